// Choice of the CPU kernels at run time: the widest instruction set that was compiled and that the
// machine can run, unless another one is forced.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "problem.h"

namespace attn_kd::cpu {

const Kernels& active_kernels();
std::vector<std::string> compiled_instruction_sets();
std::vector<std::string> supported_instruction_sets();
void set_instruction_set(const std::string& name);  // throws std::invalid_argument

// The active kernels' 2^x and log2 x, element by element.
at::Tensor exp2(const at::Tensor& x);
at::Tensor short_exp2(const at::Tensor& x);
at::Tensor log2(const at::Tensor& x);
// The active kernels' Philox4x32-10: four words [n, 4] for counters [n, 4] and a key of two words,
// 32-bit numbers in int64 tensors.
at::Tensor philox(const at::Tensor& counters, uint32_t key0, uint32_t key1);

}  // namespace attn_kd::cpu
