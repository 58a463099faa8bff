// Dropout of the map on its way to the output, by noise that depends on nothing but the entry: a
// tile can be drawn again in the backward pass, in other tiles, on another thread or machine.
#pragma once

#include "philox.h"
#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

// Lanes of which only what is kept reaches its place; all of it where `kept` is null.
template <class Lanes, class T>
struct KeptLanes {
  Lanes lanes;
  const T* kept;  // masks of ones and zeros, the lanes' column of a [keys, kPanel] tile

  void put(int64_t key, vec<T> x) const { lanes.put(key, kept ? masked(x, key) : x); }
  void put(int64_t key, vec<T> x, vec<T> next) const {
    if (kept) x = masked(x, key), next = masked(next, key + 1);
    lanes.put(key, x, next);
  }

 private:
  vec<T> masked(vec<T> x, int64_t key) const {
    return (vec<T>)((vec<uint64_t>)x & (vec<uint64_t>)load(kept + key * kPanel<T>));
  }
};

template <class T>
class Dropout {
 public:
  Dropout(const cpu::DropoutNoise& noise, Scratch<T>& scratch, int64_t max_keys)
      : noise_(noise), kept_(scratch.take(active() ? max_keys * kPanel<T> : 0)) {}

  // Draws which entries of a [keys, kPanel] tile are kept; head is b * H + h. Does nothing without
  // dropout, and nor does apply.
  void draw(int64_t head, int64_t first_row, int64_t first_key, int64_t keys, int64_t vectors) {
    if (!active()) return;
    constexpr int64_t kWords = 4;  // of one counter, for as many keys
    for (int64_t quad = first_key / kWords; quad * kWords < first_key + keys; ++quad)
      for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
        vec<T> kept[kWords];
        draw_quad(quad, first_row + lane, head, kept);
        for (int64_t word = 0; word < kWords; ++word) {
          const int64_t key = quad * kWords + word - first_key;
          if (key >= 0 && key < keys) store<T>(kept_ + key * kPanel<T> + lane, kept[word]);
        }
      }
  }

  // Clears the dropped entries of the tile. Whoever divides by the sum of the map's row multiplies
  // by keep_factor as well.
  void apply(T* tile, int64_t keys, int64_t vectors) const {
    if (!active()) return;
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
        T* at = tile + key * kPanel<T> + lane;
        store<T>(at, (vec<T>)((vec<uint64_t>)load(at) &
                              (vec<uint64_t>)load(kept_ + key * kPanel<T> + lane)));
      }
  }

  // The same on their way into a tile, of the lanes from `lane` on.
  template <class Lanes>
  KeptLanes<Lanes, T> apply(Lanes lanes, int64_t lane) const {
    return {lanes, active() ? kept_ + lane : nullptr};
  }

  bool active() const { return noise_.threshold != 0; }

 private:
  // The four words of as many counters as fit a vector, for query rows first_row, + kStep, ...
  template <int kStep>
  void words(int64_t quad, int64_t first_row, int64_t head, vec<uint64_t> (&word)[4]) const {
    vec<uint64_t> steps{};
    for (int i = 0; i < kLanes<uint64_t>; ++i) steps[i] = i * kStep;
    word[0] = broadcast(static_cast<uint64_t>(quad));
    word[1] = broadcast(static_cast<uint64_t>(first_row)) + steps;
    word[2] = broadcast(static_cast<uint64_t>(head));
    word[3] = broadcast<uint64_t>(noise_.offset);
    philox(word, noise_.key);
  }

  // Masks of ones and zeros for four keys and a vector of query rows.
  void draw_quad(int64_t quad, int64_t first_row, int64_t head, vec<T> (&kept)[4]) const {
    vec<uint64_t> even[4];
    if constexpr (sizeof(T) == 8) {
      words<1>(quad, first_row, head, even);
      for (int i = 0; i < 4; ++i) kept[i] = (vec<T>)((even[i] & 0xffffffffu) >= noise_.threshold);
    } else {
      vec<uint64_t> odd[4];
      words<2>(quad, first_row, head, even);
      words<2>(quad, first_row + 1, head, odd);
      for (int i = 0; i < 4; ++i) {
        const vec<uint64_t> both = (even[i] & 0xffffffffu) | (odd[i] << 32);
        kept[i] = (vec<T>)((vec<uint32_t>)both >= noise_.threshold);
      }
    }
  }

  const cpu::DropoutNoise& noise_;
  T* kept_;
};

}  // namespace attn_kd::ATTN_KD_ISA
