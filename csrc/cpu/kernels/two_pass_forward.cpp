// Compiled once per instruction set, like kernels.cpp.
#include "two_pass_forward.h"

#include "passes.h"

namespace attn_kd::ATTN_KD_ISA {

template void two_pass_forward<float>(const cpu::ForwardProblem&, int64_t, int64_t);
template void two_pass_forward<double>(const cpu::ForwardProblem&, int64_t, int64_t);

}  // namespace attn_kd::ATTN_KD_ISA
