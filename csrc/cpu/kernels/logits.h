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

}  // namespace attn_kd::ATTN_KD_ISA
