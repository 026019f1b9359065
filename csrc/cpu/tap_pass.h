// One tap of the plain-mode backward: dot, blend and scatter in one pass over a run of voxels (docs/math.md,
// section 3).
#pragma once

#include <algorithm>

#include "../geometry.h"
#include "simd.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Gradients, one bit each.
enum Wanted { kInput = 1, kWeight = 2, kAttention = 4 };

// The rows that a run of voxels meets in one tap. projected, blended, input and grad_input hold `width` vectors a
// voxel; slot i is branch[i], which reads input and grad_input `offset[i]` further on.
template <typename A>
struct TapPass {
  const A* projected;
  A* blended;
  const A* input;
  A* grad_input;
  const A* attention;
  A* grad_attention;  // one vector of partial sums a voxel and branch
  int64_t tile_step, input_step, attention_branch, grad_attention_step;
  int64_t offset[kMaxBranches], branch[kMaxBranches];
};

// Slots first .. first + N - 1; `add` to what earlier slots have blended.
template <typename A, int N, int wanted, int width, bool add>
void tap_pass(const TapPass<A>& t, int first, int64_t count) {
  using V = Vec<A>;
  using Native = typename V::Native;
  // Local copies: the compiler cannot know that the stores leave the caller's struct alone.
  const A *projected = t.projected, *x[N], *attention[N];
  A *blended = t.blended, *dx[N], *da[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    x[i] = t.input + t.offset[first + i];
    dx[i] = t.grad_input + t.offset[first + i];
    attention[i] = t.attention + t.branch[first + i] * t.attention_branch;
    da[i] = t.grad_attention + t.branch[first + i] * V::kLanes;
  }
  const int64_t tile_step = t.tile_step, x_step = t.input_step, da_step = t.grad_attention_step;
  int64_t at_x = 0, at_da = 0;
  for (int64_t p = 0; p < count; ++p, projected += tile_step, blended += tile_step, at_x += x_step, at_da += da_step) {
    Native gradient[width], blend[width];
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) {
      gradient[v] = V::load(projected + v * V::kLanes);
      blend[v] = add ? V::load(blended + v * V::kLanes) : Native{};
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Native a = V::broadcast(attention[i][p]);
      Native dot = {};
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) {
        const int64_t at = at_x + v * V::kLanes;
        if (wanted & (kWeight | kAttention)) {
          const Native xv = V::load(x[i] + at);
          if (wanted & kWeight) blend[v] += a * xv;
          if (wanted & kAttention) dot += gradient[v] * xv;
        }
        if (wanted & kInput) V::store(dx[i] + at, V::load(dx[i] + at) + a * gradient[v]);
      }
      if (wanted & kAttention) V::store(da[i] + at_da, V::load(da[i] + at_da) + dot);
    }
    if (wanted & kWeight)
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) V::store(blended + v * V::kLanes, blend[v]);
  }
}

// All slots, at most four at a time so that their attention stays in registers. Without any, the blend is zero.
template <typename A, int wanted, int width>
void tap_branches(const TapPass<A>& t, int active, int64_t count) {
  if (active == 0 && (wanted & kWeight))
    for (int64_t p = 0; p < count; ++p)
      for (int v = 0; v < width; ++v)
        Vec<A>::store(t.blended + p * t.tile_step + v * Vec<A>::kLanes, typename Vec<A>::Native{});
  for (int done = 0; done < active; done += 4) {
    switch (std::min(active - done, 4)) {
#define AUTOFOCUS_CASE(N)                                            \
  case N:                                                            \
    done > 0 ? tap_pass<A, N, wanted, width, true>(t, done, count)   \
             : tap_pass<A, N, wanted, width, false>(t, done, count); \
    break;
      AUTOFOCUS_CASE(1)
      AUTOFOCUS_CASE(2)
      AUTOFOCUS_CASE(3)
      AUTOFOCUS_CASE(4)
#undef AUTOFOCUS_CASE
    }
  }
}

template <typename A>
using TapFunction = void (*)(const TapPass<A>&, int, int64_t);

// More would not leave registers for both gradient and blend of a voxel.
constexpr int kMaxTapVectors = 4;

template <typename A>
TapFunction<A> tap_function(int wanted, int width) {
  static constexpr TapFunction<A> table[8][kMaxTapVectors] = {
#define AUTOFOCUS_ROW(w) {tap_branches<A, w, 1>, tap_branches<A, w, 2>, tap_branches<A, w, 3>, tap_branches<A, w, 4>}
      AUTOFOCUS_ROW(0), AUTOFOCUS_ROW(1), AUTOFOCUS_ROW(2), AUTOFOCUS_ROW(3),
      AUTOFOCUS_ROW(4), AUTOFOCUS_ROW(5), AUTOFOCUS_ROW(6), AUTOFOCUS_ROW(7),
#undef AUTOFOCUS_ROW
  };
  return table[wanted][width - 1];
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
