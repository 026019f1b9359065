// The two kernels behind sum_weight_partials (weight_sum.h): one for the weight, one for the branch scale.
#include "elements.h"
#include "weight_sum.h"

namespace autofocus::cuda {

constexpr int kSumThreads = 256;

template <typename A>
__device__ inline A sum_of_splits(const WeightPartials& partials, int64_t k, int64_t o, int64_t c, int64_t tap,
                                  int64_t taps) {
  const int64_t split_size = partials.branches * partials.outputs * partials.inputs * taps;
  const A* element =
      static_cast<const A*>(partials.data) + ((k * partials.outputs + o) * partials.inputs + c) * taps + tap;
  A sum = A(0);
  for (int64_t split = 0; split < partials.splits; ++split, element += split_size) sum += *element;
  return sum;
}

// A thread for each element of the weight.
template <typename T>
__global__ __launch_bounds__(kSumThreads) void weight_sum(Problem g, WeightPartials partials, Strided<const T> scale,
                                                          Strided<T> grad_weight, bool adds) {
  using A = Accumulator<T>;
  const int64_t taps = num_taps(g);
  const int64_t element = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (element >= g.O * g.C * taps) return;
  const int64_t o = element / taps / g.C, c = element / taps % g.C, tap = element % taps;
  A total = A(0);
  for (int64_t k = 0; k < partials.branches; ++k) {
    const A sum = sum_of_splits<A>(partials, k, o, c, tap, taps);
    total += scale.data == nullptr ? sum : branch_value(scale, k, o) * sum;
  }
  T* to = grad_weight.at(o, c, unravel(tap, g.kernel));
  store(to, adds ? to_accumulator(*to) + total : total);
}

// A block for each element [k, o] of the scale; grid (O, K).
template <typename T>
__global__ __launch_bounds__(kSumThreads) void scale_sum(Problem g, WeightPartials partials, Strided<const T> weight,
                                                         Strided<T> grad_scale) {
  using A = Accumulator<T>;
  A* sums = reinterpret_cast<A*>(shared_memory());  // [kSumThreads]
  const int64_t o = blockIdx.x, k = blockIdx.y, taps = num_taps(g);
  A sum = A(0);
  for (int64_t i = threadIdx.x; i < g.C * taps; i += kSumThreads)
    sum += sum_of_splits<A>(partials, k, o, i / taps, i % taps, taps) *
           to_accumulator(*weight.at(o, i / taps, unravel(i % taps, g.kernel)));
  sums[threadIdx.x] = sum;
  sum_rows<kSumThreads>(sums, 1);
  if (threadIdx.x == 0) store(grad_scale.data + k * grad_scale.n + o * grad_scale.c, sums[0]);
}

void sum_weight_partials(const Inputs& in, const WeightPartials& partials, const TensorView& grad_weight,
                         const TensorView& grad_scale, bool adds, const Context& context) {
  const Problem& g = in.g;
  const int64_t elements = g.O * g.C * num_taps(g);
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Read = Strided<const T>;
    if (grad_weight.data != nullptr)
      launch("weight_sum", &weight_sum<T>, dim3(static_cast<unsigned int>((elements + kSumThreads - 1) / kSumThreads)),
             kSumThreads, 0, context.stream, g, partials, Read(in.scale), Strided<T>(grad_weight), adds);
    if (grad_scale.data != nullptr)
      launch("scale_sum", &scale_sum<T>, dim3(static_cast<unsigned int>(g.O), static_cast<unsigned int>(g.K)),
             kSumThreads, kSumThreads * int(sizeof(Accumulator<T>)), context.stream, g, partials, Read(in.weight),
             Strided<T>(grad_scale));
  });
}

}  // namespace autofocus::cuda
