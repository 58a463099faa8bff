// The attention maps of a group of heads, tile by tile, for divergences that take a second pass
// over the keys: the student's origins and sums and the teacher's LSEs are known by then.
//
// A group is all heads of a batch entry where the maps are averaged over heads before they are
// compared, else one head. Tiles are kept transposed, keys by queries, as everywhere.
#pragma once

#include "exp2.h"
#include "logits.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::Problem;

// Keys of a tile: those of 8 heads by 64 floats are 96 KiB, which a core's L2 holds beside the
// heads' panels.
inline constexpr int64_t kGroupKeys = 48;

// What the first pass left of every row.
struct KnownRows {
  const void* origin;                      // [B, H, Lq], base 2
  const void* inverse_sum;                 // [B, H, Lq]
  const void* teacher_lse;                 // [B, Ht, Lq]
  const void* teacher_lse_rest = nullptr;  // likewise, what rounding dropped of it, if known
};

// p = 2^logit in place, and average += weight * p.
template <class T>
inline void add_map(T* logits, T* average, int64_t keys, vec<T> weight) {
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>) {
    const vec<T> p = exp2<T>(load(logits + at));
    store<T>(logits + at, p);
    store<T>(average + at, load(average + at) + weight * p);
  }
}

template <class T>
class GroupMaps {
 public:
  GroupMaps(const Problem& problem, const KnownRows& known, Scratch<T>& scratch)
      : p_(problem),
        known_(known),
        heads_(problem.average_heads ? problem.heads : 1),
        teacher_heads_(problem.average_heads ? problem.teacher_heads : 1),
        tile_keys_(problem.key_length < kGroupKeys ? problem.key_length : kGroupKeys),
        rows_(scratch.take(P * wider(problem.head_dim, problem.teacher_dim))),
        query_(scratch.take(heads_ * P * problem.head_dim)),
        key_(scratch.take(heads_ * key_elements())),
        probability_(scratch.take(heads_ * tile_elements())),
        start_(scratch.take(heads_ * P)),
        weight_(scratch.take(heads_ * P)),
        seeing_(scratch.take(P)),
        teacher_query_(scratch.take(teacher_heads_ * P * problem.teacher_dim)),
        teacher_key_(scratch.take(teacher_keys(tile_keys_) * problem.teacher_dim)),
        teacher_logits_(scratch.take(teacher_keys(tile_keys_) * P)),
        teacher_start_(scratch.take(teacher_heads_ * P)),
        teacher_weight_(scratch.take(teacher_heads_ * P)),
        teacher_seeing_(scratch.take(P)),
        student_(scratch.take(tile_elements())),
        teacher_(scratch.take(tile_elements())),
        zeros_(scratch.take(P)),
        bias_(problem.mask, scratch, tile_keys_) {}

  int64_t heads() const { return heads_; }
  int64_t tile_keys() const { return tile_keys_; }
  int64_t vectors() const { return round_up(row_count_, kLanes<T>) / kLanes<T>; }

  // Reads the group's queries from first_row on; heads are counted from first_head.
  void start(int64_t b, int64_t first_head, int64_t first_row, int64_t rows) {
    b_ = b;
    first_head_ = first_head;
    first_row_ = first_row;
    row_count_ = rows;
    fill(zeros_, P, T(0));
    fill(seeing_, P, T(0));
    fill(teacher_seeing_, P, T(0));
    for (int64_t i = 0; i < heads_; ++i) start_student(i);
    for (int64_t i = 0; i < teacher_heads_; ++i) start_teacher(i);
  }

  // Computes the maps on `keys` keys from first_key on. Returns whether any pair of them is visible
  // in any head; the tiles are not filled where none is.
  bool tile(int64_t first_key, int64_t keys) {
    fill(student_, keys * P, T(0));
    fill(teacher_, keys * P, T(0));
    const bool pairs = teacher_heads_ == heads_;
    bool any_visible = false;
    for (int64_t i = 0; i < heads_; ++i) {
      if (read_mask(i, first_key, keys)) {
        add_student(i, first_key, keys);
        if (pairs) add_teacher(i, first_key, keys);
        any_visible = true;
      } else {
        fill(probability(i), keys * P, T(0));
        fill(key(i), keys * p_.head_dim, T(0));
      }
    }
    // Unequal numbers of heads share one mask, which has been read.
    if (any_visible && !pairs)
      for (int64_t i = 0; i < teacher_heads_; ++i) add_teacher(i, first_key, keys);
    return any_visible;
  }

  // Of the tile: averages over the heads [keys, P], and of one head the map before normalisation,
  // [keys, P], and the keys, [keys, D].
  T* student() { return student_; }
  const T* teacher() const { return teacher_; }
  T* probability(int64_t head) { return probability_ + head * tile_elements(); }
  T* key(int64_t head) { return key_ + head * key_elements(); }

  // What a row of the averages sums to but for roundings: the share of heads that see any key.
  double share(int64_t row) const { return share_of(seeing_[row], heads_); }
  double teacher_share(int64_t row) const { return share_of(teacher_seeing_[row], teacher_heads_); }

  // Zeroes those of the tile's rows of `width` whose keys the mask hides from every query.
  void clear_hidden(int64_t head, T* rows, int64_t first_key, int64_t keys, int64_t width) {
    if (p_.mask.row_stride != 0) return;
    if (p_.mask.head_stride != 0) read_mask(head, first_key, keys);
    bias_.clear_hidden(rows, keys, width);
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static int64_t wider(int64_t a, int64_t b) { return a > b ? a : b; }
  static double share_of(T seeing, int64_t heads) {
    return static_cast<double>(seeing) / static_cast<double>(heads);
  }
  int64_t tile_elements() const { return tile_keys_ * P; }
  int64_t key_elements() const { return tile_keys_ * p_.head_dim; }
  int64_t teacher_keys(int64_t keys) const { return keys * p_.teacher_keys_per_key; }

  // Whether the head sees any of the keys; one mask for all heads is read for the first alone.
  bool read_mask(int64_t head, int64_t first_key, int64_t keys) {
    if (head == 0 || p_.mask.head_stride != 0)
      visible_ = bias_.read(b_, first_head_ + head, first_row_, row_count_, first_key, keys);
    return visible_;
  }

  const T* row_values(const void* values, int64_t heads, int64_t head) const {
    return static_cast<const T*>(values) + (b_ * heads + head) * p_.query_length + first_row_;
  }

  // The logits of lanes without a row, and of rows that see no key, start at -inf, so that their
  // probabilities are exactly 0.
  void start_student(int64_t i) {
    T* start = start_ + i * P;
    T* weight = weight_ + i * P;
    fill(start, P, static_cast<T>(-__builtin_inf()));
    fill(weight, P, T(0));
    const T* origin = row_values(known_.origin, p_.heads, first_head_ + i);
    const T* inverse_sum = row_values(known_.inverse_sum, p_.heads, first_head_ + i);
    for (int64_t row = 0; row < row_count_; ++row) {
      if (inverse_sum[row] == 0) continue;
      start[row] = -origin[row];
      weight[row] = inverse_sum[row] / static_cast<T>(heads_);
      seeing_[row] += 1;
    }
    load_rows(p_.query, b_, first_head_ + i, first_row_, row_count_, p_.head_dim, rows_,
              p_.head_dim);
    transpose_to_panel(Rows<T>{rows_, p_.head_dim}, row_count_, p_.head_dim, T(p_.scale * kLog2e),
                       query_ + i * P * p_.head_dim);
  }

  // The base-2 LSE is rounded to where the logits start; the weight makes up for what that drops.
  void start_teacher(int64_t i) {
    T* start = teacher_start_ + i * P;
    T* weight = teacher_weight_ + i * P;
    fill(start, P, static_cast<T>(-__builtin_inf()));
    fill(weight, P, T(0));
    const int64_t seen_by = teacher_heads_ == heads_ ? first_head_ + i : first_head_;
    const T* inverse_sum = row_values(known_.inverse_sum, p_.heads, seen_by);
    const T* lse = row_values(known_.teacher_lse, p_.teacher_heads, first_head_ + i);
    const T* rest = known_.teacher_lse_rest
                        ? row_values(known_.teacher_lse_rest, p_.teacher_heads, first_head_ + i)
                        : zeros_;
    for (int64_t row = 0; row < row_count_; ++row) {
      if (inverse_sum[row] == 0) continue;
      const double exact_lse = static_cast<double>(lse[row]) + static_cast<double>(rest[row]);
      const double exact = p_.group_shift() - kLog2e * exact_lse;
      start[row] = static_cast<T>(exact);
      const double dropped = exact - static_cast<double>(start[row]);
      weight[row] = static_cast<T>((1 + kLn2 * dropped) / static_cast<double>(teacher_heads_));
      teacher_seeing_[row] += 1;
    }
    load_rows(p_.teacher_query, b_, first_head_ + i, first_row_, row_count_, p_.teacher_dim, rows_,
              p_.teacher_dim);
    transpose_to_panel(Rows<T>{rows_, p_.teacher_dim}, row_count_, p_.teacher_dim,
                       T(p_.teacher_scale * kLog2e), teacher_query_ + i * P * p_.teacher_dim);
  }

  void add_student(int64_t i, int64_t first_key, int64_t keys) {
    T* k = key(i);
    T* logits = probability(i);
    load_rows(p_.key, b_, first_head_ + i, first_key, keys, p_.head_dim, k, p_.head_dim);
    bias_.clear_hidden(k, keys, p_.head_dim);
    logit_tile<FullPrecision<T>>(keys, 1, vectors(), p_.head_dim, {k, p_.head_dim},
                                 query_ + i * P * p_.head_dim, p_.scale, start_ + i * P, zeros_,
                                 bias_, logits);
    for (int64_t lane = 0; lane < vectors() * kLanes<T>; lane += kLanes<T>)
      add_map<T>(logits + lane, student_ + lane, keys, load(weight_ + i * P + lane));
  }

  void add_teacher(int64_t i, int64_t first_key, int64_t keys) {
    const int64_t dim = p_.teacher_dim, group = p_.teacher_keys_per_key;
    load_rows(p_.teacher_key, b_, first_head_ + i, first_key * group, keys * group, dim,
              teacher_key_, dim);
    bias_.clear_hidden(teacher_key_, keys, group * dim);
    logit_tile<FullPrecision<T>>(keys, group, vectors(), dim, {teacher_key_, dim},
                                 teacher_query_ + i * P * dim, p_.teacher_scale,
                                 teacher_start_ + i * P, zeros_, bias_, teacher_logits_);
    for (int64_t lane = 0; lane < vectors() * kLanes<T>; lane += kLanes<T>)
      add_map<T>(teacher_logits_ + lane, teacher_ + lane, keys,
                 load(teacher_weight_ + i * P + lane));
  }

  const Problem& p_;
  const KnownRows known_;
  const int64_t heads_, teacher_heads_, tile_keys_;
  int64_t b_ = 0, first_head_ = 0, first_row_ = 0, row_count_ = 0;
  bool visible_ = true;
  T *rows_, *query_, *key_, *probability_, *start_, *weight_, *seeing_;
  T *teacher_query_, *teacher_key_, *teacher_logits_;
  T *teacher_start_, *teacher_weight_, *teacher_seeing_;
  T *student_, *teacher_, *zeros_;
  Bias<T> bias_;
};

}  // namespace attn_kd::ATTN_KD_ISA
