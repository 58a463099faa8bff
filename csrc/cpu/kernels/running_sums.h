// What a panel of query rows gathers while keys stream past: the online softmax with its
// divergence.
#pragma once

#include "divergence.h"
#include "log2.h"
#include "logits.h"
#include "tile.h"

namespace attn_kd::ATTN_KD_ISA {

// Keys that are summed up before they are added to the sum of their tile: a third of the rounding
// of one sum after the other.
inline constexpr int64_t kSummedKeys = 12;

// A row's logits are measured from an origin, so that exponentials neither overflow nor vanish:
// from the highest of the first keys it sees, and from its log-sum-exp so far once its sum exceeds
// kRoom. Tiles need not be searched for their highest logit, unless that exceeds the origin by much
// more than kRoomBits, which their sums tell: then they are swept once more. So that a row's origin
// depends on the row alone, a search moves none that the tile's sum would have left where it is:
// there no logit exceeds it by more than kRoomBits, and the search allows one bit more.
inline constexpr int kRoomBits = 8;
template <class T>
inline constexpr T kRoom = T(1 << kRoomBits);

// The running sums of a panel, base 2, one lane a query row. Those that end in `rest` are what
// rounding has taken from the sums before them.
template <class T>
struct RunningSums {
  int64_t rows = 0;                                 // lanes from here on hold none
  T* origin = nullptr;                              // kMasked where the row has seen no key
  T *sum = nullptr, *sum_rest = nullptr;            // of p = 2^(s - origin)
  T *weighted = nullptr, *weighted_rest = nullptr;  // of the divergence's terms
  // As for the student; the origin is 0 where the logits are measured from a given LSE.
  T* teacher_origin = nullptr;
  T *teacher_sum = nullptr, *teacher_sum_rest = nullptr;
  T* rounded_sum = nullptr;  // of p as the product with the values reads it, where that is rounded
  T* seen = nullptr;         // 1 where the row has seen a key, which only a mask can hide
  T* output = nullptr;       // [Dv, kPanel], sum of p times the value

  // Elements of the memory it is laid out in.
  static int64_t elements(int64_t value_dim) { return (cpu::kRunningSums + value_dim) * kPanel<T>; }

  // A row's sum with what rounding took from it; an infinite sum has lost nothing.
  static double total(const T* sum, const T* rest, int64_t row) {
    const double lost = rest[row];
    return sum[row] + (lost == lost ? lost : 0);
  }

  RunningSums() = default;
  RunningSums(T* memory, int64_t rows)
      : rows(rows),
        origin(memory),
        sum(origin + kPanel<T>),
        sum_rest(sum + kPanel<T>),
        weighted(sum_rest + kPanel<T>),
        weighted_rest(weighted + kPanel<T>),
        teacher_origin(weighted_rest + kPanel<T>),
        teacher_sum(teacher_origin + kPanel<T>),
        teacher_sum_rest(teacher_sum + kPanel<T>),
        rounded_sum(teacher_sum_rest + kPanel<T>),
        seen(rounded_sum + kPanel<T>),
        output(seen + kPanel<T>) {
    static_assert(cpu::kRunningSums == 10);
  }

  void reset(bool teacher_lse_given, int64_t vectors, int64_t value_dim) {
    const vec<T> masked = broadcast(kMasked<T>);
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
      store<T>(origin + lane, masked);
      store<T>(teacher_origin + lane, teacher_lse_given ? vec<T>{} : masked);
      for (T* of : {sum, sum_rest, weighted, weighted_rest, teacher_sum, teacher_sum_rest,
                    rounded_sum, seen})
        store<T>(of + lane, vec<T>{});
      for (int64_t row = 0; row < value_dim; ++row)
        store<T>(output + row * kPanel<T> + lane, vec<T>{});
    }
  }
};

// The highest logit of one vector of lanes in the tile's column, `lowest` at least.
template <class Precision, class T>
inline vec<T> highest_logit(LogitSource<T> logits, int64_t keys, vec<T> lowest) {
  const vec<T> start{};
  const auto logit = [&](const T* x) { return Precision::logit(load(x), logits.factor, start); };
  const T* tile = logits.numbers;
  constexpr int kChains = 4;  // a single chain of maxima would be limited by its latency
  vec<T> chain[kChains] = {lowest, lowest, lowest, lowest};
  int64_t key = 0;
  for (; key + kChains <= keys; key += kChains, tile += kChains * kPanel<T>)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i)
      chain[i] = max_or_second<T>(logit(tile + i * kPanel<T>), chain[i]);
  for (; key < keys; ++key, tile += kPanel<T>) chain[0] = max_or_second<T>(logit(tile), chain[0]);
  return max_or_second<T>(max_or_second<T>(chain[0], chain[1]),
                          max_or_second<T>(chain[2], chain[3]));
}

// What the tile's logits are measured from, of one vector of lanes, `rows` of which hold a row
// whose sum before the tile was `sum`, of logits measured from `before`.
template <class Precision, class T>
inline vec<T> raised_origin(LogitSource<T> logits, int64_t keys, bool search, int64_t rows,
                            vec<T> before, vec<T> sum) {
  vec<T> raised = before;
  if (any_above<T>(sum, kRoom<T>, rows)) raised = sum > kRoom<T> ? before + log2<T>(sum) : before;
  // Of origins, only kMasked lies so low.
  const bool some_see_none = any_above<T>(-before, -kMasked<T> / 2, rows);
  if (!search && !some_see_none) return raised;
  const vec<T> highest = highest_logit<Precision>(logits, keys, before);
  return before == kMasked<T> || highest > raised + T(kRoomBits + 1) ? highest : raised;
}

// What to subtract from logits: where nothing was visible yet, 0, which leaves masked logits low
// enough to vanish.
template <class T>
inline vec<T> subtracted(vec<T> origin) {
  return origin == kMasked<T> ? vec<T>{} : origin;
}

// Adds a tile's sum to what came before it, which shrinks as the origin rises. Tiles are summed
// from zero, and what rounding takes from their sum is kept (Knuth's two-sum), so that errors do
// not grow with the number of keys: a divergence may be a small difference of these sums.
template <class T>
inline void add_tile(T* running, T* rest, vec<T> shrink, vec<T> tile_sum) {
  const vec<T> before = load(running) * shrink, total = before + tile_sum;
  const vec<T> added = total - before;
  store<T>(running, total);
  store<T>(rest, load(rest) * shrink + ((before - (total - added)) + (tile_sum - added)));
}

// Whether the teacher's probabilities are summed up.
template <class Div, bool kTeacherLse>
inline constexpr bool kSumsTeacher = Div::kTeacherProbability || (Div::kTeacher && !kTeacherLse);

// What one vector of lanes of a tile adds to the running sums.
template <class T>
struct TileSums {
  vec<T> sum{}, weighted{}, teacher_sum{}, rounded_sum{};
};

// Turns the tile's logits into p = 2^(s - origin), which go to `probabilities`, and sums them up.
template <class Div, bool kTeacherLse, class Precision, class Lanes, class T>
inline TileSums<T> sum_tile(LogitSource<T> student, LogitSource<T> teacher, int64_t keys,
                            vec<T> origin, vec<T> teacher_origin, Lanes probabilities) {
  TileSums<T> sums;
  for (int64_t first = 0; first < keys; first += kSummedKeys) {
    const int64_t end = first + kSummedKeys < keys ? first + kSummedKeys : keys;
    vec<T> part{}, weighted_part{}, teacher_part{};
    const auto next = [&](int64_t key) __attribute__((always_inline)) {
      const int64_t at = key * kPanel<T>;
      const vec<T> s = Precision::logit_from(origin, load(student.numbers + at), student.factor);
      const vec<T> p = Precision::power(s);
      part += p;
      if constexpr (Div::kTeacher) {
        vec<T> t = load(teacher.numbers + at), pt{};
        if constexpr (kTeacherLse)
          t = Precision::logit(t, teacher.factor, load(teacher.start));
        else
          t = Precision::logit_from(teacher_origin, t, teacher.factor);
        if constexpr (kSumsTeacher<Div, kTeacherLse>) {
          pt = Precision::power(t);
          teacher_part += pt;
        }
        weighted_part += Div::term(p, pt, s - t);
      }
      return p;
    };
    int64_t key = first;
    for (; key + 1 < end; key += 2) {
      const vec<T> p = next(key), after = next(key + 1);
      probabilities.put(key, p, after);
      if constexpr (Precision::kRoundsTiles)
        sums.rounded_sum = Precision::add_rounded(sums.rounded_sum, p, after);
    }
    if (key < end) {
      const vec<T> p = next(key);
      probabilities.put(key, p);
      if constexpr (Precision::kRoundsTiles)
        sums.rounded_sum = Precision::add_rounded(sums.rounded_sum, p, vec<T>{});
    }
    sums.sum += part;
    sums.weighted += weighted_part;
    sums.teacher_sum += teacher_part;
  }
  return sums;
}

// Origins of one vector of lanes, before a tile and from it on.
template <class T>
struct Move {
  vec<T> before, after;

  vec<T> shift() const { return before - after; }
};

// Adds a tile, which was measured from the origins after the move, to one vector of lanes.
template <class Div, bool kTeacherLse, class Precision, class T>
inline void add_tile_sums(const RunningSums<T>& sums, int64_t lane, int64_t value_dim,
                          Move<T> origin, Move<T> teacher_origin, const TileSums<T>& tile) {
  const vec<T> shrink = exp2<T>(origin.shift());
  const vec<T> teacher_shrink = exp2<T>(teacher_origin.shift());
  if (!all_equal<T>(origin.before, origin.after))
    for (int64_t row = 0; row < value_dim; ++row) {
      T* output = sums.output + row * kPanel<T> + lane;
      store<T>(output, load(output) * shrink);
    }
  store<T>(sums.origin + lane, origin.after);
  store<T>(sums.teacher_origin + lane, teacher_origin.after);
  if constexpr (Div::kTeacher) {
    // Earlier terms were measured from earlier origins.
    T* weighted = sums.weighted + lane;
    store<T>(weighted,
             Div::shifted(load(weighted), load(sums.sum + lane), load(sums.teacher_sum + lane),
                          origin.shift() - teacher_origin.shift()));
    add_tile(weighted, sums.weighted_rest + lane,
             Div::kTeacherProbability ? teacher_shrink : shrink, tile.weighted);
  }
  add_tile(sums.sum + lane, sums.sum_rest + lane, shrink, tile.sum);
  if constexpr (Precision::kRoundsTiles)
    store<T>(sums.rounded_sum + lane, load(sums.rounded_sum + lane) * shrink + tile.rounded_sum);
  if constexpr (kSumsTeacher<Div, kTeacherLse>)
    add_tile(sums.teacher_sum + lane, sums.teacher_sum_rest + lane, teacher_shrink,
             tile.teacher_sum);
}

// Sweeps one vector of lanes of a tile, which the logits are given for: p goes to `probabilities`,
// and the running sums grow. Returns false, with nothing added, where some logits lie so far above
// their origin that the tile must be searched for the highest.
template <class Div, bool kTeacherLse, class Precision, class Lanes, class T>
inline bool sweep(LogitSource<T> student, LogitSource<T> teacher, int64_t keys, bool search,
                  const RunningSums<T>& sums, int64_t lane, int64_t value_dim,
                  Lanes probabilities) {
  constexpr bool kTeacherMoves = Div::kTeacher && !kTeacherLse;
  const int64_t rows = sums.rows - lane;
  Move<T> origin{load(sums.origin + lane), {}};
  origin.after =
      raised_origin<Precision>(student, keys, search, rows, origin.before, load(sums.sum + lane));
  Move<T> teacher_origin{load(sums.teacher_origin + lane), load(sums.teacher_origin + lane)};
  if constexpr (kTeacherMoves)
    teacher_origin.after = raised_origin<Precision>(
        teacher, keys, search, rows, teacher_origin.before, load(sums.teacher_sum + lane));

  const TileSums<T> tile =
      sum_tile<Div, kTeacherLse, Precision>(student, teacher, keys, subtracted<T>(origin.after),
                                            subtracted<T>(teacher_origin.after), probabilities);
  if (!search && (any_above<T>(tile.sum, kRoom<T>, rows) ||
                  (kTeacherMoves && any_above<T>(tile.teacher_sum, kRoom<T>, rows))))
    return false;
  add_tile_sums<Div, kTeacherLse, Precision>(sums, lane, value_dim, origin, teacher_origin, tile);
  return true;
}

// Adds to one vector of lanes of `sums` what the same rows have gathered from other keys.
template <class Div, class T>
inline void merge(const RunningSums<T>& sums, const RunningSums<T>& other, int64_t lane,
                  int64_t value_dim) {
  const vec<T> origin = max_or_second<T>(load(other.origin + lane), load(sums.origin + lane));
  const vec<T> teacher_origin =
      max_or_second<T>(load(other.teacher_origin + lane), load(sums.teacher_origin + lane));
  struct Rebased {
    vec<T> shrink, teacher_shrink, weighted;
    vec<T> weight() const { return Div::kTeacherProbability ? teacher_shrink : shrink; }
  };
  const auto rebase = [&](const RunningSums<T>& part) {
    const vec<T> change = load(part.origin + lane) - origin;
    const vec<T> teacher_change = load(part.teacher_origin + lane) - teacher_origin;
    Rebased rebased{exp2<T>(change), exp2<T>(teacher_change), {}};
    if constexpr (Div::kTeacher)
      rebased.weighted = Div::shifted(load(part.weighted + lane), load(part.sum + lane),
                                      load(part.teacher_sum + lane), change - teacher_change);
    return rebased;
  };
  const Rebased mine = rebase(sums), others = rebase(other);
  const auto add_sum = [lane](T* to, T* rest, vec<T> shrink, vec<T> from, const T* from_rest,
                              vec<T> from_shrink) {
    add_tile<T>(to + lane, rest + lane, shrink, from * from_shrink);
    store<T>(rest + lane, load(rest + lane) + load(from_rest + lane) * from_shrink);
  };
  if constexpr (Div::kTeacher) {
    store<T>(sums.weighted + lane, mine.weighted);
    add_sum(sums.weighted, sums.weighted_rest, mine.weight(), others.weighted, other.weighted_rest,
            others.weight());
  }
  add_sum(sums.sum, sums.sum_rest, mine.shrink, load(other.sum + lane), other.sum_rest,
          others.shrink);
  add_sum(sums.teacher_sum, sums.teacher_sum_rest, mine.teacher_shrink,
          load(other.teacher_sum + lane), other.teacher_sum_rest, others.teacher_shrink);
  const auto add = [lane](T* to, const T* from, vec<T> shrink, vec<T> from_shrink) {
    store<T>(to + lane, load(to + lane) * shrink + load(from + lane) * from_shrink);
  };
  add(sums.rounded_sum, other.rounded_sum, mine.shrink, others.shrink);
  for (int64_t row = 0; row < value_dim * kPanel<T>; row += kPanel<T>)
    add(sums.output + row, other.output + row, mine.shrink, others.shrink);
  store<T>(sums.origin + lane, origin);
  store<T>(sums.teacher_origin + lane, teacher_origin);
  store<T>(sums.seen + lane, max_or_second<T>(load(other.seen + lane), load(sums.seen + lane)));
}

}  // namespace attn_kd::ATTN_KD_ISA
