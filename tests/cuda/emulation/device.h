// kernels/cuda/device.cuh on the CPU: the same functions, on the machine of machine.h. Instructions
// are written from the PTX ISA: the layouts of ldmatrix and of the fragments of mma.m16n8k16 are
// its formulas, not the kernels'.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "machine.h"

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace attn_kd::cuda::device {

using emulation::kLanes;
using emulation::Machine;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline unsigned thread_index() { return Machine::the().thread(); }
inline int opaque(int x) { return x; }
inline unsigned block_index() { return Machine::the().block(); }

template <class S>
S& shared_storage() {
  return *static_cast<S*>(Machine::the().shared_memory(sizeof(S)));
}

template <class V>
V read_global(const V* from) {
  Machine::the().read_global(from, sizeof(V));
  return *from;
}

template <class V>
void write_global(V* to, V x) {
  Machine::the().write_global(to, sizeof(V));
  *to = x;
}

template <class V>
V read_shared(const V* from) {
  Machine::the().read_shared(from, sizeof(V));
  return *from;
}

template <class V>
void write_shared(V* to, V x) {
  Machine::the().write_shared(to, sizeof(V));
  *to = x;
}

inline void copy_async(void* to, const void* from, bool valid) {
  Machine::the().begin_copy(to, from, valid);
}

inline void wait_for_copies() { Machine::the().finish_copies(); }

inline void barrier() { Machine::the().barrier(false); }
inline bool barrier_any(bool condition) { return Machine::the().barrier(condition); }

// What a lane brings to a warp-wide operation of which it gets R.
template <class Operand, class R>
struct Exchange {
  Operand operand;
  R result;
};

inline float shuffle_xor(float x, int lanes) {
  struct Operand {
    float x;
    int lanes;
  };
  using Lane = Exchange<Operand, float>;
  Lane lane{{x, lanes}, 0};
  const auto shuffle = [](void* const(&all)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      auto* self = static_cast<Lane*>(all[i]);
      self->result = static_cast<Lane*>(all[i ^ self->operand.lanes])->operand.x;
    }
  };
  Machine::the().together(shuffle, &lane);
  return lane.result;
}

// ldmatrix.m8n8.x4: lanes 8 i to 8 i + 7 bring the rows of matrix i; lane l gets row l / 4, columns
// 2 (l % 4) and one more, of the matrix or of its transpose.
template <bool kTransposed>
void load_matrices(uint32_t (&matrices)[4], const void* row) {
  struct Fragments {
    uint16_t elements[4][2];
  };
  using Lane = Exchange<const void*, Fragments>;
  Lane lane{row, {}};
  Machine::the().read_shared(row, 16);
  const auto load = [](void* const(&all)[kLanes]) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* rows[8];
      unsigned banks = 0;
      for (int j = 0; j < 8; ++j) {
        const void* address = static_cast<Lane*>(all[8 * i + j])->operand;
        rows[j] = static_cast<const uint16_t*>(address);
        banks |= 1u << (reinterpret_cast<uintptr_t>(address) / 16 % 8);
      }
      if (banks != 0xff) ++Machine::the().bank_conflicts;
      for (int l = 0; l < kLanes; ++l)
        for (int e = 0; e < 2; ++e) {
          const int r = l / 4, c = 2 * (l % 4) + e;
          static_cast<Lane*>(all[l])->result.elements[i][e] = kTransposed ? rows[c][r] : rows[r][c];
        }
    }
  };
  Machine::the().together(load, &lane);
  std::memcpy(matrices, lane.result.elements, 16);
}

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline float widen(Float16 x) {
  _Float16 number;
  std::memcpy(&number, &x.bits, 2);
  return static_cast<float>(number);
}

inline void round_to(BFloat16& rounded, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x))
    rounded.bits = 0x7fff;
  else
    rounded.bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void round_to(Float16& rounded, float x) {
  const auto number = static_cast<_Float16>(x);
  std::memcpy(&rounded.bits, &number, 2);
}

// mma.m16n8k16, row.col: with group = lane / 4 and four = lane % 4,
//   a_i, i < 8: row group, or group + 8 for i = 2, 3, 6, 7; column 2 four + i % 2, + 8 for i >= 4
//   b_i, i < 4: row 2 four + i % 2, + 8 for i >= 2; column group
//   c_i, i < 4: row group, or group + 8 for i >= 2; column 2 four + i % 2
template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operand {
    T a[8], b[4];
    float c[4];
  };
  using Lane = Exchange<Operand, float[4]>;
  Lane lane;
  const uint32_t b[2] = {b0, b1};
  std::memcpy(lane.operand.a, a, 16);
  std::memcpy(lane.operand.b, b, 8);
  std::memcpy(lane.operand.c, sum, 16);
  const auto multiply = [](void* const(&all)[kLanes]) {
    float a[16][16], b[16][8];
    for (int l = 0; l < kLanes; ++l) {
      const Operand& of = static_cast<Lane*>(all[l])->operand;
      const int group = l / 4, four = l % 4;
      for (int i = 0; i < 8; ++i)
        a[group + (i / 2 % 2 == 1 ? 8 : 0)][2 * four + i % 2 + (i >= 4 ? 8 : 0)] = widen(of.a[i]);
      for (int i = 0; i < 4; ++i) b[2 * four + i % 2 + (i >= 2 ? 8 : 0)][group] = widen(of.b[i]);
    }
    for (int l = 0; l < kLanes; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + (i >= 2 ? 8 : 0), column = 2 * (l % 4) + i % 2;
        float c = static_cast<Lane*>(all[l])->operand.c[i];
        for (int k = 0; k < 16; ++k) c += a[row][k] * b[k][column];
        static_cast<Lane*>(all[l])->result[i] = c;
      }
  };
  Machine::the().together(multiply, &lane);
  std::memcpy(sum, lane.result, 16);
}

template <class T>
uint32_t pack(float low, float high) {
  T both[2];
  round_to(both[0], low);
  round_to(both[1], high);
  uint32_t word;
  std::memcpy(&word, both, 4);
  return word;
}

inline float exp2_approx(float x) { return std::exp2(x); }

// Of a GPU as the test wants it.
inline int emulated_multiprocessors = 1;
inline int multiprocessors() { return emulated_multiprocessors; }

inline std::string last_fault;
inline void* last_stream = nullptr;  // that something was to be launched on

template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
           Parameters... parameters) {
  last_stream = stream;
  try {
    Machine::the().run(static_cast<int>(blocks), threads, [&] { kernel(parameters...); });
    return 0;
  } catch (const emulation::Fault& fault) {
    last_fault = fault.what;
    return 1;
  }
}

inline const char* error_string(int) { return last_fault.c_str(); }

}  // namespace attn_kd::cuda::device
