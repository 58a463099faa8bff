// Forward pass: attention output, log-sum-exps and divergence of a panel of query rows, in one
// sweep over the keys.
//
// Tiles are kept transposed, keys by queries, one query per SIMD lane: the softmax then needs no
// horizontal operation, keys and values are read in their natural layout as the broadcast operand
//   S = K Qt,  T = Kt Qtt,  O += Vt P      (Qt, Qtt, O: panels, see tile.h)
// and nothing of the size of the attention map is ever transposed.
//
// Where there are few panels their keys are split between tasks. The last task of a panel to arrive
// merges what all have gathered, in the order of the keys, so that the result does not depend on
// which threads ran them, or on how many there were.
#pragma once

#include "dropout.h"
#include "logits.h"
#include "running_sums.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::ForwardProblem;

// Keys of a forward tile: a multiple of the micro-kernel's rows; two tiles of 96 keys by 64
// floats are 48 KiB.
inline constexpr int64_t kForwardKeys = 96;

// Tiles that are searched for their highest logits after one that had to be swept twice: sharp
// logits rise again and again, and a search costs a tenth of what sweeping twice does. Whether it
// is searched does not change a tile's results.
inline constexpr int64_t kSearchedTiles = 16;

// Query rows on their way through the keys, one SIMD lane a row.
template <class Precision>
struct QueryPanel {
  using T = typename Precision::Number;
  typename Precision::Element *query, *teacher_query;  // [D, kPanel], [Dt, kPanel], see Precision
  T* teacher_start;  // [kPanel], the negative LSEs of the teacher where they are given, else 0
  T* memory;         // for its sums, unless the keys are split
  RunningSums<T> sums;
  int64_t first_row = 0, rows = 0, tiles_to_search = 0;

  QueryPanel(const ForwardProblem& p, Scratch<T>& scratch, int64_t index)
      : QueryPanel(p, scratch, Lanes{index < p.panels_per_task ? kPanel<T> : 0}) {}
  int64_t vectors() const { return round_up(rows, kLanes<T>) / kLanes<T>; }

 private:
  struct Lanes {
    int64_t count;  // 0 for a panel that the task does not use
  };
  QueryPanel(const ForwardProblem& p, Scratch<T>& scratch, Lanes lanes)
      : query(Precision::take(scratch, lanes.count * Precision::depth(p.head_dim))),
        teacher_query(Precision::take(scratch, lanes.count * Precision::depth(p.teacher_dim))),
        teacher_start(scratch.take(lanes.count)),
        memory(scratch.take(
            p.key_splits > 1 || lanes.count == 0 ? 0 : RunningSums<T>::elements(p.value_dim))) {}
};

// One thread's forward work; its scratch does not grow with the sequences (but with the number of
// teacher keys that make a key).
template <class Div, bool kTeacherLse, class Precision>
class ForwardWorker {
  using T = typename Precision::Number;
  using Keys = typename Precision::Keys;

 public:
  ForwardWorker(const ForwardProblem& problem, Scratch<T>& scratch)
      : p_(problem),
        panels_{{problem, scratch, 0},
                {problem, scratch, 1},
                {problem, scratch, 2},
                {problem, scratch, 3}},
        tile_keys_(min(kForwardKeys, problem.key_length)),
        rows_(scratch.take(P * problem.value_dim)),
        query_rows_(Precision::take(scratch, P * widest(problem))),
        zeros_(scratch.take(P)),
        key_(problem.key, problem.head_dim, tile_keys_, hides_keys(), Keys::Use::rows, scratch),
        teacher_key_(problem.teacher_key, problem.teacher_dim, p_.teacher_keys(tile_keys_),
                     hides_keys(), Keys::Use::rows, scratch),
        value_(problem.value, problem.value_dim, tile_keys_, hides_keys(), Keys::Use::columns,
               scratch),
        logits_(scratch.take(tile_keys_ * P)),
        teacher_logits_(scratch.take(Div::kTeacher ? p_.teacher_keys(tile_keys_) * P : 0)),
        probabilities_(scratch, tile_keys_),
        bias_(problem.mask, scratch, tile_keys_),
        dropout_(problem.dropout, scratch, tile_keys_) {}

  // The task of a block of panels and of one of the ranges that the keys are split into.
  void run(int64_t block, int64_t split) {
    const int64_t rows = P * p_.panels_per_task;
    const int64_t blocks = ceil_div(p_.query_length, rows), head = block / blocks;
    const int64_t b = head / p_.heads, h = head % p_.heads;
    if (block != block_) start(b, h, block % blocks * rows);
    block_ = block;
    for (int64_t i = 0; i < count_; ++i) {
      panels_[i].sums = gathered(panels_[i], head, split);
      panels_[i].sums.reset(kTeacherLse, panels_[i].vectors(), p_.value_dim);
      panels_[i].tiles_to_search = 0;
    }
    gather(b, h, p_.key_length * split / p_.key_splits,
           p_.key_length * (split + 1) / p_.key_splits);
    if (p_.key_splits > 1 && !is_last_to_arrive(block)) return;
    for (int64_t i = 0; i < count_; ++i) {
      if (p_.key_splits > 1) merge_splits(panels_[i], head);
      finish(panels_[i], b, h);
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static_assert(cpu::kMaxPanelsPerTask == 4, "panels_ is initialised by hand");
  bool hides_keys() const { return Bias<T>::hides_keys(p_.mask); }
  static int64_t widest(const ForwardProblem& p) {
    return p.head_dim > p.teacher_dim ? p.head_dim : p.teacher_dim;
  }

  const T* given_teacher_lse(int64_t b, int64_t h, int64_t first_row) const {
    return static_cast<const T*>(p_.given_teacher_lse) + (b * p_.heads + h) * p_.query_length +
           first_row;
  }

  void start(int64_t b, int64_t h, int64_t first_row) {
    fill(zeros_, P, T(0));
    count_ = 0;
    for (; count_ < p_.panels_per_task && first_row < p_.query_length; first_row += P)
      start(panels_[count_++], b, h, first_row);
  }

  void gather(int64_t b, int64_t h, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += tile_keys_) {
      const int64_t keys = min(end - first, tile_keys_);
      key_.read(b, h, first, keys);
      if constexpr (Div::kTeacher)
        teacher_key_.read(b, h, p_.teacher_keys(first), p_.teacher_keys(keys));
      value_.read(b, h, first, keys);
      for (int64_t i = 0; i < count_; ++i)
        if (bias_.read(b, h, panels_[i].first_row, panels_[i].rows, first, keys)) {
          dropout_.draw(b * p_.heads + h, panels_[i].first_row, first, keys, panels_[i].vectors());
          tile(panels_[i], keys);
        }
    }
  }

  // What a panel gathers from one of the ranges.
  RunningSums<T> gathered(const QueryPanel<Precision>& panel, int64_t head, int64_t split) const {
    if (p_.key_splits == 1) return RunningSums<T>(panel.memory, panel.rows);
    const int64_t index = head * ceil_div(p_.query_length, P) + panel.first_row / P;
    const int64_t at = index * p_.key_splits + split;
    return RunningSums<T>(
        static_cast<T*>(p_.partials) + at * RunningSums<T>::elements(p_.value_dim), panel.rows);
  }

  // Whether all other tasks of the block have gathered their part: it can be read from here on.
  bool is_last_to_arrive(int64_t block) const {
    return __atomic_add_fetch(p_.arrivals + block, 1, __ATOMIC_ACQ_REL) == p_.key_splits;
  }

  void merge_splits(QueryPanel<Precision>& panel, int64_t head) {
    panel.sums = gathered(panel, head, 0);
    for (int64_t split = 1; split < p_.key_splits; ++split) {
      const RunningSums<T> other = gathered(panel, head, split);
      for (int64_t lane = 0; lane < panel.vectors() * kLanes<T>; lane += kLanes<T>)
        merge<Div>(panel.sums, other, lane, p_.value_dim);
    }
  }

  void start(QueryPanel<Precision>& panel, int64_t b, int64_t h, int64_t first_row) {
    const int64_t rows = min(p_.query_length - first_row, P);
    panel.first_row = first_row;
    panel.rows = rows;
    Precision::read_panel(p_.query, b, h, first_row, rows, p_.head_dim, p_.scale, query_rows_,
                          panel.query);
    if constexpr (Div::kTeacher)
      Precision::read_panel(p_.teacher_query, b, h, first_row, rows, p_.teacher_dim,
                            p_.teacher_scale, query_rows_, panel.teacher_query);
    fill(panel.teacher_start, P, T(0));
    if constexpr (Div::kTeacher && kTeacherLse) {
      const T* lse = given_teacher_lse(b, h, first_row);
      for (int64_t row = 0; row < rows; ++row)
        panel.teacher_start[row] = T(p_.group_shift()) - T(kLog2e) * lse[row];
    }
  }

  void tile(QueryPanel<Precision>& panel, int64_t keys) {
    const int64_t vectors = panel.vectors();
    bias_.mark_seen(panel.sums.seen, keys, vectors);
    key_.clear_hidden(bias_, 0, keys);
    teacher_key_.clear_hidden(bias_, 0, keys, p_.teacher_keys(1));
    value_.clear_hidden(bias_, 0, keys);
    const LogitSource<T> student = student_logits(panel, keys, 0, vectors);
    LogitSource<T> teacher{teacher_logits_, 1, zeros_};
    if constexpr (Div::kTeacher)
      teacher = logit_products<Precision>(keys, p_.teacher_keys(1), vectors, p_.teacher_dim,
                                          teacher_key_.rows(0), panel.teacher_query,
                                          p_.teacher_scale, panel.teacher_start, zeros_, bias_,
                                          teacher_logits_, panel.rows);
    bool risen = false;
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
      const auto kept = dropout_.apply(probabilities_.lanes(logits_, lane), lane);
      bool search = panel.tiles_to_search > 0;
      while (!sweep<Div, kTeacherLse, Precision>(student.at(lane), teacher.at(lane), keys, search,
                                                 panel.sums, lane, p_.value_dim, kept)) {
        search = risen = true;
        student_logits(panel, keys, lane, 1);  // which may have become probabilities
      }
    }
    panel.tiles_to_search = risen ? kSearchedTiles : max(panel.tiles_to_search - 1, 0);
    columns_times_panel(p_.value_dim, vectors, panel.rows, Precision::depth(keys),
                        value_.columns(0), probabilities_.right(logits_), panel.sums.output);
  }

  LogitSource<T> student_logits(const QueryPanel<Precision>& panel, int64_t keys, int64_t lane,
                                int64_t vectors) {
    return logit_products<Precision>(keys, 1, vectors, p_.head_dim, key_.rows(0),
                                     panel.query + lane, p_.scale, zeros_, zeros_, bias_,
                                     logits_ + lane, panel.rows, lane);
  }

  void finish(const QueryPanel<Precision>& panel, int64_t b, int64_t h) {
    const int64_t at = (b * p_.heads + h) * p_.query_length + panel.first_row;
    const RunningSums<T>& sums = panel.sums;
    T factor[P];
    for (int64_t row = 0; row < panel.rows; ++row) {
      const bool sees_no_key = sums.seen[row] == 0;
      const double sum = RunningSums<T>::total(sums.sum, sums.sum_rest, row);
      const T inverse_sum = sees_no_key ? T(0) : static_cast<T>(1 / sum);
      const T operand_sum = Precision::kRoundsTiles ? sums.rounded_sum[row] : static_cast<T>(sum);
      factor[row] = sees_no_key ? T(0) : static_cast<T>(p_.dropout.keep_factor) / operand_sum;
      static_cast<T*>(p_.origin)[at + row] =
          sums.origin[row] == kMasked<T> ? T(0) : sums.origin[row];
      static_cast<T*>(p_.inverse_sum)[at + row] = inverse_sum;
      static_cast<T*>(p_.correction)[at + row] = 0;
      // In double: the divergence is a small difference of these logarithms.
      const double log_sum = __builtin_log2(sum);
      const double lse = sees_no_key ? -__builtin_inf() : sums.origin[row] + log_sum;
      static_cast<T*>(p_.lse)[at + row] = static_cast<T>(kLn2 * lse);
      if constexpr (Div::kTeacher) finish_divergence(panel, row, at, sees_no_key, sum, log_sum);
    }
    transpose_from_panel(sums.output, panel.rows, p_.value_dim, factor, rows_, p_.value_dim);
    store_rows(rows_, p_.value_dim, T(1), p_.output, b, h, panel.first_row, panel.rows,
               p_.value_dim);
  }

  void finish_divergence(const QueryPanel<Precision>& panel, int64_t row, int64_t at,
                         bool sees_no_key, double sum, double log_sum) {
    const RunningSums<T>& sums = panel.sums;
    const double weighted = RunningSums<T>::total(sums.weighted, sums.weighted_rest, row);
    const double teacher_sum = RunningSums<T>::total(sums.teacher_sum, sums.teacher_sum_rest, row);
    // What the teacher's logits were measured from, and what the backward pass will measure them
    // from but for roundings of its own: the LSE as it is stored.
    double origin, teacher_log_sum, stored_lse;
    if constexpr (kTeacherLse) {
      origin = -static_cast<double>(panel.teacher_start[row]);
      stored_lse =
          kLog2e * static_cast<const T*>(p_.given_teacher_lse)[at + row] - p_.group_shift();
      teacher_log_sum = stored_lse - origin;
    } else {
      origin = sums.teacher_origin[row];
      teacher_log_sum = __builtin_log2(teacher_sum);
      const double lse = kLn2 * (origin + teacher_log_sum + p_.group_shift());
      const T rounded = sees_no_key ? static_cast<T>(-__builtin_inf()) : static_cast<T>(lse);
      stored_lse = kLog2e * rounded - p_.group_shift();
      static_cast<T*>(p_.teacher_lse)[at + row] = rounded;
      if (p_.teacher_lse_rest)
        static_cast<T*>(p_.teacher_lse_rest)[at + row] = static_cast<T>(lse - rounded);
    }
    if (sees_no_key) {
      static_cast<T*>(p_.kl)[at + row] = 0;
      return;
    }
    static_cast<T*>(p_.kl)[at + row] =
        static_cast<T>(kLn2 * Div::finish(weighted, sum, teacher_sum, log_sum, teacher_log_sum));
    static_cast<T*>(p_.correction)[at + row] =
        static_cast<T>(Div::correction(weighted, sum, stored_lse - origin));
  }

  const ForwardProblem& p_;
  QueryPanel<Precision> panels_[cpu::kMaxPanelsPerTask];
  int64_t count_ = 0, block_ = -1;  // how many of them are in use, and for which block of rows
  const int64_t tile_keys_;
  T* rows_;
  typename Precision::Element* query_rows_;
  T* zeros_;
  Keys key_, teacher_key_, value_;
  T *logits_, *teacher_logits_;
  typename Precision::template Tile<Side::right> probabilities_;
  Bias<T> bias_;
  Dropout<T> dropout_;
};

template <class Div, bool kTeacherLse, class Precision>
void forward_tasks(const ForwardProblem& problem, int64_t begin, int64_t end) {
  using T = typename Precision::Number;
  with_worker<ForwardWorker<Div, kTeacherLse, Precision>, T>(problem, [&](auto& worker) {
    for (int64_t task = begin; task < end; ++task)
      worker.run(task / problem.key_splits, task % problem.key_splits);
  });
}

template <class Precision>
void forward_at(const ForwardProblem& problem, int64_t begin, int64_t end) {
  visit_one_pass_divergence(problem.divergence, [&](auto divergence) {
    using Div = decltype(divergence);
    if constexpr (Div::kTeacher)
      if (!problem.given_teacher_lse)
        return forward_tasks<Div, false, Precision>(problem, begin, end);
    forward_tasks<Div, true, Precision>(problem, begin, end);
  });
}

template <class T>
void forward(const ForwardProblem& problem, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float))
    if (all_bfloat16(problem)) return forward_at<PairPrecision>(problem, begin, end);
#endif
  forward_at<FullPrecision<T>>(problem, begin, end);
}

}  // namespace attn_kd::ATTN_KD_ISA
