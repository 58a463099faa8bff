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

// The active kernels' 2^x, element by element.
at::Tensor exp2(const at::Tensor& x);

}  // namespace attn_kd::cpu
