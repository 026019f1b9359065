// Branch mode: every branch is scaled and shifted on its own, so nothing can be blended before the projection.
//
// Forward: project first, Z_t = W_t x (one GEMM for all branches), then y_k(p) = sum_t Z_t(q_k(p)): additions only.
// Backward: with dy_k the gradient of y_k, v_t(q) = sum_k dy_k(p), dx = sum_t W_t^T v_t and dW_t = sum_q v_t x^T.
// Branches exist one lattice and one group of output channels at a time, in a buffer of the thread (docs/math.md,
// section 6). The lattices are those of lattice.h; the cut depends on the problem alone, so results are bitwise the same
// for any number of threads.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "backward.h"
#include "gemm.h"
#include "pack.h"
#include "tile.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// The branches of one lattice, sample and group of output channels: values[k][output point][width].
template <typename A>
struct BranchBlock {
  const Lattice& lattice;
  int64_t n, group, first, channels, width;
  A* values;

  A* row(int64_t k, int64_t z, int64_t y) const {
    const Problem& g = lattice.problem;
    return values + (k * volume(g.output) + ravel({z, y, 0}, g.output)) * width;
  }
  // The same row in a tensor of the whole problem, at channel `channel`.
  template <typename T>
  T* row_of(const View<T>& view, int64_t channel, int64_t z, int64_t y) const {
    return lattice_row(view, n, channel, lattice.first_output, lattice.step, z, y, 0);
  }
};

// Calls visit(z, y) for every row of a volume.
template <typename Visit>
void for_each_row(const Index3& size, const Visit& visit) {
  for (int64_t z = 0; z < size.z; ++z)
    for (int64_t y = 0; y < size.y; ++y) visit(z, y);
}

// to[p] += from[p], `count` rows of `vectors` vectors.
template <typename A, int vectors>
void add_rows_of(const A* from, int64_t from_step, A* to, int64_t to_step, int64_t count) {
  using V = Vec<A>;
  for (int64_t p = 0; p < count; ++p, from += from_step, to += to_step)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      V::store(to + v * V::kLanes, V::load(to + v * V::kLanes) + V::load(from + v * V::kLanes));
}

// Of a row of a block, so that loops over one can be unrolled.
constexpr int kMaxBlockBytes = 256;

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

// Of whole vectors: 0 times anything else is no zero.
template <typename A>
bool all_finite(const A* values, int64_t count) {
  typename Vec<A>::Native sum = {};
  for (int64_t i = 0; i < count; i += Vec<A>::kLanes) sum += Vec<A>::load(values + i) * typename Vec<A>::Native{};
  return Vec<A>::sum(sum) == 0;
}

template <typename T, typename A>
class Branches {
  using V = Vec<A>;

 public:
  Branches(const Problem& g, const View<const T>& input, const View<const T>& weight, ParallelFor parallel)
      : g_(g),
        input_(input),
        weight_(weight),
        parallel_(parallel),
        step{axis_factor(g, &Index3::z, 8), axis_factor(g, &Index3::y, 8), axis_factor(g, &Index3::x, 16)},
        lattices(g.N * volume(step)),
        width(block_vectors() * V::kLanes),
        groups((g.O + width - 1) / width),
        tap_columns_(g.kernel.x * width),
        in_width_(padded<A>(g.C)),
        tap_rows_(g.kernel.z * g.kernel.y) {
    constexpr int64_t kTileBytes = 32 * 1024;
    voxels_ = std::clamp<int64_t>(kTileBytes / sizeof(A) / (tap_columns_ + in_width_), 12, 64);
  }

  Lattice lattice(int64_t index) const { return lattice_at(g_, step, index % volume(step)); }

  // Computes every block and calls consume(block, lattice index) in the thread that computed it.
  template <typename Consume>
  void compute(const Consume& consume) const {
    const Scratch<A> weight = projection_weight();
    parallel_(lattices * groups, [&](int64_t begin, int64_t end) {
      Scratch<A> values(block_size());
      Workspace w(*this);
      for (int64_t job = begin; job < end; ++job) {
        const Lattice sub = lattice(job / groups);
        const BranchBlock<A> block = make_block(sub, job / groups, job % groups, values);
        fill(block, weight, w);
        consume(block, job / groups);
      }
    });
  }

  // Gradients of input and weight. produce(block, lattice index) overwrites a block with dy_k; where `recompute`, it
  // finds y_k there.
  template <typename Produce>
  void differentiate(bool recompute, const View<T>& grad_input, const View<T>& grad_weight,
                     const Produce& produce) const {
    const Scratch<A> projection = recompute ? projection_weight() : Scratch<A>(0);
    const Scratch<A> transposed = grad_input.data ? transposed_weight() : Scratch<A>(0);
    const bool finite_weight =
        !grad_input.data || all_finite<A>(transposed, groups * num_taps(g_) * width * in_width_);
    const int64_t weight_size = num_taps(g_) * groups * width * g_.C;
    const int64_t partials = std::clamp<int64_t>((int64_t(1) << 23) / weight_size, 1, lattices);
    Scratch<A> sums(grad_weight.data ? partials * weight_size : 0);
    parallel_(partials, [&](int64_t begin, int64_t end) {
      Scratch<A> values(block_size()), dx(grad_input.data ? lattice_points() * in_width_ : 0);
      Workspace w(*this);
      for (int64_t partial = begin; partial < end; ++partial) {
        A* sum = sums + partial * weight_size;
        if (grad_weight.data) std::fill(sum, sum + weight_size, A(0));
        for (int64_t index = partial; index < lattices; index += partials) {
          const Lattice sub = lattice(index);
          if (grad_input.data) std::fill(dx.get(), dx + volume(sub.problem.input) * in_width_, A(0));
          for (int64_t group = 0; group < groups; ++group) {
            const BranchBlock<A> block = make_block(sub, index, group, values);
            if (recompute) fill(block, projection, w);
            produce(block, index);
            if (grad_input.data || grad_weight.data)
              gather(block, transposed, finite_weight, grad_input.data ? dx.get() : nullptr,
                     grad_weight.data ? sum : nullptr, w);
          }
          if (grad_input.data) for_each_row(sub.problem.input, [&](int64_t z, int64_t y) {
              unpack_row(dx + ravel({z, y, 0}, sub.problem.input) * in_width_, in_width_, sub.problem.input.x, g_.C,
                         lattice_row(grad_input, index / volume(step), 0, sub.first_input, sub.step, z, y, 0),
                         sub.step.x * grad_input.s.x, grad_input.c);
            });
        }
      }
    });
    if (grad_weight.data) reduce_weight(sums, partials, weight_size, grad_weight);
  }

 private:
  // All channels, so that rows of tensors are read and written whole, unless there are few lattices to share out.
  int64_t block_vectors() const {
    const int64_t all = vectors<A>(g_.O);
    const int64_t parts = std::max(ceil_div(16, lattices), ceil_div(all, kMaxBlockBytes / AUTOFOCUS_VECTOR_BYTES));
    return ceil_div(all, parts);
  }

  const Problem& g_;
  const View<const T> input_, weight_;
  const ParallelFor parallel_;

 public:
  const Index3 step;
  const int64_t lattices;  // of all samples
  const int64_t width;     // output channels of a block
  const int64_t groups;

 private:
  const int64_t tap_columns_, in_width_, tap_rows_;
  int64_t voxels_;

  struct Workspace {
    explicit Workspace(const Branches& b)
        : x(b.voxels_ * b.in_width_), columns(b.voxels_ * b.tap_columns_), linked(b.voxels_ * b.g_.kernel.x) {}
    Scratch<A> x, columns;
    std::vector<char> linked;  // [voxel of the tile][tap x]: whether an output reads it
    std::vector<Segment> segments;
  };

  int64_t block_size() const {
    return g_.K * (g_.output.z / step.z + 1) * (g_.output.y / step.y + 1) * (g_.output.x / step.x + 1) * width;
  }
  int64_t lattice_points() const {
    return (g_.input.z / step.z + 1) * (g_.input.y / step.y + 1) * (g_.input.x / step.x + 1);
  }

  BranchBlock<A> make_block(const Lattice& sub, int64_t index, int64_t group, A* values) const {
    const int64_t first = group * width;
    return {sub, index / volume(step), group, first, std::min(width, g_.O - first), width, values};
  }

  // [group][tap row][C][tap x][width]
  Scratch<A> projection_weight() const {
    Scratch<A> packed(groups * num_taps(g_) * g_.C * width);
    A* to = packed;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t row = 0; row < tap_rows_; ++row)
        for (int64_t c = 0; c < g_.C; ++c)
          for (int64_t x = 0; x < g_.kernel.x; ++x, to += width)
            pack_row(weight_at(group * width, c, row, x), 0, weight_.n, 1, std::min(width, g_.O - group * width), to,
                     width);
    return packed;
  }

  // [group][tap row][tap x][width][C padded]
  Scratch<A> transposed_weight() const {
    Scratch<A> packed(groups * num_taps(g_) * width * in_width_);
    A* to = packed;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t row = 0; row < tap_rows_; ++row)
        for (int64_t x = 0; x < g_.kernel.x; ++x)
          for (int64_t o = group * width; o < (group + 1) * width; ++o, to += in_width_)
            pack_row(weight_at(std::min(o, g_.O - 1), 0, row, x), 0, weight_.c, 1, o < g_.O ? g_.C : 0, to, in_width_);
    return packed;
  }

  const T* weight_at(int64_t o, int64_t c, int64_t tap_row, int64_t x) const {
    return weight_.data + o * weight_.n + c * weight_.c + tap_row / g_.kernel.y * weight_.s.z +
           tap_row % g_.kernel.y * weight_.s.y + x * weight_.s.x;
  }

  void pack_input(const BranchBlock<A>& block, Workspace& w) const {
    const Lattice& sub = block.lattice;
    for (const Segment& s : w.segments)
      pack_row(lattice_row(input_, block.n, 0, sub.first_input, sub.step, s.z, s.y, s.x), sub.step.x * input_.s.x,
               input_.c, s.count, g_.C, w.x + s.offset * in_width_, in_width_);
  }

  // The row of outputs of branch k that reads the segment's row of input points through a tap with this z and y; false
  // if there is none.
  static bool find_output_row(const Problem& g, int64_t k, const Segment& s, const Index3& offset, Index3& row) {
    const int64_t z = s.z - g.origin.z - g.dilation[k].z * offset.z;
    const int64_t y = s.y - g.origin.y - g.dilation[k].y * offset.y;
    row = {z / g.stride.z, y / g.stride.y, 0};
    return z >= 0 && y >= 0 && row.z < g.output.z && row.y < g.output.y && row.z * g.stride.z == z &&
           row.y * g.stride.y == y;
  }

  // The rows of the tile from the first segment to the last that any output reads through a row of taps.
  struct Part {
    int64_t begin, end;
  };
  Part linked_part(const BranchBlock<A>& block, const Workspace& w, int64_t tap_row) const {
    const Problem& g = block.lattice.problem;
    const Index3 offset = tap_offset(g, tap_row * g.kernel.x);
    Part part{0, 0};
    Index3 row;
    for (const Segment& s : w.segments)
      for (int64_t k = 0; k < g.K; ++k)
        if (find_output_row(g, k, s, offset, row)) {
          if (part.end == 0) part.begin = s.offset;
          part.end = s.offset + s.count;
          break;
        }
    return part;
  }

  // Calls visit(row of the tile, output row of the block, count) for every branch that links a segment of input points
  // and a run of output points through tap `offset`; neighbours in the output are stride.x input points apart.
  template <typename Visit>
  void for_each_link(const BranchBlock<A>& block, const Segment& s, const Index3& offset, const Visit& visit) const {
    const Problem& g = block.lattice.problem;
    Index3 row;
    for (int64_t k = 0; k < g.K; ++k) {
      if (!find_output_row(g, k, s, offset, row)) continue;
      const int64_t base = g.origin.x + g.dilation[k].x * offset.x;  // input point of output point 0
      const int64_t begin = std::max<int64_t>(0, ceil_div(s.x - base, g.stride.x));
      const int64_t end = std::min(g.output.x, ceil_div(s.x + s.count - base, g.stride.x));
      if (begin >= end) continue;
      visit(s.offset + base + g.stride.x * begin - s.x, block.row(k, row.z, row.y) + begin * block.width, end - begin);
    }
  }

  // y_k(p) = sum_t Z_t(q), tile by tile of input points.
  void fill(const BranchBlock<A>& block, const A* weight, Workspace& w) const {
    const Problem& sub = block.lattice.problem;
    std::fill(block.values, block.values + g_.K * volume(sub.output) * width, A(0));
    const TileGrid grid(sub.input, voxels_);
    for (int64_t tile = 0; tile < grid.count(); ++tile) {
      grid.at(tile, w.segments);
      pack_input(block, w);
      for (int64_t row = 0; row < tap_rows_; ++row) {
        const Part part = linked_part(block, w, row);
        if (part.begin == part.end) continue;
        A* columns = w.columns + part.begin * tap_columns_;
        const int64_t count = part.end - part.begin;
        clear_missing(columns, count * tap_columns_, width, block.channels);
        for_each_tap_columns<A>(g_.kernel.x, width, block.channels, [&](int64_t first, int64_t group_columns) {
          gemm<A>({w.x + part.begin * in_width_, in_width_, 1,
                   weight + (block.group * tap_rows_ + row) * g_.C * tap_columns_ + first, tap_columns_,
                   columns + first, tap_columns_, g_.C},
                  count, group_columns, false);
        });
        for (int64_t x = 0; x < g_.kernel.x; ++x) {
          const Index3 offset = tap_offset(sub, row * g_.kernel.x + x);
          for (const Segment& s : w.segments)
            for_each_link(block, s, offset, [&](int64_t from, A* to, int64_t links) {
              add_rows<A>(width, w.columns + from * tap_columns_ + x * width, sub.stride.x * tap_columns_, to, width,
                          links);
            });
        }
      }
    }
  }

  // v_t(q) = sum_k dy_k(p), then dx += W_t^T v_t and dW_t += v_t x^T, tile by tile of input points.
  // A voxel adds a zero for a tap that nothing reads, which must not meet NaN or Inf: where there are any, each voxel
  // goes through its own taps only.
  void gather(const BranchBlock<A>& block, const A* weight, bool finite_weight, A* dx, A* grad_weight,
              Workspace& w) const {
    const Problem& sub = block.lattice.problem;
    const TileGrid grid(sub.input, voxels_);
    for (int64_t tile = 0; tile < grid.count(); ++tile) {
      const int64_t voxels = grid.at(tile, w.segments);
      if (grad_weight != nullptr) pack_input(block, w);
      const bool finite = finite_weight && (grad_weight == nullptr || all_finite<A>(w.x, voxels * in_width_));
      for (int64_t row = 0; row < tap_rows_; ++row) {
        const Part part = linked_part(block, w, row);
        if (part.begin == part.end) continue;
        std::fill(w.columns + part.begin * tap_columns_, w.columns + part.end * tap_columns_, A(0));
        if (!finite) std::fill(w.linked.begin(), w.linked.end(), false);
        for (int64_t x = 0; x < g_.kernel.x; ++x) {
          const Index3 offset = tap_offset(sub, row * g_.kernel.x + x);
          for (const Segment& s : w.segments)
            for_each_link(block, s, offset, [&](int64_t at, const A* from, int64_t links) {
              if (!finite)
                for (int64_t p = 0; p < links; ++p) w.linked[(at + p * sub.stride.x) * g_.kernel.x + x] = true;
              add_rows<A>(width, from, width, w.columns + at * tap_columns_ + x * width, sub.stride.x * tap_columns_,
                          links);
            });
        }
        const int64_t tap_row = block.group * tap_rows_ + row;
        if (dx != nullptr) {
          const Segment& s = w.segments.front();  // the segments of a tile are one run of points
          A* to = dx + ravel({s.z, s.y, s.x}, sub.input) * in_width_;
          for_each_product(part, block, finite, w, [&](int64_t voxel, int64_t count, int64_t first, int64_t depth) {
            gemm<A>({w.columns + voxel * tap_columns_ + first, tap_columns_, 1,
                     weight + (tap_row * tap_columns_ + first) * in_width_, in_width_, to + voxel * in_width_, in_width_,
                     depth},
                    count, g_.C, true);
          });
        }
        if (grad_weight != nullptr)
          for_each_product(part, block, finite, w, [&](int64_t voxel, int64_t count, int64_t first, int64_t columns) {
            gemm<A>({w.x + voxel * in_width_, 1, in_width_, w.columns + voxel * tap_columns_ + first, tap_columns_,
                     grad_weight + tap_row * g_.C * tap_columns_ + first, tap_columns_, count},
                    g_.C, columns, true);
          });
      }
    }
  }

  // Calls visit(first voxel, voxels, first column, columns) for the products of a row of taps.
  template <typename Visit>
  void for_each_product(const Part& part, const BranchBlock<A>& block, bool finite, const Workspace& w,
                        const Visit& visit) const {
    if (finite)
      return for_each_tap_columns<A>(g_.kernel.x, width, block.channels, [&](int64_t first, int64_t columns) {
        visit(part.begin, part.end - part.begin, first, columns);
      });
    for (int64_t voxel = part.begin; voxel < part.end; ++voxel)
      for (int64_t x = 0; x < g_.kernel.x; ++x)
        if (w.linked[voxel * g_.kernel.x + x]) visit(voxel, 1, x * width, block.channels);
  }

  void reduce_weight(const A* sums, int64_t partials, int64_t weight_size, const View<T>& to) const {
    parallel_(num_taps(g_), [&](int64_t begin, int64_t end) {
      for (int64_t tap = begin; tap < end; ++tap) {
        const Index3 j = unravel(tap, g_.kernel);
        const int64_t tap_row = tap / g_.kernel.x;
        T* at_tap = to.data + j.z * to.s.z + j.y * to.s.y + j.x * to.s.x;
        for (int64_t o = 0; o < g_.O; ++o)
          for (int64_t c = 0; c < g_.C; ++c) {
            const int64_t row = (o / width * tap_rows_ + tap_row) * g_.C + c;
            A total = 0;
            for (int64_t partial = 0; partial < partials; ++partial)
              total += sums[partial * weight_size + (row * g_.kernel.x + j.x) * width + o % width];
            from_accumulator(total, at_tap[o * to.n + c * to.c]);
          }
      }
    });
  }
};

// A [K, O] vector (or one value everywhere, where `from` is null) as [group][k][width].
template <typename T, typename A>
Scratch<A> pack_vectors(const T* from, A otherwise, int64_t K, int64_t O, int64_t groups, int64_t width) {
  Scratch<A> packed(groups * K * width);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t o = group * width + lane;
        packed[(group * K + k) * width + lane] =
            o >= O ? A(0) : from == nullptr ? otherwise : to_accumulator(from[k * O + o]);
      }
  return packed;
}

template <typename T, typename A>
void branch_forward(const ForwardArguments<T>& args) {
  using V = Vec<A>;
  const Problem& g = args.g;
  const Branches<T, A> branches(g, args.input, args.weight, args.parallel);
  const int64_t width = branches.width;
  const Scratch<A> scale = pack_vectors<T, A>(args.scale, 1, g.K, g.O, branches.groups, width);
  const Scratch<A> shift = pack_vectors<T, A>(args.shift, 0, g.K, g.O, branches.groups, width);
  branches.compute([&](const BranchBlock<A>& block, int64_t) {
    const Index3& size = block.lattice.problem.output;
    Scratch<A> attention(size.x), sum(size.x * width);
    for_each_row(size, [&](int64_t z, int64_t y) {
      for (int64_t k = 0; k < g.K; ++k) {
        pack_row(block.row_of(args.attention, k, z, y), block.lattice.step.x * args.attention.s.x, 1, size.x, 1,
                 attention.get(), 1);
        const A* values = block.row(k, z, y);
        const A* s = scale + (block.group * g.K + k) * width;
        const A* h = shift + (block.group * g.K + k) * width;
        for (int64_t p = 0; p < size.x; ++p)
          for (int64_t v = 0; v < width; v += V::kLanes) {
            const auto branch = V::load(s + v) * V::load(values + p * width + v) + V::load(h + v);
            const auto term = V::broadcast(attention[p]) * branch;
            V::store(sum + p * width + v, k == 0 ? term : V::load(sum + p * width + v) + term);
          }
      }
      unpack_row(sum.get(), width, size.x, block.channels, block.row_of(args.output, block.first, z, y),
                 block.lattice.step.x * args.output.s.x, args.output.c);
    });
  });
}

template <typename T, typename A>
void branch_backward(const BackwardArguments<T>& args) {
  using V = Vec<A>;
  const Problem& g = args.g;
  const Branches<T, A> branches(g, args.input, args.weight, args.parallel);
  const int64_t width = branches.width;
  const Scratch<A> scale = pack_vectors<T, A>(args.scale, 1, g.K, g.O, branches.groups, width);
  const Scratch<A> shift = pack_vectors<T, A>(args.shift, 0, g.K, g.O, branches.groups, width);
  const bool needs_branches = args.grad_attention.data || args.grad_scale;
  // dscale of each lattice, added in a fixed order at the end.
  const int64_t vectors_size = branches.groups * g.K * width;
  Scratch<A> grad_scale(args.grad_scale ? branches.lattices * vectors_size : 0);
  // da in the accumulator's precision: groups of channels follow each other in one thread.
  Scratch<A> grad_attention(args.grad_attention.data ? g.N * g.K * volume(g.output) : 0);

  branches.differentiate(
      needs_branches, args.grad_input, args.grad_weight, [&](const BranchBlock<A>& block, int64_t index) {
        const Lattice& lattice = block.lattice;
        const Index3& size = lattice.problem.output;
        Scratch<A> attention(size.x), G(size.x * width);
        A* dscale = grad_scale + index * vectors_size + block.group * g.K * width;
        if (args.grad_scale) std::fill(dscale, dscale + g.K * width, A(0));
        for_each_row(size, [&](int64_t z, int64_t y) {
          pack_row(block.row_of(args.grad_output, block.first, z, y), lattice.step.x * args.grad_output.s.x,
                   args.grad_output.c, size.x, block.channels, G.get(), width);
          for (int64_t k = 0; k < g.K; ++k) {
            pack_row(block.row_of(args.attention, k, z, y), lattice.step.x * args.attention.s.x, 1, size.x, 1,
                     attention.get(), 1);
            A* values = block.row(k, z, y);
            const A* s = scale + (block.group * g.K + k) * width;
            const A* h = shift + (block.group * g.K + k) * width;
            const Index3 at{lattice.first_output.z + lattice.step.z * z, lattice.first_output.y + lattice.step.y * y,
                            lattice.first_output.x};
            const int64_t da_row = (block.n * g.K + k) * volume(g.output) + ravel(at, g.output);
            for (int64_t p = 0; p < size.x; ++p) {
              const auto a = V::broadcast(attention[p]);
              typename V::Native dot = {};
              for (int64_t v = 0; v < width; v += V::kLanes) {
                const auto gradient = V::load(G + p * width + v);
                if (needs_branches) {
                  const auto branch = V::load(values + p * width + v);
                  dot += gradient * (V::load(s + v) * branch + V::load(h + v));
                  if (args.grad_scale)
                    V::store(dscale + k * width + v, V::load(dscale + k * width + v) + a * gradient * branch);
                }
                V::store(values + p * width + v, a * V::load(s + v) * gradient);
              }
              if (args.grad_attention.data) {
                A& da = grad_attention[da_row + lattice.step.x * p];
                da = (block.group == 0 ? A(0) : da) + V::sum(dot);
              }
            }
          }
        });
      });

  if (args.grad_scale)
    for (int64_t k = 0; k < g.K; ++k)
      for (int64_t o = 0; o < g.O; ++o) {
        A total = 0;
        for (int64_t index = 0; index < branches.lattices; ++index)
          total += grad_scale[index * vectors_size + (o / width * g.K + k) * width + o % width];
        from_accumulator(total, args.grad_scale[k * g.O + o]);
      }
  if (args.grad_attention.data) {
    const View<T>& to = args.grad_attention;
    const int64_t rows = g.output.z * g.output.y;
    args.parallel(g.N * g.K * rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t plane = row / rows, z = row % rows / g.output.y, y = row % g.output.y;
        T* at = to.data + plane / g.K * to.n + plane % g.K * to.c + z * to.s.z + y * to.s.y;
        for (int64_t x = 0; x < g.output.x; ++x)
          from_accumulator(grad_attention[row * g.output.x + x], at[x * to.s.x]);
      }
    });
  }
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
