// Compiled once per instruction set, like kernels.cpp, and apart from it for the sake of build
// time.
#include "two_pass.h"

#include "two_pass_backward.h"
#include "two_pass_forward.h"

namespace attn_kd::ATTN_KD_ISA {

template void two_pass_forward<float>(const cpu::ForwardProblem&, int64_t, int64_t);
template void two_pass_forward<double>(const cpu::ForwardProblem&, int64_t, int64_t);
template void two_pass_backward<float>(const cpu::BackwardProblem&, int64_t, int64_t);
template void two_pass_backward<double>(const cpu::BackwardProblem&, int64_t, int64_t);

}  // namespace attn_kd::ATTN_KD_ISA
