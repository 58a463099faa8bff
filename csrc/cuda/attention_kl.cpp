// CUDA side of the operators: their results, and the launches. Uses nothing of torch that knows
// CUDA, so that it compiles beside a torch without.
#include "attention_kl.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>

#include <array>

#include "stream.h"

namespace attn_kd::cuda {
namespace {

using at::Tensor;

// [B, H, L, D], but [B, L, H, D] in memory: what follows attention merges the heads, which is then
// free.
Tensor empty_heads_after_length(const Tensor& like) {
  const auto [b, h, l, d] = std::tuple(like.size(0), like.size(1), like.size(2), like.size(3));
  return at::empty_strided({b, h, l, d}, {l * h * d, d, h * d, 1}, like.options());
}

// A gradient in the memory layout of what it belongs to, as far as rows stay contiguous.
Tensor empty_grad(const Tensor& x) {
  Tensor grad = at::empty_like(x);
  return grad.stride(3) == 1 ? grad : at::empty_like(x, at::MemoryFormat::Contiguous);
}

float* rows_of(const Tensor& x) { return x.numel() > 0 ? x.mutable_data_ptr<float>() : nullptr; }

const float* rows_of(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr<float>() : nullptr;
}

void check_launch(int error) {
  TORCH_CHECK(error == 0,
              "attn_kd: the CUDA kernel was not launched: ", attn_kd_cuda_error_string(error));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_kl_forward(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
    const OptionalTensor& /*dropout_seed*/, std::optional<double> scale,
    std::optional<double> teacher_scale, std::string_view divergence,
    std::string_view head_reduction, double dropout_p) {
  const c10::DeviceGuard guard(query.device());
  TORCH_CHECK_VALUE(!teacher_lse.has_value() || teacher_lse->numel() > 0,
                    "attn_kd: teacher_lse is empty");
  const Arguments in(query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask,
                     {scale, teacher_scale, divergence, head_reduction, dropout_p});
  const auto rows = query.sizes().slice(0, 3);
  const auto options = query.options().dtype(at::kFloat);
  const auto rows_if = [&](bool wanted) {
    return wanted ? at::empty(rows, options) : at::empty({0}, options);
  };
  Tensor out = empty_heads_after_length(query);
  Tensor lse = at::empty(rows, options);
  Tensor kl = rows_if(in.has_teacher());
  Tensor own_teacher_lse = rows_if(in.has_teacher() && !in.teacher_lse());
  Tensor row_state = at::empty({3, rows[0], rows[1], rows[2]}, options);
  auto* state = row_state.mutable_data_ptr<float>();
  const int64_t count = lse.numel();
  const ForwardProblem problem{
      in.problem(),     rows_of(in.teacher_lse()), output(out), rows_of(kl),
      rows_of(lse),     rows_of(own_teacher_lse),  state,       state + count,
      state + 2 * count};
  check_launch(attn_kd_cuda_forward(&problem, current_stream(query.device())));
  return {out, kl, lse, own_teacher_lse, row_state};
}

std::tuple<Tensor, Tensor, Tensor> attention_kl_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_kl,
    const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& attn_mask, const OptionalTensor& /*dropout_seed*/,
    const Tensor& attention_output, const OptionalTensor& teacher_lse, const Tensor& row_state,
    std::optional<double> scale, std::optional<double> teacher_scale, std::string_view divergence,
    std::string_view head_reduction, double dropout_p) {
  const c10::DeviceGuard guard(query.device());
  // Without a gradient of the divergence this is plain attention's backward.
  const bool teacher = is_given(grad_kl) && teacher_query.has_value();
  const Arguments in(query, key, value, teacher ? teacher_query : std::nullopt,
                     teacher ? teacher_key : std::nullopt, teacher ? teacher_lse : std::nullopt,
                     attn_mask, {scale, teacher_scale, divergence, head_reduction, dropout_p});
  TORCH_CHECK_VALUE(!teacher || in.teacher_lse(), "attn_kd: teacher_lse is missing beside grad_kl");
  const auto rows = query.sizes().slice(0, 3);
  const OptionalTensor state =
      row_values("row_state", row_state, std::array{int64_t{3}, rows[0], rows[1], rows[2]}, query);
  TORCH_CHECK_VALUE(state.has_value(), "attn_kd: row_state is empty");
  const OptionalTensor of_kl =
      teacher ? row_values("grad_kl", grad_kl, rows, query) : OptionalTensor();
  const OptionalTensor of_lse = row_values("grad_lse", grad_lse, rows, query);
  Tensor attention_rows, grad_output_rows;
  Input of_attention{}, of_output{};
  if (grad_output.has_value()) {
    check_tensor("output", attention_output, query.sizes(), query);
    check_tensor("grad_output", *grad_output, query.sizes(), query);
    attention_rows = aligned_rows(attention_output);
    grad_output_rows = aligned_rows(*grad_output);
    of_attention = input(attention_rows);
    of_output = input(grad_output_rows);
  }
  Tensor grad_query = empty_grad(query), grad_key = empty_grad(key), grad_value = empty_grad(value);
  const float* origin = rows_of(state);
  const int64_t count = state->numel() / 3;
  const BackwardProblem problem{in.problem(),
                                of_attention,
                                of_output,
                                origin,
                                origin + count,
                                origin + 2 * count,
                                rows_of(in.teacher_lse()),
                                rows_of(of_kl),
                                rows_of(of_lse),
                                output(grad_query),
                                output(grad_key),
                                output(grad_value)};
  check_launch(attn_kd_cuda_backward(&problem, current_stream(query.device())));
  return {grad_query, grad_key, grad_value};
}

}  // namespace attn_kd::cuda
