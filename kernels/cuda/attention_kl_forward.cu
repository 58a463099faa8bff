// Launcher of the forward pass.
#include "attention_kl_forward.cuh"
#include "launch.cuh"

namespace attn_kd::cuda {
namespace {

template <class S, Teacher kTeacher>
int launch_forward(const ForwardProblem& p, void* stream) {
  return device::launch(attention_kl_forward<S, kTeacher>,
                        blocks_of<S>(p.problem, p.problem.query_length), kThreads, stream, p);
}

}  // namespace
}  // namespace attn_kd::cuda

extern "C" int attn_kd_cuda_forward(const attn_kd::cuda::ForwardProblem* problem, void* stream) {
  using namespace attn_kd::cuda;
  ForwardProblem p = *problem;
  p.problem = in_base_2(p.problem);
  return with_shape(p.problem, p.problem.query_length, [&]<class S>(S) {
    if (!p.problem.teacher_query.data) return launch_forward<S, Teacher::none>(p, stream);
    if (p.given_teacher_lse) return launch_forward<S, Teacher::known_lse>(p, stream);
    return launch_forward<S, Teacher::unknown_lse>(p, stream);
  });
}

extern "C" const char* attn_kd_cuda_error_string(int error) {
  return attn_kd::cuda::device::error_string(error);
}
