// The operators' arguments, checked and described to the kernels.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "problem.h"

namespace attn_kd::cpu {

using OptionalTensor = std::optional<at::Tensor>;

// The options of both operators, as in their schemas.
struct Options {
  std::optional<double> scale, teacher_scale;
  std::string_view divergence, head_reduction;
  double dropout_p;
};

// Names of the divergences that the kernels know.
std::vector<std::string> divergences();
// Throws ValueError where the kernels know no divergence of this name.
Divergence divergence_named(std::string_view name);

// For tests: from now on kernels find NaN in the scratch memory that they have not written, so that
// what they read of it by mistake shows.
void poison_scratch(bool poison);

// The dtype in which rows are accumulated and per-row results are returned.
inline at::ScalarType accumulation_type(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Throws ValueError where x is not a floating CPU tensor of the expected shape, TypeError where its
// dtype is none of the kernels'.
void check_tensor(const char* name, const at::Tensor& x, at::IntArrayRef expected);

// A per-row tensor of the expected shape, contiguous, in the accumulation type; none where it is
// absent or empty.
OptionalTensor row_values(const OptionalTensor& x, at::IntArrayRef expected,
                          at::ScalarType accumulation);

// x itself, or a copy of it where rows are not contiguous.
at::Tensor unit_last_stride(const at::Tensor& x);

Input input(const OptionalTensor& x);
Output output(const at::Tensor& x);

// The student's and teacher's tensors, kept alive while the kernels read them. The constructor
// throws ValueError or TypeError where the kernels could read past a tensor's end or would not know
// what to do.
class Arguments {
 public:
  Arguments(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
            const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
            const OptionalTensor& dropout_seed, const Options& options);

  const Problem& problem() const { return problem_; }
  // Of kl and its gradient: [B, H, Lq], or [B, Lq] of averaged maps.
  at::DimVector kl_shape() const;
  // [B, Ht, Lq] in the accumulation type, where it was given.
  const OptionalTensor& teacher_lse() const { return teacher_lse_; }

 private:
  void set_student(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const Options& options);
  void set_teacher(const at::Tensor& query, const at::Tensor& key, const OptionalTensor& lse,
                   const Options& options);
  void set_mask(const at::Tensor& mask);
  void set_dropout(const OptionalTensor& seed, double probability);

  at::Tensor query_, key_, value_;
  bool mean_of_heads_ = false;
  OptionalTensor teacher_query_, teacher_key_, teacher_lse_, mask_;
  Problem problem_;
};

}  // namespace attn_kd::cpu
