// torch.ops.autofocus_cuda: checks what would otherwise read outside a tensor, and picks the tier of every pass.
//
// Everything is in the 3D form: five-dimensional tensors of any strides, geometry lists of three ints (dilations K times
// three). The operators of autofocus_kernels/ops.py validate for users and allocate; these checks only keep a wrong direct
// call from crashing the process.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/kernels.h"

// The tests build this file for CPU tensors, over the emulation of tests/cuda_host.
#ifndef AUTOFOCUS_CUDA_DISPATCH_KEY
#define AUTOFOCUS_CUDA_DISPATCH_KEY CUDA
#endif

namespace {

using namespace autofocus;
using namespace autofocus::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

DType dtype_of(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "input must be float64, float32, float16 or bfloat16");
  return DType::kFloat32;
}

Index3 index3(const char* name, const Ints& values, size_t at, int64_t minimum) {
  STD_TORCH_CHECK(at + 3 <= values.size(), name, " must have three ints, got ", values.size());
  for (size_t i = at; i < at + 3; ++i)
    STD_TORCH_CHECK(values[i] >= minimum && values[i] <= INT32_MAX, name, " must be at least ", minimum,
                    " and fit 32 bits, got ", values[i]);
  return {values[at], values[at + 1], values[at + 2]};
}

void check_place_and_shape(const char* name, const Tensor& tensor, const Tensor& input, const Ints& shape) {
  STD_TORCH_CHECK(tensor.is_cuda() == input.is_cuda() && tensor.get_device_index() == input.get_device_index(), name,
                  " must be on the device of input");
  STD_TORCH_CHECK(tensor.dim() == int64_t(shape.size()), name, " must have ", shape.size(), " axes, got ",
                  tensor.dim());
  for (size_t i = 0; i < shape.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == shape[i], name, " must have size ", shape[i], " on axis ", i, ", got ",
                    tensor.size(i));
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& input, const Ints& shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  check_place_and_shape(name, tensor, input, shape);
}

Problem make_problem(const Tensor& input, const Tensor& weight, const Ints& output_size, const Ints& dilations,
                     const Ints& stride, const Ints& origin) {
  for (const Tensor* tensor : {&input, &weight})
    STD_TORCH_CHECK(tensor->dim() == 5, "input and weight must have five axes, got ", tensor->dim());
  Problem g{};
  g.N = input.size(0);
  g.C = input.size(1);
  g.O = weight.size(0);
  g.K = int64_t(dilations.size()) / 3;
  STD_TORCH_CHECK(g.K >= 1 && g.K <= kMaxBranches && int64_t(dilations.size()) == 3 * g.K,
                  "dilations must hold three ints for each of 1 to ", kMaxBranches, " branches, got ", dilations.size());
  g.kernel = {weight.size(2), weight.size(3), weight.size(4)};
  g.input = {input.size(2), input.size(3), input.size(4)};
  g.output = index3("the output size", output_size, 0, 1);
  g.stride = index3("stride", stride, 0, 1);
  g.origin = index3("origin", origin, 0, INT32_MIN);
  for (int64_t k = 0; k < g.K; ++k) g.dilation[k] = index3("dilations", dilations, 3 * k, 1);
  STD_TORCH_CHECK(g.kernel.z % 2 == 1 && g.kernel.y % 2 == 1 && g.kernel.x % 2 == 1,
                  "weight must have odd kernel sizes");
  check_tensor("weight", weight, input, {g.O, g.C, g.kernel.z, g.kernel.y, g.kernel.x});
  STD_TORCH_CHECK(input.numel() > 0 && weight.numel() > 0, "input and weight must not be empty");
  return g;
}

TensorArgument argument(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  TensorArgument result{tensor->data_ptr(), tensor->stride(0), tensor->stride(1), {0, 0, 0}};
  if (tensor->dim() == 5) result.s = {tensor->stride(2), tensor->stride(3), tensor->stride(4)};
  return result;
}

TensorArgument checked(const char* name, const OptionalTensor& tensor, const Tensor& input, const Ints& shape) {
  if (tensor.has_value()) check_tensor(name, *tensor, input, shape);
  return argument(tensor);
}

// A tensor that holds one of [N, O, *S_out] for each branch.
TensorArgument by_branch(const char* name, const Tensor& tensor, const Tensor& input, const Problem& g) {
  check_tensor(name, tensor, input, {g.K, g.N, g.O, g.output.z, g.output.y, g.output.x});
  return {tensor.data_ptr(), tensor.stride(1), tensor.stride(2), {tensor.stride(3), tensor.stride(4), tensor.stride(5)},
          tensor.stride(0)};
}

Inputs make_inputs(const Tensor& input, const Tensor& weight, const Tensor& attention, const OptionalTensor& bias,
                   const OptionalTensor& scale, const OptionalTensor& shift, const Ints& dilations, const Ints& stride,
                   const Ints& origin) {
  STD_TORCH_CHECK(attention.dim() == 5, "attention must have five axes, got ", attention.dim());
  const Ints output_size = {attention.size(2), attention.size(3), attention.size(4)};
  const Problem g = make_problem(input, weight, output_size, dilations, stride, origin);
  STD_TORCH_CHECK(!bias.has_value() || !shift.has_value(), "bias and branch_shift exclude each other");
  Inputs in{};
  in.g = g;
  in.dtype = dtype_of(input);
  in.input = argument(input);
  in.weight = argument(weight);
  in.attention = checked("attention", attention, input, {g.N, g.K, g.output.z, g.output.y, g.output.x});
  in.scale = checked("branch_scale", scale, input, {g.K, g.O});
  in.shift = checked("branch_shift", shift, input, {g.K, g.O});
  if (bias.has_value()) {
    check_tensor("bias", *bias, input, {g.O});
    in.shift = {bias->data_ptr(), 0, bias->stride(0), {0, 0, 0}};
  }
  return in;
}

// The device of `input` made current, its current stream, and scratch memory of torch's own allocator, which orders its
// reuse by that stream.
class Launches {
 public:
  explicit Launches(const Tensor& input) : guard_(input.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
    context_ = {stream, [this, input](int64_t bytes) {
                  scratch_.push_back(torch::stable::new_empty(input, {bytes}, ScalarType::Byte));
                  return scratch_.back().data_ptr();
                }};
  }
  Launches(const Launches&) = delete;
  const Context& context() const { return context_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> scratch_;
  Context context_;
};

void forward(const Tensor& input, const Tensor& weight, const Tensor& attention, const OptionalTensor& bias,
             const OptionalTensor& branch_scale, const OptionalTensor& branch_shift, const Tensor& output, Ints dilations,
             Ints stride, Ints origin, bool fast) {
  const Inputs in = make_inputs(input, weight, attention, bias, branch_scale, branch_shift, dilations, stride, origin);
  const Problem& g = in.g;
  const TensorArgument to = checked("output", output, input, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  const Launches launches(input);
  const bool take_fast = fast && fast_refusal(Pass::kForward, g, in.dtype) == nullptr;
  (take_fast ? fast_forward : simple_forward)(in, to, launches.context());
}

// Every gradient that is not null, each by the tier that takes it.
void run_backward(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_input,
                  const TensorArgument& grad_attention, const TensorArgument& grad_weight,
                  const TensorArgument& grad_scale, bool fast, const Context& context) {
  const auto take_fast = [&](Pass pass) { return fast && fast_refusal(pass, in.g, in.dtype) == nullptr; };
  const Pass pass_of_input = grad_output.k == 0 ? Pass::kGradInput : Pass::kBranchGradInput;
  if (grad_input.data != nullptr)
    (take_fast(pass_of_input) ? fast_grad_input : simple_grad_input)(in, grad_output, grad_input, context);
  if (grad_attention.data != nullptr)
    (take_fast(Pass::kGradAttention) ? fast_grad_attention : simple_grad_attention)(in, grad_output, grad_attention,
                                                                                    context);
  if (grad_weight.data != nullptr || grad_scale.data != nullptr)
    (take_fast(Pass::kGradWeight) ? fast_grad_weight : simple_grad_weight)(in, grad_output, grad_weight, grad_scale,
                                                                           context);
}

void backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& attention,
              const OptionalTensor& bias, const OptionalTensor& branch_scale, const OptionalTensor& branch_shift,
              const OptionalTensor& grad_input, const OptionalTensor& grad_weight, const OptionalTensor& grad_attention,
              const OptionalTensor& grad_branch_scale, Ints dilations, Ints stride, Ints origin, bool fast) {
  const Inputs in = make_inputs(input, weight, attention, bias, branch_scale, branch_shift, dilations, stride, origin);
  const Problem& g = in.g;
  const TensorArgument from =
      checked("grad_output", grad_output, input, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  const TensorArgument to_input =
      checked("grad_input", grad_input, input, {g.N, g.C, g.input.z, g.input.y, g.input.x});
  const TensorArgument to_weight =
      checked("grad_weight", grad_weight, input, {g.O, g.C, g.kernel.z, g.kernel.y, g.kernel.x});
  const TensorArgument to_attention =
      checked("grad_attention", grad_attention, input, {g.N, g.K, g.output.z, g.output.y, g.output.x});
  const TensorArgument to_scale = checked("grad_branch_scale", grad_branch_scale, input, {g.K, g.O});
  STD_TORCH_CHECK(!grad_branch_scale.has_value() || branch_scale.has_value(),
                  "grad_branch_scale needs branch_scale");
  run_backward(in, from, to_input, to_attention, to_weight, to_scale, fast, Launches(input).context());
}

// ------------------------------------------------------------------ batch-normalised branches

// branches [K, N, O, D, H, W], and what every pass over them reads beside them; null where absent.
NormInputs make_norm_inputs(const Tensor& branches, const OptionalTensor& attention,
                            const OptionalTensor& grad_output) {
  STD_TORCH_CHECK(branches.dim() == 6, "branches must have six axes, got ", branches.dim());
  STD_TORCH_CHECK(branches.numel() > 0, "branches must not be empty");
  NormInputs in{};
  Problem& g = in.g;
  g.K = branches.size(0);
  g.N = branches.size(1);
  g.O = branches.size(2);
  g.output = {branches.size(3), branches.size(4), branches.size(5)};
  in.dtype = dtype_of(branches);
  in.branches = by_branch("branches", branches, branches, g);
  in.attention = checked("attention", attention, branches, {g.N, g.K, g.output.z, g.output.y, g.output.x});
  in.grad_output = checked("grad_output", grad_output, branches, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  return in;
}

void* accumulator_vector(const char* name, const Tensor& vector, const Tensor& branches) {
  const bool wide = branches.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(vector.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name, " must be ",
                  wide ? "float64" : "float32");
  check_place_and_shape(name, vector, branches, {branches.size(0), branches.size(2)});
  STD_TORCH_CHECK(vector.is_contiguous(), name, " must be contiguous");
  return vector.data_ptr();
}

// Each branch is a forward pass of its own; `ones` stands where the attention does elsewhere.
void norm_branches(const Tensor& input, const Tensor& weight, const Tensor& ones, const Tensor& branches,
                   Ints dilations, Ints stride, Ints origin, bool fast) {
  const Inputs in = make_inputs(input, weight, ones, {}, {}, {}, dilations, stride, origin);
  const TensorArgument to = by_branch("branches", branches, input, in.g);
  const auto takes = [&](const Problem& g) { return fast && fast_refusal(Pass::kForward, g, in.dtype) == nullptr; };
  for (int64_t k = 0; k < in.g.K; ++k) {
    Inputs one = in;
    one.g = branch_problem(in.g, k);
    TensorArgument branch = to;
    branch.data = static_cast<char*>(to.data) + k * to.k * int64_t(branches.element_size());
    const Launches launches(input);  // one for each, so that scratch memory is used again
    if (takes(in.g) || takes(one.g))
      fast_branch(in, k, branch, launches.context());
    else
      simple_forward(one, branch, launches.context());
  }
}

void norm_moments(const Tensor& branches, const Tensor& mean, const Tensor& var) {
  const NormInputs in = make_norm_inputs(branches, {}, {});
  const Launches launches(branches);
  branch_moments(in, accumulator_vector("mean", mean, branches), accumulator_vector("var", var, branches),
                 launches.context());
}

void norm_combine(const Tensor& branches, const Tensor& attention, const Tensor& scale, const Tensor& shift,
                  const Tensor& output) {
  const NormInputs in = make_norm_inputs(branches, attention, {});
  const Problem& g = in.g;
  const TensorArgument to = checked("output", output, branches, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  const Launches launches(branches);
  branch_combine(in, accumulator_vector("scale", scale, branches), accumulator_vector("shift", shift, branches), to,
                 launches.context());
}

void norm_reduce(const Tensor& grad_output, const Tensor& branches, const Tensor& attention, const Tensor& mean,
                 const Tensor& scale, const Tensor& shift, const OptionalTensor& grad_attention,
                 const Tensor& grad_scale, const Tensor& grad_shift) {
  const NormInputs in = make_norm_inputs(branches, attention, grad_output);
  const Problem& g = in.g;
  const TensorArgument to_attention =
      checked("grad_attention", grad_attention, branches, {g.N, g.K, g.output.z, g.output.y, g.output.x});
  const Launches launches(branches);
  branch_reduce(in, accumulator_vector("mean", mean, branches), accumulator_vector("scale", scale, branches),
                accumulator_vector("shift", shift, branches), to_attention,
                accumulator_vector("grad_scale", grad_scale, branches),
                accumulator_vector("grad_shift", grad_shift, branches), launches.context());
}

void norm_gradients(const Tensor& grad_output, const Tensor& branches, const Tensor& attention, const Tensor& a_coef,
                    const Tensor& b_coef, const Tensor& c_coef, const Tensor& grad_branches) {
  const NormInputs in = make_norm_inputs(branches, attention, grad_output);
  const TensorArgument to = by_branch("grad_branches", grad_branches, branches, in.g);
  const Launches launches(branches);
  branch_gradients(in, accumulator_vector("a_coef", a_coef, branches), accumulator_vector("b_coef", b_coef, branches),
                   accumulator_vector("c_coef", c_coef, branches), to, launches.context());
}

// The gradients of input and weight for a gradient of each branch. `ones` stands where the attention does elsewhere.
void branch_backward(const Tensor& grad_branches, const Tensor& input, const Tensor& weight, const Tensor& ones,
                     const OptionalTensor& grad_input, const OptionalTensor& grad_weight, Ints dilations, Ints stride,
                     Ints origin, bool fast) {
  const Inputs in = make_inputs(input, weight, ones, {}, {}, {}, dilations, stride, origin);
  const Problem& g = in.g;
  const TensorArgument from = by_branch("grad_branches", grad_branches, input, g);
  run_backward(in, from, checked("grad_input", grad_input, input, {g.N, g.C, g.input.z, g.input.y, g.input.x}), {},
               checked("grad_weight", grad_weight, input, {g.O, g.C, g.kernel.z, g.kernel.y, g.kernel.x}), {}, fast,
               Launches(input).context());
}

// Why the fast tier does not take a pass ("forward", "grad_input", "grad_attention", "grad_weight" or
// "branch_grad_input"); empty if it does.
std::string fast_tier_refusal(std::string pass, const Tensor& input, const Tensor& weight, Ints output_size,
                              Ints dilations, Ints stride, Ints origin) {
  const Problem g = make_problem(input, weight, output_size, dilations, stride, origin);
  const Launches launches(input);
  const char* names[] = {"forward", "grad_input", "grad_attention", "grad_weight", "branch_grad_input"};
  const Pass passes[] = {Pass::kForward, Pass::kGradInput, Pass::kGradAttention, Pass::kGradWeight,
                         Pass::kBranchGradInput};
  for (int i = 0; i < 5; ++i)
    if (pass == names[i]) {
      const char* refusal = fast_refusal(passes[i], g, dtype_of(input));
      return refusal == nullptr ? "" : refusal;
    }
  STD_TORCH_CHECK(false, "the pass must be forward, grad_input, grad_attention, grad_weight or branch_grad_input, got ",
                  pass);
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY(autofocus_cuda, m) {
  m.def(
      "forward(Tensor input, Tensor weight, Tensor attention, Tensor? bias, Tensor? branch_scale, "
      "Tensor? branch_shift, Tensor(a!) output, int[] dilations, int[] stride, int[] origin, bool fast=True) -> ()");
  m.def(
      "backward(Tensor grad_output, Tensor input, Tensor weight, Tensor attention, Tensor? bias, "
      "Tensor? branch_scale, Tensor? branch_shift, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_attention, Tensor(d!)? grad_branch_scale, int[] dilations, int[] stride, int[] origin, "
      "bool fast=True) -> ()");
  m.def(
      "branches(Tensor input, Tensor weight, Tensor ones, Tensor(a!) branches, int[] dilations, int[] stride, "
      "int[] origin, bool fast=True) -> ()");
  m.def("branch_moments(Tensor branches, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "branch_combine(Tensor branches, Tensor attention, Tensor scale, Tensor shift, Tensor(a!) output) -> ()");
  m.def(
      "branch_reduce(Tensor grad_output, Tensor branches, Tensor attention, Tensor mean, Tensor scale, Tensor shift, "
      "Tensor(a!)? grad_attention, Tensor(b!) grad_scale, Tensor(c!) grad_shift) -> ()");
  m.def(
      "branch_gradients(Tensor grad_output, Tensor branches, Tensor attention, Tensor a_coef, Tensor b_coef, "
      "Tensor c_coef, Tensor(a!) grad_branches) -> ()");
  m.def(
      "branch_backward(Tensor grad_branches, Tensor input, Tensor weight, Tensor ones, Tensor(a!)? grad_input, "
      "Tensor(b!)? grad_weight, int[] dilations, int[] stride, int[] origin, bool fast=True) -> ()");
  m.def(
      "fast_refusal(str tier_pass, Tensor input, Tensor weight, int[] output_size, int[] dilations, int[] stride, "
      "int[] origin) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cuda, AUTOFOCUS_CUDA_DISPATCH_KEY, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("branches", TORCH_BOX(&norm_branches));
  m.impl("branch_moments", TORCH_BOX(&norm_moments));
  m.impl("branch_combine", TORCH_BOX(&norm_combine));
  m.impl("branch_reduce", TORCH_BOX(&norm_reduce));
  m.impl("branch_gradients", TORCH_BOX(&norm_gradients));
  m.impl("branch_backward", TORCH_BOX(&branch_backward));
  m.impl("fast_refusal", TORCH_BOX(&fast_tier_refusal));
}
