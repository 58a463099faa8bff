// What the kernels ask of the GPU: PTX instructions, memory accesses, barriers, launches.
//
// The kernels touch memory and other threads through these functions alone. So the same kernel
// source runs on the CPU, where tests/cuda/emulation/device.h takes the place of this file and
// checks every access.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace attn_kd::cuda::device {

// Elements of 16 bits, as memory holds them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Volatile, so that what follows from it can be computed anew instead of being kept in registers.
__device__ __forceinline__ unsigned thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The same number, but the compiler does not know: what follows from it inside of a loop is
// computed there and not kept in registers.
__device__ __forceinline__ int opaque(int x) {
  int same;
  asm volatile("mov.u32 %0, %1;" : "=r"(same) : "r"(x));
  return same;
}

__device__ __forceinline__ unsigned block_index() { return blockIdx.x; }

// The block's shared memory as one S.
template <class S>
__device__ __forceinline__ S& shared_storage() {
  __shared__ __align__(128) unsigned char bytes[sizeof(S)];
  return *reinterpret_cast<S*>(bytes);
}

template <class V>
__device__ __forceinline__ V read_global(const V* from) {
  return __ldg(from);
}

template <class V>
__device__ __forceinline__ void write_global(V* to, V x) {
  *to = x;
}

template <class V>
__device__ __forceinline__ V read_shared(const V* from) {
  return *from;
}

template <class V>
__device__ __forceinline__ void write_shared(V* to, V x) {
  *to = x;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Begins to copy 16 bytes from global to shared memory, or zeros where !valid; `from` must be an
// aligned address in either case.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// Waits for the copies that this thread has begun; the others see them after a barrier.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void barrier() { __syncthreads(); }

// A barrier that tells whether the condition holds for any thread of the block.
__device__ __forceinline__ bool barrier_any(bool condition) {
  return __syncthreads_or(condition) != 0;
}

__device__ __forceinline__ float shuffle_xor(float x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

// Four 8x8 matrices of 16-bit elements, each given by the addresses of its rows, 16 bytes each:
// those of matrix i by lanes 8 i to 8 i + 7. Lane l gets elements (l / 4, 2 (l % 4)) and the one
// after it of every matrix, or of its transpose.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sum += a b: [16, 8] += [16, 16] [16, 8], fragments as mma.m16n8k16 has them.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&sum)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to T, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float widen(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of the current device; 1 where that is not to be known, which a launch will fail for as well.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess)
    return count;
  cudaGetLastError();
  return 1;
}

// Enqueues kernel(parameters...) on a stream, a cudaStream_t; returns a cudaError_t, and leaves
// none for others to find.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
           Parameters... parameters) {
  void* arguments[] = {&parameters...};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(threads), arguments, 0, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

inline const char* error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace attn_kd::cuda::device
