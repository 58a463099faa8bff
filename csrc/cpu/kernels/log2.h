// log2(x) of whole vectors, for normal x > 0, accurate to about two units in the last place, also
// where x is near 1 and its logarithm near 0. An infinite x and NaN give NaN.
//
// x = 2^e m with m between sqrt(1/2) and sqrt(2); with s = (m - 1) / (m + 1), log2 m =
// 2 atanh(s) / ln 2 = s q(s^2), q a minimax polynomial of the relative error (Remez exchange):
// 6.9e-10 for float, 1.2e-18 for double.
#pragma once

#include "exp2.h"

namespace attn_kd::ATTN_KD_ISA {

template <class T>
struct Log2Constants;

template <>
struct Log2Constants<float> {
  static constexpr float q[] = {2.88539008f, 0.9617988483f, 0.5767143108f, 0.4317378779f};
};

template <>
struct Log2Constants<double> {
  static constexpr double q[] = {2.88539008177792681,  0.961796693925989831, 0.577078016345463937,
                                 0.412198585852491507, 0.320598533777302763, 0.26233440973280468,
                                 0.220911655308573237, 0.213672974191430373};
};

template <class T>
inline vec<T> log2(vec<T> x) {
  using C = Exp2Constants<T>;
  typedef typename C::Bits bits __attribute__((vector_size(kVectorBytes)));
  typedef typename C::SignedBits signed_bits __attribute__((vector_size(kVectorBytes)));
  constexpr T kSqrtHalf = T(0.70710678118654752440);
  const bits above = (bits)x - (bits)broadcast(kSqrtHalf);
  const bits exponent = (bits)((signed_bits)above >> C::kMantissaBits);
  const vec<T> mantissa = (vec<T>)((bits)x - (exponent << C::kMantissaBits));
  // The integer becomes a float in the mantissa of 1.5 * 2^kMantissaBits.
  const vec<T> whole = (vec<T>)(exponent + (bits)broadcast(C::kRound)) - C::kRound;

  const vec<T> s = (mantissa - T(1)) / (mantissa + T(1)), square = s * s;
  constexpr int terms = sizeof(Log2Constants<T>::q) / sizeof(T);
  vec<T> q = broadcast(Log2Constants<T>::q[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) q = q * square + Log2Constants<T>::q[i];
  return whole + s * q + (x - x);  // the last is NaN for what is not finite, else 0
}

}  // namespace attn_kd::ATTN_KD_ISA
