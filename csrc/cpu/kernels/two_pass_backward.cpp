// Compiled once per instruction set, like kernels.cpp.
#include "two_pass_backward.h"

#include "passes.h"

namespace attn_kd::ATTN_KD_ISA {

template void two_pass_backward<float>(const cpu::BackwardProblem&, int64_t, int64_t);
template void two_pass_backward<double>(const cpu::BackwardProblem&, int64_t, int64_t);

}  // namespace attn_kd::ATTN_KD_ISA
