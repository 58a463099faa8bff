// The attention maps of a group of heads, tile by tile, for divergences that take a second pass
// over the keys: the student's origins and sums and the teacher's LSEs are known by then.
//
// A group is all heads of a batch entry where the maps are averaged over heads before they are
// compared, else one head. Tiles are kept transposed, keys by queries, as everywhere.
#pragma once

#include "divergence.h"
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

// p = 2^logit in place, and average += weight * p, or = that of the first head.
template <bool kFirst, class T>
inline void add_map(T* logits, T* average, int64_t keys, vec<T> weight) {
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>) {
    const vec<T> p = exp2<T>(load(logits + at));
    store<T>(logits + at, p);
    store<T>(average + at, kFirst ? weight * p : load(average + at) + weight * p);
  }
}

// A highest logit no lower than this: only hidden pairs lie below, and of pairs hidden from both
// maps the logarithms must agree.
template <class T>
inline constexpr T kLowestLogit = T(-1e15);

// The same relative to the highest logit of all heads: average += weight * 2^(logit - highest),
// with one exponential, be the highest the new logit or the old.
template <bool kFirst, class T>
inline void merge_map(const T* logits, T* highest, T* average, int64_t keys, vec<T> weight) {
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>) {
    const vec<T> before = kFirst ? broadcast(kLowestLogit<T>) : load(highest + at);
    const vec<T> logit = load(logits + at), sum = kFirst ? vec<T>{} : load(average + at);
    const vec<T> rise = logit - before;
    const vec<T> smaller = exp2<T>(rise > T(0) ? -rise : rise);
    store<T>(highest + at, max_or_second<T>(logit, before));
    store<T>(average + at, rise > T(0) ? sum * smaller + weight : sum + weight * smaller);
  }
}

// The maps of a tile whose logits are all there, [heads, keys, kPanel]: p = 2^(logit - highest) in
// place, the highest of all heads, and the average of p.
template <class T>
inline void relate_maps(T* logits, int64_t heads, int64_t stride, T* highest, T* average,
                        int64_t keys, int64_t vectors, const T* weights) {
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t lane = v * kLanes<T>, at = key * kPanel<T> + lane;
      vec<T> base = broadcast(kLowestLogit<T>), sum{};
      for (int64_t i = 0; i < heads; ++i)
        base = max_or_second<T>(load(logits + i * stride + at), base);
      for (int64_t i = 0; i < heads; ++i) {
        const vec<T> p = exp2<T>(load(logits + i * stride + at) - base);
        store<T>(logits + i * stride + at, p);
        sum += load(weights + i * kPanel<T> + lane) * p;
      }
      store<T>(highest + at, base);
      store<T>(average + at, sum);
    }
}

// With kRelative, a key's probabilities are relative to the highest of the heads, so that what
// makes up an average is known where all of them underflow.
template <class Precision, bool kRelative>
class GroupMaps {
  using T = typename Precision::Number;
  using Element = typename Precision::Element;
  using Keys = typename Precision::Keys;

 public:
  using Number = T;

  GroupMaps(const Problem& problem, const KnownRows& known, Scratch<T>& scratch)
      : p_(problem),
        known_(known),
        heads_(problem.average_heads ? problem.heads : 1),
        teacher_heads_(problem.average_heads ? problem.teacher_heads : 1),
        tile_keys_(min(problem.key_length, kGroupKeys)),
        panel_rows_(Precision::take(scratch, P * max(problem.head_dim, problem.teacher_dim))),
        query_(Precision::take(scratch, heads_ * panel_elements(problem.head_dim))),
        key_(problem.key, problem.head_dim, tile_keys_, hides_keys(), Keys::Use::rows, scratch),
        probability_(scratch.take(heads_ * map_stride())),
        start_(scratch.take(heads_ * P)),
        weight_(scratch.take(heads_ * P)),
        seeing_(scratch.take(P)),
        teacher_query_(
            Precision::take(scratch, teacher_heads_ * panel_elements(problem.teacher_dim))),
        teacher_key_(problem.teacher_key, problem.teacher_dim, problem.teacher_keys(tile_keys_),
                     hides_keys(), Keys::Use::rows, scratch),
        teacher_logits_(scratch.take(problem.teacher_keys(tile_keys_) * P)),
        teacher_start_(scratch.take(teacher_heads_ * P)),
        teacher_weight_(scratch.take(teacher_heads_ * P)),
        teacher_seeing_(scratch.take(P)),
        mass_(scratch.take(tile_elements())),
        highest_(scratch.take(kRelative ? tile_elements() : 0)),
        teacher_mass_(scratch.take(tile_elements())),
        teacher_highest_(scratch.take(kRelative ? tile_elements() : 0)),
        zeros_(scratch.take(P)),
        bias_(problem.mask, scratch, tile_keys_) {}

  int64_t heads() const { return heads_; }
  int64_t tile_keys() const { return tile_keys_; }
  int64_t vectors() const { return ceil_div(row_count_, kLanes<T>); }

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
    const bool pairs = teacher_heads_ == heads_;
    bool any_visible = false;
    for (int64_t i = 0; i < heads_; ++i) {
      if (read_mask(i, first_key, keys)) {
        add_student(i, first_key, keys, !any_visible);
        if (pairs) add_teacher(i, first_key, keys, !any_visible);
        any_visible = true;
      } else {
        fill(probability(i), keys * P, kRelative ? kMasked<T> : T(0));
      }
    }
    if (!any_visible) return false;
    // Unequal numbers of heads share one mask, which has been read.
    for (int64_t i = 0; !pairs && i < teacher_heads_; ++i) add_teacher(i, first_key, keys, i == 0);
    if constexpr (kRelative)
      relate_maps<T>(probability_, heads_, map_stride(), highest_, mass_, keys, vectors(), weight_);
    return true;
  }

  // A key of the tile and a vector of rows, at key * kPanel + lane.
  Probabilities<T> compared(int64_t at) const {
    const vec<T> student = load(mass_ + at), teacher = load(teacher_mass_ + at);
    if constexpr (!kRelative) return {student, teacher, broadcast(T(1)), student, vec<T>{}};
    const vec<T> highest = load(highest_ + at), teacher_highest = load(teacher_highest_ + at);
    const vec<T> scale = exp2<T>(highest);
    const vec<T> ratio = above_zero<T>(student) / above_zero<T>(teacher);
    return {scale * student, exp2<T>(teacher_highest) * teacher, scale, student,
            T(kLn2) * ((highest - teacher_highest) + log2<T>(ratio))};
  }

  // Tiles, [keys, kPanel]. A sweep over `compared` may leave slopes and scales in place of what it
  // has read; of one head the map is what remains to be multiplied by the scale (1 but for
  // kRelative), normalised where that is in its exponent (see Precision).
  T* slope() { return mass_; }
  T* scale() { return highest_; }
  T* probability(int64_t head) { return probability_ + head * map_stride(); }

  // The mask of a head on those keys.
  const Bias<T>& mask(int64_t head, int64_t first_key, int64_t keys) {
    if (p_.mask.head_stride != 0) read_mask(head, first_key, keys);
    return bias_;
  }

  // What a row of the averages sums to but for roundings: the share of heads that see any key.
  double share(int64_t row) const { return share_of(seeing_[row], heads_); }
  double teacher_share(int64_t row) const { return share_of(teacher_seeing_[row], teacher_heads_); }

 private:
  static constexpr int64_t P = kPanel<T>;
  static constexpr T kMinusInfinity = -static_cast<T>(__builtin_inf());
  static double share_of(T seeing, int64_t heads) {
    return static_cast<double>(seeing) / static_cast<double>(heads);
  }
  static int64_t panel_elements(int64_t width) { return P * Precision::depth(width); }
  int64_t tile_elements() const { return tile_keys_ * P; }
  int64_t map_stride() const { return Scratch<T>::stride(tile_elements()); }
  bool hides_keys() const { return Bias<T>::hides_keys(p_.mask); }

  // Whether the head sees any of the keys; one mask for all heads is read for the first alone.
  bool read_mask(int64_t head, int64_t first_key, int64_t keys) {
    if (head == 0 || p_.mask.head_stride != 0)
      visible_ = bias_.read(b_, first_head_ + head, first_row_, row_count_, first_key, keys);
    return visible_;
  }

  // Where the panel's rows of a head lie among per-row values.
  int64_t row_of(int64_t heads, int64_t head) const {
    return (b_ * heads + first_head_ + head) * p_.query_length + first_row_;
  }

  // The logits of lanes without a row, and of rows that see no key, start at -inf, so that their
  // probabilities are exactly 0.
  void start_student(int64_t i) {
    const vec<T> share = broadcast(1 / static_cast<T>(heads_));
    for (int64_t lane = 0; lane < P; lane += kLanes<T>) {
      const int64_t at = row_of(p_.heads, i) + lane, count = max(row_count_ - lane, 0);
      const vec<T> inverse_sum = row_lanes<T>(known_.inverse_sum, at, count);
      const auto sees = inverse_sum != T(0);
      const auto [factor, exponent] = Precision::split(inverse_sum);
      const vec<T> start = exponent - row_lanes<T>(known_.origin, at, count);
      store<T>(start_ + i * P + lane, sees ? start : broadcast(kMinusInfinity));
      store<T>(weight_ + i * P + lane, factor * share);
      store<T>(seeing_ + lane, load(seeing_ + lane) + (sees ? broadcast(T(1)) : vec<T>{}));
    }
    Precision::read_panel(p_.query, b_, first_head_ + i, first_row_, row_count_, p_.head_dim,
                          p_.scale, panel_rows_, query_ + i * panel_elements(p_.head_dim));
  }

  // The base-2 LSE is rounded to where the logits start; the weight makes up for what that drops.
  void start_teacher(int64_t i) {
    T* start = teacher_start_ + i * P;
    T* weight = teacher_weight_ + i * P;
    fill(start, P, kMinusInfinity);
    fill(weight, P, T(0));
    const int64_t seen_by = row_of(p_.heads, teacher_heads_ == heads_ ? i : 0);
    const int64_t at = row_of(p_.teacher_heads, i);
    const T* inverse_sum = static_cast<const T*>(known_.inverse_sum) + seen_by;
    const T* lse = static_cast<const T*>(known_.teacher_lse) + at;
    const T* rest =
        known_.teacher_lse_rest ? static_cast<const T*>(known_.teacher_lse_rest) + at : zeros_;
    for (int64_t row = 0; row < row_count_; ++row) {
      if (inverse_sum[row] == 0) continue;
      const double exact_lse = static_cast<double>(lse[row]) + static_cast<double>(rest[row]);
      const double exact = p_.group_shift() - kLog2e * exact_lse;
      start[row] = static_cast<T>(exact);
      const double dropped = exact - static_cast<double>(start[row]);
      weight[row] = static_cast<T>((1 + kLn2 * dropped) / static_cast<double>(teacher_heads_));
      teacher_seeing_[row] += 1;
    }
    Precision::read_panel(p_.teacher_query, b_, first_head_ + i, first_row_, row_count_,
                          p_.teacher_dim, p_.teacher_scale, panel_rows_,
                          teacher_query_ + i * panel_elements(p_.teacher_dim));
  }

  void add_student(int64_t i, int64_t first_key, int64_t keys, bool first) {
    T* logits = probability(i);
    key_.read(b_, first_head_ + i, first_key, keys);
    key_.clear_hidden(bias_, 0, keys);
    logit_tile<Precision>(keys, 1, vectors(), p_.head_dim, key_.rows(0),
                          query_ + i * panel_elements(p_.head_dim), p_.scale, start_ + i * P,
                          zeros_, bias_, logits);
    if constexpr (!kRelative) add(logits, mass_, keys, weight_ + i * P, first);
  }

  void add_teacher(int64_t i, int64_t first_key, int64_t keys, bool first) {
    const int64_t group = p_.teacher_keys(1);
    teacher_key_.read(b_, first_head_ + i, group * first_key, group * keys);
    teacher_key_.clear_hidden(bias_, 0, keys, group);
    logit_tile<Precision>(keys, group, vectors(), p_.teacher_dim, teacher_key_.rows(0),
                          teacher_query_ + i * panel_elements(p_.teacher_dim), p_.teacher_scale,
                          teacher_start_ + i * P, zeros_, bias_, teacher_logits_);
    const T* weight = teacher_weight_ + i * P;
    if constexpr (!kRelative) return add(teacher_logits_, teacher_mass_, keys, weight, first);
    for (int64_t lane = 0; lane < vectors() * kLanes<T>; lane += kLanes<T>)
      if (first)
        merge_map<true, T>(teacher_logits_ + lane, teacher_highest_ + lane, teacher_mass_ + lane,
                           keys, load(weight + lane));
      else
        merge_map<false, T>(teacher_logits_ + lane, teacher_highest_ + lane, teacher_mass_ + lane,
                            keys, load(weight + lane));
  }

  void add(T* logits, T* average, int64_t keys, const T* weight, bool first) const {
    for (int64_t lane = 0; lane < vectors() * kLanes<T>; lane += kLanes<T>)
      if (first)
        add_map<true, T>(logits + lane, average + lane, keys, load(weight + lane));
      else
        add_map<false, T>(logits + lane, average + lane, keys, load(weight + lane));
  }

  const Problem& p_;
  const KnownRows known_;
  const int64_t heads_, teacher_heads_, tile_keys_;
  int64_t b_ = 0, first_head_ = 0, first_row_ = 0, row_count_ = 0;
  bool visible_ = true;
  Element *panel_rows_, *query_;
  Keys key_;
  T *probability_, *start_, *weight_, *seeing_;
  Element* teacher_query_;
  Keys teacher_key_;
  T *teacher_logits_, *teacher_start_, *teacher_weight_, *teacher_seeing_;
  // Of the tile: the averages and, with kRelative, the highest logit, which they are relative to.
  T *mass_, *highest_, *teacher_mass_, *teacher_highest_;
  T* zeros_;
  Bias<T> bias_;
};

}  // namespace attn_kd::ATTN_KD_ISA
