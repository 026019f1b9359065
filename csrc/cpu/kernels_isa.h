// Everything that is compiled once per instruction set; included by kernels_<isa>.cpp behind its target pragma.
#pragma once

#include "backward.h"
#include "branch.h"
#include "forward.h"
#include "kernels.h"

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

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
