// The Python module attn_kd._C: facts about the build and its controls. The operators themselves
// are reached through torch.ops.attn_kd, registered when this library is loaded.
#include <torch/extension.h>

#include "call.h"
#include "cpu/arguments.h"
#include "cpu/dispatch.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and controls of attn_kd's compiled kernels.";
  attn_kd::define_call(m);
  m.def(
      "instruction_set", [] { return attn_kd::cpu::active_kernels().name; },
      "Name of the instruction set whose CPU kernels are in use.");
  m.def("compiled_instruction_sets", &attn_kd::cpu::compiled_instruction_sets,
        "Names of the instruction sets this build has kernels for, the widest last.");
  m.def("supported_instruction_sets", &attn_kd::cpu::supported_instruction_sets,
        "Names of those that this machine can run, the widest last.");
  m.def("set_instruction_set", &attn_kd::cpu::set_instruction_set, py::arg("name"),
        "Use the named instruction set from now on, in all threads. Raises ValueError for one that "
        "was not compiled or that this machine cannot run.");
  m.def("divergences", &attn_kd::cpu::divergences,
        "Names of the divergences that the CPU kernels know.");
  m.def("poison_scratch", &attn_kd::cpu::poison_scratch, py::arg("poison"),
        "Whether the CPU kernels fill their scratch memory with NaN before they use it, from now "
        "on, in all threads: for tests.");
  m.def(
      "exp2", [](const at::Tensor& x) { return attn_kd::cpu::exp2(x); }, py::arg("x"),
      "The kernels' 2**x of a contiguous float32 or float64 CPU tensor, for tests of its "
      "accuracy.");
  m.def(
      "short_exp2", [](const at::Tensor& x) { return attn_kd::cpu::short_exp2(x); }, py::arg("x"),
      "The same of a float32 tensor, as passes over bfloat16 compute it, likewise.");
  m.def(
      "log2", [](const at::Tensor& x) { return attn_kd::cpu::log2(x); }, py::arg("x"),
      "The kernels' log2(x) of a contiguous float32 or float64 CPU tensor of normal numbers, "
      "likewise.");
  m.def("philox", &attn_kd::cpu::philox, py::arg("counters"), py::arg("key0"), py::arg("key1"),
        "The words [n, 4] of the kernels' Philox4x32-10 for counters [n, 4], likewise.");
  m.def(
      "features",
      [] {
        py::dict features;
        features["compiler"] = __VERSION__;
#ifdef ATTN_KD_HAVE_CUDA
        features["cuda"] = true;
#else
        features["cuda"] = false;
#endif
        return features;
      },
      "Compiler and optional parts of this build.");
}
