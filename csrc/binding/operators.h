// The operators that both libraries give, torch.ops.autofocus_cpu and torch.ops.autofocus_cuda: schemas and checks
// once.
//
// A library is a class with the static functions that Operators calls below, on checked arguments. `input` (or the
// branches) comes along for what only a tensor knows, its device for one. Contracts:
// autofocus_kernels/backends/interface.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace autofocus::binding {

template <typename Library>
struct Operators {
  static void forward(const Tensor& input, const Tensor& weight, const Tensor& attention, const OptionalTensor& bias,
                      const OptionalTensor& branch_scale, const OptionalTensor& branch_shift, const Tensor& output,
                      Ints dilations, Ints stride, Ints origin, bool tf32, bool few_blocks) {
    Library::check_device(input);
    const Call call = call_of(input, weight, attention, bias, branch_scale, branch_shift, dilations, stride, origin,
                              tf32, few_blocks, Library::kLargest);
    Library::forward(input, call, volume_of("output", output, input, output_shape(call.g)));
  }

  static void backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& attention,
                       const OptionalTensor& bias, const OptionalTensor& branch_scale,
                       const OptionalTensor& branch_shift, const OptionalTensor& grad_input,
                       const OptionalTensor& grad_weight, const OptionalTensor& grad_attention,
                       const OptionalTensor& grad_branch_scale, Ints dilations, Ints stride, Ints origin, bool tf32,
                       bool few_blocks) {
    Library::check_device(input);
    const Call call = call_of(input, weight, attention, bias, branch_scale, branch_shift, dilations, stride, origin,
                              tf32, few_blocks, Library::kLargest);
    const Problem& g = call.g;
    STD_TORCH_CHECK(!grad_branch_scale.has_value() || branch_scale.has_value(), "grad_branch_scale needs branch_scale");
    const Gradients gradients = {volume_of("grad_input", grad_input, input, input_shape(g)),
                                 volume_of("grad_weight", grad_weight, input, weight_shape(g)),
                                 volume_of("grad_attention", grad_attention, input, attention_shape(g)),
                                 vector_of("grad_branch_scale", grad_branch_scale, input, {g.K, g.O})};
    Library::backward(input, call, volume_of("grad_output", grad_output, input, output_shape(g)), gradients);
  }

  static void branch_statistics(const Tensor& input, const Tensor& weight, const Tensor& branches,
                                const OptionalTensor& mean, const OptionalTensor& var, Ints dilations, Ints stride,
                                Ints origin, bool tf32, bool few_blocks) {
    Library::check_device(input);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must be given together");
    const Call call =
        call_of_branches(input, weight, branches, dilations, stride, origin, tf32, few_blocks, Library::kLargest);
    Library::branch_statistics(input, call, branches_of("branches", branches, input, call.g),
                               mean.has_value() ? accumulator_of("mean", *mean, input, call.g) : nullptr,
                               var.has_value() ? accumulator_of("var", *var, input, call.g) : nullptr);
  }

  static void branch_combine(const Tensor& branches, const Tensor& attention, const Tensor& scale, const Tensor& shift,
                             const Tensor& output) {
    Library::check_device(branches);
    const BranchTensors existing = existing_branches(branches, attention, {});
    const Problem& g = existing.g;
    Library::branch_combine(branches, existing, accumulator_of("scale", scale, branches, g),
                            accumulator_of("shift", shift, branches, g),
                            volume_of("output", output, branches, output_shape(g)));
  }

  static void branch_reduce(const Tensor& grad_output, const Tensor& branches, const Tensor& attention,
                            const Tensor& mean, const Tensor& scale, const Tensor& shift,
                            const OptionalTensor& grad_attention, const Tensor& grad_scale, const Tensor& grad_shift) {
    Library::check_device(branches);
    const BranchTensors existing = existing_branches(branches, attention, grad_output);
    const Problem& g = existing.g;
    Library::branch_reduce(branches, existing, accumulator_of("mean", mean, branches, g),
                           accumulator_of("scale", scale, branches, g), accumulator_of("shift", shift, branches, g),
                           volume_of("grad_attention", grad_attention, branches, attention_shape(g)),
                           accumulator_of("grad_scale", grad_scale, branches, g),
                           accumulator_of("grad_shift", grad_shift, branches, g));
  }

  static void branch_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                   const Tensor& attention, const Tensor& branches, const Tensor& a_coef,
                                   const Tensor& b_coef, const Tensor& c_coef, const Tensor& grad_branches,
                                   const OptionalTensor& grad_input, const OptionalTensor& grad_weight, Ints dilations,
                                   Ints stride, Ints origin, bool tf32, bool few_blocks) {
    Library::check_device(input);
    const Call call =
        call_of_branches(input, weight, branches, dilations, stride, origin, tf32, few_blocks, Library::kLargest);
    const Problem& g = call.g;
    check_tensor("branches", branches, input, branches_shape(g));
    Library::branch_norm_backward(
        input, call, existing_branches(branches, attention, grad_output), accumulator_of("a_coef", a_coef, input, g),
        accumulator_of("b_coef", b_coef, input, g), accumulator_of("c_coef", c_coef, input, g),
        branches_of("grad_branches", grad_branches, input, g),
        volume_of("grad_input", grad_input, input, input_shape(g)),
        volume_of("grad_weight", grad_weight, input, weight_shape(g)));
  }
};

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "forward(Tensor input, Tensor weight, Tensor attention, Tensor? bias, Tensor? branch_scale, "
      "Tensor? branch_shift, Tensor(a!) output, int[] dilations, int[] stride, int[] origin, "
      "bool tf32=False, bool few_blocks=False) -> ()");
  m.def(
      "backward(Tensor grad_output, Tensor input, Tensor weight, Tensor attention, Tensor? bias, "
      "Tensor? branch_scale, Tensor? branch_shift, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_attention, Tensor(d!)? grad_branch_scale, int[] dilations, int[] stride, int[] origin, "
      "bool tf32=False, bool few_blocks=False) -> ()");
  m.def(
      "branch_statistics(Tensor input, Tensor weight, Tensor(a!) branches, Tensor(b!)? mean, Tensor(c!)? var, "
      "int[] dilations, int[] stride, int[] origin, "
      "bool tf32=False, bool few_blocks=False) -> ()");
  m.def("branch_combine(Tensor branches, Tensor attention, Tensor scale, Tensor shift, Tensor(a!) output) -> ()");
  m.def(
      "branch_reduce(Tensor grad_output, Tensor branches, Tensor attention, Tensor mean, Tensor scale, Tensor shift, "
      "Tensor(a!)? grad_attention, Tensor(b!) grad_scale, Tensor(c!) grad_shift) -> ()");
  m.def(
      "branch_norm_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor attention, Tensor branches, "
      "Tensor a_coef, Tensor b_coef, Tensor c_coef, Tensor(a!) grad_branches, Tensor(b!)? grad_input, "
      "Tensor(c!)? grad_weight, int[] dilations, int[] stride, int[] origin, "
      "bool tf32=False, bool few_blocks=False) -> ()");
}

template <typename Library>
void implement_operators(torch::stable::detail::StableLibrary& m) {
  using Of = Operators<Library>;
  m.impl("forward", TORCH_BOX(&Of::forward));
  m.impl("backward", TORCH_BOX(&Of::backward));
  m.impl("branch_statistics", TORCH_BOX(&Of::branch_statistics));
  m.impl("branch_combine", TORCH_BOX(&Of::branch_combine));
  m.impl("branch_reduce", TORCH_BOX(&Of::branch_reduce));
  m.impl("branch_norm_backward", TORCH_BOX(&Of::branch_norm_backward));
}

}  // namespace autofocus::binding
