// The host code of csrc/cuda on CPU tensors and the emulated GPU, as torch.ops.attn_kd_emulated.
#include <torch/library.h>

// Together with what they register, so that torch's headers are read once.
#include "csrc/cuda/arguments.cpp"
#include "csrc/cuda/attention_kl.cpp"

namespace attn_kd::cuda {

// Of no stream, but to be recognised.
void* current_stream(c10::Device) { return reinterpret_cast<void*>(0x100); }

}  // namespace attn_kd::cuda

TORCH_LIBRARY(attn_kd_emulated, m) {
  m.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? teacher_query, Tensor? teacher_key, "
      "Tensor? teacher_lse, Tensor? attn_mask, Tensor? dropout_seed, float? scale, "
      "float? teacher_scale, str divergence, str head_reduction, float dropout_p) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward(Tensor? grad_output, Tensor? grad_kl, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor? teacher_query, Tensor? teacher_key, Tensor? attn_mask, "
      "Tensor? dropout_seed, Tensor output, Tensor? teacher_lse, Tensor row_state, float? scale, "
      "float? teacher_scale, str divergence, str head_reduction, float dropout_p) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attn_kd_emulated, CPU, m) {
  m.impl("forward", &attn_kd::cuda::attention_kl_forward);
  m.impl("backward", &attn_kd::cuda::attention_kl_backward);
}
