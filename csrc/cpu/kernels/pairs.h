// Pairs of bfloat16 numbers, which the dot-product instructions of AVX512-BF16 multiply two at a
// time and add up in float: how they are made of tensors' rows and of tiles of floats.
#pragma once

#include <cstring>

#include "gemm.h"
#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

#if defined(__AVX512BF16__)

inline Pair* take_pairs(Scratch<float>& scratch, int64_t count) {
  return count ? reinterpret_cast<Pair*>(scratch.take(count)) : nullptr;
}

inline Pair pair(BFloat16 first, BFloat16 second) {
  return {first.bits | uint32_t{second.bits} << 16};
}

// Whether every row of x begins at a pair, and none lies so far from the next that few rows fit the
// L1 cache together.
inline bool pairs_in_place(const Input& x, int64_t width) {
  const int64_t odd = (x.batch_stride | x.head_stride | x.row_stride | width) & 1;
  return !odd && reinterpret_cast<uintptr_t>(x.data) % sizeof(Pair) == 0 &&
         x.row_stride <= 2 * width;
}

inline Rows<BFloat16> bfloat16_rows(const Input& x, int64_t b, int64_t h, int64_t first) {
  return {static_cast<const BFloat16*>(x.data) + x.offset(b, h, first), x.row_stride};
}

// dst[row * ld + j] = (src[row, 2j], src[row, 2j + 1]); an odd width is filled up with 0.
inline void copy_pairs(Rows<BFloat16> src, int64_t rows, int64_t width, Pair* dst, int64_t ld) {
  for (int64_t row = 0; row < rows; ++row, dst += ld) {
    const BFloat16* numbers = src.data + row * src.ld;
    std::memcpy(dst, numbers, static_cast<size_t>(width / 2) * sizeof(Pair));
    if (width % 2) dst[width / 2] = pair(numbers[width - 1], BFloat16{0});
  }
}

// dst[i * ld + column] = (src[2i, column], src[2i + 1, column]); a row beyond the last is 0, and so
// are columns up to ld.
inline void interleave_rows(Rows<BFloat16> src, int64_t rows, int64_t width, Pair* dst,
                            int64_t ld) {
  constexpr int64_t kBlock = kLanes<float>;  // of known length, which vectorises without checks
  for (int64_t row = 0; row < rows; row += 2, dst += ld) {
    const BFloat16* __restrict even = src.data + row * src.ld;
    const BFloat16* __restrict odd = even + src.ld;
    Pair* __restrict pairs = dst;
    int64_t j = 0;
    if (row + 1 < rows) {
      for (; j + kBlock <= width; j += kBlock)
        for (int64_t i = j; i < j + kBlock; ++i) pairs[i] = pair(even[i], odd[i]);
      for (; j < width; ++j) pairs[j] = pair(even[j], odd[j]);
    }
    for (; j < width; ++j) pairs[j] = pair(even[j], BFloat16{0});
    for (; j < ld; ++j) pairs[j].bits = 0;
  }
}

// Zeroes one of the rows that interleave_rows made, which shares its pairs with another.
inline void clear_interleaved_row(Pair* pairs, int64_t ld, int64_t row, int64_t width) {
  const uint32_t other_row = row % 2 ? 0x0000ffffu : 0xffff0000u;
  for (int64_t j = 0; j < width; ++j) pairs[row / 2 * ld + j].bits &= other_row;
}

// panel[j * kPanel + row] = (src[row, 2j], src[row, 2j + 1]), one row a lane; lanes from `rows` up
// to the next whole vector become 0.
inline void transpose_pairs_to_panel(Rows<BFloat16> src, int64_t rows, int64_t width,
                                     Pair* rows_copy, Pair* panel) {
  const int64_t pairs = ceil_div(width, 2);
  copy_pairs(src, rows, width, rows_copy, pairs);
  // Moved as if they were floats, which changes no bit.
  transpose_to_panel(
      Rows<float>{reinterpret_cast<const float*>(rows_copy), pairs}, rows, pairs,
      [](auto x) { return x; }, reinterpret_cast<float*>(panel));
}

// One vector of lanes of a [keys, kPanel] tile, as a place for numbers that products will read.
// They are rounded on their way, two keys at a time.
//
// A left operand is summed over the lanes: left[key * kPanel / 2 + i] is the pair of lanes 2i and
// 2i + 1. A right one is summed over the keys: right[i * kPanel + lane] is the pair of keys 2i and
// 2i + 1, and a key beyond the last is 0.
template <Side kSide>
struct RoundedLanes {
  Pair *left, *right;

  void put(int64_t key, vec<float> x) const {
    const __m512i two_keys = round(x, vec<float>{});
    if constexpr (kSide != Side::right) put_left(key, _mm512_castsi512_si256(two_keys));
    if constexpr (kSide != Side::left) put_right(key, two_keys);
  }
  void put(int64_t key, vec<float> x, vec<float> next) const {
    const __m512i two_keys = round(x, next);
    if constexpr (kSide != Side::right) {
      put_left(key, _mm512_castsi512_si256(two_keys));
      put_left(key + 1, _mm512_extracti64x4_epi64(two_keys, 1));
    }
    if constexpr (kSide != Side::left) put_right(key, two_keys);
  }

  // sum + x + next, both rounded as `put` does.
  static vec<float> add(vec<float> sum, vec<float> x, vec<float> next) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    return (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)in_pairs(round(x, next)),
                                        (__m512bh)ones);
  }

 private:
  static __m512i round(vec<float> key, vec<float> next) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)key);
  }
  void put_left(int64_t key, __m256i lanes) const {
    _mm256_store_si256(reinterpret_cast<__m256i*>(left + key * kPanel<float> / 2), lanes);
  }
  // The numbers of two keys, one after the other, as pairs of one lane.
  static __m512i in_pairs(__m512i two_keys) {
    constexpr int W = kLanes<float>;
    alignas(64) static constexpr auto alternating = [] {
      struct {
        uint16_t of[2 * W];
      } index{};
      for (int i = 0; i < W; ++i) index.of[2 * i] = i, index.of[2 * i + 1] = W + i;
      return index;
    }();
    return _mm512_permutexvar_epi16(_mm512_load_si512(&alternating), two_keys);
  }
  void put_right(int64_t key, __m512i two_keys) const {
    _mm512_store_si512(right + key / 2 * kPanel<float>, in_pairs(two_keys));
  }
};

// A [keys, kPanel] tile of floats, rounded to be an operand.
template <Side kSide>
class RoundedTile {
 public:
  RoundedTile(Scratch<float>& scratch, int64_t keys)
      : left_(take_pairs(scratch, kSide == Side::right ? 0 : keys * kPanel<float> / 2)),
        right_(take_pairs(scratch, kSide == Side::left ? 0 : ceil_div(keys, 2) * kPanel<float>)) {}

  RoundedLanes<kSide> lanes(float*, int64_t lane) const {
    return {left_ + lane / 2, right_ + lane};
  }
  Left<Pair> left(const float*) const { return {left_, kPanel<float> / 2}; }
  const Pair* right(const float*) const { return right_; }

 private:
  Pair *left_, *right_;
};

#endif

}  // namespace attn_kd::ATTN_KD_ISA
