// What the instructions of kernels/cuda/device.cuh give for constants: the assembler computes it.
#include "kernels/cuda/device.cuh"

using namespace attn_kd::cuda::device;

__global__ void constants(uint32_t* words, float* numbers) {
  words[0] = pack<Float16>(1.5f, -2.f);
  words[1] = pack<BFloat16>(1.5f, -2.f);
  numbers[0] = widen(Float16{0x4248});
  numbers[1] = exp2_approx(-5.f);
}
