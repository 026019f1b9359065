// u(p) = sum_k a_k(p) x(q_k(p)): the "blend" of docs/math.md section 2, for one run of one tap.
#pragma once

#include <algorithm>

#include "bfloat16_blend.h"
#include "simd.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

using autofocus::blend;  // of bfloat16

template <typename A, int N, bool add>
void blend_branches(const A* const* attentions, const A* const* sources, int64_t source_step, A* to, int64_t to_step,
                    int64_t count, int64_t width) {
  using V = Vec<A>;
  // Local copies: the compiler cannot know that the stores leave the callers' arrays alone.
  const A *attention[N], *source[N];
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) {
    attention[k] = attentions[k];
    source[k] = sources[k];
  }
  for (int64_t p = 0; p < count; ++p) {
    typename V::Native a[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) a[k] = V::broadcast(attention[k][p]);
    for (int64_t v = 0; v < width * V::kLanes; v += V::kLanes) {
      typename V::Native sum = add ? V::load(to + v) : typename V::Native{};
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sum += a[k] * V::load(source[k] + v);
      V::store(to + v, sum);
    }
    to += to_step;
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) source[k] += source_step;
  }
}

// Blends `active` branches, at most four at a time so that their attention stays in registers. Rows of `to` are written
// in whole vectors; with no active branch they are zeroed.
template <typename A>
void blend(int active, const A* const* attention, const A* const* source, int64_t source_step, A* to, int64_t to_step,
           int64_t count, int64_t channels) {
  const int64_t width = vectors<A>(channels);
  if (active == 0) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t v = 0; v < width; ++v)
        Vec<A>::store(to + p * to_step + v * Vec<A>::kLanes, typename Vec<A>::Native{});
    return;
  }
  for (int done = 0; done < active; done += 4) {
    const A* const* c = attention + done;
    const A* const* s = source + done;
    const bool add = done > 0;
    switch (std::min(active - done, 4)) {
#define AUTOFOCUS_CASE(N)                                                            \
  case N:                                                                            \
    add ? blend_branches<A, N, true>(c, s, source_step, to, to_step, count, width)   \
        : blend_branches<A, N, false>(c, s, source_step, to, to_step, count, width); \
    break;
      AUTOFOCUS_CASE(1)
      AUTOFOCUS_CASE(2)
      AUTOFOCUS_CASE(3)
      AUTOFOCUS_CASE(4)
#undef AUTOFOCUS_CASE
    }
  }
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
