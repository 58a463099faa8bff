// Backward pass of the divergences that need the maps themselves (see two_pass_forward.h).
//
// A task owns a range of keys of a group of heads and runs over all queries, a panel at a time. Per
// tile the maps of all heads are computed first, then the slopes phi' of their average, and then
// every head's gradient with the products of backward.h:
//   dP = V dOt,  dS = P (dP - Delta + g/H (phi' - c)),  dQ panel += Kt dS,  dV += P dO,  dK += dS Q
// where P is not normalised: the rows' inverse sums are folded into dO and the row constants. dK
// and dV belong to the task alone; dQ is summed over a group's tasks afterwards, in order.
#pragma once

#include "divergence.h"
#include "dropout.h"
#include "group_maps.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::BackwardProblem;

// The slopes of one vector of lanes take the place of a.
template <class Div, class T>
void slope_sweep(T* student, const T* teacher, int64_t keys) {
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>)
    store<T>(student + at, Div::template slope<T>(load(student + at), load(teacher + at)));
}

// dS = P (dP + offset + factor * slope), in place of dP. P is multiplied by the slope first: where
// forward_kl's is huge, P is so small that their product is not.
template <class T>
void group_grad_sweep(const T* probability, const T* slope, T* grad_probability, int64_t keys,
                      vec<T> offset, vec<T> factor) {
  for (int64_t at = 0; at < keys * kPanel<T>; at += kPanel<T>) {
    const vec<T> p = load(probability + at);
    const vec<T> dp = load(grad_probability + at) + offset;
    store<T>(grad_probability + at, p * dp + factor * (p * load(slope + at)));
  }
}

// Of two scratch rows of whole vectors.
template <class T>
double dot(const T* a, const T* b, int64_t length) {
  vec<T> products{};
  for (int64_t i = 0; i < length; i += kLanes<T>) products += load(a + i) * load(b + i);
  double sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += products[lane];
  return sum;
}

// One head of the group on its way over the queries.
template <class T>
struct HeadGradients {
  T* grad_key;  // [chunk, D], and of values [chunk, Dv], whole vectors wide
  T* grad_value;
  T* query_rows;        // [kPanel, D], whole vectors wide
  T* grad_output_rows;  // [kPanel, Dv], likewise, times the inverse sums
  T* grad_output;       // [Dv, kPanel], the same transposed
  T* grad_query;        // [D, kPanel]
  T* offset;            // [kPanel]
  T* factor;            // [kPanel]
};

template <class Div, class T>
class TwoPassBackwardWorker {
 public:
  TwoPassBackwardWorker(const BackwardProblem& problem, Scratch<T>& scratch)
      : p_(problem),
        value_dim_(problem.grad_output ? problem.value_dim : 0),
        head_ld_(round_up(problem.head_dim, kLanes<T>)),
        value_ld_(round_up(value_dim_, kLanes<T>)),
        maps_(problem, {problem.origin, problem.inverse_sum, problem.teacher_lse}, scratch),
        chunk_(min(chunk_keys(), problem.key_length)),
        value_(scratch.take(maps_.tile_keys() * value_dim_)),
        rows_(scratch.take(P * value_ld_)),
        grad_probability_(scratch.take(P * maps_.tile_keys())),
        dropout_(problem.dropout, scratch, maps_.tile_keys()),
        grad_key_(scratch.take(maps_.heads() * chunk_ * head_ld_)),
        grad_value_(scratch.take(maps_.heads() * chunk_ * value_ld_)),
        query_rows_(scratch.take(maps_.heads() * P * head_ld_)),
        grad_output_rows_(scratch.take(maps_.heads() * P * value_ld_)),
        grad_output_(scratch.take(maps_.heads() * P * value_dim_)),
        grad_query_(scratch.take(maps_.heads() * P * problem.head_dim)),
        offset_(scratch.take(maps_.heads() * P)),
        factor_(scratch.take(maps_.heads() * P)) {}

  void key_range(int64_t b, int64_t first_head, int64_t split, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += chunk_) {
      const int64_t keys = min(end - first, chunk_);
      fill(grad_key_, maps_.heads() * chunk_ * head_ld_, T(0));
      fill(grad_value_, maps_.heads() * chunk_ * value_ld_, T(0));
      for (int64_t row = 0; row < p_.query_length; row += P) {
        const int64_t rows = min(p_.query_length - row, P);
        maps_.start(b, first_head, row, rows);
        for (int64_t i = 0; i < maps_.heads(); ++i) start_head(i, b, first_head + i, row, rows);
        for (int64_t key = 0; key < keys; key += maps_.tile_keys())
          tile(b, first_head, first, key, min(keys - key, maps_.tile_keys()), row, rows);
        for (int64_t i = 0; i < maps_.heads(); ++i)
          finish_head(i, split * p_.batch + b, first_head + i, row, rows, first == begin);
      }
      for (int64_t i = 0; i < maps_.heads(); ++i) {
        const HeadGradients<T> head = at(i);
        store_rows(head.grad_key, head_ld_, T(p_.scale), p_.grad_key, b, first_head + i, first,
                   keys, p_.head_dim);
        store_rows(head.grad_value, value_ld_, T(1), p_.grad_value, b, first_head + i, first, keys,
                   value_dim_);
      }
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  // Keys whose gradients are accumulated at a time. More of them spare loads of the panels; all
  // heads' gradients may take 1 MiB.
  int64_t chunk_keys() const {
    constexpr int64_t kElements = (int64_t{1} << 20) / static_cast<int64_t>(sizeof(T));
    const int64_t affordable = kElements / (maps_.heads() * (head_ld_ + value_ld_));
    const int64_t keys = min(affordable, cpu::kChunkKeys) / kGroupKeys * kGroupKeys;
    return keys < kGroupKeys ? kGroupKeys : keys;
  }

  HeadGradients<T> at(int64_t i) const {
    return {.grad_key = grad_key_ + i * chunk_ * head_ld_,
            .grad_value = grad_value_ + i * chunk_ * value_ld_,
            .query_rows = query_rows_ + i * P * head_ld_,
            .grad_output_rows = grad_output_rows_ + i * P * value_ld_,
            .grad_output = grad_output_ + i * P * value_dim_,
            .grad_query = grad_query_ + i * P * p_.head_dim,
            .offset = offset_ + i * P,
            .factor = factor_ + i * P};
  }

  void start_head(int64_t i, int64_t b, int64_t h, int64_t row, int64_t rows) {
    const HeadGradients<T> head = at(i);
    load_rows(p_.query, b, h, row, rows, p_.head_dim, head.query_rows, head_ld_);
    fill(head.grad_query, P * p_.head_dim, T(0));
    if (value_dim_) {
      load_rows(p_.output, b, h, row, rows, value_dim_, rows_, value_ld_);
      load_rows(p_.grad_output, b, h, row, rows, value_dim_, head.grad_output_rows, value_ld_);
    }
    row_constants(head, b, h, row, rows);
    transpose_to_panel(Rows<T>{head.grad_output_rows, value_ld_}, rows, value_dim_, T(1),
                       head.grad_output);
  }

  // Per row: what of dS does not depend on the key, and the factor of the slope. A row that sees no
  // key has an inverse sum of 0, and nothing comes of it.
  void row_constants(const HeadGradients<T>& head, int64_t b, int64_t h, int64_t first_row,
                     int64_t rows) {
    const int64_t first = (b * p_.heads + h) * p_.query_length + first_row;
    const int64_t first_of_group = p_.average_heads ? b * p_.query_length + first_row : first;
    const auto read = [](const void* values, int64_t row) {
      return values ? static_cast<double>(static_cast<const T*>(values)[row]) : 0.0;
    };
    fill(head.offset, P, T(0));
    fill(head.factor, P, T(0));
    for (int64_t row = 0; row < rows; ++row) {
      T* grad_output = head.grad_output_rows + row * value_ld_;
      const double inverse_sum = read(p_.inverse_sum, first + row);
      if (inverse_sum == 0) {
        fill(grad_output, value_ld_, T(0));
        continue;
      }
      const double grad =
          read(p_.grad_kl, first_of_group + row) / static_cast<double>(maps_.heads());
      const double delta = dot(grad_output, rows_ + row * value_ld_, value_ld_);
      const double offset =
          read(p_.grad_lse, first + row) - delta - grad * read(p_.correction, first + row);
      head.offset[row] = static_cast<T>(inverse_sum * offset);
      head.factor[row] = static_cast<T>(inverse_sum * grad);
      const T factor = static_cast<T>(inverse_sum * p_.dropout.keep_factor);
      for (int64_t column = 0; column < value_dim_; ++column) grad_output[column] *= factor;
    }
  }

  void tile(int64_t b, int64_t first_head, int64_t first, int64_t key, int64_t keys, int64_t row,
            int64_t rows) {
    if (!maps_.tile(first + key, keys)) return;
    for (int64_t lane = 0; lane < maps_.vectors() * kLanes<T>; lane += kLanes<T>)
      slope_sweep<Div, T>(maps_.student() + lane, maps_.teacher() + lane, keys);
    for (int64_t i = 0; i < maps_.heads(); ++i) {
      if (value_dim_) {
        load_rows(p_.value, b, first_head + i, first + key, keys, value_dim_, value_, value_dim_);
        maps_.clear_hidden(i, value_, first + key, keys, value_dim_);
      }
      dropout_.draw(b * p_.heads + first_head + i, row, first + key, keys, maps_.vectors());
      head_tile(i, key, keys, rows);
    }
  }

  void head_tile(int64_t i, int64_t key, int64_t keys, int64_t rows) {
    const HeadGradients<T> head = at(i);
    const int64_t vectors = maps_.vectors();
    T* probability = maps_.probability(i);
    // With no gradient of the output the depth is 0, and the product writes zeros.
    gemm<false, Sum::alone, P>(keys, vectors, value_dim_, Left<T>{value_, value_dim_},
                               head.grad_output, grad_probability_);
    dropout_.apply(grad_probability_, keys, vectors);
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>)
      group_grad_sweep<T>(probability + lane, maps_.student() + lane, grad_probability_ + lane,
                          keys, load(head.offset + lane), load(head.factor + lane));
    dropout_.apply(probability, keys, vectors);
    gemm<true, Sum::onto, P>(p_.head_dim, vectors, keys, Left<T>{maps_.key(i), p_.head_dim},
                             grad_probability_, head.grad_query);
    gemm_rows(keys, head_ld_ / kLanes<T>, rows, Left<T>{grad_probability_, P}, head.query_rows,
              head.grad_key + key * head_ld_, head_ld_);
    gemm_rows(keys, value_ld_ / kLanes<T>, rows, Left<T>{probability, P}, head.grad_output_rows,
              head.grad_value + key * value_ld_, value_ld_);
  }

  void finish_head(int64_t i, int64_t b, int64_t h, int64_t row, int64_t rows, bool first_chunk) {
    const T scale = T(p_.scale);
    const T* grad_query = at(i).grad_query;
    T* dst = static_cast<T*>(p_.grad_query.data) + p_.grad_query.offset(b, h, row);
    for (int64_t lane = 0; lane < rows; ++lane, dst += p_.grad_query.row_stride)
      for (int64_t column = 0; column < p_.head_dim; ++column) {
        const T part = scale * grad_query[column * P + lane];
        dst[column] = first_chunk ? part : dst[column] + part;
      }
  }

  const BackwardProblem& p_;
  const int64_t value_dim_, head_ld_, value_ld_;
  GroupMaps<T> maps_;
  const int64_t chunk_;
  T *value_, *rows_, *grad_probability_;
  Dropout<T> dropout_;
  T *grad_key_, *grad_value_, *query_rows_, *grad_output_rows_, *grad_output_, *grad_query_;
  T *offset_, *factor_;
};

template <class Div, class T>
void two_pass_backward_tasks(const BackwardProblem& problem, int64_t begin, int64_t end) {
  const int64_t splits = problem.key_splits, keys = problem.key_length;
  const int64_t groups = problem.average_heads ? 1 : problem.heads;
  with_worker<TwoPassBackwardWorker<Div, T>, T>(problem, [&](auto& worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / splits, split = task % splits;
      worker.key_range(group / groups, group % groups, split, keys * split / splits,
                       keys * (split + 1) / splits);
    }
  });
}

template <class T>
void two_pass_backward(const BackwardProblem& problem, int64_t begin, int64_t end) {
  Divergences::visit(problem.divergence, [&](auto divergence) {
    two_pass_backward_tasks<decltype(divergence), T>(problem, begin, end);
  });
}

}  // namespace attn_kd::ATTN_KD_ISA
