// 2^x of whole vectors, for x < 127, accurate to about one unit in the last place.
//
// x = n + f with n an integer and |f| <= 1/2; 2^f = 1 + f q(f) by a minimax polynomial of the
// relative error: 2.6e-9 for float, 1.8e-17 for double. With a coefficient less it is 9.2e-8 for
// float, 1.6e-7 with what rounding adds: good enough, and cheaper, where the inputs have 8 bits.
// -inf gives 0 and NaN gives NaN.
#pragma once

#include "vec.h"

namespace attn_kd::ATTN_KD_ISA {

template <class T>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  using Bits = uint32_t;
  using SignedBits = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kLowest = -126, kHighest = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float q[] = {0.693147215f,    0.2402265278f,  0.05550310551f,
                                0.009617692973f, 0.00134066439f, 0.0001559467816f};
  static constexpr float short_q[] = {0.6931469776f, 0.2402224208f, 0.05550733744f, 0.009671512688f,
                                      0.001326472725f};
};

template <>
struct Exp2Constants<double> {
  using Bits = uint64_t;
  using SignedBits = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kLowest = -1022, kHighest = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double q[] = {
      0.693147180559945697,   0.24022650695910098,    0.0555041086647903946,
      0.00961812910760700238, 0.00133335581534399647, 0.000154035304415721303,
      1.52527273851938682e-5, 1.32154426753298221e-6, 1.01806476592341389e-7,
      7.07257041281442351e-9, 4.07807192958833667e-10};
};

template <const auto& kCoefficients, class T>
inline vec<T> exp2_fraction(vec<T> f) {
  constexpr int degree = sizeof(kCoefficients) / sizeof(T);
  vec<T> q = broadcast(kCoefficients[degree - 1]);
#pragma GCC unroll 16
  for (int i = degree - 2; i >= 0; --i) q = q * f + kCoefficients[i];
  return q * f + T(1);
}

template <class T, const auto& q = Exp2Constants<T>::q>
inline vec<T> exp2(vec<T> x) {
#if defined(__AVX512F__)
  // Into a register: with an operand in memory vrndscale waits, on Zen 4, for what its destination
  // held before, and a loop's exponentials for each other, which makes them three times as slow.
  asm("" : "+v"(x));
  // vscalef handles underflow and NaN. An infinite x leaves a NaN to be scaled by 2^x, of which
  // vscalef makes 0 or infinity.
  if constexpr (std::is_same_v<T, float>) {
    const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    return (vec<T>)_mm512_scalef_ps((__m512)exp2_fraction<q, T>(x - (vec<T>)n), n);
  } else {
    const __m512d n = _mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT);
    return (vec<T>)_mm512_scalef_pd((__m512d)exp2_fraction<q, T>(x - (vec<T>)n), n);
  }
#else
  using C = Exp2Constants<T>;
  // 2^n is built in the exponent field; results below the smallest normal number become 0.
  typedef typename C::Bits bits __attribute__((vector_size(kVectorBytes)));
  const auto underflow = x < C::kLowest;
  x = max_or_second<T>(broadcast(C::kLowest), x);
  x = -max_or_second<T>(broadcast(-C::kHighest), -x);
  const vec<T> shifted = x + C::kRound;
  const bits n = (bits)shifted - (bits)broadcast(C::kRound);
  const vec<T> fraction = exp2_fraction<q, T>(x - (shifted - C::kRound));
  const vec<T> result = (vec<T>)((bits)fraction + (n << C::kMantissaBits));
  return underflow ? vec<T>{} : (x != x ? x : result);
#endif
}

}  // namespace attn_kd::ATTN_KD_ISA
