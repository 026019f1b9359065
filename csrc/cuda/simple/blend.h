// Blend, then project: the forward without branch scale and, run backwards, the gradient of the input (simple tier).
//
// One kernel for both (docs/math.md, sections 2 and 3). For each tap a target position gathers one source position for
// every branch, blends them with the attention, and projects the blend once. Forward, targets are outputs and the
// attention is that of the target. In the adjoint, targets are inputs, sources are the outputs that read them, and the
// attention is that of the source.
#pragma once

#include "simple.h"

namespace autofocus::cuda {

// Forward: source is the input [N, C, *S_in], target the output [N, O, *S_out]; adds sum_k a_k shift_k.
// Adjoint: source is grad_output [N, O, *S_out] or one for each branch, target grad_input [N, C, *S_in]; multiplies the
// source by scale. Scale and shift may be null. Grid (position blocks, blocks of kTargets target channels).
template <typename T, bool kAdjoint>
__global__ __launch_bounds__(kSimpleThreads,
                             kSimpleBlocks) void simple_blend(Problem g, Strided<const T> source,
                                                              Strided<const T> weight, Strided<const T> attention,
                                                              Strided<const T> scale, Strided<const T> shift,
                                                              Strided<T> target) {
  using A = Accumulator<T>;
  const int64_t sources = kAdjoint ? g.O : g.C, targets = kAdjoint ? g.C : g.O;
  const Position position = thread_position(g.N, kAdjoint ? g.input : g.output);
  const int64_t target0 = int64_t(blockIdx.y) * kTargets;
  A sum[kTargets] = {};

  for (int64_t tap = 0; tap < num_taps(g); ++tap) {
    const Index3 offset = tap_offset(g, tap);
    for (int64_t source0 = 0; source0 < sources; source0 += kSources) {
      const A* staged = stage_weight(weight, unravel(tap, g.kernel), source0, sources, target0, targets, kAdjoint);
      if (!position.active) continue;
      A blended[kSources] = {};
      for (int64_t k = 0; k < g.K; ++k) {
        Index3 s;
        if (kAdjoint) {
          if (!output_position(g, position.p, k, offset, s)) continue;
        } else {
          s = input_position(g, position.p, k, offset);
          if (!inside(s, g.input)) continue;
        }
        const A a = to_accumulator(*attention.at(position.n, k, kAdjoint ? s : position.p));
        const T* from = source.at(position.n, source0, s) + k * source.k;
#pragma unroll
        for (int i = 0; i < kSources; ++i, from += source.c) {
          if (source0 + i >= sources) break;
          A value = a * to_accumulator(*from);
          if (kAdjoint && scale.data != nullptr) value *= branch_value(scale, k, source0 + i);
          blended[i] += value;
        }
      }
#pragma unroll
      for (int i = 0; i < kSources; ++i)
#pragma unroll
        for (int j = 0; j < kTargets; ++j) sum[j] += staged[i * kTargets + j] * blended[i];
    }
  }

  if (!position.active) return;
  if (!kAdjoint && shift.data != nullptr) {
    for (int64_t k = 0; k < g.K; ++k) {
      const A a = to_accumulator(*attention.at(position.n, k, position.p));
#pragma unroll
      for (int j = 0; j < kTargets; ++j)
        if (target0 + j < targets) sum[j] += a * branch_value(shift, k, target0 + j);
    }
  }
#pragma unroll
  for (int j = 0; j < kTargets; ++j)
    if (target0 + j < targets) store(target.at(position.n, target0 + j, position.p), sum[j]);
}

template <bool kAdjoint>
void launch_simple_blend(const char* name, const Inputs& in, const TensorView& source, const TensorView& target,
                         const Context& context) {
  const Problem& g = in.g;
  const dim3 grid(position_blocks(g.N, kAdjoint ? g.input : g.output),
                  static_cast<unsigned int>(((kAdjoint ? g.C : g.O) + kTargets - 1) / kTargets));
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Read = Strided<const T>;
    launch(name, &simple_blend<T, kAdjoint>, grid, kSimpleThreads, staged_weight_bytes<T>(), context.stream, g,
           Read(source), Read(in.weight), Read(in.attention), Read(in.scale), Read(in.shift), Strided<T>(target));
  });
}

}  // namespace autofocus::cuda
