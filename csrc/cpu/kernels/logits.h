// Tiles of base-2 logits, keys by queries, measured from an origin per query row.
#pragma once

#include "bias.h"
#include "groups.h"
#include "operand.h"

namespace attn_kd::ATTN_KD_ISA {

// tile = keys query_panel + start, and the mask's biases. With the negative origins of the rows as
// `start`, differences of logits keep their digits however far a whole row's logits lie from 0.
template <class T>
inline void student_logits(int64_t keys, int64_t vectors, int64_t width, Left<T> left,
                           const T* query_panel, const T* start, const Bias<T>& bias, T* tile) {
  gemm<false, Sum::plus_row, kPanel<T>>(keys, vectors, width, left, query_panel, tile, kPanel<T>,
                                        start);
  bias.add_to(tile, keys, vectors);
}

// The same for the teacher, `group` of whose keys stand for one.
template <class T>
inline void teacher_logits(int64_t keys, int64_t group, int64_t vectors, int64_t width,
                           Left<T> left, const T* query_panel, const T* start, const Bias<T>& bias,
                           T* tile) {
  if (group == 1) return student_logits(keys, vectors, width, left, query_panel, start, bias, tile);
  gemm<false, Sum::alone, kPanel<T>>(keys * group, vectors, width, left, query_panel, tile);
  merge_groups(tile, keys, group, vectors, start);
  bias.add_to(tile, keys, vectors);
}

}  // namespace attn_kd::ATTN_KD_ISA
