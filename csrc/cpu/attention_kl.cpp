// CPU side of the operators: tensors to problems, outputs, and the split of the work over threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "dispatch.h"

namespace attn_kd::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kBool: return DType::boolean;
    default: TORCH_CHECK_TYPE(false, "attn_kd: unsupported dtype ", x.scalar_type());
  }
}

at::ScalarType accumulation_type(const Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The kernels read rows with unit stride; any other stride between rows, heads and batches is fine.
Tensor unit_last_stride(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : x.contiguous();
}

OptionalTensor unit_last_stride(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(unit_last_stride(*x)) : x;
}

// A per-row tensor [B, H, Lq] as the kernels read it.
OptionalTensor row_values(const OptionalTensor& x, const Tensor& query) {
  if (!x.has_value() || x->numel() == 0) return std::nullopt;
  TORCH_CHECK_VALUE(x->sizes() == query.sizes().slice(0, 3),
                    "attn_kd: expected a per-row tensor of shape ", query.sizes().slice(0, 3),
                    ", got ", x->sizes());
  return x->to(accumulation_type(query)).contiguous();
}

const void* data_of(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

Input input(const OptionalTensor& x) {
  if (!x.has_value()) return {};
  return {x->const_data_ptr(), dtype_of(*x), x->stride(0),
          x->stride(1),        x->stride(2), x->stride(3)};
}

Output output(const Tensor& x) {
  return {x.mutable_data_ptr(), dtype_of(x), x.stride(0), x.stride(1), x.stride(2), 1};
}

Divergence parse_divergence(std::string_view name) {
  if (name == "reverse_kl") return Divergence::reverse_kl;
  if (name == "forward_kl") return Divergence::forward_kl;
  TORCH_CHECK_VALUE(false, "attn_kd: divergence '", name, "' is unknown");
}

void check_tensor(const char* name, const Tensor& x, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(x.sizes() == expected, "attn_kd: ", name, " has shape ", x.sizes(),
                    ", expected ", expected);
  TORCH_CHECK_VALUE(x.device().is_cpu(), "attn_kd: ", name, " is on ", x.device(),
                    ", expected cpu");
  TORCH_CHECK_TYPE(dtype_of(x) != DType::boolean, "attn_kd: ", name,
                   " is boolean, expected floating point");
}

// The student's and teacher's tensors, ready to be read by the kernels.
struct Arguments {
  Tensor query, key, value;
  OptionalTensor teacher_query, teacher_key, teacher_lse, mask;

  Arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& tq,
            const OptionalTensor& tk, const OptionalTensor& t_lse,
            const OptionalTensor& attn_mask) {
    check(q, k, v, tq, tk, attn_mask);
    query = unit_last_stride(q);
    key = unit_last_stride(k);
    value = unit_last_stride(v);
    teacher_query = unit_last_stride(tq);
    teacher_key = unit_last_stride(tk);
    teacher_lse = row_values(t_lse, q);
    mask = attn_mask;
  }

  Problem problem(double scale, double teacher_scale, std::string_view divergence) const {
    Problem p;
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.query_length = query.size(2);
    p.key_length = key.size(2);
    p.head_dim = query.size(3);
    p.value_dim = value.size(3);
    p.scale = scale;
    p.query = input(query);
    p.key = input(key);
    p.value = input(value);
    p.mask = input(mask);
    if (p.query_length == 1) p.mask.row_stride = 0;  // then every mask is one of keys alone
    if (teacher_query.has_value()) {
      p.teacher_dim = teacher_query->size(3);
      p.teacher_scale = teacher_scale;
      p.divergence = parse_divergence(divergence);
      p.teacher_query = input(teacher_query);
      p.teacher_key = input(teacher_key);
    }
    return p;
  }

 private:
  static void check(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& tq,
                    const OptionalTensor& tk, const OptionalTensor& attn_mask) {
    TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                      "attn_kd: query, key and value must have 4 dimensions");
    const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), keys = k.size(2);
    check_tensor("query", q, q.sizes());
    check_tensor("key", k, {batch, heads, keys, q.size(3)});
    check_tensor("value", v, {batch, heads, keys, v.size(3)});
    TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                     "attn_kd: query, key and value must have one dtype");
    TORCH_CHECK_VALUE(tq.has_value() == tk.has_value(),
                      "attn_kd: teacher_query and teacher_key come together");
    if (tq.has_value()) {
      TORCH_CHECK_VALUE(tq->dim() == 4, "attn_kd: teacher_query must have 4 dimensions");
      check_tensor("teacher_query", *tq, {batch, heads, rows, tq->size(3)});
      check_tensor("teacher_key", *tk, {batch, heads, keys, tq->size(3)});
    }
    if (attn_mask.has_value()) {
      const std::array<int64_t, 4> expected{batch, heads, rows, keys};
      TORCH_CHECK_VALUE(attn_mask->sizes() == at::IntArrayRef(expected),
                        "attn_kd: attn_mask has shape ", attn_mask->sizes(), ", expected ",
                        at::IntArrayRef(expected));
      TORCH_CHECK_VALUE(attn_mask->device().is_cpu(), "attn_kd: attn_mask is on ",
                        attn_mask->device(), ", expected cpu");
    }
  }
};

template <class Kernel, class AnyProblem>
void run(Kernel kernel, const AnyProblem& problem, int64_t tasks) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_kl_forward(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask, double scale,
    double teacher_scale, std::string_view divergence) {
  const Arguments in(query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask);
  ForwardProblem p{in.problem(scale, teacher_scale, divergence)};
  const bool teacher = p.divergence != Divergence::none;

  const auto row_options = query.options().dtype(accumulation_type(query));
  // [B, Lq, H, Dv] in memory: what follows attention merges the heads, which is then free.
  Tensor out =
      at::empty({p.batch, p.query_length, p.heads, p.value_dim}, query.options()).transpose(1, 2);
  Tensor lse = at::empty({p.batch, p.heads, p.query_length}, row_options);
  Tensor kl = teacher ? at::empty_like(lse) : at::empty({0}, row_options);
  Tensor own_teacher_lse =
      teacher && !in.teacher_lse ? at::empty_like(lse) : at::empty({0}, row_options);
  if (lse.numel() == 0) return {out, kl, lse, own_teacher_lse};

  p.given_teacher_lse = data_of(in.teacher_lse);
  p.output = output(out);
  p.kl = kl.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  p.teacher_lse = own_teacher_lse.mutable_data_ptr();
  const bool in_double = row_options.dtype() == at::kDouble;
  const int64_t panel = in_double ? kPanel<double> : kPanel<float>;
  const int64_t panels = (p.query_length + panel - 1) / panel;
  // Four tasks a thread at least, before panels are taken together.
  p.panels_per_task = std::clamp<int64_t>(p.batch * p.heads * panels / (4 * at::get_num_threads()),
                                          1, std::min(panels, kMaxPanelsPerTask));
  const int64_t tasks_per_head = (panels + p.panels_per_task - 1) / p.panels_per_task;
  const Kernels& kernels = active_kernels();
  run(in_double ? kernels.forward_f64 : kernels.forward_f32, p, p.batch * p.heads * tasks_per_head);
  return {out, kl, lse, own_teacher_lse};
}

// Into how many key ranges a (batch, head) is split so that the threads, each of which gets an
// equal number of consecutive tasks, finish within a tenth of each other. Every range has a partial
// sum of dQ; together these stay below an eighth of a stored map, or a few MiB where that is less.
int64_t choose_key_splits(const Problem& p) {
  constexpr int64_t kFewestKeys = 48, kSmallPartials = 1 << 20;  // elements
  const int64_t heads = p.batch * p.heads, threads = at::get_num_threads();
  const int64_t partial = heads * p.query_length * p.head_dim;
  const int64_t affordable =
      std::max({int64_t{1}, p.key_length / (8 * p.head_dim), kSmallPartials / partial});
  const int64_t most =
      std::min({threads, affordable, std::max<int64_t>(1, p.key_length / kFewestKeys)});
  int64_t best = 1;
  double best_share = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t tasks = heads * splits;
    const int64_t rounds = (tasks + threads - 1) / threads;
    const double busy_share = static_cast<double>(tasks) / static_cast<double>(rounds * threads);
    if (busy_share > best_share) best = splits, best_share = busy_share;
    if (busy_share >= 0.9) break;
  }
  return best;
}

// A gradient in the memory layout of what it belongs to, as far as rows stay contiguous.
Tensor empty_grad(const Tensor& x) {
  Tensor grad = at::empty_like(x);
  return grad.stride(3) == 1 || grad.size(3) <= 1 ? grad
                                                  : at::empty_like(x, at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor, Tensor> attention_kl_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_kl,
    const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& attn_mask, const Tensor& attention_output, const OptionalTensor& kl,
    const Tensor& lse, const OptionalTensor& teacher_lse, double scale, double teacher_scale,
    std::string_view divergence) {
  // Without a gradient of the divergence this is plain attention's backward.
  const bool teacher = grad_kl.has_value() && teacher_query.has_value();
  const Arguments in(query, key, value, teacher ? teacher_query : std::nullopt,
                     teacher ? teacher_key : std::nullopt, teacher ? teacher_lse : std::nullopt,
                     attn_mask);
  BackwardProblem p{in.problem(scale, teacher_scale, divergence)};
  Tensor grad_query = empty_grad(query), grad_key = empty_grad(key), grad_value = empty_grad(value);
  if (query.numel() == 0 || key.numel() == 0)
    return {grad_query.zero_(), grad_key.zero_(), grad_value.zero_()};

  const OptionalTensor row_lse = row_values(lse, query),
                       row_kl = teacher ? row_values(kl, query) : std::nullopt;
  const OptionalTensor row_grad_kl = teacher ? row_values(grad_kl, query) : std::nullopt;
  const OptionalTensor row_grad_lse = row_values(grad_lse, query);
  TORCH_CHECK_VALUE(row_lse && (!teacher || (row_kl && in.teacher_lse)),
                    "attn_kd: lse, or kl and teacher_lse beside grad_kl, are missing");
  p.lse = data_of(row_lse);
  p.kl = data_of(row_kl);
  p.teacher_lse = data_of(in.teacher_lse);
  p.grad_kl = data_of(row_grad_kl);
  p.grad_lse = data_of(row_grad_lse);
  Tensor attention_rows, grad_output_rows;
  if (grad_output.has_value() && value.numel() > 0) {
    const std::array<int64_t, 4> shape{p.batch, p.heads, p.query_length, p.value_dim};
    check_tensor("output", attention_output, shape);
    check_tensor("grad_output", *grad_output, shape);
    attention_rows = unit_last_stride(attention_output);
    grad_output_rows = unit_last_stride(*grad_output);
    p.output = input(attention_rows);
    p.grad_output = input(grad_output_rows);
  } else {
    grad_value.zero_();
  }

  p.key_splits = choose_key_splits(p);
  const auto accumulation = accumulation_type(query);
  const bool in_place = p.key_splits == 1 && grad_query.scalar_type() == accumulation;
  const Tensor partial =
      in_place ? grad_query
               : at::empty({p.key_splits * p.batch, p.heads, p.query_length, p.head_dim},
                           query.options().dtype(accumulation));
  p.grad_query = output(partial);
  p.grad_key = output(grad_key);
  p.grad_value = output(grad_value);
  const Kernels& kernels = active_kernels();
  run(accumulation == at::kDouble ? kernels.backward_f64 : kernels.backward_f32, p,
      p.batch * p.heads * p.key_splits);
  if (!in_place)
    grad_query.copy_(
        partial.view({p.key_splits, p.batch, p.heads, p.query_length, p.head_dim}).sum(0));
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace attn_kd::cpu

TORCH_LIBRARY_IMPL(attn_kd, CPU, m) {
  m.impl("attention_kl_forward", &attn_kd::cpu::attention_kl_forward);
  m.impl("attention_kl_backward", &attn_kd::cpu::attention_kl_backward);
}
