// Teacher keys on a finer grid: G of them together stand for one key of the student.
//
// The teacher's mass over a group, sum_g exp t_g, is that of one key with the logit
// t~ = log sum_g exp t_g, so merging the logits of a tile is all it takes: what follows sees as
// many teacher logits as the student has keys. They are the logits of the groups' means, and with
// them goes the teacher's LSE less log2 G (see Problem::group_shift).
#pragma once

#include "log2.h"
#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

// tile[keys * G, kPanel] of base-2 logits to tile[keys, kPanel], in place, plus the row `start` if
// there is one.
template <class T>
void merge_groups(T* tile, int64_t keys, int64_t group, int64_t vectors, const T* start = nullptr) {
  if (group == 1) return;
  const T share = 1 / static_cast<T>(group);
  for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
    const vec<T> origin = start ? load(start + lane) : vec<T>{};
    for (int64_t key = 0; key < keys; ++key) {
      const T* members = tile + key * group * kPanel<T> + lane;
      vec<T> highest = load(members);
      for (int64_t g = 1; g < group; ++g)
        highest = max_or_second<T>(load(members + g * kPanel<T>), highest);
      const auto empty = highest == -static_cast<T>(__builtin_inf());
      const vec<T> base = empty ? vec<T>{} : highest;
      vec<T> sum{};
      for (int64_t g = 0; g < group; ++g) sum += exp2<T>(load(members + g * kPanel<T>) - base);
      const vec<T> merged = base + origin + log2<T>(empty ? broadcast(T(1)) : share * sum);
      store<T>(tile + key * kPanel<T> + lane, empty ? highest : merged);
    }
  }
}

}  // namespace attn_kd::ATTN_KD_ISA
