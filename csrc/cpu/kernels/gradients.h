// What a backward pass sums up: the gradients of a chunk of keys and values and of a panel of
// queries, of one head or of several side by side, from the tiles of dS and P that it computes.
//
//   dQ panel += Kt dS,  dK += dS Q,  dV += P dO
// dK and dV belong to the task alone; dQ is summed over a (batch, head)'s tasks afterwards, in
// order. P is divided by the sums of its rows nowhere: it is 2^(logit - origin) and the inverse
// sums are in dO and the rows' constants, or it is normalised by its exponent (see Precision).
#pragma once

#include "logits.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::BackwardProblem;

// P and dS at one key, of one vector of lanes.
template <class T>
struct KeyOfMaps {
  vec<T> p, ds;
};

// Computes `next(key)`, a KeyOfMaps, for every key of a tile and puts its halves to their places,
// by twos: rounded operands hold keys in pairs.
template <class Next, class Lanes, class GradLanes>
inline void put_keys(int64_t keys, const Next& next, Lanes probability, GradLanes grad_logits) {
  int64_t key = 0;
  for (; key + 1 < keys; key += 2) {
    const auto one = next(key), two = next(key + 1);
    probability.put(key, one.p, two.p);
    grad_logits.put(key, one.ds, two.ds);
  }
  if (key == keys) return;
  const auto last = next(key);
  probability.put(key, last.p);
  grad_logits.put(key, last.ds);
}

template <class Precision>
class Gradients {
  using T = typename Precision::Number;
  using Element = typename Precision::Element;

 public:
  Gradients(const BackwardProblem& problem, int64_t heads, int64_t chunk, Scratch<T>& scratch)
      : p_(problem),
        heads_(heads),
        chunk_(chunk),
        value_dim_(problem.grad_output ? problem.value_dim : 0),
        head_ld_(round_up(problem.head_dim, kLanes<T>)),
        value_ld_(round_up(value_dim_, kLanes<T>)),
        grad_key_(scratch.take(heads * chunk * head_ld_)),
        grad_value_(scratch.take(heads * chunk * value_ld_)),
        grad_query_(scratch.take(heads * P * problem.head_dim)),
        query_rows_(Precision::take(scratch, heads * kDepth * head_ld_)),
        grad_output_rows_(Precision::take(scratch, heads * kDepth * value_ld_)),
        grad_output_(Precision::take(scratch, heads * P * Precision::depth(value_dim_))),
        offset_(scratch.take(heads * P)),
        rows_(scratch.take(P * max(head_ld_, value_ld_))),
        numbers_(scratch.take(Precision::kFoldFactors ? 0 : P * value_ld_)),
        panel_rows_(Precision::take(scratch, Precision::kFoldFactors ? 0 : P * value_dim_)),
        zeros_(scratch.take(P)) {}

  // Of the values, 0 where no gradient reaches the output.
  int64_t value_dim() const { return value_dim_; }

  // For the next `keys` keys.
  void start_keys(int64_t keys) {
    fill(zeros_, P, T(0));
    for (int64_t i = 0; i < heads_; ++i) {
      fill(grad_key_ + i * chunk_ * head_ld_, keys * head_ld_, T(0));
      fill(grad_value_ + i * chunk_ * value_ld_, keys * value_ld_, T(0));
    }
  }

  void store_keys(int64_t i, int64_t b, int64_t h, int64_t first, int64_t keys) const {
    const T value_factor = Precision::kFoldFactors ? T(1) : T(p_.dropout.keep_factor);
    store_rows(grad_key_ + i * chunk_ * head_ld_, head_ld_, T(p_.scale), p_.grad_key, b, h, first,
               keys, p_.head_dim);
    store_rows(grad_value_ + i * chunk_ * value_ld_, value_ld_, value_factor, p_.grad_value, b, h,
               first, keys, value_dim_);
  }

  // Reads head i's rows of queries and of the output's gradient.
  void start_rows(int64_t i, int64_t b, int64_t h, int64_t first, int64_t rows) {
    Precision::read_rows(p_.query, b, h, first, rows, p_.head_dim, query_rows(i), head_ld_);
    fill(grad_query(i), P * p_.head_dim, T(0));
    T* numbers = grad_output_numbers(i);
    if (value_dim_) {
      load_rows(p_.output, b, h, first, rows, value_dim_, rows_, value_ld_);
      load_rows(p_.grad_output, b, h, first, rows, value_dim_, numbers, value_ld_);
    }
    const int64_t at = (b * p_.heads + h) * p_.query_length + first;
    for (int64_t lane = 0; lane < rows; lane += kLanes<T>)
      store<T>(offset(i) + lane, row_lanes<T>(p_.grad_lse, at + lane, rows - lane) -
                                     output_gradient(numbers, lane, rows));
    if (!value_dim_) return;
    const T* inverse_sum = static_cast<const T*>(p_.inverse_sum) + at;
    if constexpr (Precision::kFoldFactors) {
      scale_rows(numbers, inverse_sum, rows);
      transpose_to_panel(Rows<T>{numbers, value_ld_}, rows, value_dim_, T(1), grad_output(i));
    } else {
      Element* of_rows = grad_output_rows(i);
      Precision::read_rows(p_.grad_output, b, h, first, rows, value_dim_, of_rows, value_ld_);
      Precision::read_panel(p_.grad_output, b, h, first, rows, value_dim_, 1, panel_rows_,
                            grad_output(i));
      for (int64_t row = 0; row < rows; ++row)
        if (inverse_sum[row] == 0)  // sees no key: no gradient, whatever came in
          Precision::clear_row(row, value_dim_, of_rows, value_ld_, grad_output(i));
    }
  }

  // What of the rows' dP does not depend on the key: the gradient of the LSE less dO . O. The rest
  // is the divergence's.
  T* offset(int64_t i) { return offset_ + i * P; }

  // dP = V dO of a tile; with no gradient of the output the depth is 0, and it becomes zeros.
  void multiply_values(int64_t i, Left<Element> value, int64_t keys, int64_t rows, T* tile) {
    const T factor = Precision::kFoldFactors ? T(1) : T(p_.dropout.keep_factor);
    const int64_t vectors = ceil_div(rows, kLanes<T>), depth = Precision::depth(value_dim_);
    const Epilogue<T> epilogue{zeros_, factor};
    if (factor == 1)
      return rows_times_panel<Sum::plus_row>(keys, vectors, rows, depth, value, grad_output(i),
                                             tile, epilogue);
    rows_times_panel<Sum::scaled_plus_row>(keys, vectors, rows, depth, value, grad_output(i), tile,
                                           epilogue);
  }

  // Adds what the keys from `key` on, counted from the first of the chunk, contribute: a tile of
  // probabilities and one of the logits' gradients, this on either side of a product.
  void add(int64_t i, int64_t key, int64_t keys, int64_t rows, Left<Element> key_columns,
           Left<Element> probability, Left<Element> grad_logits, const Element* grad_logits_right) {
    const int64_t vectors = ceil_div(rows, kLanes<T>), depth = Precision::depth(rows);
    gemm_rows(keys, head_ld_ / kLanes<T>, depth, grad_logits, query_rows(i),
              grad_key_ + (i * chunk_ + key) * head_ld_, head_ld_);
    columns_times_panel(p_.head_dim, vectors, rows, Precision::depth(keys), key_columns,
                        grad_logits_right, grad_query(i));
    gemm_rows(keys, value_ld_ / kLanes<T>, depth, probability, grad_output_rows(i),
              grad_value_ + (i * chunk_ + key) * value_ld_, value_ld_);
  }

  // Stores the queries' gradients, those of a task's first keys, or adds them to what is there.
  void finish_rows(int64_t i, int64_t b, int64_t h, int64_t first, int64_t rows, bool first_keys) {
    T factor[P];
    fill(factor, P, T(p_.scale));
    transpose_from_panel(grad_query(i), rows, p_.head_dim, factor, rows_, head_ld_);
    T* dst = static_cast<T*>(p_.grad_query.data) + p_.grad_query.offset(b, h, first);
    const T* src = rows_;
    for (int64_t row = 0; row < rows; ++row, dst += p_.grad_query.row_stride, src += head_ld_)
      for (int64_t j = 0; j < p_.head_dim; ++j) dst[j] = first_keys ? src[j] : dst[j] + src[j];
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static constexpr int64_t kDepth = Precision::depth(P);

  Element* query_rows(int64_t i) { return query_rows_ + i * kDepth * head_ld_; }
  Element* grad_output_rows(int64_t i) { return grad_output_rows_ + i * kDepth * value_ld_; }
  Element* grad_output(int64_t i) { return grad_output_ + i * P * Precision::depth(value_dim_); }
  T* grad_query(int64_t i) { return grad_query_ + i * P * p_.head_dim; }
  T* grad_output_numbers(int64_t i) {
    if constexpr (Precision::kFoldFactors)
      return grad_output_rows(i);
    else
      return numbers_;
  }

  // dO . O of the rows from `lane` on, one lane each.
  vec<T> output_gradient(const T* numbers, int64_t lane, int64_t rows) const {
    constexpr int W = kLanes<T>;
    vec<T> products[W];
#pragma GCC unroll 16
    for (int row = 0; row < W; ++row) {
      products[row] = vec<T>{};
      const int64_t at = (lane + row) * value_ld_;
      if (lane + row < rows)
        for (int64_t j = 0; j < value_ld_; j += W)
          products[row] += load(numbers + at + j) * load(rows_ + at + j);
    }
    transpose_stages<1, T>(products);
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int row = 0; row < half; ++row) products[row] += products[row + half];
    return products[0];
  }

  void scale_rows(T* numbers, const T* inverse_sum, int64_t rows) const {
    for (int64_t row = 0; row < rows; ++row, numbers += value_ld_) {
      const T factor = inverse_sum[row] * T(p_.dropout.keep_factor);
      // Not 0 * NaN: a row that sees no key has no gradient, whatever came in.
      for (int64_t j = 0; j < value_ld_; j += kLanes<T>)
        store<T>(numbers + j, factor == 0 ? vec<T>{} : load(numbers + j) * factor);
    }
  }

  const BackwardProblem& p_;
  const int64_t heads_, chunk_, value_dim_, head_ld_, value_ld_;
  T *grad_key_, *grad_value_;  // of every head [chunk, D] and [chunk, Dv], whole vectors wide
  T* grad_query_;              // [D, kPanel]
  Element *query_rows_, *grad_output_rows_;  // [kPanel, D], [kPanel, Dv], whole vectors wide
  Element* grad_output_;                     // [Dv, kPanel]
  T* offset_;                                // [kPanel]
  T *rows_, *numbers_;                       // of one head: [kPanel, D or Dv]
  Element* panel_rows_;
  T* zeros_;
};

}  // namespace attn_kd::ATTN_KD_ISA
