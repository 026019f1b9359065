// Partial sums (split-K) added in a fixed order: how many there are depends on the problem alone, so gradients are
// bitwise the same for any number of threads.
#pragma once

#include "arguments.h"
#include "element.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// grad_weight from `partials` sums. first(tap, o, c) is where the first of them has an element; each of the others has
// it `size` further on.
template <typename A, typename T, typename First>
void reduce_weight(const Problem& g, ParallelFor parallel, int64_t partials, int64_t size, const View<T>& grad_weight,
                   const First& first) {
  parallel(num_taps(g), [&](int64_t begin, int64_t end) {
    for (int64_t tap = begin; tap < end; ++tap) {
      T* at_tap = grad_weight.row(0, 0, unravel(tap, g.kernel)).data;
      for (int64_t c = 0; c < g.C; ++c)
        for (int64_t o = 0; o < g.O; ++o) {
          const A* sum = first(tap, o, c);
          double total = 0;  // there may be as many partial sums as samples
          for (int64_t partial = 0; partial < partials; ++partial) total += sum[partial * size];
          from_accumulator(A(total), at_tap[o * grad_weight.n + c * grad_weight.c]);
        }
    }
  });
}

// grad_attention from `partials` sums, each [N, K, D, H, W].
template <typename A, typename T>
void reduce_attention(const Problem& g, ParallelFor parallel, int64_t partials, const A* sums,
                      const View<T>& grad_attention) {
  const Index3& size = g.output;
  const int64_t rows = g.N * g.K * size.z * size.y;
  parallel(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / size.y, image = plane / size.z;
      const Row<T> to = grad_attention.row(image / g.K, image % g.K, {plane % size.z, row % size.y, 0});
      for (int64_t x = 0; x < size.x; ++x) {
        A total = 0;
        for (int64_t partial = 0; partial < partials; ++partial) total += sums[(partial * rows + row) * size.x + x];
        from_accumulator(total, to.data[x * to.x]);
      }
    }
  });
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
