// Forward pass: attention output, log-sum-exp and reverse_kl of a block of query rows, in one sweep
// over the keys.
//
//   S = Q K^T,  T = Qt Kt^T,  p = 2^(s - m),  l += p,  O += P V,  w += p (s - t)
//
// s and t in base 2, m the running maximum of s; with the teacher's LSE given, t is measured from
// it and p is the one exponential, else from a running maximum of its own with a sum of its own.
// At the end kl = ln2 (w / l - log2 l + log2 lt). Whenever an origin moves, w moves with it.
#pragma once

#include "stream.cuh"

namespace attn_kd::cuda {

enum class Teacher { none, known_lse, unknown_lse };

// The running sums of a row: the maxima as all its lanes know them, the others of one lane's
// columns.
template <Teacher kTeacher>
struct RowSums {
  float max = kMasked;  // highest logit seen
  float sum = 0;        // of p
  float weighted = 0;   // of p (s - t)
  float teacher_max;    // or what t is measured from for good
  float teacher_sum = 0;

  static constexpr int kNumbers = kTeacher == Teacher::none ? 2 : 5;  // in use, at most

  // Calls visit(x) for those that are in use.
  template <class Visitor>
  __device__ __forceinline__ void for_each(Visitor&& visit) {
    visit(max);
    visit(sum);
    if constexpr (kTeacher != Teacher::none) visit(weighted);
    if constexpr (kTeacher == Teacher::unknown_lse) visit(teacher_max);
    if constexpr (kTeacher == Teacher::unknown_lse) visit(teacher_sum);
  }

  // Measures the sums from maxima that are at least their own; returns what p shrinks by.
  __device__ __forceinline__ float move(float new_max, float new_teacher_max) {
    const float rise = max - new_max, shrink = device::exp2_approx(rise);
    if constexpr (kTeacher != Teacher::none) {
      const float teacher_rise = teacher_max - new_teacher_max;
      weighted = (weighted + (rise - teacher_rise) * sum) * shrink;
      if constexpr (kTeacher == Teacher::unknown_lse)
        teacher_sum *= device::exp2_approx(teacher_rise);
      teacher_max = new_teacher_max;
    }
    sum *= shrink;
    max = new_max;
    return shrink;
  }
};

// The two rows of a lane, with their outputs before division by the sum.
template <class S, Teacher kTeacher>
struct RunningSums {
  RowSums<kTeacher> rows[2];
  typename S::Sums output = {};
};

// What to measure logits from whose maximum is `max`: where nothing was visible yet, 0, which
// leaves hidden logits low enough to vanish.
__device__ __forceinline__ float origin_of(float max) { return max == kMasked ? 0 : max; }

template <int kFragments>
__device__ __forceinline__ float highest_of_row(const float (&scores)[kFragments][4], int r) {
  float highest = kMasked;
#pragma unroll
  for (int n = 0; n < kFragments; ++n)
    highest = fmaxf(highest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
  return max_of_row(highest);
}

// scores * scale + bias, in base 2
template <int kFragments>
__device__ __forceinline__ void scale_and_mask(float (&scores)[kFragments][4], float scale,
                                               const float* bias, const Place& place) {
#pragma unroll
  for (int n = 0; n < kFragments; ++n) {
    const float2 both =
        device::read_shared(reinterpret_cast<const float2*>(bias + 8 * n + 2 * place.pair));
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = fmaf(scores[n][i], scale, i % 2 ? both.y : both.x);
  }
}

// Turns the logits of a tile into p = 2^(s - max) and adds them to the sums, all but the output.
template <class S, Teacher kTeacher>
__device__ __forceinline__ void add_logits(MapPart<S::kWarpColumns>& logits,
                                           const MapPart<S::kWarpColumns>& teacher_logits,
                                           RunningSums<S, kTeacher>& sums) {
  float origin[2], teacher_origin[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    RowSums<kTeacher>& row = sums.rows[r];
    const float highest = fmaxf(row.max, highest_of_row(logits, r));
    float teacher_highest = row.teacher_max;
    origin[r] = origin_of(highest);
    teacher_origin[r] = teacher_highest;
    if constexpr (kTeacher == Teacher::unknown_lse) {
      teacher_highest = fmaxf(teacher_highest, highest_of_row(teacher_logits, r));
      teacher_origin[r] = origin_of(teacher_highest);
    }
    const float shrink = row.move(highest, teacher_highest);
#pragma unroll
    for (auto& fragment : sums.output) {
      fragment[2 * r] *= shrink;
      fragment[2 * r + 1] *= shrink;
    }
  }
  float sum[2] = {}, weighted[2] = {}, teacher_sum[2] = {};  // of this tile
#pragma unroll
  for (int n = 0; n < S::kWarpColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2;
      const float s = logits[n][i] - origin[r], p = device::exp2_approx(s);
      logits[n][i] = p;
      sum[r] += p;
      if constexpr (kTeacher != Teacher::none) {
        const float t = teacher_logits[n][i] - teacher_origin[r];
        weighted[r] = fmaf(p, s - t, weighted[r]);
        if constexpr (kTeacher == Teacher::unknown_lse) teacher_sum[r] += device::exp2_approx(t);
      }
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sums.rows[r].sum += sum[r];
    sums.rows[r].weighted += weighted[r];
    sums.rows[r].teacher_sum += teacher_sum[r];
  }
}

// Adds up the sums of the warps that share rows; those of the first have them all afterwards.
template <class S, Teacher kTeacher>
__device__ __forceinline__ void add_column_warps(RunningSums<S, kTeacher>& sums,
                                                 KeyStage<S> (&stages)[2], const Place& place) {
  const unsigned column_warp = place.warp / S::kRowWarps;
  Handover<S, 2 * RowSums<kTeacher>::kNumbers + S::kHeadDim / 2> theirs(stages, place);
  device::barrier();  // the stages are read no more
  if (column_warp > 0) {
    theirs.of(column_warp);
#pragma unroll
    for (auto& row : sums.rows) row.for_each([&](float x) { theirs.write(x); });
#pragma unroll
    for (int i = 0; i < S::kHeadDim / 2; ++i) theirs.write(sums.output[i / 4][i % 4]);
  }
  device::barrier();
  if (column_warp > 0) return;
#pragma unroll 1
  for (int other = 1; other < S::kColumnWarps; ++other) {
    theirs.of(other);
    RowSums<kTeacher> rows[2] = {sums.rows[0], sums.rows[1]};
    float shrink[2], their_shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r].for_each([&](float& x) { x = theirs.read(); });
      RowSums<kTeacher>& row = sums.rows[r];
      const float max = fmaxf(row.max, rows[r].max);
      const float teacher_max = kTeacher == Teacher::unknown_lse
                                    ? fmaxf(row.teacher_max, rows[r].teacher_max)
                                    : row.teacher_max;
      shrink[r] = row.move(max, teacher_max);
      their_shrink[r] = rows[r].move(max, teacher_max);
      row.sum += rows[r].sum;
      row.weighted += rows[r].weighted;
      row.teacher_sum += rows[r].teacher_sum;
    }
#pragma unroll
    for (int i = 0; i < S::kHeadDim / 2; ++i) {
      float& x = sums.output[i / 4][i % 4];
      const int r = i % 4 / 2;
      x = fmaf(theirs.read(), their_shrink[r], x * shrink[r]);
    }
  }
}

// The results of one row.
template <Teacher kTeacher>
__device__ __forceinline__ void store_row(const ForwardProblem& p, int at, bool sees_key,
                                          const RowSums<kTeacher>& sums) {
  const float log_sum = log2f(sums.sum);
  device::write_global(p.lse + at, sees_key ? kLn2 * (sums.max + log_sum) : -INFINITY);
  device::write_global(p.origin + at, sees_key ? sums.max : 0);
  device::write_global(p.inverse_sum + at, sees_key ? 1 / sums.sum : 0);
  float kl = 0, correction = 0;
  if constexpr (kTeacher != Teacher::none) {
    // By how much the teacher's LSE lies above what its logits were measured from: as it is, and as
    // the backward pass will see it. What was given is measured from its rounded product.
    float log_teacher_sum, moved = 0;
    if constexpr (kTeacher == Teacher::unknown_lse) {
      log_teacher_sum = log2f(sums.teacher_sum);
      const float lse = kLn2 * (sums.teacher_max + log_teacher_sum);
      moved = kLog2e * lse - sums.teacher_max;
      device::write_global(p.teacher_lse + at, sees_key ? lse : -INFINITY);
    } else {
      log_teacher_sum =
          fmaf(kLog2e, device::read_global(p.given_teacher_lse + at), -sums.teacher_max);
    }
    const float mean = sums.weighted / sums.sum;
    kl = sees_key ? kLn2 * (mean - log_sum + log_teacher_sum) : 0;
    correction = sees_key ? kLn2 * (mean + moved) : 0;
    device::write_global(p.kl + at, kl);
  }
  device::write_global(p.correction + at, correction);
}

template <class S, Teacher kTeacher>
__device__ __forceinline__ void store_results(const ForwardProblem& p,
                                              RunningSums<S, kTeacher>& sums, bool sees_key) {
  const Place place;
  const int length = p.problem.query_length;
  const BlockRows<S> rows(p.problem, device::block_index(), length, place);
  if (place.warp >= S::kRowWarps) return;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    RowSums<kTeacher>& row_sums = sums.rows[r];
    row_sums.sum = sum_of_row(row_sums.sum);
    row_sums.weighted = sum_of_row(row_sums.weighted);
    row_sums.teacher_sum = sum_of_row(row_sums.teacher_sum);
    factor[r] = sees_key ? 1 / row_sums.sum : 0;
    const int row = rows.first + place.row + 8 * r;
    if (row < length && place.pair == 0) store_row(p, rows.head * length + row, sees_key, row_sums);
  }
  store_rows<S>(p.output, rows.b, rows.h, rows.first, length, sums.output, factor, place);
}

template <class S, Teacher kTeacher>
__global__ void __launch_bounds__(kThreads, 2)
    attention_kl_forward(const __grid_constant__ ForwardProblem p) {
  using T = typename S::Element;
  constexpr bool kHasTeacher = kTeacher != Teacher::none;
  const Problem& problem = p.problem;
  const int length = problem.query_length;
  const Place place;
  const BlockRows<S> rows(problem, device::block_index(), length, place);
  const int row = rows.first + place.row;
  const bool exists[2] = {row < length, row + 8 < length};
  RowFragments<S> query, teacher_query;
  query.load(Rows<T>(problem.query, rows.b, rows.h), rows.first, place, exists);
  if constexpr (kHasTeacher)
    teacher_query.load(Rows<T>(problem.teacher_query, rows.b, rows.h), rows.first, place, exists);
  RunningSums<S, kTeacher> sums;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sums.rows[r].teacher_max = kTeacher == Teacher::unknown_lse ? kMasked : 0;
    if (kTeacher == Teacher::known_lse && exists[r])
      sums.rows[r].teacher_max =
          kLog2e * device::read_global(p.given_teacher_lse + rows.head * length + row + 8 * r);
  }

  auto& stages = device::shared_storage<KeyStage<S>[2]>();
  KeyStream<S, kHasTeacher> keys(problem, rows.b, rows.h, place);
  const int first_column = place.warp / S::kRowWarps * S::kWarpColumns;
  const bool sees_key = sweep<S>(keys, stages, problem.key_length, [&](const KeyStage<S>& stage) {
    MapPart<S::kWarpColumns> logits, teacher_logits;
    const float* bias = stage.bias + first_column;
    multiply_transposed(logits, query, stage.main, first_column, place);
    scale_and_mask(logits, problem.scale, bias, place);
    if constexpr (kHasTeacher) {
      multiply_transposed(teacher_logits, teacher_query, stage.teacher, first_column, place);
      scale_and_mask(teacher_logits, problem.teacher_scale, bias, place);
    }
    add_logits(logits, teacher_logits, sums);
    multiply<S>(sums.output, logits, stage.value, first_column, place);
  });
  add_column_warps(sums, stages, place);
  store_results(p, sums, sees_key);
}

}  // namespace attn_kd::cuda
