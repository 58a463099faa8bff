// How columns, keys or queries, pass a block: two stages of shared memory, the copies into the one
// under way while the other is worked on, and one barrier a tile.
#pragma once

#include "tile.cuh"

namespace attn_kd::cuda {

inline constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// The base-2 logit of a hidden pair: finite, so that the difference of two is 0 and not NaN, yet
// its exponential against any other logit is 0.
inline constexpr float kMasked = -1e30f;

// An additive mask value up to this one hides the key as -inf does.
inline constexpr float kHidden = -1e6f;

// What the mask adds to the base-2 logits of a key.
class KeyBias {
 public:
  __device__ KeyBias(const Problem& p, int b, int h)
      : mask_(p.mask), b_(b), h_(h), keys_(p.key_length) {}

  // kMasked for a hidden key and past the last one.
  __device__ float operator()(int key) const {
    if (key >= keys_) return kMasked;
    if (!mask_.data) return 0;
    const int64_t at = device::opaque(b_) * mask_.batch_stride +
                       device::opaque(h_) * mask_.head_stride + key * mask_.key_stride;
    float bias;
    switch (mask_.dtype) {
      case DType::boolean:
        return device::read_global(static_cast<const uint8_t*>(mask_.data) + at) ? 0 : kMasked;
      case DType::f32:
        bias = device::read_global(static_cast<const float*>(mask_.data) + at);
        break;
      case DType::bf16: bias = widened<device::BFloat16>(at); break;
      default: bias = widened<device::Float16>(at);
    }
    return bias <= kHidden ? kMasked : bias * kLog2e;
  }

 private:
  template <class E>
  __device__ float widened(int64_t at) const {
    return device::widen(E{device::read_global(static_cast<const uint16_t*>(mask_.data) + at)});
  }

  const KeyMask& mask_;
  const int b_, h_, keys_;
};

// A tile of keys.
template <class S>
struct KeyStage {
  Tile<S> main, teacher, value;  // K, Kt, V; of queries Q, Qt, dO
  float bias[S::kColumns];
};

// How warps that share their rows hand numbers to the first of them: through the stages, once these
// are no longer in use.
template <class S, int kNumbers>
class Handover {
 public:
  template <class Stage>
  __device__ Handover(Stage (&stages)[2], const Place& place)
      : numbers_(reinterpret_cast<float*>(stages)), place_(place) {
    static_assert(kNumbers * kStep * sizeof(float) <= sizeof(stages));
  }

  // Begins with the numbers of a column of warps other than the first.
  __device__ __forceinline__ void of(unsigned column_warp) {
    at_ = ((column_warp - 1) * S::kRowWarps + place_.warp % S::kRowWarps) * kLanes + place_.lane;
  }
  __device__ __forceinline__ void write(float x) { device::write_shared(numbers_ + next(), x); }
  __device__ __forceinline__ float read() { return device::read_shared(numbers_ + next()); }

 private:
  __device__ __forceinline__ unsigned next() {
    const unsigned at = at_;
    at_ += kStep;
    return at;
  }

  static constexpr int kStep = (kWarps - S::kRowWarps) * kLanes;

  float* numbers_;
  const Place& place_;
  unsigned at_ = 0;
};

// Begins to copy a row's chunk of an operand to its place in a tile, or zeros where !visible: then
// of row 0, for the address must be aligned though nothing is read. It is computed anew for every
// tile: kept, those of all operands would take many registers.
template <class S>
__device__ __forceinline__ void copy_chunk(Tile<S>& tile, const Input& x, int b, int h, int row,
                                           bool visible, const Place& place) {
  const Rows<typename S::Element> rows(x, device::opaque(b), device::opaque(h));
  const unsigned chunk = place.thread % S::kChunks;
  device::copy_async(&tile.chunks[Tile<S>::index(place.thread / S::kChunks, chunk)],
                     rows.row(visible ? row : 0) + 8 * chunk, visible);
}

// Keys, teacher keys and values. Zeros take the place of hidden keys: what they hold, NaN from
// padding perhaps, must not reach a product, not even against a probability of 0.
template <class S, bool kTeacher>
class KeyStream {
 public:
  __device__ KeyStream(const Problem& p, int b, int h, const Place& place)
      : p_(p), b_(b), h_(h), place_(place), bias_(KeyBias(p, b, h)(place.thread / S::kChunks)) {}

  // Begins to bring a tile, of the keys from `first` on. Tiles are asked for in order.
  __device__ void begin(KeyStage<S>& stage, int first) {
    const int column = place_.thread / S::kChunks, key = first + column;
    visible_ = bias_ != kMasked;
    copy_chunk(stage.main, p_.key, b_, h_, key, visible_, place_);
    if constexpr (kTeacher)
      copy_chunk(stage.teacher, p_.teacher_key, b_, h_, key, visible_, place_);
    copy_chunk(stage.value, p_.value, b_, h_, key, visible_, place_);
    if (place_.thread % S::kChunks == 0) device::write_shared(&stage.bias[column], bias_);
    // Read a tile ahead: it decides what is copied.
    bias_ = KeyBias(p_, b_, h_)(key + S::kColumns);
  }

  // Waits for this thread's part; returns whether its key is visible.
  __device__ bool finish(KeyStage<S>&) {
    device::wait_for_copies();
    return visible_;
  }

 private:
  const Problem& p_;
  const int b_, h_;
  const Place& place_;
  float bias_;
  bool visible_ = false;
};

// Runs body(stage) on the tiles of `columns` columns that have a visible one; returns whether there
// was any. All that the stages held before is lost.
template <class S, class Stream, class Stage, class Body>
__device__ __forceinline__ bool sweep(Stream& stream, Stage (&stages)[2], int columns,
                                      Body&& body) {
  bool any = false;
  int at = 0;
  stream.begin(stages[at], 0);
#pragma unroll 1
  for (int first = 0; first < columns; first += S::kColumns, at ^= 1) {
    // Behind this barrier the tile is there, and nobody reads the one before it any more.
    const bool visible = device::barrier_any(stream.finish(stages[at]));
    if (first + S::kColumns < columns) stream.begin(stages[at ^ 1], first + S::kColumns);
    if (visible) body(stages[at]);
    any |= visible;
  }
  return any;
}

}  // namespace attn_kd::cuda
