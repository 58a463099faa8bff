// Autocast: the student's tensors are cast as those of scaled_dot_product_attention are. The
// teacher's stay as they are, and so does everything that is computed from the logits: it is wide
// in every kernel.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "operators.h"

namespace attn_kd {
namespace {

using at::Tensor;

template <c10::DeviceType kDevice>
ForwardResults forward(const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
                       const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
                       const OptionalTensor& dropout_seed, std::optional<double> scale,
                       std::optional<double> teacher_scale, std::string_view divergence,
                       std::string_view head_reduction, double dropout_p) {
  const c10::impl::ExcludeDispatchKeyGuard guard(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const Tensor& x) { return at::autocast::cached_cast(dtype, x, kDevice); };
  return forward_operator().call(cast(query), cast(key), cast(value), teacher_query, teacher_key,
                                 teacher_lse, attn_mask, dropout_seed, scale, teacher_scale,
                                 divergence, head_reduction, dropout_p);
}

}  // namespace
}  // namespace attn_kd

TORCH_LIBRARY_IMPL(attn_kd, AutocastCPU, m) {
  m.impl("attention_kl_forward", &attn_kd::forward<at::kCPU>);
}

TORCH_LIBRARY_IMPL(attn_kd, AutocastCUDA, m) {
  m.impl("attention_kl_forward", &attn_kd::forward<at::kCUDA>);
}
