// The arguments of a kernel, typed: what kernels_isa.h makes of a call of call.h.
#pragma once

#include <cstdint>
#include <functional>

#include "view.h"

namespace autofocus {

// Runs body(begin, end) over [0, count) on the caller's thread pool.
using ParallelFor = void (*)(int64_t count, const std::function<void(int64_t, int64_t)>& body);

// In the thread that calls it.
inline void serial(int64_t count, const std::function<void(int64_t, int64_t)>& body) { body(0, count); }

// The convolution that every branch is.
template <typename T>
struct Convolution {
  Problem g;
  View<const T> input, weight;
  ParallelFor parallel;
};

// Vectors are contiguous, bias [O], scale and shift [K, O]; null where absent. Branch mode has one of the last two.
template <typename T>
struct ForwardArguments : Convolution<T> {
  View<const T> attention;
  const T *bias, *scale, *shift;
  View<T> output;
};

// Gradients that are not wanted have null data.
template <typename T>
struct BackwardArguments : Convolution<T> {
  View<const T> grad_output, attention;
  const T *bias, *scale, *shift;
  View<T> grad_input, grad_weight, grad_attention;
  T* grad_scale;  // contiguous [K, O]
};

// Branches [K, N, O, D, H, W]: a view of the first, and the distance of the others.
template <typename T>
struct BranchViews {
  View<T> first;
  int64_t distance;

  View<T> branch(int64_t k) const { return {first.data + k * distance, first.n, first.c, first.s}; }
};

// Branches in memory, and what they are summed with; grad_output has null data where it is not read.
template <typename T>
struct ExistingBranches {
  Problem g;  // of it N, O, K and the output size
  BranchViews<const T> branches;
  View<const T> attention, grad_output;
  ParallelFor parallel;
};

}  // namespace autofocus
