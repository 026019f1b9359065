// Batch-normalised branches (docs/branch_norm.md): what autofocus_kernels/ops/branch_norm.py asks of a backend.
//
// Vectors are [K, O] in the accumulator's type. Sums over voxels are taken per lattice or per slice of rows, in an order
// that does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "branch.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

template <typename T>
View<T> branch_view(const BranchViews<T>& views, int64_t k) {
  return {views.first.data + k * views.k, views.first.n, views.first.c, views.first.s};
}

// Sums term(value, lane) over the voxels of a dense volume: rows in the accumulator's type, their sums in double.
template <typename A, typename Term>
void sum_rows(const A* values, const Index3& size, int64_t width, double* total, const Term& term) {
  Scratch<A> row(width);
  std::fill(total, total + width, 0.0);
  for (int64_t r = 0; r < size.z * size.y; ++r, values += size.x * width) {
    std::fill(row.get(), row + width, A(0));
    for (int64_t p = 0; p < size.x; ++p)
      for (int64_t lane = 0; lane < width; ++lane) row[lane] += term(values[p * width + lane], lane);
    for (int64_t lane = 0; lane < width; ++lane) total[lane] += row[lane];
  }
}

// Fills the branches and, unless null, the mean and biased variance of each over batch and space.
template <typename T, typename A>
void branch_statistics(const NormArguments<T, A>& args) {
  const Problem& g = args.g;
  const Branches<T, A> branches(g, args.input, args.weight, args.parallel);
  const int64_t width = branches.width;
  const int64_t moments_size = args.mean ? branches.groups * g.K * width : 0;
  Scratch<double> means(branches.lattices * moments_size), squares(branches.lattices * moments_size);
  branches.compute([&](const BranchBlock<A>& block, int64_t index) {
    const Problem& sub = block.lattice.problem;
    for (int64_t k = 0; k < g.K; ++k) {
      const View<T> to = branch_view(args.branches, k);
      for_each_row(sub.output, [&](int64_t z, int64_t y) {
        unpack_row(block.row(k, z, y), width, sub.output.x, block.channels, block.row_of(to, block.first, z, y),
                   block.lattice.step.x * to.s.x, to.c);
      });
      if (!args.mean) continue;
      const A* values = block.values + k * volume(sub.output) * width;
      const int64_t at = index * moments_size + (block.group * g.K + k) * width;
      // Two passes over a buffer in the cache: no difference of large sums.
      sum_rows(values, sub.output, width, means + at, [](A value, int64_t) { return value; });
      for (int64_t lane = 0; lane < width; ++lane) means[at + lane] /= std::max<int64_t>(volume(sub.output), 1);
      sum_rows(values, sub.output, width, squares + at, [&](A value, int64_t lane) {
        const A distance = value - A(means[at + lane]);
        return distance * distance;
      });
    }
  });
  if (!args.mean) return;
  for (int64_t k = 0; k < g.K; ++k)
    for (int64_t o = 0; o < g.O; ++o) {
      double count = 0, mean = 0, square = 0;  // merged by the parallel rule of Chan, Golub and LeVeque
      for (int64_t index = 0; index < branches.lattices; ++index) {
        const int64_t at = index * moments_size + (o / width * g.K + k) * width + o % width;
        const double points = double(volume(branches.lattice(index).problem.output));
        if (points == 0) continue;
        const double distance = means[at] - mean;
        square += squares[at] + distance * distance * count * points / (count + points);
        mean += distance * points / (count + points);
        count += points;
      }
      args.mean[k * g.O + o] = A(mean);
      args.var[k * g.O + o] = A(square / count);
    }
}

// The rows of a whole problem, one after another, with G, a_k and y_k of the row packed to [x][O padded].
template <typename T, typename A>
struct NormRow {
  explicit NormRow(const NormArguments<T, A>& args)
      : args(args), size(args.g.output), width(padded<A>(args.g.O)), values(size.x * width), attention(size.x) {}

  void load(int64_t row, int64_t k) {
    move_to(row);
    const View<T> branch = branch_view(args.branches, k);
    pack_row<T, A>(at(branch, 0), branch.s.x, branch.c, size.x, args.g.O, values.get(), width);
    pack_row(at(args.attention, k), args.attention.s.x, 1, size.x, 1, attention.get(), 1);
  }
  void move_to(int64_t row) {
    n = row / (size.z * size.y);
    z = row / size.y % size.z;
    y = row % size.y;
  }
  template <typename S>
  S* at(const View<S>& view, int64_t channel) const {
    return view.data + n * view.n + channel * view.c + z * view.s.z + y * view.s.y;
  }

  const NormArguments<T, A>& args;
  const Index3 size;
  const int64_t width;
  Scratch<A> values, attention;
  int64_t n = 0, z = 0, y = 0;
};

// output = sum_k a_k (scale_k y_k + shift_k)
template <typename T, typename A>
void branch_combine(const NormArguments<T, A>& args) {
  using V = Vec<A>;
  const Problem& g = args.g;
  const Scratch<A> scale = pack_vectors<A, A>(args.scale, 1, g.K, g.O, 1, padded<A>(g.O));
  const Scratch<A> shift = pack_vectors<A, A>(args.shift, 0, g.K, g.O, 1, padded<A>(g.O));
  args.parallel(g.N * g.output.z * g.output.y, [&](int64_t begin, int64_t end) {
    NormRow<T, A> row(args);
    const int64_t width = row.width;
    Scratch<A> sum(row.size.x * width);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t k = 0; k < g.K; ++k) {
        row.load(r, k);
        for (int64_t p = 0; p < row.size.x; ++p)
          for (int64_t v = 0; v < width; v += V::kLanes) {
            const auto branch =
                V::load(scale + k * width + v) * V::load(row.values + p * width + v) + V::load(shift + k * width + v);
            const auto term = V::broadcast(row.attention[p]) * branch;
            V::store(sum + p * width + v, k == 0 ? term : V::load(sum + p * width + v) + term);
          }
      }
      unpack_row(sum.get(), width, row.size.x, g.O, row.at(args.output, 0), args.output.s.x, args.output.c);
    }
  });
}

// grad_shift = sum_p a_k G, grad_scale = sum_p a_k G (y_k - mean_k), grad_attention = sum_o G (scale_k y_k + shift_k)
template <typename T, typename A>
void branch_reduce(const NormArguments<T, A>& args) {
  using V = Vec<A>;
  const Problem& g = args.g;
  const int64_t width = padded<A>(g.O), vectors_size = g.K * width;
  const Scratch<A> mean = pack_vectors<A, A>(args.mean, 0, g.K, g.O, 1, width);
  const Scratch<A> scale = pack_vectors<A, A>(args.scale, 1, g.K, g.O, 1, width);
  const Scratch<A> shift = pack_vectors<A, A>(args.shift, 0, g.K, g.O, 1, width);
  const int64_t rows = g.N * g.output.z * g.output.y;
  const int64_t slices = std::min<int64_t>(rows, 64);
  Scratch<A> sums(slices * 2 * vectors_size);
  args.parallel(slices, [&](int64_t begin, int64_t end) {
    NormRow<T, A> row(args);
    Scratch<A> G(row.size.x * width), da(row.size.x);
    for (int64_t slice = begin; slice < end; ++slice) {
      A* of_scale = sums + slice * 2 * vectors_size;
      A* of_shift = of_scale + vectors_size;
      std::fill(of_scale, of_scale + 2 * vectors_size, A(0));
      for (int64_t r = rows * slice / slices; r < rows * (slice + 1) / slices; ++r) {
        row.move_to(r);
        pack_row<T, A>(row.at(args.grad_output, 0), args.grad_output.s.x, args.grad_output.c, row.size.x, g.O, G.get(),
                       width);
        for (int64_t k = 0; k < g.K; ++k) {
          row.load(r, k);
          for (int64_t p = 0; p < row.size.x; ++p) {
            const auto a = V::broadcast(row.attention[p]);
            typename V::Native dot = {};
            for (int64_t v = 0; v < width; v += V::kLanes) {
              const int64_t at = k * width + v;
              const auto gradient = V::load(G + p * width + v), branch = V::load(row.values + p * width + v);
              const auto gated = a * gradient;
              V::store(of_shift + at, V::load(of_shift + at) + gated);
              V::store(of_scale + at, V::load(of_scale + at) + gated * (branch - V::load(mean + at)));
              dot += gradient * (V::load(scale + at) * branch + V::load(shift + at));
            }
            da[p] = V::sum(dot);
          }
          if (args.grad_attention.data) {
            T* to = row.at(args.grad_attention, k);
            for (int64_t p = 0; p < row.size.x; ++p) from_accumulator(da[p], to[p * args.grad_attention.s.x]);
          }
        }
      }
    }
  });
  for (int64_t k = 0; k < g.K; ++k)
    for (int64_t o = 0; o < g.O; ++o) {
      double of_scale = 0, of_shift = 0;
      for (int64_t slice = 0; slice < slices; ++slice) {
        const A* at = sums + slice * 2 * vectors_size + k * width + o;
        of_scale += at[0];
        of_shift += at[vectors_size];
      }
      args.grad_scale[k * g.O + o] = A(of_scale);
      args.grad_shift[k * g.O + o] = A(of_shift);
    }
}

// Gradients of input and weight for dy_k = scale_k a_k G + slope_k y_k + shift_k.
template <typename T, typename A>
void branch_norm_backward(const NormArguments<T, A>& args) {
  using V = Vec<A>;
  const Problem& g = args.g;
  const Branches<T, A> branches(g, args.input, args.weight, args.parallel);
  const int64_t width = branches.width;
  const Scratch<A> a_coef = pack_vectors<A, A>(args.scale, 0, g.K, g.O, branches.groups, width);
  const Scratch<A> b_coef = pack_vectors<A, A>(args.slope, 0, g.K, g.O, branches.groups, width);
  const Scratch<A> c_coef = pack_vectors<A, A>(args.shift, 0, g.K, g.O, branches.groups, width);
  branches.differentiate(false, args.grad_input, args.grad_weight, [&](const BranchBlock<A>& block, int64_t) {
    const Index3& size = block.lattice.problem.output;
    const int64_t step = block.lattice.step.x;
    Scratch<A> attention(size.x), G(size.x * width);
    for_each_row(size, [&](int64_t z, int64_t y) {
      pack_row(block.row_of(args.grad_output, block.first, z, y), step * args.grad_output.s.x, args.grad_output.c,
               size.x, block.channels, G.get(), width);
      for (int64_t k = 0; k < g.K; ++k) {
        const View<T> branch = branch_view(args.branches, k);
        A* values = block.row(k, z, y);
        pack_row<T, A>(block.row_of(branch, block.first, z, y), step * branch.s.x, branch.c, size.x, block.channels,
                       values, width);
        pack_row(block.row_of(args.attention, k, z, y), step * args.attention.s.x, 1, size.x, 1, attention.get(), 1);
        const int64_t vectors_at = (block.group * g.K + k) * width;
        for (int64_t p = 0; p < size.x; ++p)
          for (int64_t v = 0; v < width; v += V::kLanes) {
            const auto gated = V::broadcast(attention[p]) * V::load(G + p * width + v);
            A* value = values + p * width + v;
            V::store(value, V::load(a_coef + vectors_at + v) * gated + V::load(b_coef + vectors_at + v) *
                                V::load(value) + V::load(c_coef + vectors_at + v));
          }
      }
    });
  });
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
