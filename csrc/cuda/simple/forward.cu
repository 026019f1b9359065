// Forward of the simple tier: with a branch scale by the kernel below, otherwise by that of blend.h.
#include "blend.h"

namespace autofocus::cuda {

// out = sum_k a_k (scale_k y_k + shift_k). With a branch scale the branches cannot be blended first, so each is
// computed by itself, in registers. Grid (position blocks, blocks of kTargets output channels).
template <typename T>
__global__ __launch_bounds__(kSimpleThreads,
                             kSimpleBlocks) void simple_branches(Problem g, Strided<const T> input,
                                                                 Strided<const T> weight, Strided<const T> attention,
                                                                 Strided<const T> scale, Strided<const T> shift,
                                                                 Strided<T> output) {
  using A = Accumulator<T>;
  const Position position = thread_position(g.N, g.output);
  const int64_t o0 = int64_t(blockIdx.y) * kTargets;
  A sum[kTargets] = {};
  for (int64_t k = 0; k < g.K; ++k) {
    A y[kTargets];
    branch_output(g, input, weight, position, k, o0, y);
    if (!position.active) continue;
    const A a = to_accumulator(*attention.at(position.n, k, position.p));
#pragma unroll
    for (int j = 0; j < kTargets; ++j) {
      if (o0 + j >= g.O) break;
      A branch = branch_value(scale, k, o0 + j) * y[j];
      if (shift.data != nullptr) branch += branch_value(shift, k, o0 + j);
      sum[j] += a * branch;
    }
  }
  if (!position.active) return;
#pragma unroll
  for (int j = 0; j < kTargets; ++j)
    if (o0 + j < g.O) store(output.at(position.n, o0 + j, position.p), sum[j]);
}

void simple_forward(const Inputs& in, const TensorView& output, const Context& context) {
  if (in.scale.data == nullptr) return launch_simple_blend<false>("simple_forward", in, in.input, output, context);
  const dim3 grid(position_blocks(in.g.N, in.g.output), static_cast<unsigned int>((in.g.O + kTargets - 1) / kTargets));
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Read = Strided<const T>;
    launch("simple_branches", &simple_branches<T>, grid, kSimpleThreads, staged_weight_bytes<T>(), context.stream, in.g,
           Read(in.input), Read(in.weight), Read(in.attention), Read(in.scale), Read(in.shift), Strided<T>(output));
  });
}

}  // namespace autofocus::cuda
