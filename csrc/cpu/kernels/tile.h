// Moving tiles between tensors and scratch memory.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

#include "convert.h"
#include "vec.h"

namespace attn_kd::ATTN_KD_ISA {

using cpu::Input;
using cpu::kPanel;
using cpu::Output;

template <class T>
inline constexpr cpu::DType kDType = sizeof(T) == 8 ? cpu::DType::f64 : cpu::DType::f32;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

inline constexpr std::align_val_t kScratchAlign{64};  // a cache line

// Memory that a thread keeps for its next small problem, whose arithmetic takes little longer than
// to allocate and free so much.
inline constexpr size_t kKeptBytes = size_t{128} << 10;
inline void* kept_memory() {
  struct Kept {
    void* data = ::operator new(kKeptBytes, kScratchAlign);
    ~Kept() { ::operator delete(data, kScratchAlign); }
  };
  static thread_local const Kept kept;
  return kept.data;
}

// The scratch memory of one thread, carved into cache-line aligned tiles and freed as a whole; a
// thread has one at a time. Without memory it hands out null pointers and only counts, which is how
// the size is found.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(int64_t elements, bool poison) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
    if (bytes > kKeptBytes) allocated_ = ::operator new(bytes, kScratchAlign);
    data_ = static_cast<T*>(allocated_ ? allocated_ : kept_memory());
    // All ones are a NaN in every type that is kept here.
    if (poison) std::memset(data_, 0xff, bytes);
  }
  ~Scratch() {
    if (allocated_) ::operator delete(allocated_, kScratchAlign);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* take(int64_t elements) {
    T* tile = data_ ? data_ + taken_ : nullptr;
    if (elements > 0) taken_ += stride(elements);
    return tile;
  }
  int64_t taken() const { return taken_; }

  // From one tile to the next of several that are taken together.
  static int64_t stride(int64_t elements) {
    constexpr int64_t kSize = sizeof(T);
    return round_up(elements, kCacheLine / kSize) + kStagger / kSize;
  }

 private:
  static constexpr int64_t kCacheLine = static_cast<int64_t>(kScratchAlign);
  // Between tiles, whose sizes tend to be multiples of a page: a load whose address agrees in its
  // last 12 bits with that of a store on its way to the cache waits for it.
  static constexpr int64_t kStagger = 9 * kCacheLine;
  void* allocated_ = nullptr;  // if the thread keeps no memory as large
  T* data_ = nullptr;
  int64_t taken_ = 0;
};

// Builds a worker twice: to count the scratch memory its constructor takes, and on that memory.
template <class Worker, class T, class Problem, class Body>
void with_worker(const Problem& problem, Body body) {
  Scratch<T> counter;
  Worker{problem, counter};
  Scratch<T> scratch(counter.taken(), problem.poison_scratch);
  Worker worker{problem, scratch};
  body(worker);
}

// dst[column] = convert(src[column]), most of them by a loop of known length, whose vectorised form
// needs no checks around it.
template <class S, class D, class Convert>
inline void convert_row(const S* __restrict src, int64_t width, D* __restrict dst,
                        Convert convert) {
  constexpr int64_t kBlock = kLanes<float>;
  int64_t column = 0;
  for (; column + kBlock <= width; column += kBlock)
    for (int64_t i = 0; i < kBlock; ++i) dst[column + i] = convert(src[column + i]);
  for (; column < width; ++column) dst[column] = convert(src[column]);
}

// dst[row * ld + column] = x[b, h, first + row, column]; columns up to ld become 0.
template <class T>
void load_rows(const Input& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width,
               T* dst, int64_t ld) {
  visit_storage(x.dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* src = static_cast<const S*>(x.data) + x.offset(b, h, first);
    for (int64_t row = 0; row < rows; ++row, src += x.row_stride, dst += ld) {
      convert_row(src, width, dst, [](S number) { return static_cast<T>(widen(number)); });
      for (int64_t column = width; column < ld; ++column) dst[column] = 0;
    }
  });
}

// Rows of numbers: row r begins at data + r * ld.
template <class T>
struct Rows {
  const T* data;
  int64_t ld;
};

// x[b, h, first ...] as rows of T: where they lie if they are stored as T, else widened into
// `scratch`.
template <class T>
Rows<T> rows_of(const Input& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width,
                T* scratch) {
  if (x.dtype == kDType<T>)
    return {static_cast<const T*>(x.data) + x.offset(b, h, first), x.row_stride};
  load_rows(x, b, h, first, rows, width, scratch, width);
  return {scratch, width};
}

// x[b, h, first + row, column] = factor * src[row * ld + column]
template <class T>
void store_rows(const T* src, int64_t ld, T factor, const Output& x, int64_t b, int64_t h,
                int64_t first, int64_t rows, int64_t width) {
  visit_storage(x.dtype, [&](auto storage) {
    using S = decltype(storage);
    S* dst = static_cast<S*>(x.data) + x.offset(b, h, first);
    for (int64_t row = 0; row < rows; ++row, dst += x.row_stride, src += ld)
      convert_row(src, width, dst, [factor](T number) { return convert<S>(factor * number); });
  });
}

// Transposes a block of kLanes x kLanes in registers: stage by stage, the off-diagonal halves of
// every diagonal block of 2, 4, 8, ... change places.
template <int Half, class T, size_t... Lane>
inline void swap_halves(vec<T>& upper, vec<T>& lower, std::index_sequence<Lane...>) {
  constexpr int W = kLanes<T>;
  const vec<T> first =
      __builtin_shufflevector(upper, lower, (Lane & Half ? int(Lane) - Half + W : int(Lane))...);
  lower =
      __builtin_shufflevector(upper, lower, (Lane & Half ? int(Lane) + W : int(Lane) + Half)...);
  upper = first;
}

template <int Half, class T>
inline void transpose_stages(vec<T> (&block)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  if constexpr (Half < W) {
#pragma GCC unroll 16
    for (int row = 0; row < W; ++row)
      if (!(row & Half))
        swap_halves<Half, T>(block[row], block[row | Half], std::make_index_sequence<W>());
    transpose_stages<Half * 2, T>(block);
  }
}

// A panel is the transpose of some rows: panel[column * kPanel + row], one row a SIMD lane. Lanes
// from `rows` up to the next whole vector become 0, so that what they compute stays finite.
// `finish` is applied to each number, or vector of numbers, on the way.
template <class T, class Finish>
void transpose_to_panel(Rows<T> source, int64_t rows, int64_t width, Finish finish, T* panel) {
  const T* src = source.data;
  const int64_t ld = source.ld;
  constexpr int64_t W = kLanes<T>;
  for (int64_t first = 0; first < rows; first += W, src += W * ld, panel += W) {
    const int64_t block_rows = rows - first < W ? rows - first : W;
    int64_t column = 0;
    for (; column + W <= width; column += W) {
      vec<T> block[W];
#pragma GCC unroll 16
      for (int64_t row = 0; row < W; ++row)
        block[row] = row < block_rows ? finish(load_unaligned(src + row * ld + column)) : vec<T>{};
      transpose_stages<1, T>(block);
#pragma GCC unroll 16
      for (int64_t row = 0; row < W; ++row)
        store<T>(panel + (column + row) * kPanel<T>, block[row]);
    }
    for (; column < width; ++column)
      for (int64_t row = 0; row < W; ++row)
        panel[column * kPanel<T> + row] = row < block_rows ? finish(src[row * ld + column]) : T(0);
  }
}

template <class T>
void transpose_to_panel(Rows<T> source, int64_t rows, int64_t width, T factor, T* panel) {
  transpose_to_panel(source, rows, width, [factor](auto x) { return x * factor; }, panel);
}

// dst[row * ld + column] = factor[row] * panel[column * kPanel + row]; whole vectors of columns are
// written where ld leaves room for them.
template <class T>
void transpose_from_panel(const T* panel, int64_t rows, int64_t width, const T* factor, T* dst,
                          int64_t ld) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t first = 0; first < rows; first += W, dst += W * ld, panel += W, factor += W) {
    const int64_t block_rows = rows - first < W ? rows - first : W;
    int64_t column = 0;
    for (; ld % W == 0 && column + W <= width; column += W) {
      vec<T> block[W];
#pragma GCC unroll 16
      for (int64_t row = 0; row < W; ++row) block[row] = load(panel + (column + row) * kPanel<T>);
      transpose_stages<1, T>(block);
#pragma GCC unroll 16
      for (int64_t row = 0; row < W; ++row)
        if (row < block_rows) store<T>(dst + row * ld + column, block[row] * factor[row]);
    }
    for (; column < width; ++column)
      for (int64_t row = 0; row < block_rows; ++row)
        dst[row * ld + column] = factor[row] * panel[column * kPanel<T> + row];
  }
}

// values[at ...] where there are any, 0 in the lanes beyond `count`.
template <class T>
inline vec<T> row_lanes(const void* values, int64_t at, int64_t count) {
  vec<T> lanes{};
  if (!values) return lanes;
  const T* first = static_cast<const T*>(values) + at;
  if (count >= kLanes<T>) return load_unaligned(first);
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = first[lane];
  return lanes;
}

template <class T>
inline void fill(T* x, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

}  // namespace attn_kd::ATTN_KD_ISA
