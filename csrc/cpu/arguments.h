// What the binding hands to the kernels: the problem, views of the tensors, and torch's thread pool.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>

#include "lattice.h"

namespace autofocus {

// Runs body(begin, end) over [0, count) on the caller's thread pool.
using ParallelFor = void (*)(int64_t count, const std::function<void(int64_t, int64_t)>& body);

template <typename T>
struct ForwardArguments {
  Problem g;
  View<const T> input, weight, attention;
  const T *bias, *scale, *shift;  // contiguous [O] and [K, O]; null where absent
  View<T> output;
  ParallelFor parallel;
};

// Gradients that are not wanted have null data.
template <typename T>
struct BackwardArguments {
  Problem g;
  View<const T> grad_output, input, weight, attention;
  const T *bias, *scale, *shift;
  View<T> grad_input, grad_weight, grad_attention;
  T* grad_scale;  // contiguous [K, O]
  ParallelFor parallel;
};

// The branches [K, N, O, D, H, W] of a call: a view of the first, and the distance of the others.
template <typename T>
struct BranchViews {
  View<T> first;
  int64_t k;
};

// The functions of norm.h use what they need; vectors are contiguous [K, O] of the accumulator's type, or null.
template <typename T, typename A>
struct NormArguments {
  Problem g;
  View<const T> grad_output, input, weight, attention;
  BranchViews<T> branches;
  const A *scale, *slope, *shift;
  A *mean, *var, *grad_scale, *grad_shift;
  View<T> output, grad_input, grad_weight, grad_attention;
  ParallelFor parallel;
};

// Uninitialised memory aligned for whole vectors, with one vector of slack behind it.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr int64_t kAlignment = 64;
    const int64_t bytes = (count * int64_t(sizeof(A)) + 2 * kAlignment - 1) / kAlignment * kAlignment;
    data_.reset(static_cast<A*>(std::aligned_alloc(kAlignment, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  A* get() const { return data_.get(); }
  operator A*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* data) const { std::free(data); }
  };
  std::unique_ptr<A, Free> data_;
};

}  // namespace autofocus
