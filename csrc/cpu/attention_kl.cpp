// CPU side of the operators: their results, and the split of the work over threads.
#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "dispatch.h"

namespace attn_kd::cpu {
namespace {

using at::Tensor;

// Allocation past the dispatcher, which would be a good part of a small call's time.
Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) { return at::cpu::empty(shape, dtype); }

// [B, H, L, width], but [B, L, H, width] in memory: what follows attention merges the heads, which
// is then free.
Tensor empty_heads_after_length(int64_t batch, int64_t heads, int64_t length, int64_t width,
                                at::ScalarType dtype) {
  const std::array strides{length * heads * width, width, heads * width, int64_t{1}};
  return at::cpu::empty_strided({batch, heads, length, width}, strides, dtype);
}

// How many of the tasks are worth waking a thread, which takes some microseconds: about ten
// microseconds of a forward pass. A row alone costs as much as a few do together.
int64_t grain_size(const Problem& p, int64_t tasks) {
  constexpr int64_t kWorthAThread = int64_t{1} << 19;  // multiplications
  const int64_t work = p.batch * p.heads * std::max<int64_t>(p.query_length, 8) * p.key_length *
                       (p.head_dim + p.value_dim + p.teacher_dim);
  return std::max<int64_t>(1, kWorthAThread * tasks / work);
}

template <class Kernel, class AnyProblem>
void run(Kernel kernel, const AnyProblem& problem, int64_t tasks) {
  if (tasks == 1) return kernel(problem, 0, 1);
  at::parallel_for(0, tasks, grain_size(problem, tasks),
                   [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

int64_t panels_of(const Problem& p, bool in_double) {
  const int64_t panel = in_double ? kPanel<double> : kPanel<float>;
  return (p.query_length + panel - 1) / panel;
}

// With so many tasks of a forward pass there is enough for every thread.
constexpr int64_t kEnoughTasks = 64;

// Into how many ranges the keys are split where `panels`, of all heads together, are few. A range
// is long enough to be worth a merge. How many threads there are plays no part, so that it does not
// change the last digits of the results.
int64_t choose_forward_splits(const ForwardProblem& p, int64_t panels) {
  constexpr int64_t kFewestKeys = 256;
  return std::max<int64_t>(1, std::min(p.key_length / kFewestKeys, kEnoughTasks / panels));
}

void run_one_pass(ForwardProblem& p, at::ScalarType accumulation) {
  const bool in_double = accumulation == at::kDouble;
  const int64_t heads = p.batch * p.heads, panels = panels_of(p, in_double);
  p.key_splits = choose_forward_splits(p, heads * panels);
  // Four tasks a thread at least, before panels are taken together.
  p.panels_per_task =
      std::clamp<int64_t>(heads * panels * p.key_splits / (4 * at::get_num_threads()), 1,
                          std::min(panels, kMaxPanelsPerTask));
  Tensor partials;
  std::array<int32_t, kEnoughTasks> arrivals{};
  if (p.key_splits > 1) {
    const int64_t panel = in_double ? kPanel<double> : kPanel<float>;
    partials =
        empty({heads * panels, p.key_splits, kRunningSums + p.value_dim, panel}, accumulation);
    p.partials = partials.mutable_data_ptr();
    p.arrivals = arrivals.data();
  }
  const int64_t blocks = heads * ((panels + p.panels_per_task - 1) / p.panels_per_task);
  const Kernels& kernels = active_kernels();
  run(in_double ? kernels.forward_f64 : kernels.forward_f32, p, blocks * p.key_splits);
}

// The per-row results of a forward pass that nobody wants.
struct UnwantedRows {
  Tensor rows;

  // Points kl at them, and with `all` the rows of everything but the teacher's LSE.
  UnwantedRows(ForwardProblem& p, bool all, at::ScalarType accumulation)
      : rows(empty({all ? 5 : 1, p.batch, p.heads, p.query_length}, accumulation)) {
    auto* data = static_cast<char*>(rows.mutable_data_ptr());
    p.kl = data;
    if (!all) return;
    const size_t bytes = rows.nbytes() / 5;
    p.lse = data + bytes;
    p.origin = data + 2 * bytes;
    p.inverse_sum = data + 3 * bytes;
    p.correction = data + 4 * bytes;
  }
};

// The teacher's LSE alone: as that of the teacher of a student without width.
void run_teacher_lse(const ForwardProblem& p, at::ScalarType accumulation) {
  ForwardProblem teacher = p;
  teacher.divergence = divergence_named("reverse_kl");
  teacher.average_heads = false;
  teacher.heads = p.teacher_heads;
  teacher.head_dim = teacher.value_dim = 0;
  teacher.query = teacher.key = teacher.value = teacher.teacher_query;
  teacher.output.dtype = teacher.query.dtype;
  teacher.dropout = {};
  const UnwantedRows unwanted(teacher, true, accumulation);
  run_one_pass(teacher, accumulation);
}

// Ordinary attention first, with the teacher's LSE where it is wanted, then the divergence.
void run_two_passes(ForwardProblem& p, at::ScalarType accumulation) {
  const bool in_double = accumulation == at::kDouble;
  const bool wants_lse = p.given_teacher_lse == nullptr, pairs = p.heads == p.teacher_heads;
  Tensor teacher_lse_rest;
  if (wants_lse) {
    teacher_lse_rest = empty({p.batch, p.teacher_heads, p.query_length}, accumulation);
    p.teacher_lse_rest = teacher_lse_rest.mutable_data_ptr();
  }
  ForwardProblem first = p;
  first.average_heads = false;
  if (wants_lse && pairs) {
    first.divergence = divergence_named("reverse_kl");
    const UnwantedRows unwanted(first, false, accumulation);
    run_one_pass(first, accumulation);
  } else {
    first.divergence = {};
    first.teacher_dim = 0;
    run_one_pass(first, accumulation);
    if (wants_lse) run_teacher_lse(p, accumulation);
  }
  const int64_t groups = p.batch * (p.average_heads ? 1 : p.heads);
  const Kernels& kernels = active_kernels();
  run(in_double ? kernels.two_pass_forward_f64 : kernels.two_pass_forward_f32, p,
      groups * panels_of(p, in_double));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_kl_forward(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
    const OptionalTensor& dropout_seed, std::optional<double> scale,
    std::optional<double> teacher_scale, std::string_view divergence,
    std::string_view head_reduction, double dropout_p) {
  TORCH_CHECK_VALUE(!teacher_lse.has_value() || teacher_lse->numel() > 0,
                    "attn_kd: teacher_lse is empty");
  const Arguments in(query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask,
                     dropout_seed, {scale, teacher_scale, divergence, head_reduction, dropout_p});
  ForwardProblem p{in.problem()};
  const bool teacher = bool{p.divergence};
  const bool computes_teacher_lse = teacher && !in.teacher_lse();

  const at::ScalarType accumulation = accumulation_type(query);
  const std::array rows{p.batch, p.heads, p.query_length};
  Tensor out =
      empty_heads_after_length(p.batch, p.heads, p.query_length, p.value_dim, query.scalar_type());
  Tensor lse = empty(rows, accumulation);
  Tensor kl = teacher ? empty(in.kl_shape(), accumulation) : empty({0}, accumulation);
  Tensor own_teacher_lse = computes_teacher_lse
                               ? empty({p.batch, p.teacher_heads, p.query_length}, accumulation)
                               : empty({0}, accumulation);
  Tensor row_state = empty({3, p.batch, p.heads, p.query_length}, accumulation);

  p.given_teacher_lse = in.teacher_lse() ? in.teacher_lse()->const_data_ptr() : nullptr;
  p.output = output(out);
  p.kl = kl.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  p.teacher_lse = own_teacher_lse.mutable_data_ptr();
  auto* state = static_cast<char*>(row_state.mutable_data_ptr());
  p.origin = state;
  p.inverse_sum = state + lse.nbytes();
  p.correction = state + 2 * lse.nbytes();
  if (p.two_pass())
    run_two_passes(p, accumulation);
  else
    run_one_pass(p, accumulation);
  return {out, kl, lse, own_teacher_lse, row_state};
}

// Into how many key ranges a group of heads, of one mostly, is split so that the threads, each of
// which gets an equal number of consecutive tasks, finish within a tenth of each other. Every range
// has a partial sum of dQ; together these stay below an eighth of a stored map, or a few MiB where
// that is less.
int64_t choose_key_splits(const Problem& p, int64_t groups) {
  constexpr int64_t kFewestKeys = 48, kSmallPartials = 1 << 20;  // elements
  const int64_t threads = at::get_num_threads();
  const int64_t partial = p.batch * p.heads * p.query_length * p.head_dim;
  const int64_t affordable =
      std::max({int64_t{1}, p.key_length / (8 * p.head_dim), kSmallPartials / partial});
  const int64_t most =
      std::min({threads, affordable, std::max<int64_t>(1, p.key_length / kFewestKeys)});
  int64_t best = 1;
  double best_share = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t tasks = groups * splits;
    const int64_t rounds = (tasks + threads - 1) / threads;
    const double busy_share = static_cast<double>(tasks) / static_cast<double>(rounds * threads);
    if (busy_share > best_share) best = splits, best_share = busy_share;
    if (busy_share >= 0.9) break;
  }
  return best;
}

// A gradient in the memory layout of what it belongs to, as far as rows stay contiguous.
Tensor empty_grad(const Tensor& x) {
  if (x.is_contiguous()) return empty(x.sizes(), x.scalar_type());
  Tensor grad = at::empty_like(x);
  return grad.stride(3) == 1 || grad.size(3) <= 1 ? grad
                                                  : at::empty_like(x, at::MemoryFormat::Contiguous);
}

// The rows' saved state and the cotangents of the per-row results, as the kernels read them.
struct BackwardRows {
  Tensor state;
  OptionalTensor grad_kl, grad_lse;

  BackwardRows(const Tensor& row_state, const OptionalTensor& grad_of_kl,
               const OptionalTensor& grad_of_lse, at::IntArrayRef kl_shape, BackwardProblem& p,
               at::ScalarType accumulation) {
    const std::array rows{p.batch, p.heads, p.query_length};
    const std::array states{int64_t{3}, p.batch, p.heads, p.query_length};
    const OptionalTensor given = row_values(row_state, states, accumulation);
    TORCH_CHECK_VALUE(given.has_value(), "attn_kd: row_state is empty");
    state = *given;
    if (p.divergence) grad_kl = row_values(grad_of_kl, kl_shape, accumulation);
    grad_lse = row_values(grad_of_lse, rows, accumulation);
    const auto* data = static_cast<const char*>(state.const_data_ptr());
    p.origin = data;
    p.inverse_sum = data + state.nbytes() / 3;
    p.correction = data + 2 * state.nbytes() / 3;
    p.grad_kl = grad_kl ? grad_kl->const_data_ptr() : nullptr;
    p.grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr;
  }
};

// Runs the kernels into grad_query, through partial sums where the keys are split between tasks.
void run_backward(BackwardProblem& p, Tensor& grad_query, at::ScalarType accumulation) {
  const int64_t groups = p.batch * (p.average_heads ? 1 : p.heads);
  p.key_splits = choose_key_splits(p, groups);
  const bool in_place = p.key_splits == 1 && grad_query.scalar_type() == accumulation;
  const Tensor partial =
      in_place ? grad_query
               : empty({p.key_splits * p.batch, p.heads, p.query_length, p.head_dim}, accumulation);
  p.grad_query = output(partial);
  const Kernels& kernels = active_kernels();
  const bool in_double = accumulation == at::kDouble;
  if (p.two_pass())
    run(in_double ? kernels.two_pass_backward_f64 : kernels.two_pass_backward_f32, p,
        groups * p.key_splits);
  else
    run(in_double ? kernels.backward_f64 : kernels.backward_f32, p, groups * p.key_splits);
  if (in_place) return;
  const Tensor parts = partial.view({p.key_splits, p.batch, p.heads, p.query_length, p.head_dim});
  grad_query.copy_(p.key_splits == 1 ? parts[0] : parts.sum(0));
}

std::tuple<Tensor, Tensor, Tensor> attention_kl_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_kl,
    const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& attn_mask, const OptionalTensor& dropout_seed,
    const Tensor& attention_output, const OptionalTensor& teacher_lse, const Tensor& row_state,
    std::optional<double> scale, std::optional<double> teacher_scale, std::string_view divergence,
    std::string_view head_reduction, double dropout_p) {
  // Without a gradient of the divergence this is plain attention's backward.
  const bool teacher = grad_kl.has_value() && teacher_query.has_value();
  const Arguments in(query, key, value, teacher ? teacher_query : std::nullopt,
                     teacher ? teacher_key : std::nullopt, teacher ? teacher_lse : std::nullopt,
                     attn_mask, dropout_seed,
                     {scale, teacher_scale, divergence, head_reduction, dropout_p});
  BackwardProblem p{in.problem()};
  TORCH_CHECK_VALUE(!teacher || in.teacher_lse(), "attn_kd: teacher_lse is missing beside grad_kl");
  p.teacher_lse = in.teacher_lse() ? in.teacher_lse()->const_data_ptr() : nullptr;
  const at::ScalarType accumulation = accumulation_type(query);
  const BackwardRows rows(row_state, grad_kl, grad_lse, in.kl_shape(), p, accumulation);

  Tensor grad_query = empty_grad(query), grad_key = empty_grad(key), grad_value = empty_grad(value);
  Tensor attention_rows, grad_output_rows;
  if (grad_output.has_value() && p.value_dim > 0) {
    const std::array shape{p.batch, p.heads, p.query_length, p.value_dim};
    check_tensor("output", attention_output, shape);
    check_tensor("grad_output", *grad_output, shape);
    attention_rows = unit_last_stride(attention_output);
    grad_output_rows = unit_last_stride(*grad_output);
    p.output = input(attention_rows);
    p.grad_output = input(grad_output_rows);
  } else {
    grad_value.zero_();
  }
  p.grad_key = output(grad_key);
  p.grad_value = output(grad_value);
  run_backward(p, grad_query, accumulation);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace attn_kd::cpu

TORCH_LIBRARY_IMPL(attn_kd, CPU, m) {
  m.impl("attention_kl_forward", &attn_kd::cpu::attention_kl_forward);
  m.impl("attention_kl_backward", &attn_kd::cpu::attention_kl_backward);
}
