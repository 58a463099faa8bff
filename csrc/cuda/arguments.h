// The operators' arguments, checked and described to the CUDA kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "kernels/cuda/attention_kl.h"

namespace attn_kd::cuda {

using OptionalTensor = std::optional<at::Tensor>;

// The options of both operators, as in their schemas.
struct Options {
  std::optional<double> scale, teacher_scale;
  std::string_view divergence, head_reduction;
  double dropout_p;
};

// Throws ValueError where x has another shape than expected or is not where `like` is, TypeError
// where it is of another dtype.
void check_tensor(const char* name, const at::Tensor& x, at::IntArrayRef expected,
                  const at::Tensor& like);

// Whether a tensor is there: one of shape [0] stands for none.
bool is_given(const OptionalTensor& x);

// A per-row tensor of the expected shape on the device of `like`, contiguous float; none where it
// is not given.
OptionalTensor row_values(const char* name, const OptionalTensor& x, at::IntArrayRef expected,
                          const at::Tensor& like);

// x itself, or a copy of it where rows are not contiguous or do not begin at multiples of 16 bytes.
at::Tensor aligned_rows(const at::Tensor& x);

Input input(const at::Tensor& x);
Output output(const at::Tensor& x);

// The student's and teacher's tensors, kept alive while a kernel is launched with them. The
// constructor throws ValueError or TypeError for whatever the kernels cannot do, with the reason.
class Arguments {
 public:
  Arguments(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
            const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
            const Options& options);

  const Problem& problem() const { return problem_; }
  bool has_teacher() const { return teacher_query_.defined(); }
  // [B, H, Lq] float, where it was given.
  const OptionalTensor& teacher_lse() const { return teacher_lse_; }

 private:
  void set_student(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const Options& options);
  void set_teacher(const at::Tensor& query, const at::Tensor& key, const OptionalTensor& lse,
                   const Options& options);
  void set_mask(const at::Tensor& mask);

  at::Tensor query_, key_, value_, teacher_query_, teacher_key_, mask_;
  OptionalTensor teacher_lse_;
  Problem problem_{};
};

}  // namespace attn_kd::cuda
