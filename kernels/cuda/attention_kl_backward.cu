// Launcher of the backward pass.
#include "attention_kl_backward.cuh"
#include "launch.cuh"

namespace attn_kd::cuda {
namespace {

template <class S, bool kTeacher>
int launch_backward(const BackwardProblem& p, void* stream) {
  const int64_t key_blocks = blocks_of<S>(p.problem, p.problem.key_length);
  const int64_t query_blocks = blocks_of<S>(p.problem, p.problem.query_length);
  return device::launch(attention_kl_backward<S, kTeacher>, key_blocks + query_blocks, kThreads,
                        stream, p, static_cast<int>(key_blocks));
}

}  // namespace
}  // namespace attn_kd::cuda

extern "C" int attn_kd_cuda_backward(const attn_kd::cuda::BackwardProblem* problem, void* stream) {
  using namespace attn_kd::cuda;
  BackwardProblem p = *problem;
  p.problem = in_base_2(p.problem);
  return with_shape(p.problem, p.problem.query_length + p.problem.key_length, [&]<class S>(S) {
    return p.problem.teacher_query.data ? launch_backward<S, true>(p, stream)
                                        : launch_backward<S, false>(p, stream);
  });
}
