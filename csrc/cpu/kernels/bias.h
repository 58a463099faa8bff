// Attention masks as additive biases on a tile of base-2 logits.
#pragma once

#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

inline constexpr double kLog2e = 1.44269504088896340736;
inline constexpr double kLn2 = 0.69314718055994530942;

// The logit of a masked pair: finite, so that the difference of two masked logits is 0 and not
// NaN, yet so low that its exponential against any other logit is exactly 0.
template <class T>
inline constexpr T kMasked = sizeof(T) == 4 ? T(-1e30) : T(-1e300);

// An additive mask value up to this one hides the pair as -inf does: masks are often made of -1e9
// or of the lowest finite number. Against any other logit its exponential is 0 either way, but a
// row of such values alone would leave no digits of the logits.
inline constexpr double kHidden = -1e6;

template <class T>
class Bias {
 public:
  Bias(const Input& mask, Scratch<T>& scratch, int64_t max_keys)
      : mask_(mask),
        per_key_(mask.row_stride == 0),
        values_(scratch.take(!mask ? 0 : max_keys * (per_key_ ? 1 : kPanel<T>))) {}

  // Reads the biases of `rows` queries from first_row on and `keys` keys from first_key on. Returns
  // whether any of these pairs is visible.
  bool read(int64_t b, int64_t h, int64_t first_row, int64_t rows, int64_t first_key,
            int64_t keys) {
    if (!mask_) return true;
    const int64_t at = mask_.offset(b, h, first_row) + first_key * mask_.column_stride;
    if (mask_.dtype == DType::boolean)
      return read(static_cast<const bool*>(mask_.data) + at, rows, keys);
    bool any_visible = false;
    visit_storage(mask_.dtype, [&](auto storage) {
      any_visible = read(static_cast<const decltype(storage)*>(mask_.data) + at, rows, keys);
    });
    return any_visible;
  }

  // Sets seen[row] to 1 for the rows that see any of the keys just read.
  void mark_seen(T* seen, int64_t keys, int64_t vectors) const {
    if (!mask_ || per_key_) return fill(seen, vectors * kLanes<T>, T(1));
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
        const vec<T> bias = load(values_ + key * kPanel<T> + lane);
        store<T>(seen + lane, bias == kMasked<T> ? load(seen + lane) : broadcast(T(1)));
      }
  }

  bool any() const { return static_cast<bool>(mask_); }

  // Whether the rows of some keys must be cleared.
  static bool hides_keys(const Input& mask) { return mask && mask.row_stride == 0; }

  // Whether a key of those just read is hidden from every query by a mask of keys alone. What it
  // holds, NaN from padding perhaps, must then not reach a product, not even against a probability
  // of 0.
  bool hides(int64_t key) const { return mask_ && per_key_ && values_[key] == kMasked<T>; }

  // Zeroes the rows of such keys.
  void clear_hidden(T* rows, int64_t keys, int64_t width) const {
    if (!mask_ || !per_key_) return;
    for (int64_t key = 0; key < keys; ++key)
      if (hides(key)) fill(rows + key * width, width, T(0));
  }

  // tile[key * kPanel + row - lane] += bias, from `lane` on; masked pairs become kMasked.
  void add_to(T* tile, int64_t keys, int64_t vectors, int64_t lane = 0) const {
    if (!mask_) return;
    const T* values = values_ + lane;
    for (int64_t key = 0; key < keys; ++key, tile += kPanel<T>) {
      if (per_key_ && values_[key] == 0) continue;
      for (int64_t v = 0; v < vectors; ++v) {
        T* at = tile + v * kLanes<T>;
        const vec<T> bias =
            per_key_ ? broadcast(values_[key]) : load(values + key * kPanel<T> + v * kLanes<T>);
        store<T>(at, bias == kMasked<T> ? bias : load(at) + bias);
      }
    }
  }

 private:
  // values_[key, row] from the pairs that begin at `mask`. Lanes without a row, up to the next
  // whole vector, are masked: what memory held must not reach a product of two rows at a time.
  template <class S>
  bool read(const S* mask, int64_t rows, int64_t keys) {
    const int64_t distinct = per_key_ ? 1 : rows, stride = per_key_ ? 1 : kPanel<T>;
    bool any_visible = false;
    for (int64_t key = 0; key < keys; ++key, mask += mask_.column_stride)
      for (int64_t row = 0; row < distinct; ++row) {
        const T bias = bias_of(mask[row * mask_.row_stride]);
        values_[key * stride + row] = bias;
        any_visible |= bias != kMasked<T>;
      }
    for (int64_t key = 0; !per_key_ && key < keys; ++key)
      for (int64_t lane = rows; lane < round_up(rows, kLanes<T>); ++lane)
        values_[key * kPanel<T> + lane] = kMasked<T>;
    return any_visible;
  }

  static T bias_of(bool visible) { return visible ? T(0) : kMasked<T>; }
  template <class S>
  static T bias_of(S stored) {
    const T bias = static_cast<T>(widen(stored));
    return bias <= T(kHidden) ? kMasked<T> : bias * T(kLog2e);
  }

  const Input& mask_;
  const bool per_key_;
  T* values_;
};

}  // namespace attn_kd::ATTN_KD_ISA
