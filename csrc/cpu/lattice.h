// The op as independent problems on lattices (docs/math.md, section 5), and the walk over them.
//
// Each lattice is packed, computed and written on its own, so the packed copy is a fraction of the volume and scatters
// of different lattices never meet.
#pragma once

#include <algorithm>

#include "view.h"

namespace autofocus {

// One lattice of one sample. It has outputs; inputs it may have none.
struct Lattice {
  Problem problem;  // over lattice points
  int64_t sample;
  Index3 first_output;  // output position of lattice output 0
  Index3 first_input;   // input position of lattice input 0
  Index3 step;          // distance of lattice neighbours

  Index3 output_at(const Index3& p) const {
    return {first_output.z + step.z * p.z, first_output.y + step.y * p.y, first_output.x + step.x * p.x};
  }
  Index3 input_at(const Index3& q) const {
    return {first_input.z + step.z * q.z, first_input.y + step.y * q.y, first_input.x + step.x * q.x};
  }
  // The inverse, of an input position of the lattice.
  Index3 input_point(const Index3& position) const {
    return {(position.z - first_input.z) / step.z, (position.y - first_input.y) / step.y,
            (position.x - first_input.x) / step.x};
  }
  // From lattice point p (or q) on, in a tensor of the output's (or the input's) size.
  template <typename T>
  Row<T> output_row(const View<T>& view, int64_t channel, const Index3& p) const {
    return view.row(sample, channel, output_at(p), step.x);
  }
  template <typename T>
  Row<T> input_row(const View<T>& view, int64_t channel, const Index3& q) const {
    return view.row(sample, channel, input_at(q), step.x);
  }
};

// The largest step of an axis that leaves enough points: lattices of a few would be all overhead.
inline int64_t lattice_step(const Problem& g, int64_t Index3::* axis, int64_t points_at_least) {
  if (g.stride.*axis != 1 || g.kernel.*axis == 1) return 1;
  const int64_t common = common_dilation(g, axis);
  // A divisor of `common`, counted down from the size, not from the divisor, which may be huge.
  int64_t step = std::max<int64_t>(1, std::min(common, g.output.*axis / points_at_least));
  while (common % step != 0) --step;
  return step;
}

// The lattices of all samples: how every kernel cuts a problem first, by the problem alone.
class Lattices {
 public:
  Lattices(const Problem& g, const Index3& step) : g_(g), step_(step) {}

  int64_t count() const { return g_.N * volume(step_); }
  // Of the largest lattice.
  int64_t input_points() const { return largest(g_.input); }
  int64_t output_points() const { return largest(g_.output); }

  Lattice at(int64_t index) const {
    Lattice lattice{g_, index / volume(step_), {}, {}, step_};
    const Index3 phase = unravel(index % volume(step_), step_);
    restrict_axis(lattice, &Index3::z, phase.z);
    restrict_axis(lattice, &Index3::y, phase.y);
    restrict_axis(lattice, &Index3::x, phase.x);
    return lattice;
  }

 private:
  int64_t largest(const Index3& size) const {
    return ceil_div(size.z, step_.z) * ceil_div(size.y, step_.y) * ceil_div(size.x, step_.x);
  }

  static void restrict_axis(Lattice& lattice, int64_t Index3::* axis, int64_t phase) {
    Problem& g = lattice.problem;
    const int64_t step = lattice.step.*axis;
    const InputLattice inputs = input_lattice(g.origin.*axis, phase, step);
    lattice.first_output.*axis = phase;
    lattice.first_input.*axis = inputs.phase;
    g.origin.*axis = inputs.point;
    g.output.*axis = ceil_div(g.output.*axis - phase, step);
    g.input.*axis = ceil_div(g.input.*axis - inputs.phase, step);
    for (int64_t k = 0; k < g.K; ++k) g.dilation[k].*axis /= step;
  }

  const Problem g_;
  const Index3 step_;
};

}  // namespace autofocus
