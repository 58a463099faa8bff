// Products of keys or values with a panel of query rows, one row a lane.
//
// A few rows leave most lanes idle, and a lane that is idle costs what any other does. For them
// keys or columns of values take the lanes instead. Every number is computed by the same operations
// in the same order either way, so a row's results do not depend on how many others there are.
#pragma once

#include "gemm.h"
#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

// As many rows as cost less in this way than a whole vector of lanes does.
template <class T>
inline constexpr int64_t kFewRows = kLanes<T> / 4;

// Lanes of the panel that few rows take: bfloat16 products read them two at a time.
template <class E>
inline int64_t lanes_of(int64_t rows) {
  return std::is_same_v<E, Pair> ? round_up(rows, 2) : rows;
}

// Elements [0, count) of a vector, and 0 from there on.
template <class T>
inline vec<T> load_part(const T* x, int64_t count) {
  if (count >= kLanes<T>) return load_unaligned(x);
  vec<T> part{};
  for (int64_t i = 0; i < count; ++i) part[i] = x[i];
  return part;
}

// Pairs move as if they were floats, which changes no bit.
template <class T, class E>
inline const T* as_numbers(const E* elements) {
  static_assert(sizeof(E) == sizeof(T));
  return reinterpret_cast<const T*>(elements);
}

// Calls few(integral_constant) with the number of lanes in use, from 1 to kFewRows.
template <class T, class Few, int... Lanes>
inline void with_lanes(int64_t lanes, Few few, std::integer_sequence<int, Lanes...>) {
  ((lanes == Lanes + 1 ? few(std::integral_constant<int, Lanes + 1>{}) : void()), ...);
}

// C[rows, kLane lanes] = A[rows, depth] panel[depth, kLane lanes] and what kSum says, a vector of
// rows of A at a time.
template <int kLane, Sum kSum, class E, class T>
void rows_times_few(int64_t rows, int64_t depth, Left<E> a, const E* panel, T* c,
                    Epilogue<T> epilogue) {
  constexpr int W = kLanes<T>;
  constexpr int64_t P = kPanel<T>;
  for (int64_t first = 0; first < rows; first += W, a.data += W * a.ld, c += W * P) {
    const int64_t count = rows - first < W ? rows - first : W;
    vec<T> acc[kLane] = {};
    for (int64_t k = 0; k < depth; k += W) {
      const int64_t columns = depth - k < W ? depth - k : W;
      vec<T> block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        block[i] = i < count ? load_part(as_numbers<T>(a.data + i * a.ld + k), columns) : vec<T>{};
      transpose_stages<1, T>(block);
      const E* element = panel + k * P;
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j)
        if (j < columns)
#pragma GCC unroll 4
          for (int lane = 0; lane < kLane; ++lane)
            multiply_add(acc[lane], element[j * P + lane], block[j]);
    }
#pragma GCC unroll 4
    for (int lane = 0; lane < kLane; ++lane) {
      if constexpr (is_scaled(kSum)) acc[lane] *= epilogue.factor;
      if constexpr (adds_row(kSum)) acc[lane] += broadcast(epilogue.row[lane]);
      for (int64_t i = 0; i < count; ++i) {
        T& at = c[i * P + lane];
        at = adds_onto(kSum) ? at + acc[lane][i] : acc[lane][i];
      }
    }
  }
}

// C[width, kLane lanes] += A[width, depth] tile[depth, kLane lanes], kVectors vectors of the rows
// of A, which are its unit stride, at a time. Returns how many rows are done.
template <int kLane, int kVectors, class E, class T>
int64_t columns_times_few(int64_t width, int64_t depth, Left<E> a, const E* tile, T* c) {
  constexpr int W = kLanes<T>;
  constexpr int64_t P = kPanel<T>, kBlock = kVectors * W;
  int64_t done = 0;
  for (; kVectors == 1 ? done < width : done + kBlock <= width; done += kBlock) {
    vec<T> acc[kVectors][kLane] = {};
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = done + v * W;
        const vec<T> column = load_part(as_numbers<T>(a.data + k * a.ld + at), width - at);
#pragma GCC unroll 4
        for (int lane = 0; lane < kLane; ++lane)
          multiply_add(acc[v][lane], tile[k * P + lane], column);
      }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (int lane = 0; lane < kLane; ++lane)
        for (int64_t i = 0; i < W && done + v * W + i < width; ++i)
          c[(done + v * W + i) * P + lane] += acc[v][lane][i];
  }
  return done;
}

template <Sum kSum, class E, class T>
void terms_times_panel(int64_t rows, int64_t vectors, int64_t query_rows, int64_t depth, Left<E> a,
                       const E* panel, T* c, Epilogue<T> epilogue) {
  if (query_rows > kFewRows<T>)
    return gemm<false, kSum, kPanel<T>>(rows, vectors, depth, a, panel, c, kPanel<T>, epilogue);
  const auto few = [&](auto lanes) {
    rows_times_few<lanes, kSum>(rows, depth, a, panel, c, epilogue);
  };
  with_lanes<T>(lanes_of<E>(query_rows), few, std::make_integer_sequence<int, kFewRows<T>>());
}

// Terms that are summed one after another. The rounding error of such a chain grows with its
// length, and an error of a logit is one of a probability. Sums of chains keep wide heads as
// accurate as narrow ones, for 3 % of a forward pass at head_dim 64.
inline constexpr int64_t kChain = 32;

// C[rows, panel] = A[rows, depth] B[depth, panel] and what kSum says. The panel holds `query_rows`
// in `vectors` vectors; lanes without a row are written or not.
template <Sum kSum, class E, class T>
void rows_times_panel(int64_t rows, int64_t vectors, int64_t query_rows, int64_t depth, Left<E> a,
                      const E* panel, T* c, Epilogue<T> epilogue = {}) {
  const int64_t first = depth < kChain ? depth : kChain;
  terms_times_panel<kSum>(rows, vectors, query_rows, first, a, panel, c, epilogue);
  for (int64_t k = kChain; k < depth; k += kChain) {
    const int64_t terms = depth - k < kChain ? depth - k : kChain;
    const Left<E> further{a.data + k, a.ld};
    terms_times_panel<continued(kSum)>(rows, vectors, query_rows, terms, further,
                                       panel + k * kPanel<T>, c, epilogue);
  }
}

// C[width, panel] += A[width, depth] tile[depth, panel], likewise, with the rows of A as its unit
// stride.
template <class E, class T>
void columns_times_panel(int64_t width, int64_t vectors, int64_t query_rows, int64_t depth,
                         Left<E> a, const E* tile, T* c) {
  if (query_rows > kFewRows<T>)
    return gemm<true, Sum::onto, kPanel<T>>(width, vectors, depth, a, tile, c);
  const auto few = [&](auto lanes) {
    const int64_t done = columns_times_few<lanes, 2>(width, depth, a, tile, c);
    a.data += done;
    columns_times_few<lanes, 1>(width - done, depth, a, tile, c + done * kPanel<T>);
  };
  with_lanes<T>(lanes_of<E>(query_rows), few, std::make_integer_sequence<int, kFewRows<T>>());
}

}  // namespace attn_kd::ATTN_KD_ISA
