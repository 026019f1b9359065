// What the passes of the simple tier share: a thread has one position and a few channels of it in registers, and
// weights come through shared memory. branch_norm.cu uses the positions, too.
#pragma once

#include "../elements.h"

namespace autofocus::cuda {

constexpr int kSimpleThreads = 128;
// The fewest blocks on a multiprocessor, for __launch_bounds__. They leave 255 registers a thread; told so, ptxas takes
// what it needs and spills none.
constexpr int kSimpleBlocks = 2;
constexpr int kTargets = 16;  // channels that a thread sums
constexpr int kSources = 4;   // channels that it gathers at a time, so that a position is computed once for all of them

// A thread's position in a sample. Threads beyond the last position have active = false: they take part in barriers
// only.
struct Position {
  bool active;
  int64_t n;
  Index3 p;
};

__device__ inline Position thread_position(int64_t N, const Index3& size) {
  const int64_t index = int64_t(blockIdx.x) * kSimpleThreads + threadIdx.x;
  const int64_t voxels = volume(size);
  return {index < N * voxels, index / voxels, unravel(index % voxels, size)};
}

inline unsigned int position_blocks(int64_t N, const Index3& size) {
  return static_cast<unsigned int>((N * volume(size) + kSimpleThreads - 1) / kSimpleThreads);
}

// Copies the weight of a tap to shared memory as [kSources][kTargets], zero beyond the last source or target, and
// returns it. `transposed`: sources are the weight's output channels. All threads call it; it ends with a barrier.
template <typename T>
__device__ inline const Accumulator<T>* stage_weight(const Strided<const T>& weight, const Index3& tap, int64_t source0,
                                                     int64_t sources, int64_t target0, int64_t targets,
                                                     bool transposed) {
  using A = Accumulator<T>;
  A* staged = reinterpret_cast<A*>(shared_memory());
  __syncthreads();  // others may still read the weight staged before
  for (int i = threadIdx.x; i < kSources * kTargets; i += kSimpleThreads) {
    const int64_t source = source0 + i / kTargets, target = target0 + i % kTargets;
    const bool valid = source < sources && target < targets;
    staged[i] =
        !valid ? A(0) : to_accumulator(transposed ? *weight.at(source, target, tap) : *weight.at(target, source, tap));
  }
  __syncthreads();
  return staged;
}

template <typename T>
constexpr int staged_weight_bytes() {
  return kSources * kTargets * int(sizeof(Accumulator<T>));
}

// y_k(p) of the kTargets output channels from `o0` on: gathers and projects one branch (docs/math.md, section 1). All
// threads call it.
template <typename T>
__device__ inline void branch_output(const Problem& g, const Strided<const T>& input, const Strided<const T>& weight,
                                     const Position& position, int64_t k, int64_t o0, Accumulator<T> (&y)[kTargets]) {
  using A = Accumulator<T>;
  for (int j = 0; j < kTargets; ++j) y[j] = A(0);
  for (int64_t tap = 0; tap < num_taps(g); ++tap) {
    const Index3 q = input_position(g, position.p, k, tap_offset(g, tap));
    const bool valid = position.active && inside(q, g.input);
    for (int64_t c0 = 0; c0 < g.C; c0 += kSources) {
      const A* staged = stage_weight(weight, unravel(tap, g.kernel), c0, g.C, o0, g.O, false);
      if (!valid) continue;
      const T* source = input.at(position.n, c0, q);
      for (int i = 0; i < kSources && c0 + i < g.C; ++i) {
        const A x = to_accumulator(source[i * input.c]);
#pragma unroll
        for (int j = 0; j < kTargets; ++j) y[j] += staged[i * kTargets + j] * x;
      }
    }
  }
}

}  // namespace autofocus::cuda
