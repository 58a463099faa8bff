// SIMD vectors of the instruction set this translation unit is compiled for.
//
// Compiler vector extensions carry the arithmetic, so one source serves x86-64 and arm64; the few
// operations that they express badly are spelled out per instruction set. Nothing here includes a
// torch header: these files are compiled several times with different flags, and an inline function
// shared with the rest of the library could be linked in from the wrong copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef ATTN_KD_ISA
#error "ATTN_KD_ISA must name the instruction set, e.g. -DATTN_KD_ISA=baseline"
#endif

namespace attn_kd::ATTN_KD_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
  requires std::is_arithmetic_v<T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using vec = typename VectorOf<T>::type;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// For reading scalars in memory as vectors.
template <class T>
struct VectorInMemory {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
};

// Scratch memory is aligned to whole vectors; these are for it.
template <class T>
inline vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorInMemory<T>::type*>(p);
}

// Elements wherever a tensor has them.
template <class T>
inline vec<T> load_unaligned(const T* p) {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias, aligned(alignof(T))));
  return (vec<T>)*reinterpret_cast<const type*>(p);
}

template <class T>
inline void store(T* p, vec<T> x) {
  *reinterpret_cast<typename VectorInMemory<T>::type*>(p) = x;
}

template <class T>
inline vec<T> broadcast(T x) {
  return x - vec<T>{};
}

// max(a, b), and b where either is NaN: the order of the arguments decides what a NaN does.
template <class T>
inline vec<T> max_or_second(vec<T> a, vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<T, double>) return (vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<T, double>) return (vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}

// Whether every lane of a equals the same lane of b, as numbers do: never where one is NaN.
template <class T>
inline bool all_equal(vec<T> a, vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_cmpneq_ps_mask((__m512)a, (__m512)b) == 0;
  else
    return _mm512_cmpneq_pd_mask((__m512d)a, (__m512d)b) == 0;
#else
  const auto differs = a != b;
  for (int lane = 0; lane < kLanes<T>; ++lane)
    if (differs[lane]) return false;
  return true;
#endif
}

// Whether x exceeds the limit, which NaN does not, in any of the first `lanes` lanes.
template <class T>
inline bool any_above(vec<T> x, T limit, int64_t lanes) {
#if defined(__AVX512F__)
  const uint32_t in_use = lanes < kLanes<T> ? (1u << lanes) - 1 : 0xffffu;
  if constexpr (std::is_same_v<T, float>)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) & in_use;
  else
    return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(limit), _CMP_GT_OQ) & in_use;
#else
  bool above = false;
  for (int lane = 0; lane < kLanes<T>; ++lane) above |= lane < lanes && x[lane] > limit;
  return above;
#endif
}

}  // namespace attn_kd::ATTN_KD_ISA
