// Conversions between storage types and the accumulation type, written so that loops over them
// vectorise on every instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../problem.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::DType;

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float widen(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent rebias by multiplication turns subnormal halves into normal floats on the way;
  // exponent 31 (inf, NaN) is widened to 255 by hand.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t bits = magnitude >= 0x7c00u ? special : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | sign);
}

inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>(x != x ? nan : rounded)};
}

inline Half to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal halves: adding 1/2 aligns the mantissa so that the addition itself rounds.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // overflows to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return {static_cast<uint16_t>(half | sign)};
}

// Calls visit(Storage{}) with the C++ type that stores `dtype`.
template <class Visitor>
inline void visit_storage(DType dtype, Visitor visit) {
  switch (dtype) {
    case DType::f32: return visit(float{});
    case DType::f64: return visit(double{});
    case DType::bf16: return visit(BFloat16{});
    case DType::f16: return visit(Half{});
    case DType::boolean: return;  // masks alone are boolean; see bias.h
  }
}

template <class S, class T>
inline S convert(T x) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return to_bfloat16(static_cast<float>(x));
  else if constexpr (std::is_same_v<S, Half>)
    return to_half(static_cast<float>(x));
  else
    return static_cast<S>(x);
}

}  // namespace attn_kd::ATTN_KD_ISA
