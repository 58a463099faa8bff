// The passes that kernels.cpp lists, each compiled for float and double in a file of its own, apart
// for the sake of build time.
#pragma once

#include "../problem.h"

namespace attn_kd::ATTN_KD_ISA {

template <class T>
void forward(const cpu::ForwardProblem& problem, int64_t begin, int64_t end);
template <class T>
void backward(const cpu::BackwardProblem& problem, int64_t begin, int64_t end);
template <class T>
void two_pass_forward(const cpu::ForwardProblem& problem, int64_t begin, int64_t end);
template <class T>
void two_pass_backward(const cpu::BackwardProblem& problem, int64_t begin, int64_t end);

}  // namespace attn_kd::ATTN_KD_ISA
