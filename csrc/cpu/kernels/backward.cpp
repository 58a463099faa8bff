// Compiled once per instruction set, like kernels.cpp.
#include "backward.h"

#include "passes.h"

namespace attn_kd::ATTN_KD_ISA {

template void backward<float>(const cpu::BackwardProblem&, int64_t, int64_t);
template void backward<double>(const cpu::BackwardProblem&, int64_t, int64_t);

}  // namespace attn_kd::ATTN_KD_ISA
