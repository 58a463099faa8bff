// Second forward pass of the divergences that need the maps themselves: js, mse, and all of them on
// head-averaged maps. The first is the ordinary forward pass of every head (forward.h).
//
// A task takes a panel of query rows of a group of heads through the keys, and sums the row's
// divergence D = sum_j phi(a_j, b_j) and, per head, the correction c_h = sum_j a_hj dphi/da_j.
#pragma once

#include "divergence.h"
#include "group_maps.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::ForwardProblem;

// The sums of a panel's rows, in double: over many keys a float would drop what `renormalised` is
// there to keep.
struct GroupSums {
  double divergence[kPanel<float>], student[kPanel<float>], teacher[kPanel<float>];
};

// Adds a tile's sums of one vector of lanes.
template <class T>
inline void add_lanes(double* sums, vec<T> of_tile) {
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store<T>(lanes, of_tile);
  for (int lane = 0; lane < kLanes<T>; ++lane) sums[lane] += static_cast<double>(lanes[lane]);
}

// Adds one vector of lanes' phi(a, b), a and b to the sums, and leaves the slopes.
template <class Div, class Maps>
void value_sweep(Maps& maps, int64_t keys, int64_t lane, GroupSums& sums) {
  using T = typename Maps::Number;
  vec<T> divergence{}, student_sum{}, teacher_sum{};
  for (int64_t at = lane; at < keys * kPanel<T>; at += kPanel<T>) {
    const Probabilities<T> key = maps.compared(at);
    student_sum += key.a;
    teacher_sum += key.b;
    divergence += Div::value(key);
    store<T>(maps.slope() + at, Div::slope(key));
  }
  add_lanes<T>(sums.divergence + lane, divergence);
  add_lanes<T>(sums.student + lane, student_sum);
  add_lanes<T>(sums.teacher + lane, teacher_sum);
}

// Adds one vector of lanes' p * slope to `correction`.
template <class T>
void correction_sweep(const T* probability, const T* slope, int64_t keys, T* correction) {
  vec<T> sum{};
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>)
    sum += load(probability + at) * load(slope + at);
  store<T>(correction, load(correction) + sum);
}

template <class Div, class Precision>
class TwoPassForwardWorker {
  using T = typename Precision::Number;

 public:
  TwoPassForwardWorker(const ForwardProblem& problem, Scratch<T>& scratch)
      : p_(problem),
        maps_(problem,
              {problem.origin, problem.inverse_sum, teacher_lse(problem), problem.teacher_lse_rest},
              scratch),
        correction_(scratch.take(maps_.heads() * P)) {}

  void rows(int64_t b, int64_t first_head, int64_t first_row) {
    const int64_t rows = min(p_.query_length - first_row, P);
    maps_.start(b, first_head, first_row, rows);
    sums_ = {};
    fill(correction_, maps_.heads() * P, T(0));
    for (int64_t first = 0; first < p_.key_length; first += maps_.tile_keys()) {
      const int64_t keys = min(p_.key_length - first, maps_.tile_keys());
      if (maps_.tile(first, keys)) add(keys);
    }
    finish(b, first_head, first_row, rows);
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static const void* teacher_lse(const ForwardProblem& p) {
    return p.given_teacher_lse ? p.given_teacher_lse : p.teacher_lse;
  }

  void add(int64_t keys) {
    for (int64_t lane = 0; lane < maps_.vectors() * kLanes<T>; lane += kLanes<T>) {
      value_sweep<Div>(maps_, keys, lane, sums_);
      for (int64_t i = 0; i < maps_.heads(); ++i)
        correction_sweep<T>(maps_.probability(i) + lane, maps_.slope() + lane, keys,
                            correction_ + i * P + lane);
    }
  }

  void finish(int64_t b, int64_t first_head, int64_t first_row, int64_t rows) {
    const int64_t groups = p_.heads / maps_.heads(), group = first_head / maps_.heads();
    T* kl = static_cast<T*>(p_.kl) + (b * groups + group) * p_.query_length + first_row;
    for (int64_t row = 0; row < rows; ++row)
      kl[row] = static_cast<T>(Div::renormalised(sums_.divergence[row], map_sums(row)));
    for (int64_t i = 0; i < maps_.heads(); ++i) {
      const int64_t at = (b * p_.heads + first_head + i) * p_.query_length + first_row;
      for (int64_t lane = 0; lane < rows; lane += kLanes<T>) {
        const vec<T> inverse_sum = row_lanes<T>(p_.inverse_sum, at + lane, rows - lane);
        const vec<T> factor = Precision::split(inverse_sum).factor;
        const vec<T> correction = factor * load(correction_ + i * P + lane);
        for (int64_t row = lane; row < min(rows, lane + kLanes<T>); ++row)
          static_cast<T*>(p_.correction)[at + row] = correction[row - lane];
      }
    }
  }

  // A given LSE is the caller's definition of the teacher's map, whatever that sums to.
  MapSums map_sums(int64_t row) const {
    const double teacher = sums_.teacher[row];
    return {.student = sums_.student[row],
            .teacher = teacher,
            .exact_student = maps_.share(row),
            .exact_teacher = p_.given_teacher_lse ? teacher : maps_.teacher_share(row)};
  }

  const ForwardProblem& p_;
  GroupMaps<Precision, Div::kLogRatio> maps_;
  GroupSums sums_;
  T* correction_;
};

template <class Precision>
void two_pass_forward_at(const ForwardProblem& problem, int64_t begin, int64_t end) {
  using T = typename Precision::Number;
  const int64_t panels = ceil_div(problem.query_length, kPanel<T>);
  const int64_t groups = problem.average_heads ? 1 : problem.heads;
  Divergences::visit(problem.divergence, [&](auto divergence) {
    using Worker = TwoPassForwardWorker<decltype(divergence), Precision>;
    with_worker<Worker, T>(problem, [&](Worker& worker) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / panels;
        worker.rows(group / groups, group % groups, task % panels * kPanel<T>);
      }
    });
  });
}

template <class T>
void two_pass_forward(const ForwardProblem& problem, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(float))
    if (all_bfloat16(problem)) return two_pass_forward_at<PairPrecision>(problem, begin, end);
#endif
  two_pass_forward_at<FullPrecision<T>>(problem, begin, end);
}

}  // namespace attn_kd::ATTN_KD_ISA
