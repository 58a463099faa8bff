// Softmax attention with its divergence from a teacher's attention, on NVIDIA GPUs: what the host
// asks for. Plain data and C functions, no CUDA and no torch header.
//
// For the latency of small layers (a few hundred to a few thousand tokens): head_dim 32 or 64, the
// same for query, value and teacher; bfloat16 or float16; reverse_kl or no teacher; a mask of keys
// alone. One launch forward, one backward. Compiled for sm_80 and later, and validated by running
// the same source in an emulation of a thread block (tests/cuda); it has not been run on a GPU.
//
// Per-row values are contiguous [B, H, Lq] of float. Logarithms are natural, but for the origin.
#pragma once

#include <cstdint>

namespace attn_kd::cuda {

enum class DType : int32_t { bf16, f16, f32, boolean };

// A [B, H, L, head_dim] tensor with unit last stride, or an absent one (data == nullptr). Rows
// begin at multiples of 16 bytes. Strides count elements.
template <class Pointer>
struct View {
  Pointer data;
  int64_t batch_stride, head_stride, row_stride;
};

using Input = View<const void*>;
using Output = View<void*>;

struct KeyMask {  // [B, H, Lk], bool (true: attend) or additive; or absent
  const void* data;
  DType dtype;
  int64_t batch_stride, head_stride, key_stride;
};

struct Problem {
  int32_t batch, heads, query_length, key_length, head_dim;
  DType dtype;  // bf16 or f16
  float scale, teacher_scale;
  Input query, key, value;           // [B, H, Lq, D], [B, H, Lk, D], [B, H, Lk, D]
  Input teacher_query, teacher_key;  // [B, H, Lq, D], [B, H, Lk, D]; or absent
  KeyMask mask;
};

struct ForwardProblem {
  Problem problem;
  const float* given_teacher_lse;  // or nullptr, and it is computed
  Output output;                   // [B, H, Lq, D]
  float *kl, *lse;                 // kl: with a teacher only
  float* teacher_lse;              // written where there is a teacher and it is not given
  // What the backward pass needs to know of a row: its highest base-2 logit m, 1 / sum_j 2^(s_j -
  // m) or 0 where it sees no key, and sum_j a_j log(a_j / b_j) as measured from m and the teacher's
  // LSE: [B, H, Lq] each. The same as csrc/cpu/problem.h says.
  float *origin, *inverse_sum, *correction;
};

struct BackwardProblem {
  Problem problem;  // with a teacher only where there is a grad_kl
  Input output;
  Input grad_output;  // or absent: no gradient reaches the output
  const float *origin, *inverse_sum, *correction;
  const float *teacher_lse, *grad_kl;  // present together with the teacher
  const float* grad_lse;               // or nullptr
  Output grad_query, grad_key, grad_value;
};

}  // namespace attn_kd::cuda

// Both enqueue one kernel on `stream`, a cudaStream_t of the current device, and return a
// cudaError_t.
extern "C" int attn_kd_cuda_forward(const attn_kd::cuda::ForwardProblem* problem, void* stream);
extern "C" int attn_kd_cuda_backward(const attn_kd::cuda::BackwardProblem* problem, void* stream);
extern "C" const char* attn_kd_cuda_error_string(int error);
