// The CUDA kernels of the operators. This file is part of builds with CUDA alone.
#include <torch/library.h>

#include "attention_kl.h"

TORCH_LIBRARY_IMPL(attn_kd, CUDA, m) {
  m.impl("attention_kl_forward", &attn_kd::cuda::attention_kl_forward);
  m.impl("attention_kl_backward", &attn_kd::cuda::attention_kl_backward);
}
