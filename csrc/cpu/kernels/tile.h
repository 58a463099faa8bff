// Moving tiles between tensors and scratch memory.
#pragma once

#include <cstddef>
#include <new>

#include "convert.h"
#include "vec.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::Input;
using cpu::kPanel;
using cpu::Output;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The scratch memory of one thread, carved into cache-line aligned tiles and freed as a whole.
// Without memory it hands out null pointers and only counts, which is how the size is found.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t elements)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(elements) * sizeof(T), kAlign))) {}
  ~Scratch() {
    if (data_) ::operator delete(data_, kAlign);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* take(int64_t elements) {
    T* tile = data_ ? data_ + taken_ : nullptr;
    taken_ += round_up(elements, kCacheLine / static_cast<int64_t>(sizeof(T)));
    return tile;
  }
  int64_t taken() const { return taken_; }

 private:
  static constexpr int64_t kCacheLine = 64;
  static constexpr std::align_val_t kAlign{kCacheLine};
  T* data_ = nullptr;
  int64_t taken_ = 0;
};

// Builds a worker twice: to count the scratch memory its constructor takes, and on that memory.
template <class Worker, class T, class Problem, class Body>
void with_worker(const Problem& problem, Body body) {
  Scratch<T> counter;
  Worker{problem, counter};
  Scratch<T> scratch(counter.taken());
  Worker worker{problem, scratch};
  body(worker);
}

// dst[row * ld + column] = x[b, h, first + row, column]; columns up to ld become 0.
template <class T>
void load_rows(const Input& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width,
               T* dst, int64_t ld) {
  visit_storage(x.dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* src = static_cast<const S*>(x.data) + x.offset(b, h, first);
    for (int64_t row = 0; row < rows; ++row, src += x.row_stride, dst += ld) {
      for (int64_t column = 0; column < width; ++column)
        dst[column] = static_cast<T>(widen(src[column]));
      for (int64_t column = width; column < ld; ++column) dst[column] = 0;
    }
  });
}

// x[b, h, first + row, column] = factor * src[row * ld + column]
template <class T>
void store_rows(const T* src, int64_t ld, T factor, const Output& x, int64_t b, int64_t h,
                int64_t first, int64_t rows, int64_t width) {
  visit_storage(x.dtype, [&](auto storage) {
    using S = decltype(storage);
    S* dst = static_cast<S*>(x.data) + x.offset(b, h, first);
    for (int64_t row = 0; row < rows; ++row, dst += x.row_stride, src += ld)
      for (int64_t column = 0; column < width; ++column)
        dst[column] = convert<S>(factor * src[column]);
  });
}

// A panel is the transpose of some rows: panel[column * kPanel + row], one row a SIMD lane. Lanes
// from `rows` up to the next whole vector become 0, so that what they compute stays finite.
template <class T>
void transpose_to_panel(const T* src, int64_t ld, int64_t rows, int64_t width, T factor, T* panel) {
  const int64_t lanes = round_up(rows, kLanes<T>);
  for (int64_t column = 0; column < width; ++column, panel += kPanel<T>) {
    for (int64_t row = 0; row < rows; ++row) panel[row] = factor * src[row * ld + column];
    for (int64_t row = rows; row < lanes; ++row) panel[row] = 0;
  }
}

// dst[row * ld + column] = factor[row] * panel[column * kPanel + row]
template <class T>
void transpose_from_panel(const T* panel, int64_t rows, int64_t width, const T* factor, T* dst,
                          int64_t ld) {
  for (int64_t row = 0; row < rows; ++row, dst += ld)
    for (int64_t column = 0; column < width; ++column)
      dst[column] = factor[row] * panel[column * kPanel<T> + row];
}

template <class T>
inline void fill(T* x, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

}  // namespace attn_kd::ATTN_KD_ISA
