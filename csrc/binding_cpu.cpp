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
  STD_TORCH_CHECK(int64_t(dilations.size()) == 3 * g.K, "dilations must hold three ints for each of the ", g.K,
                  " branches, got ", dilations.size());
  g.kernel = {weight.size(2), weight.size(3), weight.size(4)};
  g.input = {input.size(2), input.size(3), input.size(4)};
  g.output = {attention.size(2), attention.size(3), attention.size(4)};
  g.stride = index3("stride", stride, 0, 1);
  g.origin = index3("origin", origin, 0, INT32_MIN);
  for (int64_t k = 0; k < g.K; ++k) g.dilation[k] = index3("dilations", dilations, 3 * k, 1);
  STD_TORCH_CHECK(g.kernel.z % 2 == 1 && g.kernel.y % 2 == 1 && g.kernel.x % 2 == 1,
                  "weight must have odd kernel sizes");
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

}  // namespace

STABLE_TORCH_LIBRARY(autofocus_cpu, m) {
  m.def(
      "forward(Tensor input, Tensor weight, Tensor attention, Tensor? bias, Tensor? branch_scale, "
      "Tensor? branch_shift, Tensor(a!) output, int[] dilations, int[] stride, int[] origin) -> ()");
  m.def(
      "backward(Tensor grad_output, Tensor input, Tensor weight, Tensor attention, Tensor? bias, "
      "Tensor? branch_scale, Tensor? branch_shift, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_attention, Tensor(d!)? grad_branch_scale, int[] dilations, int[] stride, int[] origin) -> ()");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
