// How a call is cut into parts. Parts run one after the other in the same scratch memory, which holds the packed
// operands of only one of them.
#pragma once

#include <vector>

#include "lattice.h"

namespace autofocus::cuda {

// Consecutive planes of each class of a volume.
struct Slab {
  int first, count;
};

// Positions that passes can compute by themselves: some samples, and some classes of the output with the classes of the
// input that they read. The gradient of the input also takes slabs: some planes of the input, with the planes of the
// output that they read.
struct Part {
  int64_t first_sample, samples;
  Classes output, input;
  Slab output_planes, input_planes;
};

// Into how many parts a call is cut.
struct Split {
  int64_t samples;  // groups of samples, a divisor of N
  Int3 classes;     // on each axis 1 (all classes together) or the step (each by itself)
  int slabs;
};

inline int64_t num_parts(const Split& split) { return split.samples * volume(split.classes) * split.slabs; }

// Planes of each but the last slab of `points` planes: a multiple of 8, which tiles of 8 and of 4 planes fill.
inline int slab_planes(int points, int slabs) { return int(ceil_div(ceil_div(points, slabs), 8)) * 8; }

// Part `index` of 0 .. num_parts. Slabs vary fastest.
Part part_of(const Problem& g, const Split& split, int64_t index);
// Restricts a lattice to the positions of a part.
void restrict_to(Lattice& lattice, const Part& part, Direction direction);

// How many tiles a pass has, and how many of them run at once.
struct Work {
  int64_t tiles, at_once;
};

// What cutting may cost, in rounds: tiles that each multiprocessor takes one after another, a last incomplete round
// included. A launch begins with a copy while nothing is multiplied and ends with idle multiprocessors. So every part
// must have at least `least_rounds`, and all parts together at most `percent` more than the whole call.
struct Cost {
  int64_t least_rounds, percent;
};
constexpr Cost kForTime{4, 6};     // forward: loses only a few percent of time
constexpr Cost kForMemory{1, 15};  // backward, which holds more

// The finest split that is allowed for every one of these passes, which share it.
Split split_of(const Problem& g, const std::vector<Work>& passes, const Cost& allowed);
// The same for the gradient of the input alone, with slabs as well until there are about `wanted` parts.
Split split_in_slabs(const Problem& g, const Lattice& lattice, const Work& pass, int64_t wanted, const Cost& allowed);

}  // namespace autofocus::cuda
