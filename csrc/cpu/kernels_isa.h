// Everything that is compiled once per instruction set, and its entries: what the binding hands down, typed. Included
// by kernels_<isa>.cpp behind its target pragma.
#pragma once

#include "branch_mode.h"
#include "branch_norm.h"
#include "kernels.h"
#include "plain_backward.h"
#include "plain_forward.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// What a tensor holds, and what its sums have.
template <typename Element, typename Accumulator>
struct Types {
  using T = Element;
  using A = Accumulator;
};

template <typename Run>
void with_types(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32: return run(Types<float, float>());
    case DType::kFloat64: return run(Types<double, double>());
    case DType::kBFloat16: return run(Types<BFloat16, float>());
    case DType::kFloat16: return run(Types<Half, float>());
  }
}

template <typename T>
View<T> view(const TensorView& v) {
  return {static_cast<T*>(v.data), v.n, v.c, v.s};
}
template <typename T>
T* vector(void* data) {
  return static_cast<T*>(data);
}

template <typename T>
Convolution<T> convolution(const Call& call, ParallelFor parallel) {
  return {call.g, view<const T>(call.input), view<const T>(call.weight), parallel};
}
template <typename T>
ExistingBranches<T> existing(const BranchTensors& in, ParallelFor parallel) {
  return {in.g,
          {view<const T>(in.branches), in.branches.k},
          view<const T>(in.attention),
          view<const T>(in.grad_output),
          parallel};
}

void forward_of(const Call& call, const TensorView& output, ParallelFor parallel) {
  with_types(call.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using A = typename decltype(types)::A;
    const ForwardArguments<T> args{convolution<T>(call, parallel), view<const T>(call.attention),
                                   vector<const T>(call.bias),     vector<const T>(call.scale),
                                   vector<const T>(call.shift),    view<T>(output)};
    if (args.scale || args.shift) return branch_forward<T, A>(args);
    if constexpr (std::is_same_v<T, BFloat16> && AUTOFOCUS_VECTOR_BYTES == 64)
      if (has_bfloat16_gemm()) return PlainForward<T, A, uint16_t>(args).run();
    PlainForward<T, A, A>(args).run();
  });
}

void backward_of(const Call& call, const TensorView& grad_output, const Gradients& gradients, ParallelFor parallel) {
  with_types(call.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using A = typename decltype(types)::A;
    const BackwardArguments<T> args{convolution<T>(call, parallel), view<const T>(grad_output),
                                    view<const T>(call.attention),  vector<const T>(call.bias),
                                    vector<const T>(call.scale),    vector<const T>(call.shift),
                                    view<T>(gradients.input),       view<T>(gradients.weight),
                                    view<T>(gradients.attention),   vector<T>(gradients.scale)};
    if (args.scale || args.shift)
      BranchBackward<T, A>(args).run();
    else
      PlainBackward<T, A>(args).run();
  });
}

void branch_statistics_of(const Call& call, const TensorView& branches, void* mean, void* var, ParallelFor parallel) {
  with_types(call.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using A = typename decltype(types)::A;
    branch_statistics<T, A>(convolution<T>(call, parallel), {view<T>(branches), branches.k}, vector<A>(mean),
                            vector<A>(var));
  });
}

void branch_combine_of(const BranchTensors& in, void* scale, void* shift, const TensorView& output,
                       ParallelFor parallel) {
  with_types(in.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using A = typename decltype(types)::A;
    branch_combine<T, A>(existing<T>(in, parallel), vector<A>(scale), vector<A>(shift), view<T>(output));
  });
}

void branch_reduce_of(const BranchTensors& in, void* mean, void* scale, void* shift, const TensorView& grad_attention,
                      void* grad_scale, void* grad_shift, ParallelFor parallel) {
  with_types(in.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using A = typename decltype(types)::A;
    branch_reduce<T, A>(existing<T>(in, parallel), vector<A>(mean), vector<A>(scale), vector<A>(shift),
                        view<T>(grad_attention), vector<A>(grad_scale), vector<A>(grad_shift));
  });
}

void branch_norm_backward_of(const Call& call, const BranchTensors& in, void* a_coef, void* b_coef, void* c_coef,
                             const TensorView& grad_input, const TensorView& grad_weight, ParallelFor parallel) {
  with_types(call.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using A = typename decltype(types)::A;
    branch_norm_backward<T, A>(convolution<T>(call, parallel), existing<T>(in, parallel), vector<A>(a_coef),
                               vector<A>(b_coef), vector<A>(c_coef), view<T>(grad_input), view<T>(grad_weight));
  });
}

// For a constant: nothing of an instruction set may run before it is chosen.
constexpr Kernels entries(const char* name) {
  return {name,
          forward_of,
          backward_of,
          branch_statistics_of,
          branch_combine_of,
          branch_reduce_of,
          branch_norm_backward_of};
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
