// The left operands of the matrix products: keys, teacher keys and values.
#pragma once

#include "bias.h"
#include "gemm.h"
#include "pairs.h"

namespace attn_kd::ATTN_KD_ISA {

// Rows of a tensor that are broadcast one number at a time. The micro-kernel reads them anywhere,
// so they stay where they are, unless they must be widened, or changed (keys that a mask hides), or
// lie so far apart that few of them fit the L1 cache together.
template <class T>
class Operand {
 public:
  // Of which way round a product will read the rows; both are the same here, see PairOperand.
  enum class Use { rows, columns, both };

  Operand(const Input& x, int64_t width, int64_t max_rows, bool changed, Use, Scratch<T>& scratch)
      : x_(x),
        width_(width),
        in_place_(!changed && x.dtype == kDType<T> && x.row_stride <= 2 * width),
        ld_(in_place_ ? x.row_stride : width),
        copy_(scratch.take(in_place_ ? 0 : max_rows * width)) {}

  void read(int64_t b, int64_t h, int64_t first, int64_t rows) {
    if (!in_place_) load_rows(x_, b, h, first, rows, width_, copy_, width_);
    data_ = in_place_ ? static_cast<const T*>(x_.data) + x_.offset(b, h, first) : copy_;
  }

  // Zeroes what a mask of keys alone hides, `group` rows a key.
  void clear_hidden(const Bias<T>& bias, int64_t first_key, int64_t keys, int64_t group = 1) {
    bias.clear_hidden(copy_ + first_key * group * width_, keys, group * width_);
  }

  // A[rows, width], and A[width, rows], from a row of those that were read on.
  Left<T> rows(int64_t first) const { return {data_ + first * ld_, ld_}; }
  Left<T> columns(int64_t first) const { return rows(first); }

 private:
  const Input& x_;
  const int64_t width_;
  const bool in_place_;
  const int64_t ld_;
  T* copy_;
  const T* data_ = nullptr;
};

#if defined(__AVX512BF16__)
// The same of bfloat16 rows, broadcast two numbers at a time. Along a row they are pairs as they
// lie; pairs along a column are made of two rows.
class PairOperand {
 public:
  using Use = Operand<float>::Use;

  PairOperand(const Input& x, int64_t width, int64_t max_rows, bool changed, Use use,
              Scratch<float>& scratch)
      : x_(x),
        width_(width),
        columns_used_(use != Use::rows),
        in_place_(!changed && pairs_in_place(x, width)),
        ld_(in_place_ ? x.row_stride / 2 : ceil_div(width, 2)),
        copy_(take_pairs(scratch, in_place_ || use == Use::columns ? 0 : max_rows * ld_)),
        columns_(take_pairs(scratch, columns_used_ ? ceil_div(max_rows, 2) * width : 0)) {}

  void read(int64_t b, int64_t h, int64_t first, int64_t rows) {
    const Rows<BFloat16> source = bfloat16_rows(x_, b, h, first);
    if (copy_) copy_pairs(source, rows, width_, copy_, ld_);
    data_ = copy_ ? copy_ : reinterpret_cast<const Pair*>(source.data);
    if (columns_used_) interleave_rows(source, rows, width_, columns_, width_);
  }

  void clear_hidden(const Bias<float>& bias, int64_t first_key, int64_t keys, int64_t group = 1) {
    for (int64_t i = 0; i < keys * group; ++i) {
      if (!bias.hides(i / group)) continue;
      const int64_t row = first_key * group + i;
      for (int64_t j = 0; copy_ && j < ld_; ++j) copy_[row * ld_ + j].bits = 0;
      if (columns_used_) clear_interleaved_row(columns_, width_, row, width_);
    }
  }

  // A[rows, width / 2], and A[width, rows / 2] from an even row on.
  Left<Pair> rows(int64_t first) const { return {data_ + first * ld_, ld_}; }
  Left<Pair> columns(int64_t first) const { return {columns_ + first / 2 * width_, width_}; }

 private:
  const Input& x_;
  const int64_t width_;
  const bool columns_used_, in_place_;
  const int64_t ld_;
  Pair *copy_, *columns_;
  const Pair* data_ = nullptr;
};
#endif

}  // namespace attn_kd::ATTN_KD_ISA
