#include "dispatch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace attn_kd {

namespace baseline {
const cpu::Kernels& kernels();
}
#ifdef ATTN_KD_HAVE_AVX2
namespace avx2 {
const cpu::Kernels& kernels();
}
#endif
#ifdef ATTN_KD_HAVE_AVX512
namespace avx512 {
const cpu::Kernels& kernels();
}
#endif

#ifdef ATTN_KD_HAVE_AVX512_BF16
namespace avx512_bf16 {
const cpu::Kernels& kernels();
}
#endif

namespace cpu {
namespace {

struct InstructionSet {
  const Kernels* kernels;
  bool supported;
};

// Narrowest first.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets{{&baseline::kernels(), true}};
#ifdef ATTN_KD_HAVE_AVX2
  sets.push_back({&avx2::kernels(), __builtin_cpu_supports("avx2") &&
                                        __builtin_cpu_supports("fma") &&
                                        __builtin_cpu_supports("f16c")});
#endif
#ifdef ATTN_KD_HAVE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  sets.push_back({&avx512::kernels(), avx512});
#endif
#ifdef ATTN_KD_HAVE_AVX512_BF16
  sets.push_back({&avx512_bf16::kernels(), avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
  return sets;
}

const Kernels* widest_supported() {
  const Kernels* widest = nullptr;
  for (const auto& set : instruction_sets())
    if (set.supported) widest = set.kernels;
  return widest;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{widest_supported()};
  return kernels;
}

std::vector<std::string> names(bool supported_only) {
  std::vector<std::string> names;
  for (const auto& set : instruction_sets())
    if (set.supported || !supported_only) names.emplace_back(set.kernels->name);
  return names;
}

at::Tensor map(const at::Tensor& x, Kernels::Map<float> map_f32, Kernels::Map<double> map_f64) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.is_contiguous(), "expected a contiguous CPU tensor");
  at::Tensor y = at::empty_like(x);
  if (x.scalar_type() == at::kFloat)
    map_f32(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel());
  else if (x.scalar_type() == at::kDouble)
    map_f64(x.const_data_ptr<double>(), y.mutable_data_ptr<double>(), x.numel());
  else
    TORCH_CHECK_TYPE(false, "expected float32 or float64, got ", x.scalar_type());
  return y;
}

}  // namespace

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> compiled_instruction_sets() { return names(false); }
std::vector<std::string> supported_instruction_sets() { return names(true); }

void set_instruction_set(const std::string& name) {
  for (const auto& set : instruction_sets()) {
    if (name != set.kernels->name) continue;
    if (!set.supported)
      throw std::invalid_argument("this machine cannot run instruction set '" + name + "'");
    active().store(set.kernels, std::memory_order_relaxed);
    return;
  }
  std::string message = "instruction set '" + name + "' was not compiled; expected one of";
  for (const auto& known : names(false)) message += " '" + known + "'";
  throw std::invalid_argument(message);
}

at::Tensor exp2(const at::Tensor& x) {
  return map(x, active_kernels().exp2_f32, active_kernels().exp2_f64);
}

at::Tensor short_exp2(const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "expected float32, got ", x.scalar_type());
  return map(x, active_kernels().short_exp2_f32, nullptr);
}

at::Tensor log2(const at::Tensor& x) {
  return map(x, active_kernels().log2_f32, active_kernels().log2_f64);
}

at::Tensor philox(const at::Tensor& counters, uint32_t key0, uint32_t key1) {
  TORCH_CHECK_VALUE(counters.dim() == 2 && counters.size(1) == 4 && counters.device().is_cpu(),
                    "expected counters of shape [n, 4] on cpu, got ", counters.sizes());
  const at::Tensor wide = counters.to(at::kLong).contiguous();
  std::vector<uint32_t> narrow(wide.numel()), words(wide.numel());
  const auto* first = wide.const_data_ptr<int64_t>();
  std::transform(first, first + wide.numel(), narrow.begin(),
                 [](int64_t word) { return static_cast<uint32_t>(word); });
  const uint32_t key[2] = {key0, key1};
  active_kernels().philox(narrow.data(), key, words.data(), wide.size(0));
  at::Tensor result = at::empty_like(wide);
  std::copy(words.begin(), words.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

}  // namespace cpu
}  // namespace attn_kd
