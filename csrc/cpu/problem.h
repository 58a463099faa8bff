// What a CPU kernel is asked to do: plain data, shared between the host side (which knows torch)
// and the kernels (which are compiled once per instruction set and know nothing of torch).
#pragma once

#include <cstdint>
#include <span>

namespace attn_kd::cpu {

enum class DType : int8_t { f32, f64, bf16, f16, boolean };

// One of the divergences that kernels/divergence.h lists, or none.
struct Divergence {
  int8_t index = -1;  // in that list
  const char* name = nullptr;
  bool one_pass = true;  // whether the keys need be swept only once, for single heads

  explicit operator bool() const { return index >= 0; }
};

// A [B, H, L, width] tensor with unit last stride, or an absent one (data == nullptr).
template <class Pointer>
struct View {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 1;  // other than 1 for masks only

  explicit operator bool() const { return data != nullptr; }
  int64_t offset(int64_t b, int64_t h, int64_t row) const {
    return b * batch_stride + h * head_stride + row * row_stride;
  }
};

using Input = View<const void*>;
using Output = View<void*>;

// Rows of queries that a kernel works on together, one SIMD lane each: 256 bytes of accumulators,
// which is four AVX-512 registers.
inline constexpr int64_t kPanelBytes = 256;
// Panels that a forward task takes through the keys together, so that a tile of keys, teacher keys
// and values, once read from the outer caches, serves them all.
inline constexpr int64_t kMaxPanelsPerTask = 4;
// Numbers a query row that a forward task gathers beside the row of the output.
inline constexpr int64_t kRunningSums = 10;
// What a backward task may take of one core's L2 for keys, teacher keys and values and for the
// gradients that it accumulates: 1126 keys of 32 floats. The more keys at a time, the fewer times
// panels of query rows are made ready.
inline constexpr int64_t kChunkBytes = int64_t{704} << 10;

template <class T>
inline constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(T));

// Which entries of the map are dropped on their way to the output: word `key % 4` of Philox4x32-10
// with this key, of the counter (key / 4, query row, b * H + h, offset), where it is below the
// threshold. So the noise depends on nothing but the entry.
struct DropoutNoise {
  uint32_t threshold = 0;  // 0: no dropout
  uint32_t key[2] = {0, 0};
  uint32_t offset = 0;
  double keep_factor = 1;  // 1 / (1 - p), which kept entries are multiplied by
};

struct Problem {
  int64_t batch = 0, heads = 0, query_length = 0, key_length = 0;
  int64_t head_dim = 0, value_dim = 0, teacher_dim = 0;  // D, Dv, Dt
  int64_t teacher_heads = 0;                             // Ht, H unless heads are averaged
  int64_t teacher_keys_per_key = 1;                      // G teacher keys are one of the student's
  bool average_heads = false;                            // of several, before the maps are compared
  double scale = 1, teacher_scale = 1;
  Divergence divergence;
  DropoutNoise dropout;
  Input query, key, value;           // [B, H, Lq, D], [B, H, Lk, D], [B, H, Lk, Dv]
  Input teacher_query, teacher_key;  // [B, Ht, Lq, Dt], [B, Ht, G * Lk, Dt]; or absent
  Input mask;                        // [B, H, Lq, Lk], bool or additive
  bool poison_scratch = false;       // start on scratch memory full of NaN, for tests

  int64_t teacher_keys(int64_t keys) const { return keys * teacher_keys_per_key; }

  // Base 2: kernels merge a group's logits into that of their mean, log2(1/G sum_g 2^t_g), and so
  // know the teacher's LSE less log2 G. A student's and a teacher's logits are then of one size,
  // and their difference keeps its digits.
  double group_shift() const { return __builtin_log2(static_cast<double>(teacher_keys_per_key)); }

  // Whether the divergence needs the maps themselves, which only a second pass over the keys has.
  bool two_pass() const { return average_heads || !divergence.one_pass; }
};

// Per-row values (kl, lse, ...) are contiguous [B, H, Lq] in the accumulation type: double where
// the inputs are double, else float. Logarithms are natural, but for the origin.
//
// The backward pass knows a row's map by its origin m, near its highest base-2 logit, and its
// inverse sum, 1 / sum_j 2^(s_j - m), which is 0 where the row sees no key: a_j = 2^(s_j - m) *
// inverse_sum is exact to the last digits, which a map recomputed from one rounded LSE is not. The
// correction is what the gradient of the divergence needs beside them: for reverse_kl
// sum_j a_j (s_j - t_j), in two passes sum_j a_j dphi/da_j (see kernels/divergence.h).
struct ForwardProblem : Problem {
  int64_t panels_per_task = 1;  // at most kMaxPanelsPerTask
  int64_t key_splits = 1;       // tasks per block of panels, each with a part of the keys
  // Where there are several: what each has gathered, [B * H, panels, key_splits, kRunningSums + Dv,
  // kPanel] in the accumulation type, and how many of a block are done, 0 at first.
  void* partials = nullptr;
  int32_t* arrivals = nullptr;
  const void* given_teacher_lse = nullptr;
  Output output;  // [B, H, Lq, Dv]
  void* kl = nullptr;
  void* lse = nullptr;
  void* teacher_lse = nullptr;       // written when not given
  void* teacher_lse_rest = nullptr;  // likewise, where wanted: what rounding dropped of it
  void* origin = nullptr;
  void* inverse_sum = nullptr;
  void* correction = nullptr;
};

struct BackwardProblem : Problem {
  Input output, grad_output;  // [B, H, Lq, Dv]; absent when no gradient reaches the output
  const void* origin = nullptr;
  const void* inverse_sum = nullptr;
  const void* correction = nullptr;
  const void* teacher_lse = nullptr;
  const void* grad_kl = nullptr;   // may be absent
  const void* grad_lse = nullptr;  // may be absent
  int64_t key_splits = 1;          // tasks per (batch, head)
  Output grad_query;               // [key_splits * B, H, Lq, D]: one partial sum per split
  Output grad_key, grad_value;     // [B, H, Lk, D], [B, H, Lk, Dv]
};

// The kernels of one instruction set. Tasks [begin, end) may run in any order and at the same time,
// but each of them once: those of a forward pass with key_splits > 1 count the arrivals. `heads` is
// B * H and `groups` B where heads are averaged, else B * H:
//   forward          heads * ceil(Lq / (panel * panels_per_task)) * key_splits
//   backward         heads * key_splits
//   two_pass_forward groups * ceil(Lq / panel), after a forward pass that has written the LSEs,
//                    origins and inverse sums; writes kl, [B, Lq] where heads are averaged, and the
//                    correction
//   two_pass_backward groups * key_splits; grad_kl is shaped as kl
struct Kernels {
  using Forward = void (*)(const ForwardProblem&, int64_t begin, int64_t end);
  using Backward = void (*)(const BackwardProblem&, int64_t begin, int64_t end);
  template <class T>
  using Map = void (*)(const T* x, T* y, int64_t n);
  const char* name;
  std::span<const Divergence> divergences;  // that the kernels know
  Forward forward_f32, forward_f64;
  Backward backward_f32, backward_f64;
  Forward two_pass_forward_f32, two_pass_forward_f64;
  Backward two_pass_backward_f32, two_pass_backward_f64;
  // The kernels' vector functions, exposed so that they can be tested.
  Map<float> exp2_f32;
  Map<double> exp2_f64;
  Map<float> short_exp2_f32;
  Map<float> log2_f32;
  Map<double> log2_f64;
  // words[n, 4] of Philox4x32-10 for counters[n, 4]
  void (*philox)(const uint32_t* counters, const uint32_t key[2], uint32_t* words, int64_t n);
};

}  // namespace attn_kd::cpu
