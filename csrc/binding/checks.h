// Checks of what reaches an operator: whatever a direct call passes, no kernel reads outside a tensor.
//
// The operators of autofocus_kernels/ops validate for users and allocate. Everything here is in the 3D form: tensors of
// five axes, geometry lists of three ints (dilations K times three).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

#include "../call.h"

namespace autofocus::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& input) {
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

inline Index3 index3(const char* name, const Ints& values, int64_t minimum, int64_t maximum) {
  STD_TORCH_CHECK(values.size() == 3, name, " must have three ints, got ", values.size());
  for (const int64_t value : values)
    STD_TORCH_CHECK(value >= minimum && value <= maximum, name, " must be at least ", minimum, " and at most ", maximum,
                    ", got ", value);
  return {values[0], values[1], values[2]};
}

inline void check_place_and_shape(const char* name, const Tensor& tensor, const Tensor& input, const Ints& shape) {
  STD_TORCH_CHECK(tensor.is_cpu() == input.is_cpu() && tensor.is_cuda() == input.is_cuda() &&
                      tensor.get_device_index() == input.get_device_index(),
                  name, " must be on the device of input");
  STD_TORCH_CHECK(tensor.dim() == int64_t(shape.size()), name, " must have ", shape.size(), " axes, got ",
                  tensor.dim());
  for (size_t i = 0; i < shape.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == shape[i], name, " must have size ", shape[i], " on axis ", i, ", got ",
                    tensor.size(i));
}

inline void check_tensor(const char* name, const Tensor& tensor, const Tensor& input, const Ints& shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  check_place_and_shape(name, tensor, input, shape);
}

inline TensorView view(const Tensor& tensor) {
  return {
      tensor.data_ptr(), tensor.stride(0), tensor.stride(1), {tensor.stride(2), tensor.stride(3), tensor.stride(4)}};
}

// A tensor of five axes; null where there is none.
inline TensorView volume_of(const char* name, const OptionalTensor& tensor, const Tensor& input, const Ints& shape) {
  if (!tensor.has_value()) return {};
  check_tensor(name, *tensor, input, shape);
  return view(*tensor);
}

// A contiguous vector [O] or matrix [K, O] in the dtype of input; null where there is none.
inline void* vector_of(const char* name, const OptionalTensor& tensor, const Tensor& input, const Ints& shape) {
  if (!tensor.has_value()) return nullptr;
  check_tensor(name, *tensor, input, shape);
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  return tensor->data_ptr();
}

// A contiguous matrix [K, O] in the dtype that sums of input's have.
inline void* accumulator_of(const char* name, const Tensor& matrix, const Tensor& input, const Problem& g) {
  const bool wide = input.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(matrix.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name, " must be ",
                  wide ? "float64" : "float32");
  check_place_and_shape(name, matrix, input, {g.K, g.O});
  STD_TORCH_CHECK(matrix.is_contiguous(), name, " must be contiguous");
  return matrix.data_ptr();
}

inline Ints input_shape(const Problem& g) { return {g.N, g.C, g.input.z, g.input.y, g.input.x}; }
inline Ints weight_shape(const Problem& g) { return {g.O, g.C, g.kernel.z, g.kernel.y, g.kernel.x}; }
inline Ints attention_shape(const Problem& g) { return {g.N, g.K, g.output.z, g.output.y, g.output.x}; }
inline Ints output_shape(const Problem& g) { return {g.N, g.O, g.output.z, g.output.y, g.output.x}; }
inline Ints branches_shape(const Problem& g) { return {g.K, g.N, g.O, g.output.z, g.output.y, g.output.x}; }

// [K, N, O, D, H, W].
inline TensorView branches_of(const char* name, const Tensor& tensor, const Tensor& input, const Problem& g) {
  check_tensor(name, tensor, input, branches_shape(g));
  return {tensor.data_ptr(),
          tensor.stride(1),
          tensor.stride(2),
          {tensor.stride(3), tensor.stride(4), tensor.stride(5)},
          tensor.stride(0)};
}

// The most elements of a tensor (a view that repeats memory may have more than memory has), and the farthest in voxels
// that a kernel may reach from its centre, so that nothing computed from them overflows: LARGEST of
// autofocus_kernels/geometry.py.
constexpr int64_t kLargest = int64_t(1) << 48;

// `largest` is what the kernels' arithmetic takes of any dilation, stride, origin or output size.
inline Problem problem_of(const Tensor& input, const Tensor& weight, const Ints& output_size, const Ints& dilations,
                          const Ints& stride, const Ints& origin, int64_t largest) {
  for (const Tensor* tensor : {&input, &weight})
    STD_TORCH_CHECK(tensor->dim() == 5, "input and weight must have five axes, got ", tensor->dim());
  STD_TORCH_CHECK(input.numel() > 0 && weight.numel() > 0, "input and weight must not be empty");
  for (const Tensor* tensor : {&input, &weight})
    STD_TORCH_CHECK(tensor->numel() <= kLargest, "input and weight must have at most ", kLargest, " elements, got ",
                    tensor->numel());
  Problem g{};
  g.N = input.size(0);
  g.C = input.size(1);
  g.O = weight.size(0);
  g.K = int64_t(dilations.size()) / 3;
  STD_TORCH_CHECK(g.K >= 1 && g.K <= kMaxBranches && int64_t(dilations.size()) == 3 * g.K,
                  "dilations must hold three ints for each of 1 to ", kMaxBranches, " branches, got ",
                  dilations.size());
  g.kernel = {weight.size(2), weight.size(3), weight.size(4)};
  STD_TORCH_CHECK(g.kernel.z % 2 == 1 && g.kernel.y % 2 == 1 && g.kernel.x % 2 == 1,
                  "weight must have odd kernel sizes");
  g.input = {input.size(2), input.size(3), input.size(4)};
  g.output = index3("the output size", output_size, 1, largest);
  g.stride = index3("stride", stride, 1, largest);
  g.origin = index3("origin", origin, -largest, largest);
  for (int64_t k = 0; k < g.K; ++k) {
    const auto first = dilations.begin() + 3 * k;
    const Index3 r = g.dilation[k] = index3("dilations", Ints(first, first + 3), 1, largest);
    for (const auto& [size, dilation] : {std::pair(g.kernel.z, r.z), {g.kernel.y, r.y}, {g.kernel.x, r.x}})
      STD_TORCH_CHECK(size / 2 <= kLargest / dilation, "weight must end within ", kLargest,
                      " voxels of its centre, got size ", size, " at dilation ", dilation);
  }
  check_tensor("weight", weight, input, weight_shape(g));
  return g;
}

inline Call call_of(const Tensor& input, const Tensor& weight, const Tensor& attention, const OptionalTensor& bias,
                    const OptionalTensor& scale, const OptionalTensor& shift, const Ints& dilations, const Ints& stride,
                    const Ints& origin, bool tf32, bool few_blocks, int64_t largest) {
  STD_TORCH_CHECK(attention.dim() == 5, "attention must have five axes, got ", attention.dim());
  const Ints output_size = {attention.size(2), attention.size(3), attention.size(4)};
  const Problem g = problem_of(input, weight, output_size, dilations, stride, origin, largest);
  STD_TORCH_CHECK(!bias.has_value() || (!scale.has_value() && !shift.has_value()),
                  "bias excludes branch_scale and branch_shift");
  return {g,
          dtype_of(input),
          view(input),
          view(weight),
          volume_of("attention", attention, input, attention_shape(g)),
          vector_of("bias", bias, input, {g.O}),
          vector_of("branch_scale", scale, input, {g.K, g.O}),
          vector_of("branch_shift", shift, input, {g.K, g.O}),
          tf32,
          few_blocks};
}

// The call that branches [K, N, O, D, H, W] in memory belong to, without attention, bias, scale and shift.
inline Call call_of_branches(const Tensor& input, const Tensor& weight, const Tensor& branches, const Ints& dilations,
                             const Ints& stride, const Ints& origin, bool tf32, bool few_blocks, int64_t largest) {
  STD_TORCH_CHECK(branches.dim() == 6, "branches must have six axes, got ", branches.dim());
  const Ints output_size = {branches.size(3), branches.size(4), branches.size(5)};
  const Problem g = problem_of(input, weight, output_size, dilations, stride, origin, largest);
  return {g, dtype_of(input), view(input), view(weight), {}, nullptr, nullptr, nullptr, tf32, few_blocks};
}

inline BranchTensors existing_branches(const Tensor& branches, const Tensor& attention,
                                       const OptionalTensor& grad_output) {
  STD_TORCH_CHECK(branches.dim() == 6, "branches must have six axes, got ", branches.dim());
  STD_TORCH_CHECK(branches.numel() > 0, "branches must not be empty");
  BranchTensors result{};
  Problem& g = result.g;
  g.K = branches.size(0);
  STD_TORCH_CHECK(g.K <= kMaxBranches, "branches must be at most ", kMaxBranches, ", got ", g.K);
  g.N = branches.size(1);
  g.O = branches.size(2);
  g.output = {branches.size(3), branches.size(4), branches.size(5)};
  result.dtype = dtype_of(branches);
  result.branches = branches_of("branches", branches, branches, g);
  result.attention = volume_of("attention", attention, branches, attention_shape(g));
  result.grad_output = volume_of("grad_output", grad_output, branches, output_shape(g));
  return result;
}

}  // namespace autofocus::binding
