// Gradients of input and weight from those of the branches: with dy_k the gradient of y_k, v_t(q) = sum_k dy_k(p) over
// the outputs that read q, dx = sum_t W_t^T v_t and dW_t = sum_q v_t(q) x(q)^T (docs/math.md, section 6).
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "branch_tile.h"
#include "branches.h"
#include "gemm.h"
#include "operands.h"
#include "partial_sums.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Whether `count` values, whole vectors of them, are finite: 0 times NaN or Inf is NaN.
template <typename A>
bool all_finite(const A* values, int64_t count) {
  typename Vec<A>::Native sum = {};
  for (int64_t i = 0; i < count; i += Vec<A>::kLanes) sum += Vec<A>::load(values + i) * typename Vec<A>::Native{};
  return Vec<A>::sum(sum) == 0;
}

template <typename T, typename A>
class BranchGather {
 public:
  // Gradients that are not wanted have null data.
  BranchGather(const Convolution<T>& conv, const BranchPlan<A>& plan, const View<T>& grad_input,
               const View<T>& grad_weight)
      : conv_(conv),
        g_(conv.g),
        plan_(plan),
        grad_input_(grad_input),
        grad_weight_(grad_weight),
        group_size_(num_taps(g_) * plan.width * plan.in_width),
        weight_size_(plan.groups * group_size_),
        partials_(
            std::clamp<int64_t>((int64_t(1) << 23) / weight_size_, 1, plan.together ? kSplits : plan.lattices.count())),
        sets_(plan.together ? 1 : partials_),
        weight_(grad_input.data ? transposed_weight() : Scratch<A>(0)),
        finite_weight_(!grad_input.data ||
                       all_finite<A>(weight_, plan.groups * num_taps(g_) * plan.width * plan.in_width)),
        low_columns_(bfloat16_depth(plan.tap_columns)),
        low_weight_(round_matrices<T, A>(weight_, plan.groups * plan.tap_rows, plan.tap_columns, plan.in_width,
                                         plan.low_precision && grad_input.data)),
        sums_(grad_weight.data ? partials_ * weight_size_ : 0) {}

  // produce(block, tile, slab index) fills a block with dy_k; the tile is memory for it to use.
  template <typename Produce>
  void run(const Produce& produce) const {
    if (grad_weight_.data)
      conv_.parallel(partials_, [&](int64_t begin, int64_t end) {
        std::fill(sums_ + begin * weight_size_, sums_ + end * weight_size_, A(0));
      });
    plan_.over_lattices(conv_.parallel)(sets_, [&](int64_t begin, int64_t end) {
      const Scratch<A> values(plan_.lattice_size);
      const Scratch<A> dx(grad_input_.data ? plan_.lattices.input_points() * plan_.in_width : 0);
      for (int64_t set = begin; set < end; ++set)
        for (int64_t index = set; index < plan_.lattices.count(); index += sets_)
          run_lattice(index, produce, set, values, dx);
    });
    if (grad_weight_.data) reduce_grad_weight();
  }

 private:
  static constexpr int64_t kSplits = 32;
  // Tiles that one sum of dW is taken over; one axis may have 10^5 of them, which float32 cannot add one by one.
  static constexpr int64_t kTilesOfASum = 256;

  struct Workspace {
    explicit Workspace(const BranchGather& b)
        : tile(b.plan_),
          tile_sum(b.grad_weight_.data ? b.group_size_ : 0),
          is_read(b.plan_.voxels * b.g_.kernel.x),
          dx(b.plan_.low_precision ? bfloat16_rows(b.plan_.voxels) * b.plan_.in_width : 0),
          low_rows(b.plan_.low_precision ? bfloat16_rows(b.plan_.voxels) * b.low_columns_ : 0),
          low_pairs(b.plan_.low_precision ? bfloat16_depth(b.plan_.voxels) * b.plan_.tap_columns : 0),
          low_x(b.plan_.low_precision ? bfloat16_rows(b.g_.C) * bfloat16_depth(b.plan_.voxels) : 0) {}
    BranchTile<A> tile;
    Scratch<A> tile_sum;        // dW of up to kTilesOfASum tiles
    std::vector<char> is_read;  // [voxel of the tile][tap x]
    // For products in bfloat16: dx of the tile, v_t by voxel and in pairs of voxels, and x by channel.
    Scratch<A> dx;
    Scratch<uint16_t> low_rows, low_pairs, low_x;
  };

  template <typename Body>
  void within(int64_t count, const Body& body) const {
    plan_.within_lattice(conv_.parallel)(count, body);
  }

  template <typename Produce>
  void run_lattice(int64_t index, const Produce& produce, int64_t set, A* values, A* dx) const {
    const Lattice lattice = plan_.lattices.at(index);
    const Index3& size = lattice.problem.input;
    const int64_t rows = size.z * size.y, row_size = size.x * plan_.in_width;
    if (grad_input_.data)
      within(rows, [&](int64_t begin, int64_t end) { std::fill(dx + begin * row_size, dx + end * row_size, A(0)); });
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const BranchBlock<A> block(plan_, lattice, group, values);
      within(plan_.slabs.per_lattice(), [&](int64_t begin, int64_t end) {
        BranchTile<A> tile(plan_);
        for (int64_t i = begin; i < end; ++i) {
          const Lattice slab = plan_.slabs.of(lattice, i);
          produce(BranchBlock<A>(block, slab), tile, index * plan_.slabs.per_lattice() + i);
        }
      });
      if (grad_input_.data || grad_weight_.data) gather(block, set, dx);
    }
    if (grad_input_.data)
      within(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          unpack_row(dx + row * row_size, plan_.in_width, size.x, g_.C,
                     lattice.input_row(grad_input_, 0, {row / size.y, row % size.y, 0}));
      });
  }

  // Adds a block's part of dx and dW.
  void gather(const BranchBlock<A>& block, int64_t set, A* dx) const {
    const TileGrid grid(block.lattice.problem.input, plan_.voxels);
    const int64_t splits = partials_ / sets_;
    within(splits, [&](int64_t first, int64_t last) {
      Workspace w(*this);
      for (int64_t split = first; split < last; ++split) {
        A* sum = sums_ + (set * splits + split) * weight_size_ + block.group * group_size_;
        const int64_t begin = grid.count() * split / splits, end = grid.count() * (split + 1) / splits;
        if (!grad_weight_.data || end - begin < 16) {  // a sum of their own would take time
          for (int64_t tile = begin; tile < end; ++tile) gather_tile(block, grid, tile, sum, dx, w);
          continue;
        }
        for (int64_t tile = begin; tile < end;) {
          std::fill(w.tile_sum.get(), w.tile_sum + group_size_, A(0));
          for (const int64_t next = std::min(tile + kTilesOfASum, end); tile < next; ++tile)
            gather_tile(block, grid, tile, w.tile_sum, dx, w);
          for (int64_t i = 0; i < group_size_; ++i) sum[i] += w.tile_sum[i];
        }
      }
    });
  }

  // Adds the part of one tile of input points. Where no output reads a voxel through a tap, v_t is zero, and times NaN
  // or Inf it would be NaN: where there are any, each voxel goes through those taps only by which it is read.
  void gather_tile(const BranchBlock<A>& block, const TileGrid& grid, int64_t index, A* sum, A* dx,
                   Workspace& w) const {
    const Problem& sub = block.lattice.problem;
    const int64_t voxels = grid.at(index, w.tile.segments);
    if (grad_weight_.data) w.tile.load(block.lattice, conv_.input);
    const bool finite = finite_weight_ && (!grad_weight_.data || all_finite<A>(w.tile.x, voxels * plan_.in_width));
    const bool low_precision = plan_.low_precision && finite;
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision && grad_weight_.data)
        round_transposed(w.tile.x, plan_.in_width, voxels, g_.C, w.low_x, bfloat16_depth(plan_.voxels));
    bool empty = true;
    for (int64_t row = 0; row < plan_.tap_rows; ++row) {
      TilePart part = w.tile.part_read(sub, tap_offset(sub, row * sub.kernel.x));
      if (part.begin == part.end) continue;
      if (low_precision) part = {0, voxels};
      gather_row(block, row, part, !finite, w);
      const int64_t tap_row = block.group * plan_.tap_rows + row;
      if (low_precision) {
        add_low_precision(tap_row, voxels, !empty, sum + row * plan_.in_width * plan_.tap_columns, w);
      } else {
        if (grad_input_.data) add_input(block, tap_row, part, finite, dx, w);
        if (grad_weight_.data) add_weight(block, part, finite, sum + row * plan_.in_width * plan_.tap_columns, w);
      }
      empty = false;
    }
    if (low_precision && grad_input_.data && !empty) {
      A* to = dx + ravel(w.tile.segments.front().first(), sub.input) * plan_.in_width;
      for (int64_t i = 0; i < voxels * plan_.in_width; ++i) to[i] += w.dx[i];
    }
  }

  // v_t(q) for the taps of one row: columns[q][tap x][width].
  void gather_row(const BranchBlock<A>& block, int64_t row, const TilePart& part, bool mark, Workspace& w) const {
    const Problem& sub = block.lattice.problem;
    A* columns = w.tile.columns;
    std::fill(columns + part.begin * plan_.tap_columns, columns + part.end * plan_.tap_columns, A(0));
    if (mark) std::fill(w.is_read.begin(), w.is_read.end(), false);
    for (int64_t x = 0; x < sub.kernel.x; ++x)
      w.tile.for_each_reader(
          block, tap_offset(sub, row * sub.kernel.x + x), [&](int64_t at, const A* from, int64_t count) {
            if (mark)
              for (int64_t p = 0; p < count; ++p) w.is_read[(at + p * sub.stride.x) * sub.kernel.x + x] = true;
            add_rows<A>(plan_.width, from, plan_.width, columns + at * plan_.tap_columns + x * plan_.width,
                        sub.stride.x * plan_.tap_columns, count);
          });
  }

  // dx(q) += sum_t W_t^T v_t(q)
  void add_input(const BranchBlock<A>& block, int64_t tap_row, const TilePart& part, bool finite, A* dx,
                 const Workspace& w) const {
    A* to = dx + ravel(w.tile.segments.front().first(), block.lattice.problem.input) * plan_.in_width;
    for_each_product(block, part, finite, w, [&](int64_t voxel, int64_t voxels, int64_t first, int64_t columns) {
      gemm<A>({w.tile.columns + voxel * plan_.tap_columns + first, plan_.tap_columns, 1,
               weight_ + (tap_row * plan_.tap_columns + first) * plan_.in_width, plan_.in_width,
               to + voxel * plan_.in_width, plan_.in_width, columns},
              voxels, g_.C, true);
    });
  }

  // dW_t += sum_q x(q) v_t(q)^T, for the taps of one row: [C padded][tap x][width]
  void add_weight(const BranchBlock<A>& block, const TilePart& part, bool finite, A* sum, Workspace& w) const {
    for_each_product(block, part, finite, w, [&](int64_t voxel, int64_t voxels, int64_t first, int64_t columns) {
      gemm<A>({w.tile.x + voxel * plan_.in_width, 1, plan_.in_width, w.tile.columns + voxel * plan_.tap_columns + first,
               plan_.tap_columns, sum + first, plan_.tap_columns, voxels},
              g_.C, columns, true);
    });
  }

  // Both in bfloat16, for the whole tile. dx is summed in a buffer of its own: a product may write more rows than the
  // tile has.
  void add_low_precision(int64_t tap_row, int64_t voxels, bool accumulate, A* sum, Workspace& w) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const int64_t columns = plan_.tap_columns;
      if (grad_input_.data) {
        round_rows(w.tile.columns, columns, voxels, columns, w.low_rows, low_columns_);
        bfloat16_gemm(w.low_rows, low_columns_, low_weight_ + tap_row * low_columns_ * plan_.in_width, w.dx,
                      plan_.in_width, voxels, plan_.in_width, columns, accumulate);
      }
      if (grad_weight_.data) {
        round_pairs(w.tile.columns, columns, voxels, columns, w.low_pairs);
        bfloat16_gemm(w.low_x, bfloat16_depth(plan_.voxels), w.low_pairs, sum, columns, g_.C, columns, voxels, true);
      }
    }
  }

  // Calls visit(first voxel, voxels, first column, columns) for the products of a row of taps.
  template <typename Visit>
  void for_each_product(const BranchBlock<A>& block, const TilePart& part, bool finite, const Workspace& w,
                        const Visit& visit) const {
    if (finite)
      return for_each_tap_columns<A>(g_.kernel.x, plan_.width, block.channels, [&](int64_t first, int64_t columns) {
        visit(part.begin, part.end - part.begin, first, columns);
      });
    for (int64_t voxel = part.begin; voxel < part.end; ++voxel)
      for (int64_t x = 0; x < g_.kernel.x; ++x)
        if (w.is_read[voxel * g_.kernel.x + x]) visit(voxel, 1, x * plan_.width, block.channels);
  }

  // [group][tap row][tap x][width][C padded]
  Scratch<A> transposed_weight() const {
    Scratch<A> packed(plan_.groups * num_taps(g_) * plan_.width * plan_.in_width);
    A* to = packed;
    for (int64_t group = 0; group < plan_.groups; ++group)
      for (int64_t row = 0; row < plan_.tap_rows; ++row)
        for (int64_t x = 0; x < g_.kernel.x; ++x)
          for (int64_t o = group * plan_.width; o < (group + 1) * plan_.width; ++o, to += plan_.in_width)
            pack_row(Row<const T>{weight_at(g_, conv_.weight, std::min(o, g_.O - 1), 0, row, x), 0, conv_.weight.c}, 1,
                     o < g_.O ? g_.C : 0, to, plan_.in_width);
    return packed;
  }

  void reduce_grad_weight() const {
    const auto first = [&](int64_t tap, int64_t o, int64_t c) {
      const int64_t row = (o / plan_.width * plan_.tap_rows + tap / g_.kernel.x) * plan_.in_width + c;
      return sums_ + (row * g_.kernel.x + tap % g_.kernel.x) * plan_.width + o % plan_.width;
    };
    reduce_weight<A>(g_, conv_.parallel, partials_, weight_size_, grad_weight_, first);
  }

  const Convolution<T>& conv_;
  const Problem& g_;
  const BranchPlan<A>& plan_;
  const View<T> grad_input_, grad_weight_;
  const int64_t group_size_, weight_size_;  // of a partial sum, of one group of output channels and of all
  const int64_t partials_;
  const int64_t sets_;  // of lattices; a partial sum is of a set, or of a part of every lattice
  const Scratch<A> weight_;
  const bool finite_weight_;
  const int64_t low_columns_;  // of a voxel, as the depth of a product in bfloat16
  const Scratch<uint16_t> low_weight_;
  const Scratch<A> sums_;
};

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
