// The one place where the operators' schemas are registered; backends add their kernels per device.
//
// attention_kl_forward: softmax attention and, with a teacher, its divergence from the teacher's
// attention. Shapes as in attn_kd.attention_kl; attn_mask is expanded to [B, H, Lq, Lk]. Returns
// output, kl (empty without a teacher), lse, and teacher_lse (empty where it was given).
#include <torch/library.h>

TORCH_LIBRARY(attn_kd, m) {
  m.def(
      "attention_kl_forward(Tensor query, Tensor key, Tensor value, Tensor? teacher_query, "
      "Tensor? teacher_key, Tensor? teacher_lse, Tensor? attn_mask, float scale, float "
      "teacher_scale, "
      "str divergence) -> (Tensor output, Tensor kl, Tensor lse, Tensor teacher_lse)");
  m.def(
      "attention_kl_backward(Tensor? grad_output, Tensor? grad_kl, Tensor? grad_lse, Tensor query, "
      "Tensor key, Tensor value, Tensor? teacher_query, Tensor? teacher_key, Tensor? attn_mask, "
      "Tensor output, Tensor? kl, Tensor lse, Tensor? teacher_lse, float scale, float "
      "teacher_scale, "
      "str divergence) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
