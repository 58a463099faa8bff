// Backward pass of the divergences that need the maps themselves (see two_pass_forward.h).
//
// Per tile the maps of all heads are computed first, then the slopes phi' of their average, and
// then every head's gradient, as in backward.h:
//   dP = V dOt,  dS = P (dP - Delta + g/H (phi' - c))
#pragma once

#include "backward_tasks.h"
#include "divergence.h"
#include "dropout.h"
#include "gradients.h"
#include "group_maps.h"

namespace attn_kd::ATTN_KD_ISA {

// The slopes, and scales, of one vector of lanes.
template <class Div, class Maps>
void slope_sweep(Maps& maps, int64_t keys, int64_t lane) {
  using T = typename Maps::Number;
  for (int64_t at = lane; at < keys * kPanel<T>; at += kPanel<T>) {
    const Probabilities<T> key = maps.compared(at);
    store<T>(maps.slope() + at, Div::slope(key));
    if constexpr (Div::kLogRatio) store<T>(maps.scale() + at, key.scale);
  }
}

// P and dS = P (dP + offset + factor * phi') of one vector of lanes, each to its place; the slope
// is phi' times the scale that P lacks, which it gets.
template <bool kScaled, class T, class Lanes, class GradLanes>
void group_grad_sweep(const T* probability, const T* slope, const T* scale,
                      const T* grad_probability, int64_t keys, vec<T> offset, vec<T> factor,
                      Lanes to_probability, GradLanes to_grad_logits) {
  const auto next = [&](int64_t key) __attribute__((always_inline)) {
    const int64_t at = key * kPanel<T>;
    const vec<T> relative = load(probability + at);
    vec<T> p = relative;
    if constexpr (kScaled) p *= load(scale + at);
    const vec<T> dp = load(grad_probability + at) + offset;
    return KeyOfMaps<T>{p, p * dp + factor * (relative * load(slope + at))};
  };
  put_keys(keys, next, to_probability, to_grad_logits);
}

template <class Div, class Precision>
class TwoPassBackwardWorker {
  using T = typename Precision::Number;
  using Keys = typename Precision::Keys;

 public:
  static constexpr int64_t kRows = kPanel<T>;

  TwoPassBackwardWorker(const BackwardProblem& problem, Scratch<T>& scratch)
      : p_(problem),
        maps_(problem, {problem.origin, problem.inverse_sum, problem.teacher_lse}, scratch),
        chunk_(chunk_keys(problem, maps_.heads())),
        gradients_(problem, maps_.heads(), chunk_, scratch),
        key_(p_.key, p_.head_dim, tile_keys(), hides_keys(), Keys::Use::columns, scratch),
        value_(p_.value, gradients_.value_dim(), tile_keys(), hides_keys(), Keys::Use::rows,
               scratch),
        grad_probability_(scratch.take(kRows * tile_keys())),
        factor_(scratch.take(maps_.heads() * kRows)),
        probability_(scratch, tile_keys()),
        grad_logits_(scratch, tile_keys()),
        dropout_(problem.dropout, scratch, tile_keys()) {}

  // See key_range, which calls these.
  int64_t chunk() const { return chunk_; }
  int64_t tile_keys() const { return maps_.tile_keys(); }

  void start_keys(const Block& at) { gradients_.start_keys(at.keys); }

  void start_rows(const Block& at) {
    maps_.start(at.b, at.h, at.first_row, at.rows);
    for (int64_t i = 0; i < maps_.heads(); ++i) {
      gradients_.start_rows(i, at.b, at.h + i, at.first_row, at.rows);
      row_constants(i, at);
    }
  }

  void tile(const Block& at, int64_t key, int64_t keys) {
    if (!maps_.tile(at.first_key + key, keys)) return;
    for (int64_t lane = 0; lane < maps_.vectors() * kLanes<T>; lane += kLanes<T>)
      slope_sweep<Div>(maps_, keys, lane);
    for (int64_t i = 0; i < maps_.heads(); ++i) head_tile(i, at, key, keys);
  }

  void finish_rows(const Block& at, int64_t partial, bool first_keys) {
    for (int64_t i = 0; i < maps_.heads(); ++i)
      gradients_.finish_rows(i, partial, at.h + i, at.first_row, at.rows, first_keys);
  }

  void finish_keys(const Block& at) {
    for (int64_t i = 0; i < maps_.heads(); ++i)
      gradients_.store_keys(i, at.b, at.h + i, at.first_key, at.keys);
  }

 private:
  // Keys whose gradients are accumulated at a time. More of them spare loads of the panels; all
  // heads' gradients may take 1 MiB.
  static int64_t chunk_keys(const BackwardProblem& p, int64_t heads) {
    constexpr int64_t kKeys = 512, kElements = (int64_t{1} << 20) / static_cast<int64_t>(sizeof(T));
    const int64_t columns = round_up(p.head_dim, kLanes<T>) + round_up(p.value_dim, kLanes<T>);
    const int64_t affordable = min(kElements / (heads * columns), kKeys);
    return min(max(affordable / kGroupKeys, 1) * kGroupKeys, p.key_length);
  }
  bool hides_keys() const { return Bias<T>::hides_keys(p_.mask); }

  // Per row: what of dS does not depend on the key, and the factor of the slope. Rows that see no
  // key get zeros.
  void row_constants(int64_t i, const Block& at) {
    const int64_t first = (at.b * p_.heads + at.h + i) * p_.query_length + at.first_row;
    const int64_t of_group = p_.average_heads ? at.b * p_.query_length + at.first_row : first;
    const T share = 1 / static_cast<T>(maps_.heads());
    T* offset = gradients_.offset(i);
    for (int64_t lane = 0; lane < at.rows; lane += kLanes<T>) {
      const int64_t count = at.rows - lane;
      const vec<T> inverse_sum = row_lanes<T>(p_.inverse_sum, first + lane, count);
      const auto sees = inverse_sum != T(0);
      const vec<T> factor = Precision::split(inverse_sum).factor;
      const vec<T> grad = share * row_lanes<T>(p_.grad_kl, of_group + lane, count);
      const vec<T> own = grad * row_lanes<T>(p_.correction, first + lane, count);
      store<T>(offset + lane, sees ? factor * (load(offset + lane) - own) : vec<T>{});
      store<T>(factor_ + i * kRows + lane, sees ? factor * grad : vec<T>{});
    }
  }

  void head_tile(int64_t i, const Block& at, int64_t key, int64_t keys) {
    const int64_t vectors = maps_.vectors(), h = at.h + i, first_key = at.first_key + key;
    T* probability = maps_.probability(i);
    key_.read(at.b, h, first_key, keys);
    value_.read(at.b, h, first_key, keys);
    if (hides_keys()) {
      key_.clear_hidden(maps_.mask(i, first_key, keys), 0, keys);
      value_.clear_hidden(maps_.mask(i, first_key, keys), 0, keys);
    }
    dropout_.draw(at.b * p_.heads + h, at.first_row, first_key, keys, vectors);
    gradients_.multiply_values(i, value_.rows(0), keys, at.rows, grad_probability_);
    dropout_.apply(grad_probability_, keys, vectors);
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>)
      group_grad_sweep<Div::kLogRatio, T>(
          probability + lane, maps_.slope() + lane, maps_.scale() + lane, grad_probability_ + lane,
          keys, load(gradients_.offset(i) + lane), load(factor_ + i * kRows + lane),
          dropout_.apply(probability_.lanes(probability, lane), lane),
          grad_logits_.lanes(grad_probability_, lane));
    gradients_.add(i, key, keys, at.rows, key_.columns(0), probability_.left(probability),
                   grad_logits_.left(grad_probability_), grad_logits_.right(grad_probability_));
  }

  const BackwardProblem& p_;
  GroupMaps<Precision, Div::kLogRatio> maps_;
  const int64_t chunk_;
  Gradients<Precision> gradients_;
  Keys key_, value_;
  T *grad_probability_, *factor_;
  typename Precision::template Tile<Side::left> probability_;
  typename Precision::template Tile<Side::both> grad_logits_;
  Dropout<T> dropout_;
};

template <class Precision>
void two_pass_backward_at(const BackwardProblem& problem, int64_t begin, int64_t end) {
  Divergences::visit(problem.divergence, [&](auto divergence) {
    using Worker = TwoPassBackwardWorker<decltype(divergence), Precision>;
    backward_tasks<Worker, typename Precision::Number>(problem, begin, end);
  });
}

template <class T>
void two_pass_backward(const BackwardProblem& problem, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float))
    if (gradients_of_bfloat16(problem))
      return two_pass_backward_at<PairPrecision>(problem, begin, end);
#endif
  two_pass_backward_at<FullPrecision<T>>(problem, begin, end);
}

}  // namespace attn_kd::ATTN_KD_ISA
