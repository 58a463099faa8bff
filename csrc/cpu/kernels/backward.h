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
#include "log2.h"
#include "logits.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::BackwardProblem;
using cpu::kChunkKeys;

// Keys of a backward tile: a multiple of the micro-kernels' 6 and 12 rows; three tiles are 36 KiB.
inline constexpr int64_t kBackwardKeys = 48;

// dS = P (dP + offset + divergence part), in place: logits, measured from the rows' origins, become
// P = 2^logits, and grad_probability becomes dS; teacher logits are measured from the rows' LSEs.
// Everything that P is multiplied by, here and in dV, has the rows' inverse sums folded in:
// normalising the map costs nothing per element.
template <class Div, class T>
inline void grad_sweep(T* logits, const T* teacher, T* grad_probability, int64_t keys,
                       vec<T> offset, vec<T> slope) {
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>) {
    const vec<T> s = load(logits + at);
    const vec<T> p = exp2<T>(s);
    const vec<T> dp = load(grad_probability + at) + offset;
    vec<T> ds = p * dp;
    if constexpr (Div::kTeacher) {
      const vec<T> t = load(teacher + at);
      vec<T> b{};
      if constexpr (Div::kTeacherProbability) b = exp2<T>(t);
      ds = Div::grad_logit(p, b, s - t, dp, slope);
    }
    store<T>(logits + at, p);
    store<T>(grad_probability + at, ds);
  }
}

template <class Div, class Precision>
class BackwardWorker {
  using T = typename Precision::Number;
  using Element = typename Precision::Element;
  using Keys = typename Precision::Keys;

 public:
  BackwardWorker(const BackwardProblem& problem, Scratch<T>& scratch)
      : p_(problem),
        value_dim_(problem.grad_output ? problem.value_dim : 0),
        head_ld_(round_up(problem.head_dim, kLanes<T>)),
        value_ld_(round_up(value_dim_, kLanes<T>)),
        chunk_(chunk_keys(problem)),
        tile_keys_(min(kBackwardKeys, chunk_)),
        key_(p_.key, p_.head_dim, chunk_, hides_keys(), Keys::Use::both, scratch),
        teacher_key_(p_.teacher_key, p_.teacher_dim, teacher_keys(chunk_), hides_keys(),
                     Keys::Use::rows, scratch),
        value_(p_.value, value_dim_, chunk_, hides_keys(), Keys::Use::rows, scratch),
        grad_key_(scratch.take(chunk_ * head_ld_)),
        grad_value_(scratch.take(chunk_ * value_ld_)),
        query_rows_(Precision::take(scratch, Precision::depth(P) * head_ld_)),
        grad_output_numbers_(scratch.take(P * value_ld_)),
        grad_output_rows_(
            Precision::take_beside(grad_output_numbers_, scratch, Precision::depth(P) * value_ld_)),
        rows_(scratch.take(P * (head_ld_ > value_ld_ ? head_ld_ : value_ld_))),
        panel_rows_(Precision::take(scratch, P * widest())),
        query_(Precision::take(scratch, P * Precision::depth(p_.head_dim))),
        teacher_query_(Precision::take(scratch, P * Precision::depth(p_.teacher_dim))),
        grad_output_(Precision::take(scratch, P * Precision::depth(value_dim_))),
        grad_query_(scratch.take(P * p_.head_dim)),
        logits_(scratch.take(P * tile_keys_)),
        teacher_logits_(scratch.take(Div::kTeacher ? P * teacher_keys(tile_keys_) : 0)),
        grad_probability_(scratch.take(P * tile_keys_)),
        rounded_map_(Precision::take(scratch, rounded_elements())),
        rounded_rows_(Precision::take(scratch, rounded_elements())),
        rounded_columns_(Precision::take(scratch, rounded_elements())),
        zeros_(scratch.take(P)),
        minus_origin_(scratch.take(P)),
        minus_teacher_origin_(scratch.take(P)),
        offset_(scratch.take(P)),
        slope_(scratch.take(P)),
        bias_(problem.mask, scratch, tile_keys_),
        dropout_(problem.dropout, scratch, tile_keys_) {}

  void key_range(int64_t b, int64_t h, int64_t split, int64_t begin, int64_t end) {
    const T value_factor = Precision::kFoldFactors ? T(1) : T(p_.dropout.keep_factor);
    fill(zeros_, P, T(0));
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
      store_rows(grad_value_, value_ld_, value_factor, p_.grad_value, b, h, first, keys,
                 value_dim_);
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t vectors_of(int64_t rows) { return round_up(rows, kLanes<T>) / kLanes<T>; }
  int64_t teacher_keys(int64_t keys) const { return keys * p_.teacher_keys_per_key; }
  // Chunks of one size, as large as kChunkKeys allows: a short last one would cost as many panels.
  static int64_t chunk_keys(const BackwardProblem& p) {
    const int64_t keys = ceil_div(p.key_length, p.key_splits);
    const int64_t equal = ceil_div(keys, ceil_div(keys, kChunkKeys));
    return min(keys, round_up(equal, kBackwardKeys));
  }
  int64_t widest() const {
    const int64_t widest = p_.head_dim > value_dim_ ? p_.head_dim : value_dim_;
    return widest > p_.teacher_dim ? widest : p_.teacher_dim;
  }
  bool hides_keys() const { return Bias<T>::hides_keys(p_.mask); }
  // Of a tile that is rounded: pairs of rows, so an even number of them.
  int64_t rounded_elements() const {
    return Precision::kFoldFactors ? 0 : round_up(tile_keys_, 2) * P / 2;
  }

  void start_chunk(int64_t b, int64_t h, int64_t first, int64_t keys) {
    key_.read(b, h, first, keys);
    if constexpr (Div::kTeacher) teacher_key_.read(b, h, teacher_keys(first), teacher_keys(keys));
    value_.read(b, h, first, keys);
    fill(grad_key_, keys * head_ld_, T(0));
    fill(grad_value_, keys * value_ld_, T(0));
  }

  void start_panel(int64_t b, int64_t h, int64_t row, int64_t rows) {
    if constexpr (Div::kTeacher)
      Precision::read_panel(p_.teacher_query, b, h, row, rows, p_.teacher_dim, p_.teacher_scale,
                            panel_rows_, teacher_query_);
    Precision::read_rows(p_.query, b, h, row, rows, p_.head_dim, query_rows_, head_ld_);
    Precision::read_panel(p_.query, b, h, row, rows, p_.head_dim, p_.scale, panel_rows_, query_);
    fill(grad_query_, P * p_.head_dim, T(0));
    if (value_dim_) {
      load_rows(p_.output, b, h, row, rows, value_dim_, rows_, value_ld_);
      load_rows(p_.grad_output, b, h, row, rows, value_dim_, grad_output_numbers_, value_ld_);
    }
    row_constants((b * p_.heads + h) * p_.query_length + row, rows);
    if (!value_dim_) return;
    if constexpr (Precision::kFoldFactors) {
      transpose_to_panel(Rows<T>{grad_output_numbers_, value_ld_}, rows, value_dim_, T(1),
                         grad_output_);
    } else {
      Precision::read_rows(p_.grad_output, b, h, row, rows, value_dim_, grad_output_rows_,
                           value_ld_);
      Precision::read_panel(p_.grad_output, b, h, row, rows, value_dim_, 1, panel_rows_,
                            grad_output_);
      const T* inverse_sum =
          static_cast<const T*>(p_.inverse_sum) + (b * p_.heads + h) * p_.query_length + row;
      for (int64_t i = 0; i < rows; ++i)
        if (inverse_sum[i] == 0)  // sees no key: no gradient, whatever came in
          Precision::clear_row(i, value_dim_, grad_output_rows_, value_ld_, grad_output_);
    }
  }

  // Per row: what of dS does not depend on the key, and the inverse sum, which goes into whatever
  // the row's probabilities are multiplied by or, where that must not be touched, into their
  // exponent. Rows that see no key, whose logits are all masked, get zeros.
  void row_constants(int64_t at, int64_t rows) {
    const auto read = [&](const void* values, int64_t lane) {
      return read_lanes(static_cast<const T*>(values), at + lane, rows - lane);
    };
    const vec<T> one = broadcast(T(1));
    for (int64_t lane = 0; lane < rows; lane += kLanes<T>) {
      const vec<T> inverse_sum = read(p_.inverse_sum, lane);
      const auto sees = inverse_sum != T(0);
      const vec<T> factor = Precision::kFoldFactors ? inverse_sum : one;
      vec<T> log_factor{};
      if constexpr (!Precision::kFoldFactors) log_factor = log2<T>(sees ? inverse_sum : one);
      vec<T> offset = read(p_.grad_lse, lane) - output_gradient(lane, rows);
      if constexpr (Div::kTeacher) {
        const vec<T> grad = read(p_.grad_kl, lane);
        vec<T> slope{}, minus_origin{};
        for (int64_t i = 0; i < kLanes<T> && lane + i < rows; ++i) {
          // In double: what is rounded here is common to all keys of the row.
          const auto* lses = static_cast<const T*>(p_.teacher_lse);
          const auto* corrections = static_cast<const T*>(p_.correction);
          const double lse = kLog2e * lses[at + lane + i] - p_.group_shift();
          const double correction = corrections[at + lane + i] + kLn2 * log_factor[i];
          const T origin = static_cast<T>(Div::teacher_origin(lse, correction));
          minus_origin[i] = sees[i] ? -origin : T(0);
          offset[i] += static_cast<T>(Div::row_offset(grad[i], correction, origin - lse));
          slope[i] = static_cast<T>(Div::row_slope(grad[i], factor[i], origin - lse));
        }
        // Lanes without a row included: a product of two rows at a time reads one of them.
        store<T>(minus_teacher_origin_ + lane, minus_origin);
        store<T>(slope_ + lane, sees ? slope : vec<T>{});
      }
      store<T>(minus_origin_ + lane, log_factor - read(p_.origin, lane));
      store<T>(offset_ + lane, sees ? offset * factor : vec<T>{});
      if constexpr (Precision::kFoldFactors)
        scale_grad_output(lane, rows, inverse_sum * T(p_.dropout.keep_factor));
    }
  }

  // values[at ...] where there are any, 0 in the lanes beyond `count`.
  static vec<T> read_lanes(const T* values, int64_t at, int64_t count) {
    vec<T> lanes{};
    if (!values) return lanes;
    if (count >= kLanes<T>) return load_unaligned(values + at);
    for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = values[at + lane];
    return lanes;
  }

  // dO . O of the rows from `lane` on, one lane each.
  vec<T> output_gradient(int64_t lane, int64_t rows) const {
    constexpr int W = kLanes<T>;
    vec<T> products[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      products[i] = vec<T>{};
      const int64_t at = (lane + i) * value_ld_;
      if (lane + i < rows)
        for (int64_t j = 0; j < value_ld_; j += W)
          products[i] += load(grad_output_numbers_ + at + j) * load(rows_ + at + j);
    }
    transpose_stages<1, T>(products);
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) products[i] += products[i + half];
    return products[0];
  }

  void scale_grad_output(int64_t lane, int64_t rows, vec<T> factor) {
    for (int64_t i = 0; i < kLanes<T> && lane + i < rows; ++i)
      for (int64_t j = 0; j < value_ld_; j += kLanes<T>) {
        T* at = grad_output_numbers_ + (lane + i) * value_ld_ + j;
        // Not 0 * NaN: a row that sees no key has no gradient, whatever came in.
        store<T>(at, factor[i] == 0 ? vec<T>{} : load(at) * factor[i]);
      }
  }

  void tile(int64_t key, int64_t keys, int64_t rows) {
    const int64_t vectors = vectors_of(rows);
    key_.clear_hidden(bias_, key, keys);
    teacher_key_.clear_hidden(bias_, key, keys, teacher_keys(1));
    value_.clear_hidden(bias_, key, keys);
    logit_tile<Precision>(keys, 1, vectors, p_.head_dim, key_.rows(key), query_, p_.scale,
                          minus_origin_, zeros_, bias_, logits_);
    if constexpr (Div::kTeacher)
      logit_tile<Precision>(keys, teacher_keys(1), vectors, p_.teacher_dim,
                            teacher_key_.rows(teacher_keys(key)), teacher_query_, p_.teacher_scale,
                            minus_teacher_origin_, zeros_, bias_, teacher_logits_);
    // With no gradient of the output the depth is 0, and the product writes zeros.
    constexpr Sum kSum = Precision::kFoldFactors ? Sum::alone : Sum::scaled_plus_row;
    gemm<false, kSum, P>(keys, vectors, Precision::depth(value_dim_), value_.rows(key),
                         grad_output_, grad_probability_, P,
                         Epilogue<T>{zeros_, T(p_.dropout.keep_factor)});
    dropout_.apply(grad_probability_, keys, vectors);
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>)
      grad_sweep<Div>(logits_ + lane, teacher_logits_ + lane, grad_probability_ + lane, keys,
                      load(offset_ + lane), load(slope_ + lane));
    dropout_.apply(logits_, keys, vectors);
    add_gradients(key, keys, rows, vectors);
  }

  // dQ += Kt dS, dK += dS Q, dV += P dO.
  void add_gradients(int64_t key, int64_t keys, int64_t rows, int64_t vectors) {
    const int64_t depth = Precision::depth(rows);
    const Left<Element> grad_logits =
        Precision::as_rows(grad_probability_, keys, vectors, rounded_rows_);
    gemm_rows(keys, head_ld_ / kLanes<T>, depth, grad_logits, query_rows_,
              grad_key_ + key * head_ld_, head_ld_);
    gemm<true, Sum::onto, P>(
        p_.head_dim, vectors, Precision::depth(keys), key_.columns(key),
        Precision::as_columns(grad_probability_, keys, vectors, rounded_rows_, rounded_columns_),
        grad_query_);
    gemm_rows(keys, value_ld_ / kLanes<T>, depth,
              Precision::as_rows(logits_, keys, vectors, rounded_map_), grad_output_rows_,
              grad_value_ + key * value_ld_, value_ld_);
  }

  void finish_panel(int64_t b, int64_t h, int64_t row, int64_t rows, bool first_chunk) {
    T factor[P];
    fill(factor, P, T(p_.scale));
    transpose_from_panel(grad_query_, rows, p_.head_dim, factor, rows_, head_ld_);
    T* dst = static_cast<T*>(p_.grad_query.data) + p_.grad_query.offset(b, h, row);
    const T* src = rows_;
    for (int64_t i = 0; i < rows; ++i, dst += p_.grad_query.row_stride, src += head_ld_)
      for (int64_t j = 0; j < p_.head_dim; ++j) dst[j] = first_chunk ? src[j] : dst[j] + src[j];
  }

  const BackwardProblem& p_;
  const int64_t value_dim_, head_ld_, value_ld_, chunk_, tile_keys_;
  Keys key_, teacher_key_, value_;
  T *grad_key_, *grad_value_;
  Element* query_rows_;
  T* grad_output_numbers_;
  Element* grad_output_rows_;
  T* rows_;
  Element *panel_rows_, *query_, *teacher_query_, *grad_output_;
  T *grad_query_, *logits_, *teacher_logits_, *grad_probability_;
  Element *rounded_map_, *rounded_rows_, *rounded_columns_;
  T *zeros_, *minus_origin_, *minus_teacher_origin_, *offset_, *slope_;
  Bias<T> bias_;
  Dropout<T> dropout_;
};

template <class Div, class Precision>
void backward_tasks(const BackwardProblem& problem, int64_t begin, int64_t end) {
  using T = typename Precision::Number;
  const int64_t splits = problem.key_splits, keys = problem.key_length;
  with_worker<BackwardWorker<Div, Precision>, T>(problem, [&](auto& worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / splits, split = task % splits;
      worker.key_range(head / problem.heads, head % problem.heads, split, keys * split / splits,
                       keys * (split + 1) / splits);
    }
  });
}

template <class Precision>
void backward_at(const BackwardProblem& problem, int64_t begin, int64_t end) {
  visit_one_pass_divergence(problem.divergence, [&](auto divergence) {
    backward_tasks<decltype(divergence), Precision>(problem, begin, end);
  });
}

template <class T>
void backward(const BackwardProblem& problem, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  const bool rounded_gradient = !problem.grad_output || problem.grad_output.dtype == DType::bf16;
  if constexpr (sizeof(T) == sizeof(float))
    if (all_bfloat16(problem) && rounded_gradient)
      return backward_at<PairPrecision>(problem, begin, end);
#endif
  backward_at<FullPrecision<T>>(problem, begin, end);
}

}  // namespace attn_kd::ATTN_KD_ISA
