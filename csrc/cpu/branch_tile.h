// How branch mode is cut: blocks of branches, and tiles of input points with the outputs that read them.
//
// A block holds the branches of one lattice, or of a slab of one, and one group of output channels, the only place
// where a branch exists (docs/math.md, section 6). It is computed from, and taken back to, tiles of input points.
//
// Many lattices are shared out whole. Few are cut into slabs, each of which projects all inputs that its outputs read
// (docs/math.md, section 5), and their branches are taken back together.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "arguments.h"
#include "bfloat16_gemm.h"
#include "bfloat16_tiles.h"
#include "lattice.h"
#include "pack.h"
#include "scratch.h"
#include "slabs.h"
#include "tile.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// The most bytes of a voxel of a block: few enough for loops over its vectors to be unrolled.
constexpr int kMaxBlockBytes = 256;

// How the work is cut: by the problem alone, never by the number of threads.
template <typename A>
struct BranchPlan {
  BranchPlan(const Problem& g, bool low_precision)
      : low_precision(low_precision),
        lattices(g, {lattice_step(g, &Index3::z, 8), lattice_step(g, &Index3::y, 8), lattice_step(g, &Index3::x, 16)}),
        slabs(lattices, lattices.count() < 4 ? kJobs / lattices.count() : 1,
              [](const Reach& reach) { return 3 * (reach.most - reach.least); }) {
    // A block has all channels, so that rows of tensors are read and written whole, unless slabs alone are too few
    // jobs. Then its width may go down by half if that leaves fewer vectors empty.
    const int64_t all = vectors<A>(g.O);
    const int64_t parts =
        std::max(ceil_div(kJobs, slabs.count()), ceil_div(all, kMaxBlockBytes / AUTOFOCUS_VECTOR_BYTES));
    const int64_t most = ceil_div(all, parts);
    int64_t best = most;
    for (int64_t fewer = most - 1; 2 * fewer >= most; --fewer)
      if (ceil_div(all, fewer) * fewer < ceil_div(all, best) * best) best = fewer;
    width = best * Vec<A>::kLanes;
    groups = ceil_div(g.O, width);
    in_width = padded<A>(g.C);
    low_depth = bfloat16_depth(g.C);
    tap_rows = g.kernel.z * g.kernel.y;
    tap_columns = g.kernel.x * width;
    const Index3& largest = lattices.at(0).problem.output;
    lattice_size = g.K * volume(largest) * width;
    slab_size = g.K * slabs.largest(largest) * width;
    together = (slabs.per_lattice() > 1 || lattices.count() == 1) && lattice_size >= kWorthSharing;
    constexpr int64_t kTileBytes = 32 * 1024;
    voxels = std::clamp<int64_t>(kTileBytes / sizeof(A) / (tap_columns + in_width), 12, 64);
    rows = voxels - 1 + bfloat16_rows(1);
  }
  // All threads at one lattice after another, or a lattice for each.
  ParallelFor over_lattices(ParallelFor parallel) const { return together ? serial : parallel; }
  ParallelFor within_lattice(ParallelFor parallel) const { return together ? parallel : serial; }

  bool low_precision;  // products in bfloat16
  Lattices lattices;
  Slabs slabs;
  bool together;
  int64_t width;   // output channels of a block
  int64_t groups;  // of output channels
  int64_t in_width, tap_rows, tap_columns;
  int64_t low_depth;                // of a product over input channels in bfloat16
  int64_t lattice_size, slab_size;  // of the largest block of a lattice, and of a slab
  int64_t voxels;                   // of a tile
  int64_t rows;                     // and room for those of a product that begins at any of them
};

// values[k][output point][width]
template <typename A>
struct BranchBlock {
  BranchBlock(const BranchPlan<A>& plan, const Lattice& lattice, int64_t group, A* values)
      : lattice(lattice),
        group(group),
        first(group * plan.width),
        channels(std::min(plan.width, lattice.problem.O - first)),
        width(plan.width),
        size(lattice.problem.output),
        values(values) {}

  // A slab of the block, where that has it.
  BranchBlock(const BranchBlock& block, const Lattice& slab)
      : lattice(slab),
        group(block.group),
        first(block.first),
        channels(block.channels),
        width(block.width),
        size(block.size),
        values(block.row(0, (slab.first_output.z - block.lattice.first_output.z) / slab.step.z,
                         (slab.first_output.y - block.lattice.first_output.y) / slab.step.y)) {}

  A* row(int64_t k, int64_t z, int64_t y) const { return values + (k * volume(size) + ravel({z, y, 0}, size)) * width; }
  // The same row in a tensor of the output's size that has the block's channels.
  template <typename T>
  Row<T> row_of(const View<T>& view, int64_t z, int64_t y) const {
    return lattice.output_row(view, first, {z, y, 0});
  }

  const Lattice& lattice;
  const int64_t group, first, channels, width;
  const Index3 size;  // of what the values are of
  A* const values;
};

// Calls visit(z, y) for every row of a volume.
template <typename Visit>
void for_each_row(const Index3& size, const Visit& visit) {
  for (int64_t z = 0; z < size.z; ++z)
    for (int64_t y = 0; y < size.y; ++y) visit(z, y);
}

// The row of outputs of branch k that reads the segment's row of input points through a tap with this z and y; false if
// there is none.
inline bool find_output_row(const Problem& g, int64_t k, const Segment& s, const Index3& offset, Index3& row) {
  const int64_t z = s.z - g.origin.z - g.dilation[k].z * offset.z;
  const int64_t y = s.y - g.origin.y - g.dilation[k].y * offset.y;
  row = {z / g.stride.z, y / g.stride.y, 0};
  return z >= 0 && y >= 0 && row.z < g.output.z && row.y < g.output.y && row.z * g.stride.z == z &&
         row.y * g.stride.y == y;
}

// Rows begin .. end - 1 of a tile.
struct TilePart {
  int64_t begin, end;
};

// A tile of input points. The segments of one follow each other in the lattice.
template <typename A>
struct BranchTile {
  explicit BranchTile(const BranchPlan<A>& plan)
      : in_width(plan.in_width),
        x(plan.voxels * plan.in_width),
        columns(plan.rows * plan.tap_columns),
        low_x(plan.low_precision ? plan.rows * plan.low_depth : 0),
        tiles(plan.low_precision) {}

  template <typename T>
  void load(const Lattice& lattice, const View<const T>& input) const {
    for (const Segment& s : segments)
      pack_row(lattice.input_row(input, 0, s.first()), s.count, lattice.problem.C, x + s.offset * in_width, in_width);
  }

  // From the first segment to the last that any output reads through the row of taps that begins with `first_tap`.
  TilePart part_read(const Problem& g, const Index3& first_tap) const {
    TilePart part{0, 0};
    Index3 row;
    for (const Segment& s : segments)
      for (int64_t k = 0; k < g.K; ++k)
        if (find_output_row(g, k, s, first_tap, row)) {
          if (part.end == 0) part.begin = s.offset;
          part.end = s.offset + s.count;
          break;
        }
    return part;
  }

  // Calls visit(row of the tile, output row of the block, count) for every run of output points that read a segment
  // through tap `offset` of a branch; neighbours in the output are stride.x rows of the tile apart.
  template <typename Visit>
  void for_each_reader(const BranchBlock<A>& block, const Index3& offset, const Visit& visit) const {
    const Problem& g = block.lattice.problem;
    Index3 row;
    for (const Segment& s : segments)
      for (int64_t k = 0; k < g.K; ++k) {
        if (!find_output_row(g, k, s, offset, row)) continue;
        const int64_t base = g.origin.x + g.dilation[k].x * offset.x;  // input point of output point 0
        const int64_t begin = std::max<int64_t>(0, ceil_div(s.x - base, g.stride.x));
        const int64_t end = std::min(g.output.x, ceil_div(s.x + s.count - base, g.stride.x));
        if (begin < end)
          visit(s.offset + base + g.stride.x * begin - s.x, block.row(k, row.z, row.y) + begin * block.width,
                end - begin);
      }
  }

  const int64_t in_width;
  const Scratch<A> x;             // [voxel][C padded]
  const Scratch<A> columns;       // [voxel][tap x][width]
  const Scratch<uint16_t> low_x;  // x in bfloat16
  const AmxTiles tiles;
  std::vector<Segment> segments;
};

// to[p] += from[p], `count` rows of `vectors` vectors.
template <typename A, int vectors>
void add_rows_of(const A* from, int64_t from_step, A* to, int64_t to_step, int64_t count) {
  using V = Vec<A>;
  for (int64_t p = 0; p < count; ++p, from += from_step, to += to_step)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      V::store(to + v * V::kLanes, V::load(to + v * V::kLanes) + V::load(from + v * V::kLanes));
}

template <typename A, int... less>
auto pick_add_rows(int64_t vectors, std::integer_sequence<int, less...>) {
  static constexpr decltype(&add_rows_of<A, 1>) loops[] = {add_rows_of<A, less + 1>...};
  return loops[vectors - 1];
}

// to[p] += from[p], `count` rows of `width` elements.
template <typename A>
void add_rows(int64_t width, const A* from, int64_t from_step, A* to, int64_t to_step, int64_t count) {
  constexpr std::make_integer_sequence<int, kMaxBlockBytes / AUTOFOCUS_VECTOR_BYTES> widths;
  pick_add_rows<A>(width / Vec<A>::kLanes, widths)(from, from_step, to, to_step, count);
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
