// Everything that is compiled once per instruction set; included by kernels_<isa>.cpp behind its target pragma.
#pragma once

#include "backward.h"
#include "branch.h"
#include "forward.h"
#include "kernels.h"
#include "norm.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

template <typename T>
View<T> cast(const View<void>& v) { return {static_cast<T*>(v.data), v.n, v.c, v.s}; }
template <typename T>
View<const T> cast(const View<const void>& v) { return {static_cast<const T*>(v.data), v.n, v.c, v.s}; }

template <typename T, typename A>
void run_forward(const ForwardArguments<void>& a) {
  const ForwardArguments<T> args{a.g, cast<T>(a.input), cast<T>(a.weight), cast<T>(a.attention), static_cast<const T*>(a.bias),
                 static_cast<const T*>(a.scale), static_cast<const T*>(a.shift), cast<T>(a.output), a.parallel};
  if (args.scale || args.shift)
    branch_forward<T, A>(args);
  else
    forward<T, A>(args);
}

template <typename T, typename A>
void run_backward(const BackwardArguments<void>& a) {
  const BackwardArguments<T> args{a.g, cast<T>(a.grad_output), cast<T>(a.input), cast<T>(a.weight), cast<T>(a.attention),
                  static_cast<const T*>(a.bias), static_cast<const T*>(a.scale), static_cast<const T*>(a.shift),
                  cast<T>(a.grad_input), cast<T>(a.grad_weight), cast<T>(a.grad_attention),
                  static_cast<T*>(a.grad_scale), a.parallel};
  if (args.scale || args.shift)
    branch_backward<T, A>(args);
  else
    backward<T, A>(args);
}

void forward_of(DType dtype, const ForwardArguments<void>& a) {
  switch (dtype) {
    case DType::kFloat32: return run_forward<float, float>(a);
    case DType::kFloat64: return run_forward<double, double>(a);
    case DType::kBFloat16: return run_forward<BFloat16, float>(a);
    case DType::kFloat16: return run_forward<Half, float>(a);
  }
}

void backward_of(DType dtype, const BackwardArguments<void>& a) {
  switch (dtype) {
    case DType::kFloat32: return run_backward<float, float>(a);
    case DType::kFloat64: return run_backward<double, double>(a);
    case DType::kBFloat16: return run_backward<BFloat16, float>(a);
    case DType::kFloat16: return run_backward<Half, float>(a);
  }
}

template <typename T, typename A>
NormArguments<T, A> cast(const NormArguments<void, void>& a) {
  const auto vector = [](const void* data) { return static_cast<const A*>(data); };
  const auto result = [](void* data) { return static_cast<A*>(data); };
  return {a.g, cast<T>(a.grad_output), cast<T>(a.input), cast<T>(a.weight), cast<T>(a.attention),
          {cast<T>(a.branches.first), a.branches.k}, vector(a.scale), vector(a.slope), vector(a.shift), result(a.mean),
          result(a.var), result(a.grad_scale), result(a.grad_shift), cast<T>(a.output), cast<T>(a.grad_input),
          cast<T>(a.grad_weight), cast<T>(a.grad_attention), a.parallel};
}

#define AUTOFOCUS_NORM(function)                                                         \
  void function##_of(DType dtype, const NormArguments<void, void>& a) {                  \
    switch (dtype) {                                                                     \
      case DType::kFloat32: return function<float, float>(cast<float, float>(a));        \
      case DType::kFloat64: return function<double, double>(cast<double, double>(a));    \
      case DType::kBFloat16: return function<BFloat16, float>(cast<BFloat16, float>(a)); \
      case DType::kFloat16: return function<Half, float>(cast<Half, float>(a));          \
    }                                                                                    \
  }
AUTOFOCUS_NORM(branch_statistics)
AUTOFOCUS_NORM(branch_combine)
AUTOFOCUS_NORM(branch_reduce)
AUTOFOCUS_NORM(branch_norm_backward)
#undef AUTOFOCUS_NORM

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
