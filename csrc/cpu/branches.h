// The branches of a call, project first: Z_t = W_t x, one GEMM for all branches, then y_k(p) = sum_t Z_t(q_k(p)),
// additions only (docs/math.md, section 6).
#pragma once

#include <algorithm>
#include <type_traits>

#include "branch_tile.h"
#include "gemm.h"
#include "operands.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

template <typename T, typename A>
class Branches {
 public:
  Branches(const Convolution<T>& conv, const BranchPlan<A>& plan)
      : conv_(conv),
        plan_(plan),
        weight_(pack_tap_columns<A>(conv.g, conv.weight, false, plan.width)),
        low_weight_(round_matrices<T, A>(weight_, plan.groups * plan.tap_rows, conv.g.C, plan.tap_columns,
                                         plan.low_precision)) {}

  // Computes every block and calls consume(block, slab index) in the thread that computed it.
  template <typename Consume>
  void for_each_block(const Consume& consume) const {
    conv_.parallel(plan_.slabs.count() * plan_.groups, [&](int64_t begin, int64_t end) {
      const Scratch<A> values(plan_.slab_size);
      BranchTile<A> tile(plan_);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t index = job / plan_.groups;
        const Lattice slab = plan_.slabs.at(index);
        const BranchBlock<A> block(plan_, slab, job % plan_.groups, values);
        compute(block, tile);
        consume(block, index);
      }
    });
  }

  // y_k of a block, tile by tile of input points.
  void compute(const BranchBlock<A>& block, BranchTile<A>& tile) const {
    const Problem& sub = block.lattice.problem;
    for (int64_t k = 0; k < sub.K; ++k)
      for_each_row(sub.output, [&](int64_t z, int64_t y) {
        A* row = block.row(k, z, y);
        std::fill(row, row + sub.output.x * plan_.width, A(0));
      });
    const TileGrid grid(sub.input, plan_.voxels);
    for (int64_t index = 0; index < grid.count(); ++index) {
      const int64_t voxels = grid.at(index, tile.segments);
      tile.load(block.lattice, conv_.input);
      if constexpr (std::is_same_v<T, BFloat16>)
        if (plan_.low_precision) round_rows(tile.x, plan_.in_width, voxels, sub.C, tile.low_x, plan_.low_depth);
      for (int64_t row = 0; row < plan_.tap_rows; ++row) {
        const TilePart part = tile.part_read(sub, tap_offset(sub, row * sub.kernel.x));
        if (part.begin == part.end) continue;
        project(block, row, part, tile);
        for (int64_t x = 0; x < sub.kernel.x; ++x)
          tile.for_each_reader(block, tap_offset(sub, row * sub.kernel.x + x), [&](int64_t from, A* to, int64_t count) {
            add_rows<A>(plan_.width, tile.columns + from * plan_.tap_columns + x * plan_.width,
                        sub.stride.x * plan_.tap_columns, to, plan_.width, count);
          });
      }
    }
  }

 private:
  // Z_t(q) for the taps of one row.
  void project(const BranchBlock<A>& block, int64_t tap_row, const TilePart& part, const BranchTile<A>& tile) const {
    const Problem& g = conv_.g;
    const int64_t row = block.group * plan_.tap_rows + tap_row, voxels = part.end - part.begin;
    A* columns = tile.columns + part.begin * plan_.tap_columns;
    if constexpr (std::is_same_v<T, BFloat16>)
      if (plan_.low_precision)
        return bfloat16_gemm(tile.low_x + part.begin * plan_.low_depth, plan_.low_depth,
                             low_weight_ + row * plan_.low_depth * plan_.tap_columns, columns, plan_.tap_columns,
                             voxels, plan_.tap_columns, g.C, false);
    const A* weight = weight_ + row * g.C * plan_.tap_columns;
    clear_missing(columns, voxels * plan_.tap_columns, plan_.width, block.channels);
    for_each_tap_columns<A>(g.kernel.x, plan_.width, block.channels, [&](int64_t first, int64_t count) {
      gemm<A>({tile.x + part.begin * plan_.in_width, plan_.in_width, 1, weight + first, plan_.tap_columns,
               columns + first, plan_.tap_columns, g.C},
              voxels, count, false);
    });
  }

  const Convolution<T>& conv_;
  const BranchPlan<A>& plan_;
  const Scratch<A> weight_;
  const Scratch<uint16_t> low_weight_;
};

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
