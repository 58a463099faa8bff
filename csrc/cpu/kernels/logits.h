// Tiles of base-2 logits, keys by queries, measured from an origin per query row.
#pragma once

#include "groups.h"
#include "panel_products.h"
#include "precision.h"

namespace attn_kd::ATTN_KD_ISA {

// tile = scale * keys query_panel + row, and the mask's biases. With the negative origins of the
// query rows as `row`, differences of logits keep their digits however far all logits of a row lie
// from 0. Of the teacher, `group` keys stand for one. Panels and tile begin at `lane`, the mask's
// biases do not. Lanes of the panel from `rows` on may be left as they are.
template <class Precision>
inline void logit_tile(int64_t keys, int64_t group, int64_t vectors, int64_t width,
                       Left<typename Precision::Element> left,
                       const typename Precision::Element* query_panel, double scale,
                       const typename Precision::Number* row,
                       const typename Precision::Number* zeros,
                       const Bias<typename Precision::Number>& bias,
                       typename Precision::Number* tile,
                       int64_t rows = kPanel<typename Precision::Number>, int64_t lane = 0) {
  using T = typename Precision::Number;
  const Epilogue<T> epilogue{group == 1 ? row : zeros, Precision::logit_factor(scale)};
  rows_times_panel<Precision::kLogits>(keys * group, vectors, rows, Precision::depth(width), left,
                                       query_panel, tile, epilogue);
  merge_groups(tile, keys, group, vectors, row);
  bias.add_to(tile, keys, vectors, lane);
}

// A tile that a sweep gets logits from by Precision::logit: its numbers as they are, or
// number * factor + start[row].
template <class T>
struct LogitSource {
  const T* numbers = nullptr;  // [keys, kPanel]
  T factor = 1;
  const T* start = nullptr;

  // From a lane on.
  LogitSource at(int64_t lane) const { return {numbers + lane, factor, start + lane}; }
};

// As logit_tile, for a sweep that finishes the logits of a tile as it reads them: where the scale
// cannot go into the operands it costs less there than in the product, unless somebody else must
// see the logits first.
template <class Precision>
inline LogitSource<typename Precision::Number> logit_products(
    int64_t keys, int64_t group, int64_t vectors, int64_t width,
    Left<typename Precision::Element> left, const typename Precision::Element* query_panel,
    double scale, const typename Precision::Number* row, const typename Precision::Number* zeros,
    const Bias<typename Precision::Number>& bias, typename Precision::Number* tile,
    int64_t rows = kPanel<typename Precision::Number>, int64_t lane = 0) {
  if (Precision::kFoldFactors || group > 1 || bias.any()) {
    logit_tile<Precision>(keys, group, vectors, width, left, query_panel, scale, row, zeros, bias,
                          tile, rows, lane);
    return {tile, 1, zeros};
  }
  rows_times_panel<Sum::plus_row>(keys, vectors, rows, Precision::depth(width), left, query_panel,
                                  tile, Epilogue<typename Precision::Number>{zeros});
  return {tile, Precision::logit_factor(scale), row};
}

}  // namespace attn_kd::ATTN_KD_ISA
