// Divergences that take a second pass over the keys; see two_pass_forward.h and
// two_pass_backward.h, which two_pass.cpp compiles for float and double.
#pragma once

#include "../problem.h"

namespace attn_kd::ATTN_KD_ISA {

template <class T>
void two_pass_forward(const cpu::ForwardProblem& problem, int64_t begin, int64_t end);
template <class T>
void two_pass_backward(const cpu::BackwardProblem& problem, int64_t begin, int64_t end);

}  // namespace attn_kd::ATTN_KD_ISA
