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

// An additive mask value up to this one hides the pair as -inf does. Many masks hold the lowest
// finite number instead, which overflows when it is scaled or summed.
inline constexpr double kHidden = -5e29;

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
    const int64_t lanes = per_key_ ? 1 : round_up(rows, kLanes<T>);
    const int64_t stride = per_key_ ? 1 : kPanel<T>;
    const int64_t distinct = per_key_ ? 1 : rows;
    const int64_t origin = mask_.offset(b, h, first_row) + first_key * mask_.column_stride;
    bool any_visible = false;
    for (int64_t row = 0; row < lanes; ++row) {
      for (int64_t key = 0; key < keys; ++key) {
        const int64_t at = origin + row * mask_.row_stride + key * mask_.column_stride;
        const T bias = row < distinct ? value_at(at) : T(0);
        values_[key * stride + row] = bias;
        any_visible |= row < distinct && bias != kMasked<T>;
      }
    }
    return any_visible;
  }

  // Zeroes the rows of keys that no query sees, whose contents, NaN from padding perhaps, must not
  // reach a product, not even against a probability of 0.
  void clear_hidden(T* rows, int64_t keys, int64_t width) const {
    if (!mask_ || !per_key_) return;
    for (int64_t key = 0; key < keys; ++key)
      if (values_[key] == kMasked<T>) fill(rows + key * width, width, T(0));
  }

  // tile[key * kPanel + row] += bias; masked pairs become kMasked.
  void add_to(T* tile, int64_t keys, int64_t vectors) const {
    if (!mask_) return;
    for (int64_t key = 0; key < keys; ++key, tile += kPanel<T>) {
      if (per_key_ && values_[key] == 0) continue;
      for (int64_t v = 0; v < vectors; ++v) {
        T* at = tile + v * kLanes<T>;
        const vec<T> bias =
            per_key_ ? broadcast(values_[key]) : load(values_ + key * kPanel<T> + v * kLanes<T>);
        store<T>(at, bias == kMasked<T> ? bias : load(at) + bias);
      }
    }
  }

 private:
  T value_at(int64_t at) const {
    if (mask_.dtype == DType::boolean)
      return static_cast<const bool*>(mask_.data)[at] ? T(0) : kMasked<T>;
    T bias = 0;
    visit_storage(mask_.dtype, [&](auto storage) {
      bias = static_cast<T>(widen(static_cast<const decltype(storage)*>(mask_.data)[at]));
    });
    return bias <= T(kHidden) ? kMasked<T> : bias * T(kLog2e);
  }

  const Input& mask_;
  const bool per_key_;
  T* values_;
};

}  // namespace attn_kd::ATTN_KD_ISA
