// Compiled once per instruction set, like kernels.cpp.
#include "forward.h"

#include "passes.h"

namespace attn_kd::ATTN_KD_ISA {

template void forward<float>(const cpu::ForwardProblem&, int64_t, int64_t);
template void forward<double>(const cpu::ForwardProblem&, int64_t, int64_t);

}  // namespace attn_kd::ATTN_KD_ISA
