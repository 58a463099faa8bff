// Matrix products of a thread block: which rows and columns its warps have, how tiles lie in shared
// memory, and how they meet the fragments of mma.m16n8k16.
//
// A block owns some rows and streams all columns past them, a tile at a time. In the forward pass
// and for dQ the rows are queries and the columns keys; for dK and dV it is the other way round.
// The rows' operands stay in registers, 16 rows a warp; the columns' are copied into shared memory.
// Warps beyond those that the rows need take a share of every tile's columns each, and their sums
// are added at the end: a small problem is done sooner by many warps with few columns.
#pragma once

#include "attention_kl.h"

#if defined(ATTN_KD_CUDA_EMULATION)
#include <device.h>  // of tests/cuda/emulation
#else
#include "device.cuh"
#endif

namespace attn_kd::cuda {

inline constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;

// A thread's place in its block. In the fragments of a [16, 8] sum a lane has the rows `row` and
// `row` + 8 and the columns 2 `pair` and 2 `pair` + 1.
struct Place {
  unsigned thread = device::thread_index();
  unsigned warp = thread / kLanes, lane = thread % kLanes, row = lane / 4, pair = lane % 4;
};

// kRowWarps warps stand one above the other, kColumnWarps side by side.
template <class T, int D, int kRowWarpsOfBlock>
struct Shape {
  using Element = T;
  static constexpr int kHeadDim = D;
  static constexpr int kRowWarps = kRowWarpsOfBlock, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kChunks = D / 8;                // of 16 bytes, in a row of a tile
  static constexpr int kColumns = kThreads / kChunks;  // of a tile: every thread copies one chunk
  static constexpr int kWarpColumns = kColumns / kColumnWarps;
  static_assert(kWarpColumns % 16 == 0);
  using Sums = float[D / 8][4];  // [16, D] in fragments
};

struct alignas(16) Chunk {
  uint32_t words[4];
};

// The (batch, head) of a block, and the first of its rows that a warp has.
template <class S>
struct BlockRows {
  int head, b, h, first;

  __device__ BlockRows(const Problem& p, int block, int rows, const Place& place) {
    const int blocks_of_head = (rows + S::kRows - 1) / S::kRows;
    head = block / blocks_of_head;
    b = head / p.heads;
    h = head % p.heads;
    first = block % blocks_of_head * S::kRows + place.warp % S::kRowWarps * 16;
  }
};

// kColumns rows of D elements. Chunks are permuted so that neither eight lanes that write two (or
// one) whole rows nor eight that read the same chunk of eight rows in a row meet in a bank.
template <class S>
struct Tile {
  Chunk chunks[S::kColumns * S::kChunks];

  // Of a chunk in a row. Eight rows further on it is 8 kChunks higher, and where 2 i chunks further
  // on changes the bits of 2 i alone, exclusive or with 2 i gives that.
  __device__ static unsigned index(unsigned row, unsigned chunk) {
    constexpr unsigned kRowsOf128Bytes = 8 / S::kChunks;
    return row * S::kChunks + (chunk ^ (row / kRowsOf128Bytes % S::kChunks));
  }
};

// The rows of one (batch, head).
template <class T>
struct Rows {
  const T* data;  // nullptr: all zeros
  int64_t stride;

  __device__ Rows(const Input& x, int b, int h)
      : data(static_cast<const T*>(x.data)), stride(x.row_stride) {
    if (data) data += b * x.batch_stride + h * x.head_stride;
  }
  __device__ const T* row(int i) const { return data + i * stride; }
};

// 16 rows of D elements as the left operand of products, in registers.
template <class S>
struct RowFragments {
  uint32_t words[S::kHeadDim / 16][4] = {};

  // Of the two rows that this lane has, those with !visible stay 0.
  __device__ void load(const Rows<typename S::Element>& rows, int first, const Place& place,
                       const bool (&visible)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!visible[r] || !rows.data) continue;
      const auto* row = rows.row(first + place.row + 8 * r) + 2 * place.pair;
#pragma unroll
      for (int k = 0; k < S::kHeadDim / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          words[k][r + 2 * half] =
              device::read_global(reinterpret_cast<const uint32_t*>(row + 16 * k + 8 * half));
    }
  }
};

// Part of the attention map or of its transpose: [16, kColumns] in fragments of 8 columns.
template <int kColumns>
using MapPart = float[kColumns / 8][4];

// scores = rows x tile^T, of the columns from `first` on.
template <class S, unsigned kFragments>
__device__ __forceinline__ void multiply_transposed(float (&scores)[kFragments][4],
                                                    const RowFragments<S>& rows,
                                                    const Tile<S>& tile, int first,
                                                    const Place& place) {
  const unsigned at =
      Tile<S>::index(first + place.lane / 16 * 8 + place.lane % 8, place.lane / 8 % 2);
#pragma unroll
  for (unsigned n = 0; n < kFragments; n += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = scores[n + 1][i] = 0;
#pragma unroll
    for (unsigned k = 0; k < S::kHeadDim / 16; ++k) {
      uint32_t b[4];
      device::load_matrices<false>(b, &tile.chunks[(at ^ (2 * k)) + 8 * n * S::kChunks]);
      device::multiply_add<typename S::Element>(scores[n], rows.words[k], b[0], b[1]);
      device::multiply_add<typename S::Element>(scores[n + 1], rows.words[k], b[2], b[3]);
    }
  }
}

// sums += map x tile, of the columns from `first` on; the map is rounded to the element type.
template <class S, unsigned kFragments>
__device__ __forceinline__ void multiply(typename S::Sums& sums, const float (&map)[kFragments][4],
                                         const Tile<S>& tile, int first, const Place& place) {
  using T = typename S::Element;
  const unsigned at = Tile<S>::index(first + place.lane % 16, place.lane / 16);
#pragma unroll
  for (unsigned n = 0; n < kFragments; n += 2) {
    const uint32_t a[4] = {device::pack<T>(map[n][0], map[n][1]),
                           device::pack<T>(map[n][2], map[n][3]),
                           device::pack<T>(map[n + 1][0], map[n + 1][1]),
                           device::pack<T>(map[n + 1][2], map[n + 1][3])};
#pragma unroll
    for (unsigned d = 0; d < S::kHeadDim / 8; d += 2) {
      uint32_t b[4];
      device::load_matrices<true>(b, &tile.chunks[(at ^ d) + 8 * n * S::kChunks]);
      device::multiply_add<T>(sums[d], a, b[0], b[1]);
      device::multiply_add<T>(sums[d + 1], a, b[2], b[3]);
    }
  }
}

// Over the four lanes that share the rows of a fragment.
__device__ __forceinline__ float sum_of_row(float x) {
  x += device::shuffle_xor(x, 1);
  return x + device::shuffle_xor(x, 2);
}

__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, device::shuffle_xor(x, 1));
  return fmaxf(x, device::shuffle_xor(x, 2));
}

// Writes rows of sums, times a factor each, that lie below `count`; zeros where the factor is 0,
// whatever the sums are.
template <class S>
__device__ __forceinline__ void store_rows(const Output& output, int b, int h, int first, int count,
                                           const typename S::Sums& sums, const float (&factor)[2],
                                           const Place& place) {
  using T = typename S::Element;
  T* head = static_cast<T*>(output.data) + b * output.batch_stride + h * output.head_stride;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + place.row + 8 * r;
    if (row >= count) continue;
    T* to = head + row * output.row_stride + 2 * place.pair;
#pragma unroll
    for (int d = 0; d < S::kHeadDim / 8; ++d) {
      const uint32_t both =
          device::pack<T>(sums[d][2 * r] * factor[r], sums[d][2 * r + 1] * factor[r]);
      device::write_global(reinterpret_cast<uint32_t*>(to + 8 * d), factor[r] == 0 ? 0 : both);
    }
  }
}

}  // namespace attn_kd::cuda
