// Backward pass: gradients of query, key and value through output, divergence and log-sum-exp.
//
// A task owns a range of keys of one (batch, head) and runs over all queries, a panel at a time,
// with tiles kept transposed as in the forward pass. The six products, none of which transposes a
// tile:
//   S = K Qt,  T = Kt Qtt,  dP = V dOt,  dQ panel += Kt dS,  dV += A dO,  dK += dS Q
// dK and dV belong to the task alone; dQ is summed over a (batch, head)'s tasks afterwards, in
// order.
#pragma once

#include "divergence.h"
#include "dropout.h"
#include "exp2.h"
#include "gemm.h"
#include "groups.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::BackwardProblem;
using cpu::kChunkKeys;

// Keys of a backward tile: a multiple of the micro-kernels' 6 and 12 rows; three tiles are 36 KiB.
inline constexpr int64_t kBackwardKeys = 48;

// dS = P (dP + offset + divergence part), in place: logits becomes P = 2^(S - origin), and
// grad_probability becomes dS. Everything that P is multiplied by, here and in dV, has the rows'
// inverse sums folded in: normalising the map costs nothing per element.
template <class Div, class T>
inline void grad_sweep(T* logits, const T* teacher, T* grad_probability, int64_t keys,
                       vec<T> origin, vec<T> teacher_lse, vec<T> offset, vec<T> slope) {
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>) {
    const vec<T> s = load(logits + at);
    const vec<T> p = exp2<T>(s - origin);
    store<T>(logits + at, p);
    const vec<T> dp = load(grad_probability + at) + offset;
    if constexpr (Div::kTeacher) {
      const vec<T> t = load(teacher + at);
      vec<T> b{};
      if constexpr (Div::kTeacherProbability) b = exp2<T>(t - teacher_lse);
      store<T>(grad_probability + at, Div::grad_logit(p, b, s - t, dp, slope));
    } else {
      store<T>(grad_probability + at, p * dp);
    }
  }
}

template <class Div, class T>
class BackwardWorker {
 public:
  BackwardWorker(const BackwardProblem& problem, Scratch<T>& scratch)
      : p_(problem),
        value_dim_(problem.grad_output ? problem.value_dim : 0),
        head_ld_(round_up(problem.head_dim, kLanes<T>)),
        value_ld_(round_up(value_dim_, kLanes<T>)),
        chunk_(min(kChunkKeys, problem.key_length)),
        tile_keys_(min(kBackwardKeys, chunk_)),
        key_(scratch.take(chunk_ * p_.head_dim)),
        teacher_key_(scratch.take(teacher_keys(chunk_) * p_.teacher_dim)),
        value_(scratch.take(chunk_ * value_dim_)),
        grad_key_(scratch.take(chunk_ * head_ld_)),
        grad_value_(scratch.take(chunk_ * value_ld_)),
        query_rows_(scratch.take(P * head_ld_)),
        grad_output_rows_(scratch.take(P * value_ld_)),
        rows_(scratch.take(P * widest())),
        query_(scratch.take(P * p_.head_dim)),
        teacher_query_(scratch.take(P * p_.teacher_dim)),
        grad_output_(scratch.take(P * value_dim_)),
        grad_query_(scratch.take(P * p_.head_dim)),
        logits_(scratch.take(P * tile_keys_)),
        teacher_logits_(scratch.take(Div::kTeacher ? P * teacher_keys(tile_keys_) : 0)),
        grad_probability_(scratch.take(P * tile_keys_)),
        origin_(scratch.take(P)),
        teacher_lse_(scratch.take(P)),
        offset_(scratch.take(P)),
        slope_(scratch.take(P)),
        bias_(problem.mask, scratch, tile_keys_),
        dropout_(problem.dropout, scratch, tile_keys_) {}

  void key_range(int64_t b, int64_t h, int64_t split, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += chunk_) {
      const int64_t keys = min(end - first, chunk_);
      start_chunk(b, h, first, keys);
      for (int64_t row = 0; row < p_.query_length; row += P) {
        const int64_t rows = min(p_.query_length - row, P);
        start_panel(b, h, row, rows);
        for (int64_t key = 0; key < keys; key += tile_keys_) {
          const int64_t tile_keys = min(keys - key, tile_keys_);
          if (bias_.read(b, h, row, rows, first + key, tile_keys)) {
            dropout_.draw(b * p_.heads + h, row, first + key, tile_keys, vectors_of(rows));
            tile(key, tile_keys, rows);
          }
        }
        finish_panel(split * p_.batch + b, h, row, rows, first == begin);
      }
      store_rows(grad_key_, head_ld_, T(p_.scale), p_.grad_key, b, h, first, keys, p_.head_dim);
      store_rows(grad_value_, value_ld_, T(1), p_.grad_value, b, h, first, keys, value_dim_);
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t vectors_of(int64_t rows) { return round_up(rows, kLanes<T>) / kLanes<T>; }
  int64_t teacher_keys(int64_t keys) const { return keys * p_.teacher_keys_per_key; }
  int64_t widest() const {
    const int64_t widest = head_ld_ > value_ld_ ? head_ld_ : value_ld_;
    return widest > p_.teacher_dim ? widest : p_.teacher_dim;
  }

  void start_chunk(int64_t b, int64_t h, int64_t first, int64_t keys) {
    load_rows(p_.key, b, h, first, keys, p_.head_dim, key_, p_.head_dim);
    if constexpr (Div::kTeacher)
      load_rows(p_.teacher_key, b, h, teacher_keys(first), teacher_keys(keys), p_.teacher_dim,
                teacher_key_, p_.teacher_dim);
    if (value_dim_) load_rows(p_.value, b, h, first, keys, value_dim_, value_, value_dim_);
    fill(grad_key_, keys * head_ld_, T(0));
    fill(grad_value_, keys * value_ld_, T(0));
  }

  void start_panel(int64_t b, int64_t h, int64_t row, int64_t rows) {
    if constexpr (Div::kTeacher) {
      load_rows(p_.teacher_query, b, h, row, rows, p_.teacher_dim, rows_, p_.teacher_dim);
      transpose_to_panel(rows_, p_.teacher_dim, rows, p_.teacher_dim, T(p_.teacher_scale * kLog2e),
                         teacher_query_);
    }
    load_rows(p_.query, b, h, row, rows, p_.head_dim, query_rows_, head_ld_);
    transpose_to_panel(query_rows_, head_ld_, rows, p_.head_dim, T(p_.scale * kLog2e), query_);
    fill(grad_query_, P * p_.head_dim, T(0));
    if (value_dim_) {
      load_rows(p_.output, b, h, row, rows, value_dim_, rows_, value_ld_);
      load_rows(p_.grad_output, b, h, row, rows, value_dim_, grad_output_rows_, value_ld_);
    }
    row_constants((b * p_.heads + h) * p_.query_length + row, rows);
    transpose_to_panel(grad_output_rows_, value_ld_, rows, value_dim_, T(1), grad_output_);
  }

  // Per row: what of dS does not depend on the key, and the inverse sum, which goes into the rows
  // of dO too. Lanes without a row, and rows that see no key, get an infinite origin, so that their
  // probabilities are exactly 0.
  void row_constants(int64_t at, int64_t rows) {
    const auto read = [at](const void* values, int64_t row) {
      return values ? static_cast<double>(static_cast<const T*>(values)[at + row]) : 0.0;
    };
    fill(origin_, P, static_cast<T>(__builtin_inf()));
    fill(teacher_lse_, P, static_cast<T>(__builtin_inf()));
    fill(offset_, P, T(0));
    fill(slope_, P, T(0));
    for (int64_t row = 0; row < rows; ++row) {
      T* grad_output = grad_output_rows_ + row * value_ld_;
      const double inverse_sum = read(p_.inverse_sum, row);
      if (inverse_sum == 0) {
        fill(grad_output, value_ld_, T(0));
        continue;
      }
      origin_[row] = static_cast<T>(read(p_.origin, row));
      double offset = read(p_.grad_lse, row) - dot(grad_output, rows_ + row * value_ld_, value_ld_);
      if constexpr (Div::kTeacher) {
        const double grad = read(p_.grad_kl, row);
        teacher_lse_[row] = static_cast<T>(kLog2e * read(p_.teacher_lse, row));
        offset += Div::offset(grad, read(p_.correction, row));
        slope_[row] = static_cast<T>(Div::slope(grad, inverse_sum));
      }
      offset_[row] = static_cast<T>(offset * inverse_sum);
      const T factor = static_cast<T>(inverse_sum * p_.dropout.keep_factor);
      for (int64_t column = 0; column < value_dim_; ++column) grad_output[column] *= factor;
    }
  }

  // Of two scratch rows of whole vectors.
  static double dot(const T* a, const T* b, int64_t length) {
    vec<T> products{};
    for (int64_t i = 0; i < length; i += kLanes<T>) products += load(a + i) * load(b + i);
    double sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += products[lane];
    return sum;
  }

  void tile(int64_t key, int64_t keys, int64_t rows) {
    const int64_t vectors = vectors_of(rows);
    T* k = key_ + key * p_.head_dim;
    T* tk = teacher_key_ + teacher_keys(key) * p_.teacher_dim;
    T* v = value_ + key * value_dim_;
    bias_.clear_hidden(k, keys, p_.head_dim);
    bias_.clear_hidden(tk, keys, teacher_keys(1) * p_.teacher_dim);
    bias_.clear_hidden(v, keys, value_dim_);
    gemm<false, false>(keys, vectors, p_.head_dim, Left<T>{k, p_.head_dim, 1}, query_, P, logits_,
                       P);
    bias_.add_to(logits_, keys, vectors);
    if constexpr (Div::kTeacher) {
      gemm<false, false>(teacher_keys(keys), vectors, p_.teacher_dim,
                         Left<T>{tk, p_.teacher_dim, 1}, teacher_query_, P, teacher_logits_, P);
      merge_groups(teacher_logits_, keys, teacher_keys(1), vectors);
      bias_.add_to(teacher_logits_, keys, vectors);
    }
    // With no gradient of the output the depth is 0, and the product writes zeros.
    gemm<false, false>(keys, vectors, value_dim_, Left<T>{v, value_dim_, 1}, grad_output_, P,
                       grad_probability_, P);
    dropout_.apply(grad_probability_, keys, vectors);
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>)
      grad_sweep<Div>(logits_ + lane, teacher_logits_ + lane, grad_probability_ + lane, keys,
                      load(origin_ + lane), load(teacher_lse_ + lane), load(offset_ + lane),
                      load(slope_ + lane));
    dropout_.apply(logits_, keys, vectors);
    gemm<true, true>(p_.head_dim, vectors, keys, Left<T>{k, 1, p_.head_dim}, grad_probability_, P,
                     grad_query_, P);
    gemm<false, true>(keys, head_ld_ / kLanes<T>, rows, Left<T>{grad_probability_, P, 1},
                      query_rows_, head_ld_, grad_key_ + key * head_ld_, head_ld_);
    gemm<false, true>(keys, value_ld_ / kLanes<T>, rows, Left<T>{logits_, P, 1}, grad_output_rows_,
                      value_ld_, grad_value_ + key * value_ld_, value_ld_);
  }

  void finish_panel(int64_t b, int64_t h, int64_t row, int64_t rows, bool first_chunk) {
    const T scale = T(p_.scale);
    T* dst = static_cast<T*>(p_.grad_query.data) + p_.grad_query.offset(b, h, row);
    for (int64_t i = 0; i < rows; ++i, dst += p_.grad_query.row_stride)
      for (int64_t j = 0; j < p_.head_dim; ++j) {
        const T part = scale * grad_query_[j * P + i];
        dst[j] = first_chunk ? part : dst[j] + part;
      }
  }

  const BackwardProblem& p_;
  const int64_t value_dim_, head_ld_, value_ld_, chunk_, tile_keys_;
  T *key_, *teacher_key_, *value_, *grad_key_, *grad_value_;
  T *query_rows_, *grad_output_rows_, *rows_, *query_, *teacher_query_, *grad_output_, *grad_query_;
  T *logits_, *teacher_logits_, *grad_probability_, *origin_, *teacher_lse_, *offset_, *slope_;
  Bias<T> bias_;
  Dropout<T> dropout_;
};

template <class Div, class T>
void backward_tasks(const BackwardProblem& problem, int64_t begin, int64_t end) {
  const int64_t splits = problem.key_splits, keys = problem.key_length;
  with_worker<BackwardWorker<Div, T>, T>(problem, [&](auto& worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / splits, split = task % splits;
      worker.key_range(head / problem.heads, head % problem.heads, split, keys * split / splits,
                       keys * (split + 1) / splits);
    }
  });
}

template <class T>
void backward(const BackwardProblem& problem, int64_t begin, int64_t end) {
  switch (problem.divergence) {
    case cpu::Divergence::none: return backward_tasks<NoDivergence, T>(problem, begin, end);
    case cpu::Divergence::reverse_kl: return backward_tasks<ReverseKL, T>(problem, begin, end);
    case cpu::Divergence::forward_kl: return backward_tasks<ForwardKL, T>(problem, begin, end);
    case cpu::Divergence::js:
    case cpu::Divergence::mse: return;  // take two passes
  }
}

}  // namespace attn_kd::ATTN_KD_ISA
