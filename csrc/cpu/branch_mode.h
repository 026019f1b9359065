// Branch mode: every branch is scaled and shifted on its own, so nothing can be blended before the projection
// (docs/math.md, section 6).
#pragma once

#include <algorithm>
#include <optional>

#include "branch_gather.h"
#include "branch_row.h"
#include "branches.h"
#include "operands.h"
#include "partial_sums.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

template <typename T, typename A>
void branch_forward(const ForwardArguments<T>& args) {
  const Problem& g = args.g;
  const BranchPlan<A> plan(g, use_bfloat16<T>());
  const int64_t width = plan.width;
  const Scratch<A> scale = pack_vectors<A>(args.scale, 1, g.K, g.O, plan.groups, width);
  const Scratch<A> shift = pack_vectors<A>(args.shift, 0, g.K, g.O, plan.groups, width);
  Branches<T, A>(args, plan).for_each_block([&](const BranchBlock<A>& block, int64_t) {
    const Index3& size = block.lattice.problem.output;
    const Scratch<A> attention(size.x), sum(size.x * width);
    for_each_row(size, [&](int64_t z, int64_t y) {
      for (int64_t k = 0; k < g.K; ++k) {
        pack_row(block.lattice.output_row(args.attention, k, {z, y, 0}), size.x, 1, attention.get(), 1);
        const int64_t at = (block.group * g.K + k) * width;
        add_branch<A>({block.row(k, z, y), attention, scale + at, shift + at, size.x, width}, k == 0, sum);
      }
      unpack_row(sum.get(), width, size.x, block.channels, block.row_of(args.output, z, y));
    });
  });
}

// The gradients of a block's rows; those of input and weight are BranchGather's.
template <typename T, typename A>
class BranchBackward {
  using V = Vec<A>;

 public:
  explicit BranchBackward(const BackwardArguments<T>& args)
      : args_(args),
        g_(args.g),
        plan_(args.g, use_bfloat16<T>()),
        scale_(pack_vectors<A>(args.scale, 1, g_.K, g_.O, plan_.groups, plan_.width)),
        shift_(pack_vectors<A>(args.shift, 0, g_.K, g_.O, plan_.groups, plan_.width)),
        no_mean_(pack_vectors<A, T>(nullptr, 0, 1, plan_.width, 1, plan_.width)),
        grad_scale_size_(plan_.groups * g_.K * plan_.width),
        grad_scale_(args.grad_scale ? plan_.slabs.count() * grad_scale_size_ : 0),
        grad_attention_(args.grad_attention.data ? g_.N * g_.K * volume(g_.output) : 0) {
    if (args.grad_attention.data || args.grad_scale) branches_.emplace(args, plan_);
  }

  void run() const {
    const BranchGather<T, A> gather(args_, plan_, args_.grad_input, args_.grad_weight);
    gather.run([&](const BranchBlock<A>& block, BranchTile<A>& tile, int64_t index) {
      if (branches_) branches_->compute(block, tile);
      differentiate(block, index);
    });
    if (args_.grad_scale) reduce_scale();
    if (args_.grad_attention.data) reduce_attention(g_, args_.parallel, 1, grad_attention_.get(), args_.grad_attention);
  }

 private:
  // Adds da and ds where they are wanted, and puts dy_k = a_k s_k G in the place of y_k.
  void differentiate(const BranchBlock<A>& block, int64_t index) const {
    const Index3& size = block.lattice.problem.output;
    const int64_t width = plan_.width;
    const Scratch<A> attention(size.x), grad_output(size.x * width), grad_attention(size.x), sums(2 * width);
    double* grad_scale = grad_scale_ + index * grad_scale_size_ + block.group * g_.K * width;
    if (args_.grad_scale) std::fill(grad_scale, grad_scale + g_.K * width, 0.0);
    for_each_row(size, [&](int64_t z, int64_t y) {
      pack_row(block.row_of(args_.grad_output, z, y), size.x, block.channels, grad_output.get(), width);
      for (int64_t k = 0; k < g_.K; ++k) {
        pack_row(block.lattice.output_row(args_.attention, k, {z, y, 0}), size.x, 1, attention.get(), 1);
        A* values = block.row(k, z, y);
        const int64_t at = (block.group * g_.K + k) * width;
        if (branches_) {
          differentiate_branch<A>({values, attention, scale_ + at, shift_ + at, size.x, width}, grad_output, no_mean_,
                                  {grad_attention, args_.grad_scale ? grad_scale + k * width : nullptr, nullptr}, sums);
          if (args_.grad_attention.data) add_attention(block, k, {z, y, 0}, grad_attention);
        }
        for (int64_t p = 0; p < size.x; ++p)
          for (int64_t v = 0; v < width; v += V::kLanes)
            V::store(values + p * width + v,
                     V::broadcast(attention[p]) * V::load(scale_ + at + v) * V::load(grad_output + p * width + v));
      }
    });
  }

  // Groups of channels follow each other in one thread, and so do their additions to da.
  void add_attention(const BranchBlock<A>& block, int64_t k, const Index3& first, const A* row) const {
    const Lattice& lattice = block.lattice;
    A* to =
        grad_attention_ + (lattice.sample * g_.K + k) * volume(g_.output) + ravel(lattice.output_at(first), g_.output);
    for (int64_t p = 0; p < lattice.problem.output.x; ++p, to += lattice.step.x)
      *to = (block.group == 0 ? A(0) : *to) + row[p];
  }

  void reduce_scale() const {
    const int64_t width = plan_.width;
    for (int64_t k = 0; k < g_.K; ++k)
      for (int64_t o = 0; o < g_.O; ++o) {
        double total = 0;
        for (int64_t index = 0; index < plan_.slabs.count(); ++index)
          total += grad_scale_[index * grad_scale_size_ + (o / width * g_.K + k) * width + o % width];
        from_accumulator(A(total), args_.grad_scale[k * g_.O + o]);
      }
  }

  const BackwardArguments<T>& args_;
  const Problem& g_;
  const BranchPlan<A> plan_;
  const Scratch<A> scale_, shift_, no_mean_;
  const int64_t grad_scale_size_;
  const Scratch<double> grad_scale_;        // of each slab [group][k][width], added in a fixed order at the end
  const Scratch<A> grad_attention_;         // [N, K, D, H, W], in the accumulator's precision
  std::optional<Branches<T, A>> branches_;  // where da or ds is wanted
};

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
