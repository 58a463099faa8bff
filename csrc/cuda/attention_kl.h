// The operators on CUDA tensors; arguments and results as their schemas have them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "arguments.h"

namespace attn_kd::cuda {

// output, kl, lse, teacher_lse, row_state
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_kl_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
    const OptionalTensor& dropout_seed, std::optional<double> scale,
    std::optional<double> teacher_scale, std::string_view divergence,
    std::string_view head_reduction, double dropout_p);

// grad_query, grad_key, grad_value
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_kl_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_kl,
    const OptionalTensor& grad_lse, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
    const OptionalTensor& attn_mask, const OptionalTensor& dropout_seed, const at::Tensor& output,
    const OptionalTensor& teacher_lse, const at::Tensor& row_state, std::optional<double> scale,
    std::optional<double> teacher_scale, std::string_view divergence,
    std::string_view head_reduction, double dropout_p);

}  // namespace attn_kd::cuda
