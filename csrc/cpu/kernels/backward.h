// Backward pass: gradients of query, key and value through output, divergence and log-sum-exp.
//
// A task owns a range of keys of one (batch, head) and runs over all queries, a panel at a time,
// with tiles kept transposed as in the forward pass. The six products, none of which transposes a
// tile:
//   S = K Qt,  T = Kt Qtt,  dP = V dOt,  dQ panel += Kt dS,  dV += A dO,  dK += dS Q
// dK and dV belong to the task alone; dQ is summed over a (batch, head)'s tasks afterwards, in
// order.
#pragma once

#include "backward_tasks.h"
#include "divergence.h"
#include "dropout.h"
#include "exp2.h"
#include "gradients.h"

namespace attn_kd::ATTN_KD_ISA {

// Keys of a backward tile: a multiple of the micro-kernels' rows; three tiles are 36 KiB.
inline constexpr int64_t kBackwardKeys = 48;

// P = 2^logits and dS = P (dP + offset + divergence part) of one vector of lanes, each to its
// place: logits are measured from the rows' origins, teacher logits from the rows' LSEs. Everything
// that P is multiplied by has the rows' inverse sums folded in.
template <class Div, class Precision, class T, class Lanes, class GradLanes>
inline void grad_sweep(LogitSource<T> student, LogitSource<T> teacher, const T* grad_probability,
                       int64_t keys, vec<T> offset, vec<T> slope, Lanes probability,
                       GradLanes grad_logits) {
  const vec<T> start = load(student.start);
  vec<T> teacher_start{};
  if constexpr (Div::kTeacher) teacher_start = load(teacher.start);
  const auto next = [&](int64_t key) __attribute__((always_inline)) {
    const int64_t at = key * kPanel<T>;
    const vec<T> s = Precision::logit(load(student.numbers + at), student.factor, start);
    const vec<T> p = Precision::power(s);
    const vec<T> dp = load(grad_probability + at) + offset;
    vec<T> ds = p * dp;
    if constexpr (Div::kTeacher) {
      const vec<T> t = Precision::logit(load(teacher.numbers + at), teacher.factor, teacher_start);
      vec<T> b{};
      if constexpr (Div::kTeacherProbability) b = Precision::power(t);
      ds = Div::grad_logit(p, b, s - t, dp, slope);
    }
    return KeyOfMaps<T>{p, ds};
  };
  put_keys(keys, next, probability, grad_logits);
}

template <class Div, class Precision>
class BackwardWorker {
  using T = typename Precision::Number;
  using Element = typename Precision::Element;
  using Keys = typename Precision::Keys;

 public:
  static constexpr int64_t kRows = kPanel<T>;

  BackwardWorker(const BackwardProblem& problem, Scratch<T>& scratch)
      : p_(problem),
        chunk_(chunk_keys(problem)),
        tile_keys_(min(kBackwardKeys, chunk_)),
        gradients_(problem, 1, chunk_, scratch),
        key_(p_.key, p_.head_dim, chunk_, hides_keys(), Keys::Use::both, scratch),
        teacher_key_(p_.teacher_key, p_.teacher_dim, p_.teacher_keys(chunk_), hides_keys(),
                     Keys::Use::rows, scratch),
        value_(p_.value, gradients_.value_dim(), chunk_, hides_keys(), Keys::Use::rows, scratch),
        panel_rows_(Precision::take(scratch, kRows * max(p_.head_dim, p_.teacher_dim))),
        query_(Precision::take(scratch, kRows * Precision::depth(p_.head_dim))),
        teacher_query_(Precision::take(scratch, kRows * Precision::depth(p_.teacher_dim))),
        logits_(scratch.take(kRows * tile_keys_)),
        teacher_logits_(scratch.take(Div::kTeacher ? kRows * p_.teacher_keys(tile_keys_) : 0)),
        grad_probability_(scratch.take(kRows * tile_keys_)),
        probability_(scratch, tile_keys_),
        grad_logits_(scratch, tile_keys_),
        zeros_(scratch.take(kRows)),
        minus_origin_(scratch.take(kRows)),
        minus_teacher_origin_(scratch.take(kRows)),
        slope_(scratch.take(kRows)),
        bias_(problem.mask, scratch, tile_keys_),
        dropout_(problem.dropout, scratch, tile_keys_) {}

  // See key_range, which calls these.
  int64_t chunk() const { return chunk_; }
  int64_t tile_keys() const { return tile_keys_; }

  void start_keys(const Block& at) {
    fill(zeros_, kRows, T(0));
    key_.read(at.b, at.h, at.first_key, at.keys);
    if constexpr (Div::kTeacher)
      teacher_key_.read(at.b, at.h, p_.teacher_keys(at.first_key), p_.teacher_keys(at.keys));
    value_.read(at.b, at.h, at.first_key, at.keys);
    gradients_.start_keys(at.keys);
  }

  void start_rows(const Block& at) {
    if constexpr (Div::kTeacher)
      Precision::read_panel(p_.teacher_query, at.b, at.h, at.first_row, at.rows, p_.teacher_dim,
                            p_.teacher_scale, panel_rows_, teacher_query_);
    Precision::read_panel(p_.query, at.b, at.h, at.first_row, at.rows, p_.head_dim, p_.scale,
                          panel_rows_, query_);
    gradients_.start_rows(0, at.b, at.h, at.first_row, at.rows);
    row_constants((at.b * p_.heads + at.h) * p_.query_length + at.first_row, at.rows);
  }

  void tile(const Block& at, int64_t key, int64_t keys) {
    if (!bias_.read(at.b, at.h, at.first_row, at.rows, at.first_key + key, keys)) return;
    const int64_t vectors = ceil_div(at.rows, kLanes<T>), group = p_.teacher_keys(1);
    dropout_.draw(at.b * p_.heads + at.h, at.first_row, at.first_key + key, keys, vectors);
    key_.clear_hidden(bias_, key, keys);
    teacher_key_.clear_hidden(bias_, key, keys, group);
    value_.clear_hidden(bias_, key, keys);
    const LogitSource<T> student =
        logit_products<Precision>(keys, 1, vectors, p_.head_dim, key_.rows(key), query_, p_.scale,
                                  minus_origin_, zeros_, bias_, logits_, at.rows);
    LogitSource<T> teacher{teacher_logits_, 1, zeros_};
    if constexpr (Div::kTeacher)
      teacher = logit_products<Precision>(
          keys, group, vectors, p_.teacher_dim, teacher_key_.rows(group * key), teacher_query_,
          p_.teacher_scale, minus_teacher_origin_, zeros_, bias_, teacher_logits_, at.rows);
    gradients_.multiply_values(0, value_.rows(key), keys, at.rows, grad_probability_);
    dropout_.apply(grad_probability_, keys, vectors);
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>)
      grad_sweep<Div, Precision>(student.at(lane), teacher.at(lane), grad_probability_ + lane, keys,
                                 load(gradients_.offset(0) + lane), load(slope_ + lane),
                                 dropout_.apply(probability_.lanes(logits_, lane), lane),
                                 grad_logits_.lanes(grad_probability_, lane));
    gradients_.add(0, key, keys, at.rows, key_.columns(key), probability_.left(logits_),
                   grad_logits_.left(grad_probability_), grad_logits_.right(grad_probability_));
  }

  void finish_rows(const Block& at, int64_t partial, bool first_keys) {
    gradients_.finish_rows(0, partial, at.h, at.first_row, at.rows, first_keys);
  }

  void finish_keys(const Block& at) { gradients_.store_keys(0, at.b, at.h, at.first_key, at.keys); }

 private:
  // Chunks of one size, as large as kChunkBytes allows: a short last one would cost as many panels.
  static int64_t chunk_keys(const BackwardProblem& p) {
    const int64_t gradients = round_up(p.head_dim, kLanes<T>) + round_up(p.value_dim, kLanes<T>);
    const int64_t operands = p.head_dim + p.value_dim + p.teacher_keys(p.teacher_dim);
    const int64_t bytes = (gradients + operands) * static_cast<int64_t>(sizeof(T));
    const int64_t affordable = max(cpu::kChunkBytes / bytes, kBackwardKeys);
    const int64_t keys = ceil_div(p.key_length, p.key_splits);
    const int64_t equal = ceil_div(keys, ceil_div(keys, affordable));
    return min(keys, round_up(equal, kBackwardKeys));
  }
  bool hides_keys() const { return Bias<T>::hides_keys(p_.mask); }

  // Per row: what of dS does not depend on the key, and the inverse sum, which goes into whatever
  // the row's probabilities are multiplied by or, where that must not be touched, into their
  // exponent. Rows that see no key get zeros, and so do lanes without a row, one of which a product
  // of two rows at a time reads; their logits are masked, whatever a mask adds to them.
  void row_constants(int64_t at, int64_t rows) {
    for (int64_t lane = 0; lane < rows; lane += kLanes<T>) {
      const auto read = [&](const void* x) { return row_lanes<T>(x, at + lane, rows - lane); };
      const vec<T> inverse_sum = read(p_.inverse_sum);
      const auto sees = inverse_sum != T(0);
      const auto [factor, exponent] = Precision::split(inverse_sum);
      vec<T> offset = load(gradients_.offset(0) + lane);
      if constexpr (Div::kTeacher) {
        const vec<T> grad = read(p_.grad_kl);
        vec<T> slope{}, minus_origin = broadcast(kMasked<T>);
        for (int64_t i = 0; i < kLanes<T> && lane + i < rows; ++i) {
          // In double: what is rounded here is common to all keys of the row.
          const auto* lses = static_cast<const T*>(p_.teacher_lse);
          const auto* corrections = static_cast<const T*>(p_.correction);
          const double lse = kLog2e * lses[at + lane + i] - p_.group_shift();
          const double correction = corrections[at + lane + i] + kLn2 * exponent[i];
          const T origin = static_cast<T>(Div::teacher_origin(lse, correction));
          if (sees[i]) minus_origin[i] = -origin;
          offset[i] += static_cast<T>(Div::row_offset(grad[i], correction, origin - lse));
          slope[i] = static_cast<T>(Div::row_slope(grad[i], factor[i], origin - lse));
        }
        store<T>(minus_teacher_origin_ + lane, minus_origin);
        store<T>(slope_ + lane, sees ? slope : vec<T>{});
      }
      store<T>(minus_origin_ + lane, sees ? exponent - read(p_.origin) : broadcast(kMasked<T>));
      store<T>(gradients_.offset(0) + lane, sees ? offset * factor : vec<T>{});
    }
  }

  const BackwardProblem& p_;
  const int64_t chunk_, tile_keys_;
  Gradients<Precision> gradients_;
  Keys key_, teacher_key_, value_;
  Element *panel_rows_, *query_, *teacher_query_;
  T *logits_, *teacher_logits_, *grad_probability_;
  typename Precision::template Tile<Side::left> probability_;
  typename Precision::template Tile<Side::both> grad_logits_;
  T *zeros_, *minus_origin_, *minus_teacher_origin_, *slope_;
  Bias<T> bias_;
  Dropout<T> dropout_;
};

template <class Precision>
void backward_at(const BackwardProblem& problem, int64_t begin, int64_t end) {
  visit_one_pass_divergence(problem.divergence, [&](auto divergence) {
    using Worker = BackwardWorker<decltype(divergence), Precision>;
    backward_tasks<Worker, typename Precision::Number>(problem, begin, end);
  });
}

template <class T>
void backward(const BackwardProblem& problem, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float))
    if (gradients_of_bfloat16(problem)) return backward_at<PairPrecision>(problem, begin, end);
#endif
  backward_at<FullPrecision<T>>(problem, begin, end);
}

}  // namespace attn_kd::ATTN_KD_ISA
