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

// dst[key * kPanel / 2 + i] = the numbers of lanes 2i and 2i + 1 of a [keys, kPanel] tile.
inline void round_to_rows(const float* tile, int64_t keys, int64_t vectors, Pair* dst) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t key = 0; key < keys; ++key, tile += kPanel<float>, dst += kPanel<float> / 2)
    for (int64_t v = 0; v < vectors; v += 2) {
      const __m512bh both =
          _mm512_cvtne2ps_pbh((__m512)load(tile + (v + 1) * W), (__m512)load(tile + v * W));
      _mm512_store_si512(dst + v * W / 2, (__m512i)both);
    }
}

// dst[i * kPanel + lane] = the numbers of keys 2i and 2i + 1; a key beyond the last is 0. `rows` is
// what round_to_rows made.
inline void rows_to_columns(const Pair* rows, int64_t keys, int64_t vectors, Pair* dst) {
  constexpr int64_t W = kLanes<float>, kRow = kPanel<float> / 2;
  alignas(64) static constexpr auto index = [] {
    struct {
      uint16_t of[2 * W];
    } low{};
    for (int i = 0; i < W; ++i) low.of[2 * i] = i, low.of[2 * i + 1] = 2 * W + i;
    return low;
  }();
  const __m512i low = _mm512_load_si512(&index);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(W));
  for (int64_t key = 0; key < keys; key += 2, rows += 2 * kRow, dst += kPanel<float>)
    for (int64_t v = 0; v < vectors; v += 2) {
      const __m512i even = _mm512_load_si512(rows + v * W / 2);
      const __m512i odd =
          key + 1 < keys ? _mm512_load_si512(rows + kRow + v * W / 2) : _mm512_setzero_si512();
      _mm512_store_si512(dst + v * W, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(dst + (v + 1) * W, _mm512_permutex2var_epi16(even, high, odd));
    }
}

#endif

}  // namespace attn_kd::ATTN_KD_ISA
