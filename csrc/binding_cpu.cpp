// torch.ops.autofocus_cpu: checks what would otherwise read outside a tensor, and picks the instruction set.
//
// Everything is in the 3D form: five-dimensional tensors, geometry lists of three ints an axis (dilations K times three).
// The operators of autofocus_kernels/ops.py validate for users and allocate; these checks only keep a wrong direct call
// from crashing the process.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace {

using namespace autofocus;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

// The widest instruction set this CPU has; AUTOFOCUS_CPU_ISA forces another ("avx512", "avx2", "generic").
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* forced = std::getenv("AUTOFOCUS_CPU_ISA");
    const std::string name = forced == nullptr ? "" : forced;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (name.empty() || name == "avx512")) return avx512_kernels;
    if (avx2 && (name.empty() || name == "avx512" || name == "avx2")) return avx2_kernels;
#endif
    return generic_kernels;
  }();
  return chosen;
}

std::string isa() { return kernels().name; }

DType dtype_of(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "input must be float32, float64, bfloat16 or float16");
  return DType::kFloat32;
}

Index3 index3(const char* name, const Ints& values, size_t at, int64_t minimum) {
  STD_TORCH_CHECK(at + 3 <= values.size(), name, " must have three ints, got ", values.size());
  for (size_t i = at; i < at + 3; ++i)
    STD_TORCH_CHECK(values[i] >= minimum, name, " must be at least ", minimum, ", got ", values[i]);
  return {values[at], values[at + 1], values[at + 2]};
}

void check_shape(const char* name, const Tensor& tensor, const Tensor& input, const Ints& expected) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  STD_TORCH_CHECK(tensor.dim() == int64_t(expected.size()), name, " must have ", expected.size(), " axes, got ",
                  tensor.dim());
  for (size_t i = 0; i < expected.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == expected[i], name, " must have size ", expected[i], " on axis ", i, ", got ",
                    tensor.size(i));
}

// The problem's channels, sizes and K are set; adds dilations, stride and origin, and checks what they say.
void set_steps(Problem& g, const Ints& dilations, const Ints& stride, const Ints& origin) {
  STD_TORCH_CHECK(int64_t(dilations.size()) == 3 * g.K, "dilations must hold three ints for each of the ", g.K,
                  " branches, got ", dilations.size());
  g.stride = index3("stride", stride, 0, 1);
  g.origin = index3("origin", origin, 0, -(int64_t(1) << 48));
  for (int64_t k = 0; k < g.K; ++k) g.dilation[k] = index3("dilations", dilations, 3 * k, 1);
  STD_TORCH_CHECK(g.kernel.z % 2 == 1 && g.kernel.y % 2 == 1 && g.kernel.x % 2 == 1,
                  "weight must have odd kernel sizes");
}

Problem problem(const Tensor& input, const Tensor& weight, const Tensor& attention, const Ints& dilations,
                const Ints& stride, const Ints& origin) {
  for (const Tensor* tensor : {&input, &weight, &attention})
    STD_TORCH_CHECK(tensor->dim() == 5, "input, weight and attention must have five axes, got ", tensor->dim());
  Problem g;
  g.N = input.size(0);
  g.C = input.size(1);
  g.O = weight.size(0);
  g.K = attention.size(1);
  STD_TORCH_CHECK(g.K >= 1 && g.K <= kMaxBranches, "attention must have 1 to ", kMaxBranches, " branches, got ", g.K);
  g.kernel = {weight.size(2), weight.size(3), weight.size(4)};
  g.input = {input.size(2), input.size(3), input.size(4)};
  g.output = {attention.size(2), attention.size(3), attention.size(4)};
  set_steps(g, dilations, stride, origin);
  check_shape("weight", weight, input, {g.O, g.C, g.kernel.z, g.kernel.y, g.kernel.x});
  check_shape("attention", attention, input, {g.N, g.K, g.output.z, g.output.y, g.output.x});
  STD_TORCH_CHECK(input.is_cpu(), "input must be a CPU tensor");
  STD_TORCH_CHECK(input.numel() > 0 && weight.numel() > 0 && attention.numel() > 0, "no tensor may be empty");
  return g;
}

template <typename Pointer>
View<Pointer> view(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), {tensor.stride(2), tensor.stride(3), tensor.stride(4)}};
}

void* vector_data(const char* name, const OptionalTensor& tensor, const Tensor& input, const Ints& shape) {
  if (!tensor.has_value()) return nullptr;
  check_shape(name, *tensor, input, shape);
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  return tensor->data_ptr();
}

View<void> gradient(const char* name, const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor.has_value()) return {nullptr, 0, 0, {0, 0, 0}};
  Ints shape;
  for (int64_t axis = 0; axis < like.dim(); ++axis) shape.push_back(like.size(axis));
  check_shape(name, *tensor, like, shape);
  return view<void>(*tensor);
}

void forward(const Tensor& input, const Tensor& weight, const Tensor& attention, const OptionalTensor& bias,
             const OptionalTensor& branch_scale, const OptionalTensor& branch_shift, Tensor output, Ints dilations,
             Ints stride, Ints origin) {
  const Problem g = problem(input, weight, attention, dilations, stride, origin);
  check_shape("output", output, input, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  kernels().forward(dtype_of(input), {g, view<const void>(input), view<const void>(weight),
                                      view<const void>(attention), vector_data("bias", bias, input, {g.O}),
                                      vector_data("branch_scale", branch_scale, input, {g.K, g.O}),
                                      vector_data("branch_shift", branch_shift, input, {g.K, g.O}),
                                      view<void>(output), parallel});
}

void backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& attention,
              const OptionalTensor& bias, const OptionalTensor& branch_scale, const OptionalTensor& branch_shift,
              OptionalTensor grad_input, OptionalTensor grad_weight, OptionalTensor grad_attention,
              OptionalTensor grad_branch_scale, Ints dilations, Ints stride, Ints origin) {
  const Problem g = problem(input, weight, attention, dilations, stride, origin);
  check_shape("grad_output", grad_output, input, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  kernels().backward(dtype_of(input),
                     {g, view<const void>(grad_output), view<const void>(input), view<const void>(weight),
                      view<const void>(attention), vector_data("bias", bias, input, {g.O}),
                      vector_data("branch_scale", branch_scale, input, {g.K, g.O}),
                      vector_data("branch_shift", branch_shift, input, {g.K, g.O}),
                      gradient("grad_input", grad_input, input), gradient("grad_weight", grad_weight, weight),
                      gradient("grad_attention", grad_attention, attention),
                      vector_data("grad_branch_scale", grad_branch_scale, input, {g.K, g.O}), parallel});
}

// ------------------------------------------------------------------ batch-normalised branches

// The parts of a problem that batch normalisation of existing branches [K, N, O, D, H, W] needs.
Problem problem_of_branches(const Tensor& branches) {
  STD_TORCH_CHECK(branches.is_cpu() && branches.dim() == 6, "branches must be a CPU tensor [K, N, O, D, H, W]");
  STD_TORCH_CHECK(branches.numel() > 0, "branches must not be empty");
  Problem g{};
  g.K = branches.size(0);
  STD_TORCH_CHECK(g.K <= kMaxBranches, "branches must be at most ", kMaxBranches, ", got ", g.K);
  g.N = branches.size(1);
  g.O = branches.size(2);
  g.output = {branches.size(3), branches.size(4), branches.size(5)};
  return g;
}

Problem problem_of_branches(const Tensor& input, const Tensor& weight, const Tensor& branches, const Ints& dilations,
                            const Ints& stride, const Ints& origin) {
  Problem g = problem_of_branches(branches);
  STD_TORCH_CHECK(input.dim() == 5 && weight.dim() == 5, "input and weight must have five axes");
  STD_TORCH_CHECK(input.size(0) == g.N && weight.size(0) == g.O, "branches must fit input and weight");
  g.C = input.size(1);
  g.kernel = {weight.size(2), weight.size(3), weight.size(4)};
  g.input = {input.size(2), input.size(3), input.size(4)};
  set_steps(g, dilations, stride, origin);
  check_shape("weight", weight, input, {g.O, g.C, g.kernel.z, g.kernel.y, g.kernel.x});
  check_shape("branches", branches, input, {g.K, g.N, g.O, g.output.z, g.output.y, g.output.x});
  STD_TORCH_CHECK(input.is_cpu(), "input must be a CPU tensor");
  STD_TORCH_CHECK(input.numel() > 0 && weight.numel() > 0, "no tensor may be empty");
  return g;
}

BranchViews<void> branch_views(const Tensor& branches) {
  return {{branches.data_ptr(), branches.stride(1), branches.stride(2),
           {branches.stride(3), branches.stride(4), branches.stride(5)}},
          branches.stride(0)};
}

// A contiguous [K, O] vector of the accumulator's dtype.
void* accumulator_vector(const char* name, const Tensor& tensor, const Tensor& branches, const Problem& g) {
  const ScalarType wanted = branches.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == wanted && tensor.is_contiguous() && tensor.dim() == 2 &&
                      tensor.size(0) == g.K && tensor.size(1) == g.O,
                  name, " must be a contiguous CPU tensor [", g.K, ", ", g.O, "] in the accumulator's dtype");
  return tensor.data_ptr();
}

NormArguments<void, void> norm_arguments(const Problem& g, const Tensor& branches) {
  NormArguments<void, void> args{};
  args.g = g;
  args.branches = branch_views(branches);
  args.parallel = parallel;
  return args;
}

void branch_statistics(const Tensor& input, const Tensor& weight, Tensor branches, OptionalTensor mean,
                       OptionalTensor var, Ints dilations, Ints stride, Ints origin) {
  NormArguments<void, void> args =
      norm_arguments(problem_of_branches(input, weight, branches, dilations, stride, origin), branches);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must be given together");
  args.input = view<const void>(input);
  args.weight = view<const void>(weight);
  if (mean.has_value()) {
    args.mean = accumulator_vector("mean", *mean, branches, args.g);
    args.var = accumulator_vector("var", *var, branches, args.g);
  }
  kernels().branch_statistics(dtype_of(input), args);
}

void set_attention(NormArguments<void, void>& args, const Tensor& attention, const Tensor& branches) {
  const Problem& g = args.g;
  check_shape("attention", attention, branches, {g.N, g.K, g.output.z, g.output.y, g.output.x});
  args.attention = view<const void>(attention);
}

void set_grad_output(NormArguments<void, void>& args, const Tensor& grad_output, const Tensor& branches) {
  const Problem& g = args.g;
  check_shape("grad_output", grad_output, branches, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  args.grad_output = view<const void>(grad_output);
}

void branch_combine(const Tensor& branches, const Tensor& attention, const Tensor& scale, const Tensor& shift,
                    Tensor output) {
  NormArguments<void, void> args = norm_arguments(problem_of_branches(branches), branches);
  const Problem& g = args.g;
  set_attention(args, attention, branches);
  check_shape("output", output, branches, {g.N, g.O, g.output.z, g.output.y, g.output.x});
  args.scale = accumulator_vector("scale", scale, branches, g);
  args.shift = accumulator_vector("shift", shift, branches, g);
  args.output = view<void>(output);
  kernels().branch_combine(dtype_of(branches), args);
}

void branch_reduce(const Tensor& grad_output, const Tensor& branches, const Tensor& attention, const Tensor& mean,
                   const Tensor& scale, const Tensor& shift, OptionalTensor grad_attention, Tensor grad_scale,
                   Tensor grad_shift) {
  NormArguments<void, void> args = norm_arguments(problem_of_branches(branches), branches);
  const Problem& g = args.g;
  set_attention(args, attention, branches);
  set_grad_output(args, grad_output, branches);
  args.mean = accumulator_vector("mean", mean, branches, g);
  args.scale = accumulator_vector("scale", scale, branches, g);
  args.shift = accumulator_vector("shift", shift, branches, g);
  args.grad_attention = gradient("grad_attention", grad_attention, attention);
  args.grad_scale = accumulator_vector("grad_scale", grad_scale, branches, g);
  args.grad_shift = accumulator_vector("grad_shift", grad_shift, branches, g);
  kernels().branch_reduce(dtype_of(branches), args);
}

void branch_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                          const Tensor& attention, const Tensor& branches, const Tensor& a_coef, const Tensor& b_coef,
                          const Tensor& c_coef, OptionalTensor grad_input, OptionalTensor grad_weight, Ints dilations,
                          Ints stride, Ints origin) {
  NormArguments<void, void> args =
      norm_arguments(problem_of_branches(input, weight, branches, dilations, stride, origin), branches);
  set_attention(args, attention, branches);
  set_grad_output(args, grad_output, branches);
  args.input = view<const void>(input);
  args.weight = view<const void>(weight);
  args.scale = accumulator_vector("a_coef", a_coef, branches, args.g);
  args.slope = accumulator_vector("b_coef", b_coef, branches, args.g);
  args.shift = accumulator_vector("c_coef", c_coef, branches, args.g);
  args.grad_input = gradient("grad_input", grad_input, input);
  args.grad_weight = gradient("grad_weight", grad_weight, weight);
  kernels().branch_norm_backward(dtype_of(input), args);
}

}  // namespace

STABLE_TORCH_LIBRARY(autofocus_cpu, m) {
  m.def(
      "forward(Tensor input, Tensor weight, Tensor attention, Tensor? bias, Tensor? branch_scale, "
      "Tensor? branch_shift, Tensor(a!) output, int[] dilations, int[] stride, int[] origin) -> ()");
  m.def(
      "backward(Tensor grad_output, Tensor input, Tensor weight, Tensor attention, Tensor? bias, "
      "Tensor? branch_scale, Tensor? branch_shift, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_attention, Tensor(d!)? grad_branch_scale, int[] dilations, int[] stride, int[] origin) -> ()");
  m.def(
      "branch_statistics(Tensor input, Tensor weight, Tensor(a!) branches, Tensor(b!)? mean, Tensor(c!)? var, "
      "int[] dilations, int[] stride, int[] origin) -> ()");
  m.def(
      "branch_combine(Tensor branches, Tensor attention, Tensor scale, Tensor shift, Tensor(a!) output) -> ()");
  m.def(
      "branch_reduce(Tensor grad_output, Tensor branches, Tensor attention, Tensor mean, Tensor scale, Tensor shift, "
      "Tensor(a!)? grad_attention, Tensor(b!) grad_scale, Tensor(c!) grad_shift) -> ()");
  m.def(
      "branch_norm_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor attention, Tensor branches, "
      "Tensor a_coef, Tensor b_coef, Tensor c_coef, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "int[] dilations, int[] stride, int[] origin) -> ()");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("branch_statistics", TORCH_BOX(&branch_statistics));
  m.impl("branch_combine", TORCH_BOX(&branch_combine));
  m.impl("branch_reduce", TORCH_BOX(&branch_reduce));
  m.impl("branch_norm_backward", TORCH_BOX(&branch_norm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
