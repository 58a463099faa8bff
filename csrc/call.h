// The operator for Python, past the parsing of its schema.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace attn_kd {

// Adds `attention_kl` to the module.
void define_call(pybind11::module& m);

}  // namespace attn_kd
