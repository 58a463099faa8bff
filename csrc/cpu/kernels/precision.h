// What the products of a pass are computed from. Tiles of logits, probabilities and their gradients
// are float or double in either case; a precision says how operands of a product are stored, and
// turns a tile into one.
#pragma once

#include "exp2.h"
#include "log2.h"
#include "operand.h"

namespace attn_kd::ATTN_KD_ISA {

template <class T>
struct InverseSum {
  vec<T> factor, exponent;
};

// One vector of lanes of a [keys, kPanel] tile, as a place for numbers that products will read.
template <class T>
struct LanesInPlace {
  T* data;

  void put(int64_t key, vec<T> x) const { store<T>(data + key * kPanel<T>, x); }
  void put(int64_t key, vec<T> x, vec<T> next) const {
    put(key, x);
    put(key + 1, next);
  }
};

// A [keys, kPanel] tile that is an operand as it lies, on either side.
template <class T>
struct TileInPlace {
  TileInPlace(Scratch<T>&, int64_t) {}
  LanesInPlace<T> lanes(T* tile, int64_t lane) const { return {tile + lane}; }
  Left<T> left(const T* tile) const { return {tile, kPanel<T>}; }
  const T* right(const T* tile) const { return tile; }
};

// Operands of the type of the tiles.
template <class T>
struct FullPrecision {
  using Number = T;   // of tiles
  using Element = T;  // of operands
  using Keys = Operand<T>;
  template <Side>
  using Tile = TileInPlace<T>;
  // Whether the scale of the logits goes into the panel of queries, where it costs nothing, and the
  // inverse sum of a row into whatever its probabilities are multiplied by. (Numbers that must be
  // rounded to be operands are better left alone.)
  static constexpr bool kFoldFactors = true;
  // Whether tiles are rounded to become operands. Then the output is divided by the sum of the
  // rounded probabilities: their errors cancel where one of them is all that matters.
  static constexpr bool kRoundsTiles = false;
  static constexpr Sum kLogits = Sum::plus_row;

  // Elements that hold `numbers` along the depth of a product.
  static constexpr int64_t depth(int64_t numbers) { return numbers; }

  static T* take(Scratch<T>& scratch, int64_t elements) { return scratch.take(elements); }

  // The rows of x as B[rows, width].
  static void read_rows(const Input& x, int64_t b, int64_t h, int64_t first, int64_t rows,
                        int64_t width, T* dst, int64_t ld) {
    load_rows(x, b, h, first, rows, width, dst, ld);
  }

  // The panel of the rows of x, one a lane.
  static void read_panel(const Input& x, int64_t b, int64_t h, int64_t first, int64_t rows,
                         int64_t width, double scale, T* copy, T* panel) {
    transpose_to_panel(rows_of(x, b, h, first, rows, width, copy), rows, width, T(scale * kLog2e),
                       panel);
  }
  static T logit_factor(double) { return 1; }
  // The logit of a number of a tile of `logit_products`, and the same measured from an origin.
  static vec<T> logit(vec<T> x, T, vec<T>) { return x; }
  static vec<T> logit_from(vec<T> origin, vec<T> x, T) { return x - origin; }
  static vec<T> power(vec<T> logit) { return exp2<T>(logit); }
  // What of a row's inverse sum, 0 where it sees no key, is multiplied and what added to exponents.
  static InverseSum<T> split(vec<T> inverse_sum) { return {inverse_sum, vec<T>{}}; }
};

// Whether every operand of the products is stored as bfloat16.
inline bool all_bfloat16(const cpu::Problem& p) {
  const auto is = [](const Input& x) { return !x || x.dtype == DType::bf16; };
  return is(p.query) && is(p.key) && is(p.value) && is(p.teacher_query) && is(p.teacher_key);
}

inline bool gradients_of_bfloat16(const cpu::BackwardProblem& p) {
  return all_bfloat16(p) && (!p.grad_output || p.grad_output.dtype == DType::bf16);
}

#if defined(__AVX512BF16__)
// bfloat16 operands as they are, and tiles rounded to bfloat16; sums and softmax in float.
struct PairPrecision {
  using Number = float;
  using Element = Pair;
  using Keys = PairOperand;
  template <Side kSide>
  using Tile = RoundedTile<kSide>;
  static constexpr bool kFoldFactors = false;
  static constexpr bool kRoundsTiles = true;
  static constexpr Sum kLogits = Sum::scaled_plus_row;

  static constexpr int64_t depth(int64_t numbers) { return ceil_div(numbers, 2); }

  static Pair* take(Scratch<float>& scratch, int64_t elements) {
    return take_pairs(scratch, elements);
  }

  static void read_rows(const Input& x, int64_t b, int64_t h, int64_t first, int64_t rows,
                        int64_t width, Pair* dst, int64_t ld) {
    interleave_rows(bfloat16_rows(x, b, h, first), rows, width, dst, ld);
  }

  static void read_panel(const Input& x, int64_t b, int64_t h, int64_t first, int64_t rows,
                         int64_t width, double, Pair* copy, Pair* panel) {
    transpose_pairs_to_panel(bfloat16_rows(x, b, h, first), rows, width, copy, panel);
  }
  // Zeroes one of the rows that read_rows and read_panel have read.
  static void clear_row(int64_t row, int64_t width, Pair* rows, int64_t ld, Pair* panel) {
    clear_interleaved_row(rows, ld, row, width);
    for (int64_t j = 0; j < depth(width); ++j) panel[j * kPanel<float> + row].bits = 0;
  }
  static InverseSum<float> split(vec<float> inverse_sum) {
    const auto sees = inverse_sum != 0.0f;
    const vec<float> one = broadcast(1.0f);
    return {sees ? one : vec<float>{}, log2<float>(sees ? inverse_sum : one)};
  }
  static float logit_factor(double scale) { return static_cast<float>(scale * kLog2e); }
  static vec<float> logit(vec<float> x, float factor, vec<float> start) {
    return x * factor + start;
  }
  static vec<float> logit_from(vec<float> origin, vec<float> x, float factor) {
    return x * factor - origin;
  }
  static vec<float> power(vec<float> logit) {
    return exp2<float, Exp2Constants<float>::short_q>(logit);
  }
  // sum + x + next, both rounded.
  static vec<float> add_rounded(vec<float> sum, vec<float> x, vec<float> next) {
    return RoundedLanes<Side::right>::add(sum, x, next);
  }
};
#endif

}  // namespace attn_kd::ATTN_KD_ISA
