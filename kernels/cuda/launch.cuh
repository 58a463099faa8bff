// The choice of a block's shape, and how many blocks there are.
#pragma once

#include "stream.cuh"

namespace attn_kd::cuda {

// The kernels' logits are in base 2: the scales that they read make them so.
inline Problem in_base_2(Problem p) {
  p.scale *= kLog2e;
  p.teacher_scale *= kLog2e;
  return p;
}

template <class S>
int64_t blocks_of(const Problem& p, int rows) {
  return static_cast<int64_t>(p.batch) * p.heads * ((rows + S::kRows - 1) / S::kRows);
}

// Calls launch(S()) for the element type and head_dim. Blocks of 64 rows read the columns half as
// often as blocks of 32, which are chosen where too few of the others would leave multiprocessors,
// each of which holds two blocks, without work.
template <class Launch>
int with_shape(const Problem& p, int rows, Launch launch) {
  const auto of_type = [&]<class T>(T) {
    if (p.head_dim == 64) return launch(Shape<T, 64, 4>());
    using Large = Shape<T, 32, 4>;
    if (blocks_of<Large>(p, rows) < 2 * device::multiprocessors()) return launch(Shape<T, 32, 2>());
    return launch(Large());
  };
  return p.dtype == DType::bf16 ? of_type(device::BFloat16()) : of_type(device::Float16());
}

}  // namespace attn_kd::cuda
