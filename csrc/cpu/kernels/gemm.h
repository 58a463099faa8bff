// The one matrix product of the library: C[M, N] (+)= A[M, K] · B[K, N], operands in scratch
// memory.
//
// B and C hold whole vectors along N; A is read one scalar at a time and broadcast, so it may be
// stored either way round. Every product of the fused operator is brought into this form without
// transposing a tile (see forward.h and backward.h), which leaves a single micro-kernel to tune.
#pragma once

#include <utility>

#include "vec.h"

namespace attn_kd::ATTN_KD_ISA {

// Vectors along N of one micro-kernel call. The accumulators of a call must fit the register file
// beside the row of B and one broadcast scalar: 32 registers on AVX-512 and arm64, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kMaxVectors = 4;
constexpr int rows_per_call(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
inline constexpr int kMaxVectors = 2;
constexpr int rows_per_call(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

// How A is stored: row m, column k is at a[m * row_stride + k * column_stride].
template <class T>
struct Left {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;
};

template <int Rows, int Vectors, bool UnitRows, bool Accumulate, class T>
void micro_kernel(int64_t depth, Left<T> a, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int W = kLanes<T>;
  const int64_t row_stride = UnitRows ? 1 : a.row_stride;
  // C is added at the end: summing a tile from zero keeps rounding errors from growing with the
  // number of keys.
  vec<T> acc[Rows][Vectors] = {};

  const T* column = a.data;
  for (int64_t k = 0; k < depth; ++k) {
    vec<T> row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const vec<T> scalar = broadcast(column[m * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) acc[m][v] += scalar * row[v];
    }
    column += a.column_stride;
    b += ldb;
  }

#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      T* at = c + m * ldc + v * W;
      store<T>(at, Accumulate ? load(at) + acc[m][v] : acc[m][v]);
    }
}

template <class T>
using MicroKernel = void (*)(int64_t depth, Left<T> a, const T* b, int64_t ldb, T* c, int64_t ldc);

// The micro-kernels of 1, 2, ... Rows rows, for the rows that are left over.
template <int Vectors, bool UnitRows, bool Accumulate, class T, int... Rows>
constexpr auto remainder_kernels(std::integer_sequence<int, Rows...>) {
  struct Table {
    MicroKernel<T> kernel[sizeof...(Rows)];
  };
  return Table{{micro_kernel<Rows + 1, Vectors, UnitRows, Accumulate, T>...}};
}

template <int Vectors, bool UnitRows, bool Accumulate, class T>
void gemm_columns(int64_t rows, int64_t depth, Left<T> a, const T* b, int64_t ldb, T* c,
                  int64_t ldc) {
  constexpr int kRows = rows_per_call(Vectors);
  static constexpr auto remainder =
      remainder_kernels<Vectors, UnitRows, Accumulate, T>(std::make_integer_sequence<int, kRows>());
  const int64_t row_stride = UnitRows ? 1 : a.row_stride;
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows, a.data += kRows * row_stride, c += kRows * ldc)
    micro_kernel<kRows, Vectors, UnitRows, Accumulate, T>(depth, a, b, ldb, c, ldc);
  if (m < rows) remainder.kernel[rows - m - 1](depth, a, b, ldb, c, ldc);
}

// C[rows, vectors * lanes] (+)= A[rows, depth] B[depth, vectors * lanes]. UnitRows: a.row_stride
// is 1.
template <bool UnitRows, bool Accumulate, class T>
void gemm(int64_t rows, int64_t vectors, int64_t depth, Left<T> a, const T* b, int64_t ldb, T* c,
          int64_t ldc) {
  while (vectors > 0) {
    const int64_t now = vectors < kMaxVectors ? vectors : kMaxVectors;
    switch (now) {
      case 1: gemm_columns<1, UnitRows, Accumulate>(rows, depth, a, b, ldb, c, ldc); break;
      case 2: gemm_columns<2, UnitRows, Accumulate>(rows, depth, a, b, ldb, c, ldc); break;
      default:
        if constexpr (kMaxVectors == 4) {
          if (now == 3)
            gemm_columns<3, UnitRows, Accumulate>(rows, depth, a, b, ldb, c, ldc);
          else
            gemm_columns<4, UnitRows, Accumulate>(rows, depth, a, b, ldb, c, ldc);
        }
    }
    vectors -= now;
    b += now * kLanes<T>;
    c += now * kLanes<T>;
  }
}

}  // namespace attn_kd::ATTN_KD_ISA
