// Differentiation of the operators, the same for every device: the Autograd kernels of both, which
// end in the device's own forward and backward kernels. Python takes no part in either direction.
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

#include "operators.h"

namespace attn_kd {
namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

OptionalTensor if_defined(const Tensor& x) {
  return x.defined() ? OptionalTensor(x) : std::nullopt;
}

// How torch points to nodes: std::shared_ptr in 2.11, an intrusive pointer of its own since.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class N, class Pointer = NodePointer, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::make_shared<N>(std::forward<Args>(args)...);
  else
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
}

template <class N, class Pointer = NodePointer>
Pointer pointer_to(N* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return node->shared_from_this();
  else
    return Pointer::reclaim_copy(node);
}

// The backward pass of one call, as the autograd engine runs it. Not a torch::autograd::Function:
// those cost more than a small attention does, and refuse torch.func.
class AttentionKLBackward : public Node {
 public:
  AttentionKLBackward(const Tensor& query, const Tensor& key, const Tensor& value,
                      const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
                      const OptionalTensor& attn_mask, const OptionalTensor& dropout_seed,
                      std::optional<double> scale, std::optional<double> teacher_scale,
                      std::string_view divergence, std::string_view head_reduction,
                      double dropout_p)
      : inputs_{SavedVariable(query, false),       SavedVariable(key, false),
                SavedVariable(value, false),       SavedVariable(teacher_query, false),
                SavedVariable(teacher_key, false), SavedVariable(attn_mask, false),
                SavedVariable(dropout_seed, false)},
        scale_(scale),
        teacher_scale_(teacher_scale),
        divergence_(divergence),
        head_reduction_(head_reduction),
        dropout_p_(dropout_p) {
    set_next_edges(torch::autograd::collect_next_edges(query, key, value));
  }

  // Makes this the origin of the results that can be differentiated.
  void set_results(const NodePointer& self, const ForwardResults& results,
                   const OptionalTensor& given_teacher_lse) {
    const auto& [output, kl, lse, teacher_lse, row_state] = results;
    for (const Tensor& result : {output, kl, lse}) torch::autograd::set_history(result, self);
    output_ = SavedVariable(output, true);
    teacher_lse_ = SavedVariable(given_teacher_lse ? *given_teacher_lse : teacher_lse, false);
    row_state_ = SavedVariable(row_state, false);
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);  // against another thread that releases what is saved
    const auto input = [this](int i) { return inputs_[i].unpack(); };
    auto [grad_query, grad_key, grad_value] = backward_operator().call(
        if_defined(grads[0]), if_defined(grads[1]), if_defined(grads[2]), input(0), input(1),
        input(2), if_defined(input(3)), if_defined(input(4)), if_defined(input(5)),
        if_defined(input(6)), output_.unpack(pointer_to(this)), if_defined(teacher_lse_.unpack()),
        row_state_.unpack(), scale_, teacher_scale_, divergence_, head_reduction_, dropout_p_);
    return {grad_query, grad_key, grad_value};
  }

  std::string name() const override { return "AttentionKLBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for_each_saved([](SavedVariable& saved) { saved.reset_data(); });
  }

  // What follows is for compiled autograd, which runs `apply` on tensors without data.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& saved : inputs_) args.collect(saved, false);
    args.collect(output_, true);
    args.collect(teacher_lse_, false);
    args.collect(row_state_, false);
    args.collect(scale_);
    args.collect(teacher_scale_);
    args.collect(divergence_);
    args.collect(head_reduction_);
    args.collect(dropout_p_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    for_each_saved([&](SavedVariable& variable) { saved.before(variable); });
    variable_list results = apply(variable_list(grads));
    for_each_saved([&](SavedVariable& variable) { saved.after(variable); });
    return results;
  }

 private:
  template <class Visitor>
  void for_each_saved(Visitor visit) {
    for (SavedVariable& saved : inputs_) visit(saved);
    visit(output_);
    visit(teacher_lse_);
    visit(row_state_);
  }

  std::array<SavedVariable, 7> inputs_;
  SavedVariable output_, teacher_lse_, row_state_;
  const std::optional<double> scale_, teacher_scale_;
  const std::string divergence_, head_reduction_;
  const double dropout_p_;
};

// What only autograd can refuse; the devices' kernels check the rest.
void check_constant(const char* name, const OptionalTensor& x, const Tensor& query) {
  if (!x.has_value()) return;
  TORCH_CHECK_VALUE(x->device() == query.device(), "attn_kd: ", name, " is on ", x->device(),
                    " but query is on ", query.device());
  TORCH_CHECK_VALUE(!x->requires_grad() || !at::GradMode::is_enabled(), "attn_kd: ", name,
                    " requires grad, but no gradient is computed for it");
}

void check_differentiable(const char* name, const Tensor& x, const Tensor& query) {
  TORCH_CHECK_VALUE(x.device() == query.device(), "attn_kd: ", name, " is on ", x.device(),
                    " but query is on ", query.device());
  TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(x),
                              "attn_kd: forward-mode differentiation is not supported");
}

ForwardResults forward(const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& teacher_query, const OptionalTensor& teacher_key,
                       const OptionalTensor& teacher_lse, const OptionalTensor& attn_mask,
                       const OptionalTensor& dropout_seed, std::optional<double> scale,
                       std::optional<double> teacher_scale, std::string_view divergence,
                       std::string_view head_reduction, double dropout_p) {
  check_differentiable("query", query, query);
  check_differentiable("key", key, query);
  check_differentiable("value", value, query);
  check_constant("teacher_query", teacher_query, query);
  check_constant("teacher_key", teacher_key, query);
  check_constant("teacher_lse", teacher_lse, query);
  check_constant("attn_mask", attn_mask, query);
  check_constant("dropout_seed", dropout_seed, query);
  const auto results = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(query, key, value, teacher_query, teacher_key, teacher_lse,
                                   attn_mask, dropout_seed, scale, teacher_scale, divergence,
                                   head_reduction, dropout_p);
  };
  if (!torch::autograd::compute_requires_grad(query, key, value)) return results();
  const auto node = make_node<AttentionKLBackward>(query, key, value, teacher_query, teacher_key,
                                                   attn_mask, dropout_seed, scale, teacher_scale,
                                                   divergence, head_reduction, dropout_p);
  ForwardResults tracked = results();
  node->set_results(node, tracked, teacher_lse);
  return tracked;
}

// The gradient's own derivative is refused: without an Autograd kernel the operator would silently
// give zeros.
BackwardResults backward(const OptionalTensor& grad_output, const OptionalTensor& grad_kl,
                         const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
                         const Tensor& value, const OptionalTensor& teacher_query,
                         const OptionalTensor& teacher_key, const OptionalTensor& attn_mask,
                         const OptionalTensor& dropout_seed, const Tensor& output,
                         const OptionalTensor& teacher_lse, const Tensor& row_state,
                         std::optional<double> scale, std::optional<double> teacher_scale,
                         std::string_view divergence, std::string_view head_reduction,
                         double dropout_p) {
  BackwardResults grads;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    grads = backward_operator().call(grad_output, grad_kl, grad_lse, query, key, value,
                                     teacher_query, teacher_key, attn_mask, dropout_seed, output,
                                     teacher_lse, row_state, scale, teacher_scale, divergence,
                                     head_reduction, dropout_p);
  }
  if (!torch::autograd::compute_requires_grad(grad_output, grad_kl, grad_lse, query, key, value))
    return grads;
  const NodePointer refusal = make_node<torch::autograd::NotImplemented>(
      "attn_kd::attention_kl_backward",
      torch::autograd::collect_next_edges(grad_output, grad_kl, grad_lse, query, key, value));
  const auto& [grad_query, grad_key, grad_value] = grads;
  for (const Tensor& grad : {grad_query, grad_key, grad_value})
    torch::autograd::set_history(grad, refusal);
  return grads;
}

}  // namespace
}  // namespace attn_kd

TORCH_LIBRARY_IMPL(attn_kd, Autograd, m) {
  m.impl("attention_kl_forward", &attn_kd::forward);
  m.impl("attention_kl_backward", &attn_kd::backward);
}
