// Where the blend of the plain forward reads the input of a lattice: packed, or in place.
//
// Channels-last rows of the right type, and those of a single channel, are read where they are. The last vector of a
// voxel reads `spill` elements more than it has, which no sum uses. Past the end of the tensor there may be none to
// read, so its last row is copied; the other rows end early enough if rows are that far apart.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "bfloat16_blend.h"
#include "lattice.h"
#include "pack.h"
#include "scratch.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// The input of one lattice.
template <typename E>
struct Source {
  const E* data;      // the voxel at lattice point 0
  Index3 strides;     // of voxels; channels are neighbours
  const E* last_row;  // a copy of the row at lattice point `last`, null where that is read in place too
  Index3 last;

  // The voxel that lies `at` elements behind `data`, in the row of lattice point q.
  const E* voxel(const Index3& q, int64_t at) const {
    if (last_row == nullptr || q.z != last.z || q.y != last.y) return data + at;
    return last_row + (at - last.z * strides.z - last.y * strides.y);
  }
};

// Makes the sources of a problem's lattices, one after the other: each uses the memory of the one before. E is A, or
// blocks of bfloat16 (bfloat16_blend.h).
template <typename T, typename A, typename E>
class SourceMaker {
 public:
  SourceMaker(const Convolution<T>& conv, ParallelFor parallel, const Lattices& lattices, int64_t spill)
      : conv_(conv),
        parallel_(parallel),
        width_(padded<A>(conv.g.C)),
        in_place_(can_read_in_place(conv, spill)),
        copies_last_(in_place_ && spill > 0),
        packed_(in_place_ ? 0 : lattices.input_points() * width_),
        last_row_(copies_last_ ? (conv.g.input.x - 1) * conv.input.s.x + conv.g.C + spill : 0) {
    if constexpr (std::is_same_v<T, E>)
      if (copies_last_) copy_last_row();
  }

  Source<E> operator()(const Lattice& lattice) const {
    if constexpr (std::is_same_v<T, E>)
      if (in_place_) return in_place(lattice);
    pack(lattice);
    const Index3& size = lattice.problem.input;
    return {packed_, {size.y * size.x * width_, size.x * width_, width_}, nullptr, {}};
  }

 private:
  static bool can_read_in_place(const Convolution<T>& conv, int64_t spill) {
    const auto apart = [&](int64_t size, int64_t stride) { return size == 1 || stride >= spill; };
    const Problem& g = conv.g;
    const bool neighbours = conv.input.c == 1 || g.C == 1;
    return std::is_same_v<T, E> && neighbours && apart(g.N, conv.input.n) && apart(g.input.z, conv.input.s.z) &&
           apart(g.input.y, conv.input.s.y);
  }

  void copy_last_row() {
    const Problem& g = conv_.g;
    for (int64_t x = 0; x < g.input.x; ++x)
      pack_row(conv_.input.row(g.N - 1, 0, {g.input.z - 1, g.input.y - 1, x}), 1, g.C, last_row_ + x * conv_.input.s.x,
               g.C);
  }

  Source<E> in_place(const Lattice& lattice) const {
    const Problem& g = conv_.g;
    const Index3 &size = lattice.problem.input, &step = lattice.step, &strides = conv_.input.s;
    const Index3 last{size.z - 1, size.y - 1, 0}, position = lattice.input_at(last);
    const bool has_last =
        copies_last_ && lattice.sample == g.N - 1 && position.z == g.input.z - 1 && position.y == g.input.y - 1;
    // In the copy as in the tensor, the row begins before the first voxel of the lattice.
    const E* last_row = has_last ? last_row_ + lattice.first_input.x * strides.x : nullptr;
    return {lattice.input_row(conv_.input, 0, {}).data,
            {step.z * strides.z, step.y * strides.y, step.x * strides.x},
            last_row,
            last};
  }

  void pack(const Lattice& lattice) const {
    const Index3& size = lattice.problem.input;
    parallel_(size.z * size.y, [&](int64_t begin, int64_t end) {
      const Scratch<A> unpacked(std::is_same_v<E, A> ? 0 : size.x * width_);
      for (int64_t row = begin; row < end; ++row) {
        E* to = packed_ + row * size.x * width_;
        const Row<const T> from = lattice.input_row(conv_.input, 0, {row / size.y, row % size.y, 0});
        if constexpr (std::is_same_v<E, A>) {
          pack_row(from, size.x, conv_.g.C, to, width_);
        } else {
          pack_row(from, size.x, conv_.g.C, unpacked.get(), width_);
          pack_blocks(unpacked, size.x, width_, to);
        }
      }
    });
  }

  const Convolution<T>& conv_;
  const ParallelFor parallel_;
  const int64_t width_;
  const bool in_place_, copies_last_;
  const Scratch<E> packed_, last_row_;
};

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
