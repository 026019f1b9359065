// Slabs of a lattice, where there are too few lattices for the threads: some planes of outputs each, along z or y, and
// all planes of the input that these read (docs/math.md, section 5).
#pragma once

#include <algorithm>

#include "lattice.h"

namespace autofocus {

// How far the outermost tap of an axis reads from the centre, in the narrowest and in the widest branch.
struct Reach {
  Reach(const Problem& g, int64_t Index3::* axis) : least(g.dilation[0].*axis), most(least) {
    for (int64_t k = 1; k < g.K; ++k) {
      least = std::min(least, g.dilation[k].*axis);
      most = std::max(most, g.dilation[k].*axis);
    }
    least *= g.kernel.*axis / 2;
    most *= g.kernel.*axis / 2;
  }
  int64_t least, most;
};

// How many jobs a pass should have, so that threads can share them.
constexpr int64_t kJobs = 16;

// The least number of branch values of a lattice that makes up for handing its slabs to threads.
constexpr int64_t kWorthSharing = 1 << 16;

// The slabs of a problem, one lattice after another, each cut alike.
class Slabs {
 public:
  // Cuts each lattice into `wanted` slabs, or into fewer if these would be thinner than thickness(reach of the axis)
  // planes of the input.
  template <typename Thickness>
  Slabs(const Lattices& lattices, int64_t wanted, const Thickness& thickness) : lattices_(lattices) {
    const Problem lattice = lattices.at(0).problem;
    const auto most = [&](int64_t Index3::* axis) {
      const int64_t planes = std::max<int64_t>(4, thickness(Reach(lattice, axis)));
      return std::min(lattice.output.*axis, lattice.output.*axis * lattice.stride.*axis / planes);
    };
    const int64_t z = most(&Index3::z), y = most(&Index3::y);
    axis_ = z >= y ? &Index3::z : &Index3::y;
    per_lattice_ = std::clamp<int64_t>(std::max(z, y), 1, std::max<int64_t>(1, wanted));
  }

  int64_t count() const { return lattices_.count() * per_lattice_; }
  Lattice at(int64_t index) const { return of(lattices_.at(index / per_lattice_), index % per_lattice_); }

  int64_t per_lattice() const { return per_lattice_; }
  // Positions of the thickest slab of a lattice of this size.
  int64_t largest(const Index3& size) const {
    return volume(size) / (size.*axis_) * ceil_div(size.*axis_, per_lattice_);
  }
  Lattice of(const Lattice& lattice, int64_t index) const {
    // Including the inputs that no output reads: nobody else writes their gradient.
    if (per_lattice_ == 1) return lattice;
    Lattice slab = lattice;
    Problem& g = slab.problem;
    const int64_t size = g.output.*axis_, begin = size * index / per_lattice_, end = size * (index + 1) / per_lattice_;
    const int64_t reach = Reach(g, axis_).most;
    const int64_t first = g.origin.*axis_ + g.stride.*axis_ * begin, last = first + g.stride.*axis_ * (end - begin - 1);
    const int64_t low = std::clamp<int64_t>(first - reach, 0, g.input.*axis_);
    const int64_t high = std::clamp<int64_t>(last + reach + 1, low, g.input.*axis_);
    slab.first_output.*axis_ += slab.step.*axis_ * begin;
    slab.first_input.*axis_ += slab.step.*axis_ * low;
    g.origin.*axis_ = first - low;
    g.output.*axis_ = end - begin;
    g.input.*axis_ = high - low;
    return slab;
  }

 private:
  const Lattices lattices_;
  int64_t Index3::* axis_;
  int64_t per_lattice_;
};

}  // namespace autofocus
