// Batch-normalised branches (docs/branch_norm.md): what autofocus_kernels/ops/branch_norm.py asks of a backend.
//
// Vectors are [K, O] in the accumulator's type. Sums over voxels are taken per lattice or per slice of rows, in an
// order that does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "branch_gather.h"
#include "branch_row.h"
#include "branches.h"
#include "operands.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Sums term(value, lane) over the voxels of a dense volume.
template <typename A, typename Term>
void sum_voxels(const A* values, int64_t voxels, int64_t width, double* total, const Term& term) {
  const Scratch<A> sum(width);
  std::fill(total, total + width, 0.0);
  for (int64_t first = 0; first < voxels; first += kVoxelsOfASum) {
    std::fill(sum.get(), sum + width, A(0));
    for (int64_t p = first; p < std::min(first + kVoxelsOfASum, voxels); ++p)
      for (int64_t lane = 0; lane < width; ++lane) sum[lane] += term(values[p * width + lane], lane);
    for (int64_t lane = 0; lane < width; ++lane) total[lane] += sum[lane];
  }
}

// The mean and biased variance of every branch over batch and space, from those of each slab.
template <typename A>
class BranchMoments {
 public:
  BranchMoments(const Problem& g, const BranchPlan<A>& plan)
      : g_(g),
        plan_(plan),
        size_(plan.groups * g.K * plan.width),
        means_(plan.slabs.count() * size_),
        squares_(plan.slabs.count() * size_) {}

  // Of branch k of a block. Two passes over a buffer in the cache: no difference of large sums.
  void add(const BranchBlock<A>& block, int64_t index, int64_t k) const {
    const int64_t voxels = volume(block.lattice.problem.output);
    const int64_t width = plan_.width, at = index * size_ + (block.group * g_.K + k) * width;
    double* means = means_ + at;
    sum_voxels(block.row(k, 0, 0), voxels, width, means, [](A value, int64_t) { return value; });
    for (int64_t lane = 0; lane < width; ++lane) means[lane] /= voxels;
    sum_voxels(block.row(k, 0, 0), voxels, width, squares_ + at, [&](A value, int64_t lane) {
      const A distance = value - A(means[lane]);
      return distance * distance;
    });
  }

  // Merged by the parallel rule of Chan, Golub and LeVeque.
  void store(A* mean_of, A* var_of) const {
    std::vector<double> points;
    for (int64_t index = 0; index < plan_.slabs.count(); ++index)
      points.push_back(double(volume(plan_.slabs.at(index).problem.output)));
    for (int64_t k = 0; k < g_.K; ++k)
      for (int64_t o = 0; o < g_.O; ++o) {
        double count = 0, mean = 0, square = 0;
        for (size_t index = 0; index < points.size(); ++index) {
          const int64_t at = index * size_ + (o / plan_.width * g_.K + k) * plan_.width + o % plan_.width;
          const double distance = means_[at] - mean;
          square += squares_[at] + distance * distance * count * points[index] / (count + points[index]);
          mean += distance * points[index] / (count + points[index]);
          count += points[index];
        }
        mean_of[k * g_.O + o] = A(mean);
        var_of[k * g_.O + o] = A(square / count);
      }
  }

 private:
  const Problem& g_;
  const BranchPlan<A>& plan_;
  const int64_t size_;  // of a slab: [group][k][width]
  const Scratch<double> means_, squares_;
};

// Fills the branches and, unless null, the mean and biased variance of each over batch and space.
template <typename T, typename A>
void branch_statistics(const Convolution<T>& conv, const BranchViews<T>& branches, A* mean, A* var) {
  const Problem& g = conv.g;
  const BranchPlan<A> plan(g, use_bfloat16<T>());
  std::optional<BranchMoments<A>> moments;
  if (mean) moments.emplace(g, plan);
  Branches<T, A>(conv, plan).for_each_block([&](const BranchBlock<A>& block, int64_t index) {
    const Index3& size = block.lattice.problem.output;
    for (int64_t k = 0; k < g.K; ++k) {
      for_each_row(size, [&](int64_t z, int64_t y) {
        unpack_row(block.row(k, z, y), plan.width, size.x, block.channels, block.row_of(branches.branch(k), z, y));
      });
      if (moments) moments->add(block, index, k);
    }
  });
  if (moments) moments->store(mean, var);
}

// The rows of branches in memory, one after another, with a_k and y_k of the row packed, y_k as [x][O padded].
template <typename T, typename A>
struct ExistingRow {
  explicit ExistingRow(const ExistingBranches<T>& in)
      : in(in), size(in.g.output), width(padded<A>(in.g.O)), values(size.x * width), attention(size.x) {}

  void move_to(int64_t row) {
    sample = row / (size.z * size.y);
    first = {row / size.y % size.z, row % size.y, 0};
  }
  // Of the row and branch k, with s_k and h_k of all branches packed to `width`.
  BranchRow<A> load(int64_t k, const A* scale, const A* shift) const {
    pack_row(in.branches.branch(k).row(sample, 0, first), size.x, in.g.O, values.get(), width);
    pack_row(in.attention.row(sample, k, first), size.x, 1, attention.get(), 1);
    return {values, attention, scale + k * width, shift + k * width, size.x, width};
  }

  const ExistingBranches<T>& in;
  const Index3 size;
  const int64_t width;
  const Scratch<A> values, attention;
  int64_t sample = 0;
  Index3 first{};
};

// output = sum_k a_k (s_k y_k + h_k)
template <typename T, typename A>
void branch_combine(const ExistingBranches<T>& in, const A* scale, const A* shift, const View<T>& output) {
  const Problem& g = in.g;
  const Scratch<A> scales = pack_vectors<A>(scale, 1, g.K, g.O, 1, padded<A>(g.O));
  const Scratch<A> shifts = pack_vectors<A>(shift, 0, g.K, g.O, 1, padded<A>(g.O));
  in.parallel(g.N * g.output.z * g.output.y, [&](int64_t begin, int64_t end) {
    ExistingRow<T, A> row(in);
    const Scratch<A> sum(row.size.x * row.width);
    for (int64_t r = begin; r < end; ++r) {
      row.move_to(r);
      for (int64_t k = 0; k < g.K; ++k) add_branch(row.load(k, scales, shifts), k == 0, sum.get());
      unpack_row(sum.get(), row.width, row.size.x, g.O, output.row(row.sample, 0, row.first));
    }
  });
}

// grad_shift = sum_p a_k G, grad_scale = sum_p a_k G (y_k - mean_k), grad_attention = sum_o G (s_k y_k + h_k)
template <typename T, typename A>
void branch_reduce(const ExistingBranches<T>& in, const A* mean, const A* scale, const A* shift,
                   const View<T>& grad_attention, A* grad_scale, A* grad_shift) {
  const Problem& g = in.g;
  const int64_t width = padded<A>(g.O), size = g.K * width;
  const Scratch<A> means = pack_vectors<A>(mean, 0, g.K, g.O, 1, width);
  const Scratch<A> scales = pack_vectors<A>(scale, 1, g.K, g.O, 1, width);
  const Scratch<A> shifts = pack_vectors<A>(shift, 0, g.K, g.O, 1, width);
  const int64_t rows = g.N * g.output.z * g.output.y;
  const int64_t slices = std::min<int64_t>(rows, 64);
  const Scratch<double> totals(slices * 2 * size);  // of grad_scale, then of grad_shift
  in.parallel(slices, [&](int64_t begin, int64_t end) {
    ExistingRow<T, A> row(in);
    const Scratch<A> grad_output(row.size.x * width), da(row.size.x), sums(2 * width);
    for (int64_t slice = begin; slice < end; ++slice) {
      double* of_scale = totals + slice * 2 * size;
      double* of_shift = of_scale + size;
      std::fill(of_scale, of_scale + 2 * size, 0.0);
      for (int64_t r = rows * slice / slices; r < rows * (slice + 1) / slices; ++r) {
        row.move_to(r);
        pack_row(in.grad_output.row(row.sample, 0, row.first), row.size.x, g.O, grad_output.get(), width);
        for (int64_t k = 0; k < g.K; ++k) {
          differentiate_branch<A>(row.load(k, scales, shifts), grad_output, means + k * width,
                                  {da, of_scale + k * width, of_shift + k * width}, sums);
          if (!grad_attention.data) continue;
          const Row<T> to = grad_attention.row(row.sample, k, row.first);
          for (int64_t p = 0; p < row.size.x; ++p) from_accumulator(da[p], to.data[p * to.x]);
        }
      }
    }
  });
  for (int64_t k = 0; k < g.K; ++k)
    for (int64_t o = 0; o < g.O; ++o) {
      double of_scale = 0, of_shift = 0;
      for (int64_t slice = 0; slice < slices; ++slice) {
        const double* at = totals + slice * 2 * size + k * width + o;
        of_scale += at[0];
        of_shift += at[size];
      }
      grad_scale[k * g.O + o] = A(of_scale);
      grad_shift[k * g.O + o] = A(of_shift);
    }
}

// Gradients of input and weight for dy_k = A_k a_k G + B_k y_k + C_k.
template <typename T, typename A>
void branch_norm_backward(const Convolution<T>& conv, const ExistingBranches<T>& in, const A* a_coef, const A* b_coef,
                          const A* c_coef, const View<T>& grad_input, const View<T>& grad_weight) {
  using V = Vec<A>;
  const Problem& g = conv.g;
  const BranchPlan<A> plan(g, use_bfloat16<T>());
  const int64_t width = plan.width;
  const Scratch<A> a_coefs = pack_vectors<A>(a_coef, 0, g.K, g.O, plan.groups, width);
  const Scratch<A> b_coefs = pack_vectors<A>(b_coef, 0, g.K, g.O, plan.groups, width);
  const Scratch<A> c_coefs = pack_vectors<A>(c_coef, 0, g.K, g.O, plan.groups, width);
  const BranchGather<T, A> gather(conv, plan, grad_input, grad_weight);
  gather.run([&](const BranchBlock<A>& block, BranchTile<A>&, int64_t) {
    const Index3& size = block.lattice.problem.output;
    const Scratch<A> attention(size.x), grad_output(size.x * width);
    for_each_row(size, [&](int64_t z, int64_t y) {
      pack_row(block.row_of(in.grad_output, z, y), size.x, block.channels, grad_output.get(), width);
      for (int64_t k = 0; k < g.K; ++k) {
        A* values = block.row(k, z, y);
        pack_row(block.row_of(in.branches.branch(k), z, y), size.x, block.channels, values, width);
        pack_row(block.lattice.output_row(in.attention, k, {z, y, 0}), size.x, 1, attention.get(), 1);
        const int64_t at = (block.group * g.K + k) * width;
        for (int64_t p = 0; p < size.x; ++p)
          for (int64_t v = 0; v < width; v += V::kLanes) {
            const auto gated = V::broadcast(attention[p]) * V::load(grad_output + p * width + v);
            A* value = values + p * width + v;
            V::store(value, V::load(a_coefs + at + v) * gated + V::load(b_coefs + at + v) * V::load(value) +
                                V::load(c_coefs + at + v));
          }
      }
    });
  });
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
