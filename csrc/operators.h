// The operators as C++ calls them: through the dispatcher, with the types of their schemas.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace attn_kd {

using OptionalTensor = std::optional<at::Tensor>;

// output, kl, lse, teacher_lse, row_state
using ForwardResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using Forward = ForwardResults(const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& teacher_query,
                               const OptionalTensor& teacher_key, const OptionalTensor& teacher_lse,
                               const OptionalTensor& attn_mask, const OptionalTensor& dropout_seed,
                               std::optional<double> scale, std::optional<double> teacher_scale,
                               std::string_view divergence, std::string_view head_reduction,
                               double dropout_p);

// grad_query, grad_key, grad_value
using BackwardResults = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

using Backward = BackwardResults(const OptionalTensor& grad_output, const OptionalTensor& grad_kl,
                                 const OptionalTensor& grad_lse, const at::Tensor& query,
                                 const at::Tensor& key, const at::Tensor& value,
                                 const OptionalTensor& teacher_query,
                                 const OptionalTensor& teacher_key, const OptionalTensor& attn_mask,
                                 const OptionalTensor& dropout_seed, const at::Tensor& output,
                                 const OptionalTensor& teacher_lse, const at::Tensor& row_state,
                                 std::optional<double> scale, std::optional<double> teacher_scale,
                                 std::string_view divergence, std::string_view head_reduction,
                                 double dropout_p);

inline const c10::TypedOperatorHandle<Forward>& forward_operator() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("attn_kd::attention_kl_forward", "")
                                 .typed<Forward>();
  return handle;
}

inline const c10::TypedOperatorHandle<Backward>& backward_operator() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("attn_kd::attention_kl_backward", "")
                                 .typed<Backward>();
  return handle;
}

}  // namespace attn_kd
