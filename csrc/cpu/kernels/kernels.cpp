// Compiled once per instruction set; exports that set's kernels under a name of its own.
#include "divergence.h"
#include "log2.h"
#include "passes.h"
#include "philox.h"

#define ATTN_KD_STRINGIFY(x) #x
#define ATTN_KD_NAME(x) ATTN_KD_STRINGIFY(x)

namespace attn_kd::ATTN_KD_ISA {

// y[i] = Function(x[i]) by whole vectors.
template <class T, vec<T> (*Function)(vec<T>)>
void map_array(const T* x, T* y, int64_t n) {
  alignas(64) T lanes[kLanes<T>];
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t count = n - i < kLanes<T> ? n - i : kLanes<T>;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane)
      lanes[lane] = lane < count ? x[i + lane] : T(1);
    store<T>(lanes, Function(load(lanes)));
    for (int64_t lane = 0; lane < count; ++lane) y[i + lane] = lanes[lane];
  }
}

void philox_array(const uint32_t* counters, const uint32_t key[2], uint32_t* words, int64_t n) {
  const uint32_t both[2] = {key[0], key[1]};
  for (int64_t i = 0; i < n; ++i) {
    vec<uint64_t> word[4];
    for (int w = 0; w < 4; ++w) word[w] = broadcast<uint64_t>(counters[4 * i + w]);
    philox(word, both);
    for (int w = 0; w < 4; ++w)
      words[4 * i + w] = static_cast<uint32_t>(word[w][i % kLanes<uint64_t>]);
  }
}

const cpu::Kernels& kernels() {
  static constexpr cpu::Kernels table{
      .name = ATTN_KD_NAME(ATTN_KD_ISA),
      .divergences = kDivergences.entry,
      .forward_f32 = forward<float>,
      .forward_f64 = forward<double>,
      .backward_f32 = backward<float>,
      .backward_f64 = backward<double>,
      .two_pass_forward_f32 = two_pass_forward<float>,
      .two_pass_forward_f64 = two_pass_forward<double>,
      .two_pass_backward_f32 = two_pass_backward<float>,
      .two_pass_backward_f64 = two_pass_backward<double>,
      .exp2_f32 = map_array<float, exp2<float>>,
      .exp2_f64 = map_array<double, exp2<double>>,
      .short_exp2_f32 = map_array<float, exp2<float, Exp2Constants<float>::short_q>>,
      .log2_f32 = map_array<float, log2<float>>,
      .log2_f64 = map_array<double, log2<double>>,
      .philox = philox_array,
  };
  return table;
}

}  // namespace attn_kd::ATTN_KD_ISA
