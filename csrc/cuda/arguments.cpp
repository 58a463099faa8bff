#include "arguments.h"

#include <array>
#include <cmath>
#include <limits>

namespace attn_kd::cuda {
namespace {

using at::Tensor;

// Beyond it a float logit of size 1 is infinite, in base 2 too.
constexpr double kMaxScale = 1e38;

DType mask_dtype(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case at::kBool: return DType::boolean;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, "attn_kd: attn_mask is ", mask.scalar_type(),
                       "; backend 'cuda' takes bool or a floating dtype");
  }
}

void check_device(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_VALUE(x.device() == like.device(), "attn_kd: ", name, " is on ", x.device(),
                    " but query is on ", like.device());
}

float resolve_scale(const char* name, std::optional<double> scale, int64_t head_dim) {
  const double resolved = scale.value_or(1 / std::sqrt(static_cast<double>(head_dim)));
  TORCH_CHECK_VALUE(std::abs(resolved) <= kMaxScale, "attn_kd: ", name, " is ", resolved,
                    ", expected a number of at most ", kMaxScale);
  return static_cast<float>(resolved);
}

// Rows are counted in 32 bits.
void check_count(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.size(0) * x.size(1) * x.size(2) <= std::numeric_limits<int32_t>::max() / 2,
                    "attn_kd: ", name, " has shape ", x.sizes(), ", more rows than backend 'cuda' ",
                    "can count");
}

// Whether a stride along a dimension of this size keeps rows at multiples of 16 bytes.
bool keeps_alignment(int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; }

}  // namespace

void check_tensor(const char* name, const Tensor& x, at::IntArrayRef expected, const Tensor& like) {
  TORCH_CHECK_VALUE(x.sizes() == expected, "attn_kd: ", name, " has shape ", x.sizes(),
                    ", expected ", expected, " by backend 'cuda'");
  check_device(name, x, like);
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), "attn_kd: ", name, " is ",
                   x.scalar_type(), " but query is ", like.scalar_type(),
                   "; backend 'cuda' takes one dtype");
}

bool is_given(const OptionalTensor& x) {
  const std::array<int64_t, 1> nothing{0};
  return x.has_value() && x->sizes() != at::IntArrayRef(nothing);
}

OptionalTensor row_values(const char* name, const OptionalTensor& x, at::IntArrayRef expected,
                          const Tensor& like) {
  if (!is_given(x)) return std::nullopt;
  TORCH_CHECK_VALUE(x->sizes() == expected, "attn_kd: ", name, " has shape ", x->sizes(),
                    ", expected ", expected);
  check_device(name, *x, like);
  TORCH_CHECK_TYPE(x->is_floating_point(), "attn_kd: ", name, " is ", x->scalar_type(),
                   ", expected floating point");
  return x->to(at::kFloat).contiguous();
}

Tensor aligned_rows(const Tensor& x) {
  bool aligned = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < 3; ++i) aligned &= keeps_alignment(x.size(i), x.stride(i));
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

Input input(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Output output(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Arguments::Arguments(const Tensor& query, const Tensor& key, const Tensor& value,
                     const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
                     const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
                     const Options& options) {
  TORCH_CHECK_VALUE(options.dropout_p == 0, "attn_kd: dropout_p is ", options.dropout_p,
                    "; backend 'cuda' has no dropout");
  set_student(query, key, value, options);
  TORCH_CHECK_VALUE(teacher_query.has_value() == teacher_key.has_value(),
                    "attn_kd: teacher_query and teacher_key come together");
  if (teacher_query.has_value()) set_teacher(*teacher_query, *teacher_key, teacher_lse, options);
  if (attn_mask.has_value()) set_mask(*attn_mask);
}

void Arguments::set_student(const Tensor& query, const Tensor& key, const Tensor& value,
                            const Options& options) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "attn_kd: query, key and value must have 4 dimensions");
  const int64_t head_dim = query.size(3);
  TORCH_CHECK_VALUE(head_dim == 32 || head_dim == 64, "attn_kd: query has head_dim ", head_dim,
                    "; backend 'cuda' takes 32 or 64");
  TORCH_CHECK_TYPE(query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf,
                   "attn_kd: query is ", query.scalar_type(),
                   "; backend 'cuda' takes bfloat16 or float16");
  const std::array keys{query.size(0), query.size(1), key.size(2), head_dim};
  check_tensor("key", key, keys, query);
  check_tensor("value", value, keys, query);
  TORCH_CHECK_VALUE(query.numel() > 0 && key.numel() > 0, "attn_kd: query has shape ",
                    query.sizes(), " and key ", key.sizes(), ", expected no empty dimension");
  check_count("query", query);
  check_count("key", key);
  query_ = aligned_rows(query);
  key_ = aligned_rows(key);
  value_ = aligned_rows(value);
  Problem& p = problem_;
  p.batch = static_cast<int32_t>(query.size(0));
  p.heads = static_cast<int32_t>(query.size(1));
  p.query_length = static_cast<int32_t>(query.size(2));
  p.key_length = static_cast<int32_t>(key.size(2));
  p.head_dim = static_cast<int32_t>(head_dim);
  p.dtype = query.scalar_type() == at::kHalf ? DType::f16 : DType::bf16;
  p.scale = resolve_scale("scale", options.scale, head_dim);
  p.query = input(query_);
  p.key = input(key_);
  p.value = input(value_);
}

void Arguments::set_teacher(const Tensor& query, const Tensor& key, const OptionalTensor& lse,
                            const Options& options) {
  TORCH_CHECK_VALUE(options.divergence == "reverse_kl", "attn_kd: divergence is '",
                    options.divergence, "'; backend 'cuda' has 'reverse_kl'");
  TORCH_CHECK_VALUE(options.head_reduction == "none", "attn_kd: head_reduction is '",
                    options.head_reduction, "'; backend 'cuda' has 'none'");
  check_tensor("teacher_query", query, query_.sizes(), query_);
  check_tensor("teacher_key", key, key_.sizes(), query_);
  teacher_query_ = aligned_rows(query);
  teacher_key_ = aligned_rows(key);
  const Problem& p = problem_;
  teacher_lse_ = row_values("teacher_lse", lse,
                            std::array<int64_t, 3>{p.batch, p.heads, p.query_length}, query_);
  problem_.teacher_scale = resolve_scale("teacher_scale", options.teacher_scale, p.head_dim);
  problem_.teacher_query = input(teacher_query_);
  problem_.teacher_key = input(teacher_key_);
}

void Arguments::set_mask(const Tensor& given) {
  const Problem& p = problem_;
  // Queries that it was expanded to share what a conversion would write out for each.
  const bool expanded =
      given.dim() >= 2 && given.size(-2) == p.query_length && given.stride(-2) == 0;
  Tensor mask = expanded ? given.narrow(-2, 0, 1) : given;
  if (mask.scalar_type() == at::kDouble) mask = mask.to(at::kFloat);  // rare
  const std::array<int64_t, 4> expected{p.batch, p.heads, p.query_length, p.key_length};
  std::array<int64_t, 4> strides{};
  const int64_t missing = 4 - mask.dim();
  bool fits = missing >= 0;
  for (int64_t i = 0; fits && i < mask.dim(); ++i) {
    fits = mask.size(i) == 1 || mask.size(i) == expected[missing + i];
    strides[missing + i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  TORCH_CHECK_VALUE(fits, "attn_kd: attn_mask has shape ", mask.sizes(),
                    ", expected one that broadcasts to ", at::IntArrayRef(expected));
  TORCH_CHECK_VALUE(strides[2] == 0, "attn_kd: attn_mask has shape ", mask.sizes(),
                    "; backend 'cuda' takes masks of keys alone, [B, H, 1, Lk] or broadcastable");
  check_device("attn_mask", mask, query_);
  mask_ = mask;
  problem_.mask = {mask_.const_data_ptr(), mask_dtype(mask_), strides[0], strides[1], strides[3]};
}

}  // namespace attn_kd::cuda
