// The one matrix product of the library: C[M, N] (+)= A[M, K] · B[K, N].
//
// B and C lie in scratch memory, whole vectors along N; A is read one number, or pair of bfloat16
// numbers, at a time and broadcast, so it may lie anywhere, either way round. Every product of the
// fused operator is brought into this form without transposing a tile (see forward.h and
// backward.h), which leaves a single micro-kernel to tune.
#pragma once

#include <utility>

#include "vec.h"

namespace attn_kd::ATTN_KD_ISA {

// Vectors along N of one micro-kernel call. The accumulators of a call must fit the register file
// beside the row of B and one broadcast scalar: 32 registers on AVX-512 and arm64, else 16. With
// AVX-512 twelve are enough to hide the latency of a multiplication; the stores of more, one after
// another, hold up the multiplications of the next call (on Zen 4, 3 % of a product of depth 32).
// Cores of arm64 that multiply four vectors at a time need more of them.
#if defined(__AVX512F__)
inline constexpr int kMaxVectors = 4;
constexpr int rows_per_call(int vectors) { return 12 / vectors; }
#elif defined(__aarch64__)
inline constexpr int kMaxVectors = 4;
constexpr int rows_per_call(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
inline constexpr int kMaxVectors = 2;
constexpr int rows_per_call(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

// What becomes of a product: it is added to C, or to one row of numbers, the same for every row of
// C; the last two multiply it by a factor first. An addition costs less than nothing: it has units
// of its own, and the store after it hinders the next call less (on Zen 4, 5 % of a bfloat16
// product of depth 32 less). The factor takes the units of the product itself, 6 % of that product.
enum class Sum { onto, plus_row, scaled_onto, scaled_plus_row };

constexpr bool is_scaled(Sum sum) { return sum == Sum::scaled_onto || sum == Sum::scaled_plus_row; }
constexpr bool adds_onto(Sum sum) { return sum == Sum::onto || sum == Sum::scaled_onto; }
constexpr bool adds_row(Sum sum) { return sum == Sum::plus_row || sum == Sum::scaled_plus_row; }
// What the further terms of the product are, where its first ones have been `sum`.
constexpr Sum continued(Sum sum) { return is_scaled(sum) ? Sum::scaled_onto : Sum::onto; }

template <class T>
struct Epilogue {
  const T* row = nullptr;  // the row that is added
  T factor = 1;
};

// A, one way round or the other: element (m, k) is at data[m * ld + k], or at data[k * ld + m]
// where the rows are the unit stride (kUnitRows).
template <class E>
struct Left {
  const E* data;
  int64_t ld;
};

// Which operand of its products a tile becomes: A, B or, of two products, both.
enum class Side { left, right, both };

// acc += a * row, with one element of A for all lanes.
template <class T>
inline void multiply_add(vec<T>& acc, T a, vec<T> row) {
  acc += broadcast(a) * row;
}

template <class T>
inline vec<T> load_elements(const T* p) {
  return load(p);
}

// Two bfloat16 numbers that follow each other along the depth of a product, the first one in the
// low half. Pairs also move as if they were floats, hence may_alias.
struct [[gnu::may_alias]] Pair {
  uint32_t bits;
};

#if defined(__AVX512BF16__)
inline void multiply_add(vec<float>& acc, Pair a, vec<float> row) {
  acc =
      (vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a.bits), (__m512bh)row);
}

inline vec<float> load_elements(const Pair* p) { return load(reinterpret_cast<const float*>(p)); }
#endif

// Inlined into the loop over rows by force: a call would pass its arguments in memory and clear the
// upper halves of the registers, 6 % of a product of depth 32. kLd is the leading dimension of B
// and C where it is known, else 0: known strides are another 2 %. E is the type of A and B, T of C.
template <int Rows, int Vectors, bool kUnitRows, Sum kSum, int kLd, class E, class T>
[[gnu::always_inline]] inline void micro_kernel(int64_t depth, Left<E> a, const E* b, T* c,
                                                int64_t runtime_ld, Epilogue<T> epilogue) {
  constexpr int W = kLanes<T>;
  const int64_t ld = kLd ? kLd : runtime_ld;
  const int64_t row_stride = kUnitRows ? 1 : a.ld, column_stride = kUnitRows ? a.ld : 1;
  // What is added comes last: summing a tile from zero keeps rounding errors from growing with the
  // number of keys, or with the addend.
  vec<T> acc[Rows][Vectors] = {};

  const E* column = a.data;
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vec<T> row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = load_elements(b + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const E element = column[m * row_stride];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) multiply_add(acc[m][v], element, row[v]);
    }
    column += column_stride;
    b += ld;
  }

#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      T* at = c + m * ld + v * W;
      if constexpr (is_scaled(kSum)) acc[m][v] *= epilogue.factor;
      if constexpr (adds_onto(kSum)) acc[m][v] += load(at);
      if constexpr (adds_row(kSum)) acc[m][v] += load(epilogue.row + v * W);
      store<T>(at, acc[m][v]);
    }
}

template <class E, class T>
using MicroKernel = void (*)(int64_t depth, Left<E> a, const E* b, T* c, int64_t ld,
                             Epilogue<T> epilogue);

template <int Rows, int Vectors, bool kUnitRows, Sum kSum, int kLd, class E, class T>
void micro_kernel_call(int64_t depth, Left<E> a, const E* b, T* c, int64_t ld,
                       Epilogue<T> epilogue) {
  micro_kernel<Rows, Vectors, kUnitRows, kSum, kLd>(depth, a, b, c, ld, epilogue);
}

// The micro-kernels of 1, 2, ... Rows rows, for the rows that are left over.
template <int Vectors, bool kUnitRows, Sum kSum, int kLd, class E, class T, int... Rows>
constexpr auto remainder_kernels(std::integer_sequence<int, Rows...>) {
  struct Table {
    MicroKernel<E, T> kernel[sizeof...(Rows)];
  };
  return Table{{micro_kernel_call<Rows + 1, Vectors, kUnitRows, kSum, kLd, E, T>...}};
}

template <int Vectors, bool kUnitRows, Sum kSum, int kLd, class E, class T>
void gemm_columns(int64_t rows, int64_t depth, Left<E> a, const E* b, T* c, int64_t runtime_ld,
                  Epilogue<T> epilogue) {
  constexpr int kRows = rows_per_call(Vectors);
  static constexpr auto remainder = remainder_kernels<Vectors, kUnitRows, kSum, kLd, E, T>(
      std::make_integer_sequence<int, kRows>());
  const int64_t ld = kLd ? kLd : runtime_ld;
  const int64_t row_stride = kUnitRows ? 1 : a.ld;
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows, a.data += kRows * row_stride, c += kRows * ld)
    micro_kernel<kRows, Vectors, kUnitRows, kSum, kLd>(depth, a, b, c, ld, epilogue);
  if (m < rows) remainder.kernel[rows - m - 1](depth, a, b, c, ld, epilogue);
}

// C[rows, vectors * lanes] = A[rows, depth] B[depth, vectors * lanes] + what kSum says; B and C
// have the leading dimension kLd, or ld where that is 0.
template <bool kUnitRows, Sum kSum, int kLd = 0, class E, class T>
void gemm(int64_t rows, int64_t vectors, int64_t depth, Left<E> a, const E* b, T* c,
          int64_t ld = kLd, Epilogue<T> epilogue = {}) {
  while (vectors > 0) {
    const int64_t now = vectors < kMaxVectors ? vectors : kMaxVectors;
    switch (now) {
      case 1: gemm_columns<1, kUnitRows, kSum, kLd>(rows, depth, a, b, c, ld, epilogue); break;
      case 2: gemm_columns<2, kUnitRows, kSum, kLd>(rows, depth, a, b, c, ld, epilogue); break;
      default:
        if constexpr (kMaxVectors == 4) {
          if (now == 3)
            gemm_columns<3, kUnitRows, kSum, kLd>(rows, depth, a, b, c, ld, epilogue);
          else
            gemm_columns<4, kUnitRows, kSum, kLd>(rows, depth, a, b, c, ld, epilogue);
        }
    }
    vectors -= now;
    b += now * kLanes<T>;
    c += now * kLanes<T>;
    if (epilogue.row) epilogue.row += now * kLanes<T>;
  }
}

// C[rows, vectors * lanes] += A[rows, depth] B[depth, vectors * lanes], with the strides known for
// the commonest head_dim.
template <class E, class T>
void gemm_rows(int64_t rows, int64_t vectors, int64_t depth, Left<E> a, const E* b, T* c,
               int64_t ld) {
  if (ld == 32) return gemm<false, Sum::onto, 32>(rows, vectors, depth, a, b, c);
  gemm<false, Sum::onto>(rows, vectors, depth, a, b, c, ld);
}

}  // namespace attn_kd::ATTN_KD_ISA
