#include "arguments.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>

#include "dispatch.h"

namespace attn_kd::cpu {
namespace {

using at::Tensor;

// Of the widths D, Dv and Dt: the scratch memory of a thread grows with them.
constexpr int64_t kMaxHeadDim = 256;
// Of a factor on the logits: beyond it a float logit of size 1 is infinite.
constexpr double kMaxScale = 1e38;

std::atomic<bool> scratch_is_poisoned{false};

DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kBool: return DType::boolean;
    default: TORCH_CHECK_TYPE(false, "attn_kd: ", name, " has dtype ", x.scalar_type());
  }
}

bool parse_head_reduction(std::string_view name) {
  TORCH_CHECK_VALUE(name == "none" || name == "mean", "attn_kd: head_reduction '", name,
                    "' is unknown");
  return name == "mean";
}

double resolve_scale(const char* name, std::optional<double> scale, int64_t head_dim) {
  if (!scale.has_value()) return 1 / std::sqrt(static_cast<double>(head_dim));
  TORCH_CHECK_VALUE(std::abs(*scale) <= kMaxScale, "attn_kd: ", name, " is ", *scale,
                    ", expected a number from ", -kMaxScale, " to ", kMaxScale);
  return *scale;
}

void check_width(const char* name, int64_t width, int64_t least) {
  TORCH_CHECK_VALUE(width >= least && width <= kMaxHeadDim, "attn_kd: ", name, " has width ", width,
                    ", expected ", least, " to ", kMaxHeadDim);
}

}  // namespace

std::vector<std::string> divergences() {
  std::vector<std::string> names;
  for (const Divergence& known : active_kernels().divergences) names.emplace_back(known.name);
  return names;
}

Divergence divergence_named(std::string_view name) {
  for (const Divergence& known : active_kernels().divergences)
    if (name == known.name) return known;
  TORCH_CHECK_VALUE(false, "attn_kd: divergence '", name, "' is unknown");
}

void poison_scratch(bool poison) { scratch_is_poisoned.store(poison, std::memory_order_relaxed); }

void check_tensor(const char* name, const Tensor& x, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(x.sizes() == expected, "attn_kd: ", name, " has shape ", x.sizes(),
                    ", expected ", expected);
  TORCH_CHECK_VALUE(x.device().is_cpu(), "attn_kd: ", name, " is on ", x.device(),
                    ", expected cpu");
  TORCH_CHECK_TYPE(dtype_of(name, x) != DType::boolean, "attn_kd: ", name,
                   " is boolean, expected floating point");
}

OptionalTensor row_values(const OptionalTensor& x, at::IntArrayRef expected,
                          at::ScalarType accumulation) {
  const std::array<int64_t, 1> nothing{0};
  if (!x.has_value() || x->sizes() == at::IntArrayRef(nothing)) return std::nullopt;
  TORCH_CHECK_VALUE(x->sizes() == expected, "attn_kd: expected a per-row tensor of shape ",
                    expected, ", got ", x->sizes());
  TORCH_CHECK_VALUE(x->device().is_cpu(), "attn_kd: expected a per-row tensor on cpu, got one on ",
                    x->device());
  TORCH_CHECK_TYPE(x->is_floating_point(), "attn_kd: expected a floating per-row tensor, got ",
                   x->scalar_type());
  if (x->scalar_type() == accumulation && x->is_contiguous()) return x;
  return x->to(accumulation).contiguous();
}

Tensor unit_last_stride(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : x.contiguous();
}

Input input(const OptionalTensor& x) {
  if (!x.has_value()) return {};
  const auto strides = x->strides();
  return {x->const_data_ptr(), dtype_of("input", *x), strides[0], strides[1], strides[2],
          strides[3]};
}

Output output(const Tensor& x) {
  const auto strides = x.strides();
  return {x.mutable_data_ptr(), dtype_of("output", x), strides[0], strides[1], strides[2], 1};
}

Arguments::Arguments(const Tensor& query, const Tensor& key, const Tensor& value,
                     const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
                     const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
                     const OptionalTensor& dropout_seed, const Options& options) {
  problem_.poison_scratch = scratch_is_poisoned.load(std::memory_order_relaxed);
  set_student(query, key, value, options);
  TORCH_CHECK_VALUE(teacher_query.has_value() == teacher_key.has_value(),
                    "attn_kd: teacher_query and teacher_key come together");
  if (teacher_query.has_value()) set_teacher(*teacher_query, *teacher_key, teacher_lse, options);
  if (attn_mask.has_value()) set_mask(*attn_mask);
  set_dropout(dropout_seed, options.dropout_p);
}

at::DimVector Arguments::kl_shape() const {
  if (mean_of_heads_) return {problem_.batch, problem_.query_length};
  return {problem_.batch, problem_.heads, problem_.query_length};
}

void Arguments::set_student(const Tensor& query, const Tensor& key, const Tensor& value,
                            const Options& options) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "attn_kd: query, key and value must have 4 dimensions");
  Problem& p = problem_;
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.query_length = query.size(2);
  p.key_length = key.size(2);
  p.head_dim = query.size(3);
  p.value_dim = value.size(3);
  check_tensor("query", query, query.sizes());
  check_tensor("key", key, std::array{p.batch, p.heads, p.key_length, p.head_dim});
  check_tensor("value", value, std::array{p.batch, p.heads, p.key_length, p.value_dim});
  TORCH_CHECK_VALUE(query.numel() > 0 && key.numel() > 0, "attn_kd: query has shape ",
                    query.sizes(), " and key ", key.sizes(), ", expected no empty dimension");
  check_width("query", p.head_dim, 1);
  check_width("value", p.value_dim, 0);
  TORCH_CHECK_TYPE(
      key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
      "attn_kd: query, key and value must have one dtype");
  p.scale = resolve_scale("scale", options.scale, p.head_dim);
  query_ = unit_last_stride(query);
  key_ = unit_last_stride(key);
  value_ = unit_last_stride(value);
  p.query = input(query_);
  p.key = input(key_);
  p.value = input(value_);
}

void Arguments::set_teacher(const Tensor& query, const Tensor& key, const OptionalTensor& lse,
                            const Options& options) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4,
                    "attn_kd: teacher_query and teacher_key must have 4 dimensions");
  Problem& p = problem_;
  p.divergence = divergence_named(options.divergence);
  mean_of_heads_ = parse_head_reduction(options.head_reduction);
  p.teacher_heads = mean_of_heads_ ? query.size(1) : p.heads;
  p.average_heads = mean_of_heads_ && (p.heads > 1 || p.teacher_heads > 1);
  p.teacher_dim = query.size(3);
  p.teacher_keys_per_key = std::max<int64_t>(1, key.size(2) / p.key_length);
  check_tensor("teacher_query", query,
               std::array{p.batch, p.teacher_heads, p.query_length, p.teacher_dim});
  check_tensor(
      "teacher_key", key,
      std::array{p.batch, p.teacher_heads, p.teacher_keys_per_key * p.key_length, p.teacher_dim});
  TORCH_CHECK_VALUE(p.teacher_heads > 0, "attn_kd: teacher_query has shape ", query.sizes(),
                    ", expected no empty dimension");
  check_width("teacher_query", p.teacher_dim, 1);
  p.teacher_scale = resolve_scale("teacher_scale", options.teacher_scale, p.teacher_dim);
  teacher_query_ = unit_last_stride(query);
  teacher_key_ = unit_last_stride(key);
  p.teacher_query = input(teacher_query_);
  p.teacher_key = input(teacher_key_);
  TORCH_CHECK_TYPE(!lse || lse->scalar_type() == at::kFloat || lse->scalar_type() == at::kDouble,
                   "attn_kd: teacher_lse is ", lse->scalar_type(), ", expected float32");
  teacher_lse_ = row_values(lse, std::array{p.batch, p.teacher_heads, p.query_length},
                            accumulation_type(query_));
}

// Describes the mask as a [B, H, Lq, Lk] view whose broadcast dimensions have stride 0.
void Arguments::set_mask(const Tensor& mask) {
  Problem& p = problem_;
  const std::array expected{p.batch, p.heads, p.query_length, p.key_length};
  std::array<int64_t, 4> strides{};
  const int64_t missing = 4 - mask.dim();
  bool fits = missing >= 0;
  for (int64_t i = 0; fits && i < mask.dim(); ++i) {
    fits = mask.size(i) == 1 || mask.size(i) == expected[missing + i];
    strides[missing + i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  TORCH_CHECK_VALUE(fits, "attn_kd: attn_mask has shape ", mask.sizes(),
                    ", expected one that broadcasts to ", at::IntArrayRef(expected));
  TORCH_CHECK_VALUE(mask.device().is_cpu(), "attn_kd: attn_mask is on ", mask.device(),
                    ", expected cpu");
  TORCH_CHECK_VALUE(!p.teacher_query || p.teacher_heads == p.heads || strides[1] == 0,
                    "attn_kd: attn_mask has shape ", mask.sizes(), ", expected one mask for all ",
                    "heads where teacher and student have different numbers of them");
  mask_ = mask;
  p.mask = {mask.const_data_ptr(),
            dtype_of("attn_mask", mask),
            strides[0],
            strides[1],
            strides[2],
            strides[3]};
}

void Arguments::set_dropout(const OptionalTensor& seed, double probability) {
  TORCH_CHECK_VALUE(probability >= 0 && probability < 1, "attn_kd: dropout_p is ", probability,
                    ", expected a probability in [0, 1)");
  if (probability == 0) return;
  TORCH_CHECK_VALUE(seed.has_value() && seed->scalar_type() == at::kLong &&
                        seed->sizes() == at::IntArrayRef({2}) && seed->device().is_cpu(),
                    "attn_kd: dropout_p > 0 needs a dropout_seed of int64 [2] on cpu");
  const Tensor words = seed->contiguous();
  const auto* word = words.const_data_ptr<int64_t>();
  const auto bits = static_cast<uint64_t>(word[0]);
  DropoutNoise& noise = problem_.dropout;
  noise.keep_factor = 1 / (1 - probability);
  // A word is kept iff it is at least p * 2^32; p just below 1 keeps the highest word alone.
  noise.threshold =
      static_cast<uint32_t>(std::min(std::ceil(probability * 4294967296.0), 4294967295.0));
  noise.key[0] = static_cast<uint32_t>(bits);
  noise.key[1] = static_cast<uint32_t>(bits >> 32);
  noise.offset = static_cast<uint32_t>(word[1]);
}

}  // namespace attn_kd::cpu
