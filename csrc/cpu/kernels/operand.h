// The left operands of the matrix products: keys, teacher keys and values.
#pragma once

#include "gemm.h"
#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

// Rows of a tensor that are broadcast one number at a time. The micro-kernel reads them anywhere,
// so they stay where they are, unless they must be widened, or changed (keys that a mask hides), or
// lie so far apart that few of them fit the L1 cache together.
template <class T>
class Operand {
 public:
  Operand(const Input& x, int64_t width, int64_t max_rows, bool changed, Scratch<T>& scratch)
      : x_(x),
        width_(width),
        in_place_(!changed && x.dtype == kDType<T> && x.row_stride <= 2 * width),
        ld_(in_place_ ? x.row_stride : width),
        copy_(scratch.take(in_place_ ? 0 : max_rows * width)) {}

  void read(int64_t b, int64_t h, int64_t first, int64_t rows) {
    if (!in_place_) load_rows(x_, b, h, first, rows, width_, copy_, width_);
    data_ = in_place_ ? static_cast<const T*>(x_.data) + x_.offset(b, h, first) : copy_;
  }

  // From a row of those that were read on.
  Left<T> from(int64_t first) const { return {data_ + first * ld_, ld_}; }

  // The copied rows, to be changed.
  T* copy(int64_t first = 0) { return copy_ + first * width_; }
  int64_t width() const { return width_; }

 private:
  const Input& x_;
  const int64_t width_;
  const bool in_place_;
  const int64_t ld_;
  T* copy_;
  const T* data_ = nullptr;
};

}  // namespace attn_kd::ATTN_KD_ISA
