// Compiled once per instruction set; exports that set's kernels under a name of its own.
#include "backward.h"
#include "forward.h"

#define ATTN_KD_STRINGIFY(x) #x
#define ATTN_KD_NAME(x) ATTN_KD_STRINGIFY(x)

namespace attn_kd::ATTN_KD_ISA {

template <class T>
void exp2_array(const T* x, T* y, int64_t n) {
  alignas(64) T lanes[kLanes<T>];
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t count = n - i < kLanes<T> ? n - i : kLanes<T>;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane)
      lanes[lane] = lane < count ? x[i + lane] : T(0);
    store<T>(lanes, exp2<T>(load(lanes)));
    for (int64_t lane = 0; lane < count; ++lane) y[i + lane] = lanes[lane];
  }
}

const cpu::Kernels& kernels() {
  static constexpr cpu::Kernels table{
      ATTN_KD_NAME(ATTN_KD_ISA), forward<float>,    forward<double>,    backward<float>,
      backward<double>,          exp2_array<float>, exp2_array<double>,
  };
  return table;
}

}  // namespace attn_kd::ATTN_KD_ISA
