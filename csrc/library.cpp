// The one place where the operators' schemas are registered; backends add their kernels per device.
//
// attention_kl_forward: softmax attention and, with a teacher, its divergence from the teacher's
// attention. Shapes as in attn_kd.attention_kl; attn_mask broadcasts to [B, H, Lq, Lk];
// teacher_key may have G * Lk tokens, G in a row to a key; dropout_seed is int64 [2], a seed and an
// offset, given where dropout_p > 0. Returns output, kl (empty without a teacher), lse, teacher_lse
// [B, Ht, Lq] (empty where it was given), and row_state [3, B, H, Lq]: what backward needs to know
// of every row (see cpu/problem.h).
#include <torch/library.h>

TORCH_LIBRARY(attn_kd, m) {
  m.def(
      "attention_kl_forward(Tensor query, Tensor key, Tensor value, Tensor? teacher_query, "
      "Tensor? teacher_key, Tensor? teacher_lse, Tensor? attn_mask, Tensor? dropout_seed, "
      "float? scale, float? teacher_scale, str divergence, str head_reduction, float dropout_p) -> "
      "(Tensor output, Tensor kl, Tensor lse, Tensor teacher_lse, Tensor row_state)");
  m.def(
      "attention_kl_backward(Tensor? grad_output, Tensor? grad_kl, Tensor? grad_lse, "
      "Tensor query, Tensor key, Tensor value, Tensor? teacher_query, Tensor? teacher_key, "
      "Tensor? attn_mask, Tensor? dropout_seed, Tensor output, Tensor? teacher_lse, "
      "Tensor row_state, float? scale, float? teacher_scale, str divergence, str head_reduction, "
      "float dropout_p) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
