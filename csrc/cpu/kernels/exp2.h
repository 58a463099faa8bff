// 2^x of whole vectors, for x <= 0 up to rounding, accurate to about one unit in the last place.
//
// x = n + f with n an integer and |f| <= 1/2; 2^f = 1 + f q(f) by a minimax polynomial of the
// relative error (Remez exchange): 2.6e-9 for float, 1.8e-17 for double. -inf gives 0 and NaN gives
// NaN.
#pragma once

#include "vec.h"

namespace attn_kd::ATTN_KD_ISA {

template <class T>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  using Bits = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kLowest = -126, kHighest = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float q[] = {0.693147215f,    0.2402265278f,  0.05550310551f,
                                0.009617692973f, 0.00134066439f, 0.0001559467816f};
};

template <>
struct Exp2Constants<double> {
  using Bits = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kLowest = -1022, kHighest = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double q[] = {
      0.693147180559945697,   0.24022650695910098,    0.0555041086647903946,
      0.00961812910760700238, 0.00133335581534399647, 0.000154035304415721303,
      1.52527273851938682e-5, 1.32154426753298221e-6, 1.01806476592341389e-7,
      7.07257041281442351e-9, 4.07807192958833667e-10};
};

template <class T>
inline vec<T> exp2_fraction(vec<T> f) {
  using C = Exp2Constants<T>;
  constexpr int degree = sizeof(C::q) / sizeof(T);
  vec<T> q = broadcast(C::q[degree - 1]);
#pragma GCC unroll 16
  for (int i = degree - 2; i >= 0; --i) q = q * f + C::q[i];
  return q * f + T(1);
}

#if defined(__AVX512F__)
// With 16 values of 2^(j/16) in one register, x = n + j/16 + r leaves |r| <= 1/32, and a polynomial
// of half the degree does: the multiplications are what the kernels' sweeps are limited by.
inline vec<float> exp2_by_table(vec<float> x) {
  const __m512 table =
      _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                     1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                     1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  // Adding 1.5 * 2^19 rounds to sixteenths, and leaves j in the last four bits.
  const vec<float> rounder = broadcast(786432.0f);
  x = max_or_second<float>(broadcast(-200.0f), x);  // -inf has no remainder
  const vec<float> shifted = x + rounder, sixteenths = shifted - rounder;
  const vec<float> r = x - sixteenths;
  const vec<float> power = (vec<float>)_mm512_permutexvar_ps((__m512i)shifted, table);
  const vec<float> q = (r * 0.0555041f + 0.240226507f) * r + 0.693147181f;
  return (vec<float>)_mm512_scalef_ps((__m512)(power * r * q + power), (__m512)sixteenths);
}
#endif

template <class T>
inline vec<T> exp2(vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return exp2_by_table(x);
  } else {
    // vreduce leaves x - round(x), and 0 for an infinite x; vscalef handles underflow and NaN.
    const __m512d fraction = _mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT);
    const __m512d n = _mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT);
    return (vec<T>)_mm512_scalef_pd((__m512d)exp2_fraction<T>((vec<T>)fraction), n);
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
  const vec<T> fraction = exp2_fraction<T>(x - (shifted - C::kRound));
  const vec<T> result = (vec<T>)((bits)fraction + (n << C::kMantissaBits));
  return underflow ? vec<T>{} : (x != x ? x : result);
#endif
}

}  // namespace attn_kd::ATTN_KD_ISA
