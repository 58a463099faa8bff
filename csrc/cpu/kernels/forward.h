// Forward pass: attention output, log-sum-exps and divergence of a panel of query rows, in one
// sweep over the keys.
//
// Tiles are kept transposed, keys by queries, one query per SIMD lane: the softmax then needs no
// horizontal operation, keys and values are read in their natural layout as the broadcast operand
//   S = K Qt,  T = Kt Qtt,  O += Vt P      (Qt, Qtt, O: panels, see tile.h)
// and nothing of the size of the attention map is ever transposed.
#pragma once

#include "divergence.h"
#include "dropout.h"
#include "exp2.h"
#include "logits.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::ForwardProblem;

// Keys of a forward tile: a multiple of the micro-kernel's 6 rows; two tiles of 96 keys by 64
// floats are 48 KiB.
inline constexpr int64_t kForwardKeys = 96;

// Keys that are summed up before they are added to the sum of their tile: a third of the rounding
// of one sum after the other.
inline constexpr int64_t kSummedKeys = 12;

// The running sums of a panel, base 2, one lane a query row.
template <class T>
struct RunningSums {
  T* max;          // largest logit seen
  T* sum;          // sum of p = 2^(s - max)
  T* weighted;     // sum of the divergence's terms
  T* teacher_max;  // the same for the teacher; 0 where its logits are measured from a given LSE
  T* teacher_sum;
  T* seen;  // 1 where the row has seen a key, which only a mask can hide

  explicit RunningSums(Scratch<T>& scratch)
      : max(scratch.take(kPanel<T>)),
        sum(scratch.take(kPanel<T>)),
        weighted(scratch.take(kPanel<T>)),
        teacher_max(scratch.take(kPanel<T>)),
        teacher_sum(scratch.take(kPanel<T>)),
        seen(scratch.take(kPanel<T>)) {}

  void reset(bool teacher_lse_given) {
    fill(max, kPanel<T>, kMasked<T>);
    fill(sum, kPanel<T>, T(0));
    fill(weighted, kPanel<T>, T(0));
    fill(teacher_max, kPanel<T>, teacher_lse_given ? T(0) : kMasked<T>);
    fill(teacher_sum, kPanel<T>, T(0));
    fill(seen, kPanel<T>, T(0));
  }
};

// Raises the running maximum of one vector of lanes to cover the tile's column; returns by how much
// earlier sums shrink.
template <class T>
inline vec<T> raise_max(const T* tile, int64_t keys, T* running_max) {
  constexpr int kChains = 4;  // a single chain of maxima would be limited by its latency
  const vec<T> before = load(running_max);
  vec<T> chain[kChains] = {before, before, before, before};
  int64_t key = 0;
  for (; key + kChains <= keys; key += kChains, tile += kChains * kPanel<T>)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i)
      chain[i] = max_or_second<T>(load(tile + i * kPanel<T>), chain[i]);
  for (; key < keys; ++key, tile += kPanel<T>) chain[0] = max_or_second<T>(load(tile), chain[0]);
  const vec<T> highest =
      max_or_second<T>(max_or_second<T>(chain[0], chain[1]), max_or_second<T>(chain[2], chain[3]));
  store<T>(running_max, highest);
  return exp2<T>(before - highest);
}

// What to subtract from logits whose maximum is `max`: where nothing was visible yet, 0, which
// leaves masked logits low enough to vanish.
template <class T>
inline vec<T> origin_of(vec<T> max) {
  return max == kMasked<T> ? vec<T>{} : max;
}

// Adds a tile's sum to what came before it, which shrinks as the maximum rises. Tiles are summed
// from zero, so that rounding errors do not grow with the number of keys.
template <class T>
inline void add_tile(T* running, vec<T> shrink, vec<T> tile_sum) {
  store<T>(running, load(running) * shrink + tile_sum);
}

// Turns the tile's logits into p = 2^(s - max) and adds them to the running sums of one vector of
// lanes. `logits` and `teacher` point at the lanes' column of the tiles.
template <class Div, bool kTeacherLse, class T>
inline void sweep(T* logits, const T* teacher, int64_t keys, const RunningSums<T>& sums,
                  int64_t lane, T* output, int64_t value_dim) {
  constexpr bool kTeacherMax = Div::kTeacher && !kTeacherLse;
  constexpr bool kTeacherSum = Div::kTeacherProbability || kTeacherMax;
  const vec<T> before = load(sums.max + lane), teacher_before = load(sums.teacher_max + lane);
  const vec<T> shrink = raise_max(logits, keys, sums.max + lane);
  const vec<T> highest = load(sums.max + lane), max = origin_of<T>(highest);
  vec<T> teacher_max{}, teacher_shrink = broadcast(T(1));
  if constexpr (kTeacherMax) {
    teacher_shrink = raise_max(teacher, keys, sums.teacher_max + lane);
    teacher_max = origin_of<T>(load(sums.teacher_max + lane));
  }
  if (!all_equal<T>(before, highest))
    for (int64_t row = 0; row < value_dim; ++row)
      store<T>(output + row * kPanel<T>, load(output + row * kPanel<T>) * shrink);

  vec<T> sum{}, weighted{}, teacher_sum{};  // of this tile
  for (int64_t first = 0; first < keys; first += kSummedKeys) {
    const int64_t end = first + kSummedKeys < keys ? first + kSummedKeys : keys;
    vec<T> part{}, weighted_part{}, teacher_part{};
    for (int64_t key = first; key < end; ++key) {
      T* at = logits + key * kPanel<T>;
      const vec<T> s = load(at) - max;
      const vec<T> p = exp2<T>(s);
      store<T>(at, p);
      part += p;
      if constexpr (Div::kTeacher) {
        vec<T> t = load(teacher + key * kPanel<T>), pt{};
        if constexpr (kTeacherMax) t -= teacher_max;
        if constexpr (kTeacherSum) {
          pt = exp2<T>(t);
          teacher_part += pt;
        }
        weighted_part += Div::term(p, pt, s - t);
      }
    }
    sum += part;
    weighted += weighted_part;
    teacher_sum += teacher_part;
  }
  if constexpr (Div::kTeacher) {
    // Earlier terms were measured from earlier origins.
    const vec<T> shift = (before - highest) - (teacher_before - load(sums.teacher_max + lane));
    store<T>(sums.weighted + lane, Div::shifted(load(sums.weighted + lane), load(sums.sum + lane),
                                                load(sums.teacher_sum + lane), shift));
    add_tile(sums.weighted + lane, Div::kTeacherProbability ? teacher_shrink : shrink, weighted);
  }
  add_tile(sums.sum + lane, shrink, sum);
  if constexpr (kTeacherSum) add_tile(sums.teacher_sum + lane, teacher_shrink, teacher_sum);
}

// Query rows on their way through the keys, one SIMD lane a row.
template <class Precision>
struct QueryPanel {
  using T = typename Precision::Number;
  typename Precision::Element *query, *teacher_query;  // [D, kPanel], [Dt, kPanel], see Precision
  T* teacher_start;  // [kPanel], the negative LSEs of the teacher where they are given, else 0
  T* output;         // [Dv, kPanel], not yet divided by the sum of probabilities
  RunningSums<T> sums;
  int64_t first_row = 0, rows = 0;

  QueryPanel(const ForwardProblem& p, Scratch<T>& scratch, int64_t index)
      : QueryPanel(p, scratch, Lanes{index < p.panels_per_task ? kPanel<T> : 0}) {}
  int64_t vectors() const { return round_up(rows, kLanes<T>) / kLanes<T>; }

 private:
  struct Lanes {
    int64_t count;  // 0 for a panel that the task does not use, which takes its sums alone
  };
  QueryPanel(const ForwardProblem& p, Scratch<T>& scratch, Lanes lanes)
      : query(Precision::take(scratch, lanes.count * Precision::depth(p.head_dim))),
        teacher_query(Precision::take(scratch, lanes.count * Precision::depth(p.teacher_dim))),
        teacher_start(scratch.take(lanes.count)),
        output(scratch.take(lanes.count * p.value_dim)),
        sums(scratch) {}
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
        teacher_key_(problem.teacher_key, problem.teacher_dim, teacher_keys(tile_keys_),
                     hides_keys(), Keys::Use::rows, scratch),
        value_(problem.value, problem.value_dim, tile_keys_, hides_keys(), Keys::Use::columns,
               scratch),
        logits_(scratch.take(tile_keys_ * P)),
        teacher_logits_(scratch.take(Div::kTeacher ? teacher_keys(tile_keys_) * P : 0)),
        rounded_rows_(Precision::take(scratch, rounded_elements())),
        rounded_columns_(Precision::take(scratch, rounded_elements())),
        bias_(problem.mask, scratch, tile_keys_),
        dropout_(problem.dropout, scratch, tile_keys_) {}

  void rows(int64_t b, int64_t h, int64_t first_row) {
    fill(zeros_, P, T(0));
    int64_t panels = 0;
    for (; panels < p_.panels_per_task && first_row < p_.query_length; ++panels, first_row += P)
      start(panels_[panels], b, h, first_row);
    for (int64_t first = 0; first < p_.key_length; first += tile_keys_) {
      const int64_t keys = min(p_.key_length - first, tile_keys_);
      key_.read(b, h, first, keys);
      if constexpr (Div::kTeacher) teacher_key_.read(b, h, teacher_keys(first), teacher_keys(keys));
      value_.read(b, h, first, keys);
      for (int64_t i = 0; i < panels; ++i)
        if (bias_.read(b, h, panels_[i].first_row, panels_[i].rows, first, keys)) {
          dropout_.draw(b * p_.heads + h, panels_[i].first_row, first, keys, panels_[i].vectors());
          tile(panels_[i], keys);
        }
    }
    for (int64_t i = 0; i < panels; ++i) finish(panels_[i], b, h);
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static_assert(cpu::kMaxPanelsPerTask == 4, "panels_ is initialised by hand");
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  int64_t teacher_keys(int64_t keys) const { return keys * p_.teacher_keys_per_key; }
  bool hides_keys() const { return Bias<T>::hides_keys(p_.mask); }
  // Of a tile that is rounded: pairs of rows, so an even number of them.
  int64_t rounded_elements() const {
    return Precision::kFoldFactors ? 0 : round_up(tile_keys_, 2) * P / 2;
  }
  static int64_t widest(const ForwardProblem& p) {
    return p.head_dim > p.teacher_dim ? p.head_dim : p.teacher_dim;
  }

  const T* given_teacher_lse(int64_t b, int64_t h, int64_t first_row) const {
    return static_cast<const T*>(p_.given_teacher_lse) + (b * p_.heads + h) * p_.query_length +
           first_row;
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
    fill(panel.output, P * p_.value_dim, T(0));
    panel.sums.reset(kTeacherLse);
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
    teacher_key_.clear_hidden(bias_, 0, keys, teacher_keys(1));
    value_.clear_hidden(bias_, 0, keys);
    logit_tile<Precision>(keys, 1, vectors, p_.head_dim, key_.rows(0), panel.query, p_.scale,
                          zeros_, zeros_, bias_, logits_);
    if constexpr (Div::kTeacher)
      logit_tile<Precision>(keys, teacher_keys(1), vectors, p_.teacher_dim, teacher_key_.rows(0),
                            panel.teacher_query, p_.teacher_scale, panel.teacher_start, zeros_,
                            bias_, teacher_logits_);
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>)
      sweep<Div, kTeacherLse>(logits_ + lane, teacher_logits_ + lane, keys, panel.sums, lane,
                              panel.output + lane, p_.value_dim);
    dropout_.apply(logits_, keys, vectors);
    Precision::as_rows(logits_, keys, vectors, rounded_rows_);
    gemm<true, Sum::onto, P>(
        p_.value_dim, vectors, Precision::depth(keys), value_.columns(0),
        Precision::as_columns(logits_, keys, vectors, rounded_rows_, rounded_columns_),
        panel.output);
  }

  void finish(const QueryPanel<Precision>& panel, int64_t b, int64_t h) {
    const int64_t at = (b * p_.heads + h) * p_.query_length + panel.first_row;
    const RunningSums<T>& sums = panel.sums;
    T factor[P];
    for (int64_t row = 0; row < panel.rows; ++row) {
      const bool sees_no_key = sums.seen[row] == 0;
      const T inverse_sum = sees_no_key ? T(0) : 1 / sums.sum[row];
      factor[row] = inverse_sum * static_cast<T>(p_.dropout.keep_factor);
      static_cast<T*>(p_.origin)[at + row] = sums.max[row] == kMasked<T> ? T(0) : sums.max[row];
      static_cast<T*>(p_.inverse_sum)[at + row] = inverse_sum;
      static_cast<T*>(p_.correction)[at + row] = 0;
      // In double: the divergence is a small difference of these logarithms.
      const double sum = static_cast<double>(sums.sum[row]), log_sum = __builtin_log2(sum);
      const double lse = sees_no_key ? -__builtin_inf() : sums.max[row] + log_sum;
      static_cast<T*>(p_.lse)[at + row] = static_cast<T>(kLn2 * lse);
      if constexpr (Div::kTeacher) finish_divergence(panel, row, at, sees_no_key, log_sum);
    }
    transpose_from_panel(panel.output, panel.rows, p_.value_dim, factor, rows_, p_.value_dim);
    store_rows(rows_, p_.value_dim, T(1), p_.output, b, h, panel.first_row, panel.rows,
               p_.value_dim);
  }

  void finish_divergence(const QueryPanel<Precision>& panel, int64_t row, int64_t at,
                         bool sees_no_key, double log_sum) {
    const RunningSums<T>& sums = panel.sums;
    const double weighted = sums.weighted[row], sum = sums.sum[row];
    const double teacher_sum = sums.teacher_sum[row];
    // What the teacher's logits were measured from, and what the backward pass will measure them
    // from but for roundings of its own: the LSE as it is stored.
    double origin, teacher_log_sum, stored_lse;
    if constexpr (kTeacherLse) {
      origin = -static_cast<double>(panel.teacher_start[row]);
      stored_lse =
          kLog2e * static_cast<const T*>(p_.given_teacher_lse)[at + row] - p_.group_shift();
      teacher_log_sum = stored_lse - origin;
    } else {
      origin = sums.teacher_max[row];
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
  const int64_t tile_keys_;
  T* rows_;
  typename Precision::Element* query_rows_;
  T* zeros_;
  Keys key_, teacher_key_, value_;
  T *logits_, *teacher_logits_;
  typename Precision::Element *rounded_rows_, *rounded_columns_;
  Bias<T> bias_;
  Dropout<T> dropout_;
};

template <class Div, bool kTeacherLse, class Precision>
void forward_tasks(const ForwardProblem& problem, int64_t begin, int64_t end) {
  using T = typename Precision::Number;
  const int64_t rows = kPanel<T> * problem.panels_per_task;
  const int64_t tasks_per_head = (problem.query_length + rows - 1) / rows;
  with_worker<ForwardWorker<Div, kTeacherLse, Precision>, T>(problem, [&](auto& worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tasks_per_head;
      worker.rows(head / problem.heads, head % problem.heads, task % tasks_per_head * rows);
    }
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
