// Gradient of the attention in the simple tier (docs/math.md, section 3): a kernel each for calls without and with a
// branch scale.
#include "simple.h"

namespace autofocus::cuda {

constexpr int kBranchGroup = 4;  // branches that a thread sums at a time

// Without a branch scale g_t(p) = W_t^T G(p) is the same for all branches: it is projected once, and each branch takes
// its dot product with the input. Grid (position blocks, groups of kBranchGroup branches).
template <typename T>
__global__ __launch_bounds__(kSimpleThreads, kSimpleBlocks) void simple_grad_attention_shared(
    Problem g, Strided<const T> grad_output, Strided<const T> input, Strided<const T> weight, Strided<const T> shift,
    Strided<T> grad_attention) {
  using A = Accumulator<T>;
  const Position position = thread_position(g.N, g.output);
  const int64_t k0 = int64_t(blockIdx.y) * kBranchGroup;
  A sum[kBranchGroup] = {};
  for (int64_t o0 = 0; o0 < g.O; o0 += kTargets) {
    A grad[kTargets] = {};
#pragma unroll
    for (int j = 0; j < kTargets; ++j)
      if (position.active && o0 + j < g.O) grad[j] = to_accumulator(*grad_output.at(position.n, o0 + j, position.p));
    for (int64_t tap = 0; tap < num_taps(g); ++tap) {
      const Index3 offset = tap_offset(g, tap);
      for (int64_t c0 = 0; c0 < g.C; c0 += kSources) {
        const A* staged = stage_weight(weight, unravel(tap, g.kernel), c0, g.C, o0, g.O, false);
        if (!position.active) continue;
        A projected[kSources] = {};
#pragma unroll
        for (int i = 0; i < kSources; ++i)
#pragma unroll
          for (int j = 0; j < kTargets; ++j) projected[i] += staged[i * kTargets + j] * grad[j];
#pragma unroll
        for (int b = 0; b < kBranchGroup; ++b) {
          if (k0 + b >= g.K) continue;
          const Index3 q = input_position(g, position.p, k0 + b, offset);
          if (!inside(q, g.input)) continue;
          const T* from = input.at(position.n, c0, q);
#pragma unroll
          for (int i = 0; i < kSources; ++i, from += input.c)
            if (c0 + i < g.C) sum[b] += projected[i] * to_accumulator(*from);
        }
      }
    }
    if (shift.data == nullptr) continue;
#pragma unroll
    for (int b = 0; b < kBranchGroup; ++b)
#pragma unroll
      for (int j = 0; j < kTargets; ++j)
        if (k0 + b < g.K && o0 + j < g.O) sum[b] += branch_value(shift, k0 + b, o0 + j) * grad[j];
  }
  if (!position.active) return;
#pragma unroll
  for (int b = 0; b < kBranchGroup; ++b)
    if (k0 + b < g.K) store(grad_attention.at(position.n, k0 + b, position.p), sum[b]);
}

// With a branch scale: da_k = sum_o G_o (scale_ko y_ko + shift_ko). Grid (position blocks, K).
template <typename T>
__global__ __launch_bounds__(kSimpleThreads, kSimpleBlocks) void simple_grad_attention_scaled(
    Problem g, Strided<const T> grad_output, Strided<const T> input, Strided<const T> weight, Strided<const T> scale,
    Strided<const T> shift, Strided<T> grad_attention) {
  using A = Accumulator<T>;
  const Position position = thread_position(g.N, g.output);
  const int64_t k = blockIdx.y;
  A sum = A(0);
  for (int64_t o0 = 0; o0 < g.O; o0 += kTargets) {
    A y[kTargets];
    branch_output(g, input, weight, position, k, o0, y);
    if (!position.active) continue;
#pragma unroll
    for (int j = 0; j < kTargets; ++j) {
      if (o0 + j >= g.O) break;
      A branch = branch_value(scale, k, o0 + j) * y[j];
      if (shift.data != nullptr) branch += branch_value(shift, k, o0 + j);
      sum += branch * to_accumulator(*grad_output.at(position.n, o0 + j, position.p));
    }
  }
  if (position.active) store(grad_attention.at(position.n, k, position.p), sum);
}

void simple_grad_attention(const Inputs& in, const TensorView& grad_output, const TensorView& grad_attention,
                           const Context& context) {
  const unsigned int blocks = position_blocks(in.g.N, in.g.output);
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Read = Strided<const T>;
    if (in.scale.data == nullptr) {
      const dim3 grid(blocks, static_cast<unsigned int>((in.g.K + kBranchGroup - 1) / kBranchGroup));
      launch("simple_grad_attention_shared", &simple_grad_attention_shared<T>, grid, kSimpleThreads,
             staged_weight_bytes<T>(), context.stream, in.g, Read(grad_output), Read(in.input), Read(in.weight),
             Read(in.shift), Strided<T>(grad_attention));
    } else {
      const dim3 grid(blocks, static_cast<unsigned int>(in.g.K));
      launch("simple_grad_attention_scaled", &simple_grad_attention_scaled<T>, grid, kSimpleThreads,
             staged_weight_bytes<T>(), context.stream, in.g, Read(grad_output), Read(in.input), Read(in.weight),
             Read(in.scale), Read(in.shift), Strided<T>(grad_attention));
    }
  });
}

}  // namespace autofocus::cuda
