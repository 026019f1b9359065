// The op as independent problems on sub-lattices (docs/math.md, section 5).
//
// When every dilation of an axis is a multiple of f, outputs p = first + f p' read only inputs q = first' + f q': the
// problem falls apart into f smaller ones with dilations r / f. Each is packed, computed and written on its own, so the
// packed copy is a fraction of the volume and scatters of different lattices never meet.
#pragma once

#include <algorithm>
#include <numeric>

#include "../geometry.h"

namespace autofocus {

// Views one tensor's elements: 3D strides, in elements, of [N, C, D, H, W].
template <typename T>
struct View {
  T* data;
  int64_t n, c;
  Index3 s;
};

struct Lattice {
  Problem problem;     // over lattice points
  Index3 first_output;  // output position of lattice output 0
  Index3 first_input;   // input position of lattice input 0
  Index3 step;          // distance of lattice neighbours
};

inline int64_t axis_factor(const Problem& g, int64_t Index3::*axis, int64_t extent_at_least) {
  if (g.stride.*axis != 1) return 1;
  if (g.kernel.*axis == 1) return 1;
  int64_t common = 0;
  for (int64_t k = 0; k < g.K; ++k) common = std::gcd(common, g.dilation[k].*axis);
  // The largest divisor that leaves enough points: lattices of a few would be all overhead. Counted down from the
  // size, not from the divisor, which may be huge.
  int64_t factor = std::max<int64_t>(1, std::min(common, g.output.*axis / extent_at_least));
  while (common % factor != 0) --factor;
  return factor;
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

inline void restrict_axis(Lattice& lattice, int64_t Index3::*axis, int64_t phase) {
  Problem& g = lattice.problem;
  const int64_t step = lattice.step.*axis;
  const int64_t origin = g.origin.*axis + phase;
  lattice.first_output.*axis = phase;
  g.origin.*axis = floor_div(origin, step);
  lattice.first_input.*axis = origin - step * (g.origin.*axis);
  g.output.*axis = std::max<int64_t>(0, ceil_div(g.output.*axis - phase, step));
  g.input.*axis = std::max<int64_t>(0, ceil_div(g.input.*axis - lattice.first_input.*axis, step));
  for (int64_t k = 0; k < g.K; ++k)
    if (g.kernel.*axis > 1) g.dilation[k].*axis /= step;
}

// The lattice number `index` of volume(step).
inline Lattice lattice_at(const Problem& g, const Index3& step, int64_t index) {
  Lattice lattice{g, {}, {}, step};
  const Index3 phase = unravel(index, step);
  restrict_axis(lattice, &Index3::z, phase.z);
  restrict_axis(lattice, &Index3::y, phase.y);
  restrict_axis(lattice, &Index3::x, phase.x);
  return lattice;
}

}  // namespace autofocus
