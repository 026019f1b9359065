// Parts of a call, taken one after the other: only what one reads is packed at a time.
#pragma once

#include <vector>

#include "lattice.h"

namespace autofocus::cuda {

// Lattice planes of a volume.
struct Slab {
  int first, count;
};

// Positions that a pass can take by themselves: some samples, and classes of the output with the classes of the input
// that they read; for the gradient of the input also some planes of it, with those of the output that they read.
struct Part {
  int64_t first_sample, samples;
  Classes output, input;
  Slab output_planes, input_planes;
};

// Into how many parts positions are cut: groups of samples, classes (on an axis 1, or the step) and slabs.
struct Split {
  int64_t samples;
  Int3 classes;
  int slabs;
};

inline int64_t num_parts(const Split& split) { return split.samples * volume(split.classes) * split.slabs; }

// Planes of a slab of `points`, which tiles of eight and of four fill.
inline int slab_planes(int points, int slabs) { return int(ceil_div(ceil_div(points, slabs), 8)) * 8; }

Part part_of(const Problem& g, const Split& split, int64_t index);
// Lattice and tiles to those of a part.
void restrict_to(Lattice& lattice, const Part& part, Direction direction);

// What a pass runs: tiles, and how many of them at once.
struct Work {
  int64_t tiles, at_once;
};

// What parts may cost. A launch copies its first block of points while nothing is multiplied, and its last tiles leave
// multiprocessors idle: every part has at least so many rounds of tiles, the last of which need not be full, and all of
// them together have at most so many percent more than the whole.
struct Cost {
  int64_t least_rounds, percent;
};
constexpr Cost kForTime{4, 6};  // a few percent of it
constexpr Cost kForMemory{1, 15};

// As many parts as all passes allow.
Split split_of(const Problem& g, const std::vector<Work>& passes, const Cost& allowed);
// For the gradient of the input alone: slabs as well, if that makes more parts, up to `wanted`.
Split split_in_slabs(const Problem& g, const Lattice& lattice, const Work& pass, int64_t wanted, const Cost& allowed);

}  // namespace autofocus::cuda
