// Plain-mode backward: project once, then dot, blend and scatter in one pass over the taps (docs/math.md, section 3).
//
//   g_t(p)    = W_t^T G(p)                          one GEMM serves both gradients below
//   da_k(p)  += <g_t(p), x(q_k(p))>                 dot
//   u_t(p)   += a_k(p) x(q_k(p))                    blend, from the same loads of x
//   dx(q_k(p)) += a_k(p) g_t(p)                     scatter
//   dW_t      = sum_p u_t(p) G(p)^T                 the second GEMM
//
// A job owns one lattice of one sample and one group of input channels: no other job touches its part of dx, so the
// scatter needs no atomics. Partial sums of dW and da are kept per job group and added in a fixed order; how many there
// are depends on the problem alone, so results are bitwise the same for any number of threads.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "forward.h"
#include "gemm.h"
#include "lowprecision.h"
#include "pack.h"
#include "tile.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

enum Wanted { kInput = 1, kWeight = 2, kAttention = 4 };

// One run of one tap: see the table above. g, u, x and dx hold `width` vectors a voxel; slot i is branch[i], which reads
// x and dx `offset[i]` further on.
template <typename A>
struct TapPass {
  const A* g;  // projected gradient of this tap
  A* u;        // blended input of this tap
  const A* x;
  A* dx;
  const A* a;
  A* da;  // one vector of partial sums a voxel and branch
  int64_t tile_step, x_step, a_branch, da_step;
  int64_t offset[kMaxBranches], branch[kMaxBranches];
};

template <typename A, int N, int wanted, int width, bool add>
void tap_pass(const TapPass<A>& t, int first, int64_t count) {
  using V = Vec<A>;
  using Native = typename V::Native;
  // Local copies: the compiler cannot know that the stores leave the caller's struct alone.
  const A *g = t.g, *x[N], *a[N];
  A *u = t.u, *dx[N], *da[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    x[i] = t.x + t.offset[first + i];
    dx[i] = t.dx + t.offset[first + i];
    a[i] = t.a + t.branch[first + i] * t.a_branch;
    da[i] = t.da + t.branch[first + i] * V::kLanes;
  }
  const int64_t tile_step = t.tile_step, x_step = t.x_step, da_step = t.da_step;
  int64_t at_x = 0, at_da = 0;
  for (int64_t p = 0; p < count; ++p, g += tile_step, u += tile_step, at_x += x_step, at_da += da_step) {
    Native gv[width], uv[width];
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) {
      gv[v] = V::load(g + v * V::kLanes);
      uv[v] = add ? V::load(u + v * V::kLanes) : Native{};
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Native attention = V::broadcast(a[i][p]);
      Native dot = {};
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) {
        const int64_t at = at_x + v * V::kLanes;
        if (wanted & (kWeight | kAttention)) {
          const Native xv = V::load(x[i] + at);
          if (wanted & kWeight) uv[v] += attention * xv;
          if (wanted & kAttention) dot += gv[v] * xv;
        }
        if (wanted & kInput) V::store(dx[i] + at, V::load(dx[i] + at) + attention * gv[v]);
      }
      if (wanted & kAttention) V::store(da[i] + at_da, V::load(da[i] + at_da) + dot);
    }
    if (wanted & kWeight)
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) V::store(u + v * V::kLanes, uv[v]);
  }
}

template <typename A, int wanted, int width>
void tap_branches(const TapPass<A>& t, int active, int64_t count) {
  if (active == 0 && (wanted & kWeight))
    for (int64_t p = 0; p < count; ++p)
      for (int v = 0; v < width; ++v) Vec<A>::store(t.u + p * t.tile_step + v * Vec<A>::kLanes, typename Vec<A>::Native{});
  for (int done = 0; done < active; done += 4) {
    switch (std::min(active - done, 4)) {
#define AUTOFOCUS_CASE(N)                                                         \
  case N:                                                                         \
    done > 0 ? tap_pass<A, N, wanted, width, true>(t, done, count)                \
             : tap_pass<A, N, wanted, width, false>(t, done, count);              \
    break;
      AUTOFOCUS_CASE(1)
      AUTOFOCUS_CASE(2)
      AUTOFOCUS_CASE(3)
      AUTOFOCUS_CASE(4)
#undef AUTOFOCUS_CASE
    }
  }
}

template <typename A>
using TapFunction = void (*)(const TapPass<A>&, int, int64_t);

// More would not leave registers for both g and u of a voxel.
constexpr int kMaxTapVectors = 4;

template <typename A>
TapFunction<A> tap_function(int wanted, int width) {
  static constexpr TapFunction<A> table[8][kMaxTapVectors] = {
#define AUTOFOCUS_ROW(w) {tap_branches<A, w, 1>, tap_branches<A, w, 2>, tap_branches<A, w, 3>, tap_branches<A, w, 4>}
      AUTOFOCUS_ROW(0), AUTOFOCUS_ROW(1), AUTOFOCUS_ROW(2), AUTOFOCUS_ROW(3),
      AUTOFOCUS_ROW(4), AUTOFOCUS_ROW(5), AUTOFOCUS_ROW(6), AUTOFOCUS_ROW(7),
#undef AUTOFOCUS_ROW
  };
  return table[wanted][width - 1];
}

// Calls visit(first column, columns) for the parts of a tap row's columns that hold channels: all of them at once, or
// tap by tap where whole vectors of the `width` hold none.
template <typename A, typename Visit>
void for_each_tap_columns(int64_t taps, int64_t width, int64_t channels, const Visit& visit) {
  if (gemm_columns_written<A>(channels) == width) return visit(0, taps * width);
  for (int64_t x = 0; x < taps; ++x) visit(x * width, channels);
}

// Columns that for_each_tap_columns leaves out are read all the same: they must be zeros, not what a tile left there.
template <typename A>
void clear_missing(A* columns, int64_t size, int64_t width, int64_t channels) {
  if (gemm_columns_written<A>(channels) < width) std::fill(columns, columns + size, A(0));
}

// How the work is cut: by the problem alone, never by the number of threads.
template <typename A>
struct BackwardPlan {
  explicit BackwardPlan(const Problem& g) {
    // The x axis is cut too: smaller lattices keep x and dx of a job in the cache and give more jobs.
    step = {axis_factor(g, &Index3::z, 8), axis_factor(g, &Index3::y, 8), axis_factor(g, &Index3::x, 16)};
    lattices = g.N * volume(step);
    // Channels are shared out evenly among groups of 128 bytes a voxel, or three vectors, or of 64 bytes where there are
    // few lattices to share out.
    const int64_t all = vectors<A>(g.C);
    const int64_t few = 64 / AUTOFOCUS_VECTOR_BYTES;
    const int64_t most = std::min<int64_t>(lattices < 16 ? few : all == 3 ? 3 : 2 * few, kMaxTapVectors);
    group_vectors = ceil_div(all, ceil_div(all, most));
    group_width = group_vectors * Vec<A>::kLanes;
    groups = (g.C + group_width - 1) / group_width;
    constexpr int64_t kPartials = 32;
    partials = std::clamp<int64_t>(kPartials / groups, 1, lattices);
    constexpr int64_t kTileBytes = (AUTOFOCUS_VECTOR_BYTES == 64 ? 20 : 36) * 1024;
    const int64_t row = 2 * g.kernel.x * group_width + padded<A>(g.O) + g.K * Vec<A>::kLanes;
    voxels = std::clamp<int64_t>(kTileBytes / sizeof(A) / row, 12, 64);
  }
  Index3 step;
  int64_t lattices;       // lattices of all samples
  int64_t group_vectors;  // input channels of a job, in vectors
  int64_t group_width;
  int64_t groups;
  int64_t partials;  // partial sums of dW per channel group
  int64_t voxels;    // of a tile
};

template <typename T, typename A>
class Backward {
  using V = Vec<A>;

 public:
  explicit Backward(const BackwardArguments<T>& args)
      : args_(args),
        g_(args.g),
        plan_(args.g),
        wanted_((args.grad_input.data ? kInput : 0) | (args.grad_weight.data ? kWeight : 0) |
                (args.grad_attention.data ? kAttention : 0)),
        out_width_(padded<A>(g_.O)),
        tap_columns_(g_.kernel.x * plan_.group_width),
        weight_size_(num_taps(g_) * plan_.group_width * out_width_),
        output_size_(volume(g_.output)),
        low_precision_(use_brgemm<T>()),
        low_depth_(even(g_.O)),
        weight_(needs_projection() ? plan_.groups * num_taps(g_) * g_.O * plan_.group_width : 0),
        low_weight_(low_precision_ && needs_projection()
                        ? plan_.groups * g_.kernel.z * g_.kernel.y * low_depth_ * tap_columns_
                        : 0),
        bias_(out_width_),
        grad_weight_(wanted_ & kWeight ? plan_.groups * plan_.partials * weight_size_ : 0),
        grad_attention_(wanted_ & kAttention ? plan_.groups * g_.N * g_.K * output_size_ : 0) {
    std::fill(bias_.get(), bias_ + out_width_, A(0));
    if (args.bias != nullptr) pack_row(args.bias, 0, 1, 1, g_.O, bias_.get(), out_width_);
    if (needs_projection()) pack_weight();
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_ && needs_projection())
        for (int64_t row = 0; row < plan_.groups * g_.kernel.z * g_.kernel.y; ++row)
          round_pairs(weight_ + row * g_.O * tap_columns_, tap_columns_, g_.O, tap_columns_,
                      low_weight_ + row * low_depth_ * tap_columns_);
  }

  void run() {
    // Jobs of one partial sum follow each other in one thread: lattices partial, partial + partials, ...
    args_.parallel(plan_.groups * plan_.partials, [&](int64_t begin, int64_t end) {
      Workspace workspace(*this);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t group = job % plan_.groups, partial = job / plan_.groups;
        A* grad_weight = grad_weight_ + (group * plan_.partials + partial) * weight_size_;
        if (wanted_ & kWeight) std::fill(grad_weight, grad_weight + weight_size_, A(0));
        for (int64_t lattice = partial; lattice < plan_.lattices; lattice += plan_.partials)
          run_lattice(lattice, group, grad_weight, workspace);
      }
      if (low_precision_) brgemm_done();
    });
    if (wanted_ & kWeight) reduce_weight();
    if (wanted_ & kAttention) reduce_attention();
  }

 private:
  struct Workspace {
    explicit Workspace(const Backward& b)
        : x(b.wanted_ & (kWeight | kAttention) ? b.lattice_points() * b.plan_.group_width : 0),
          dx(b.wanted_ & kInput ? b.lattice_points() * b.plan_.group_width : 0),
          attention((b.g_.K + 1) * b.plan_.voxels),
          grad_output(b.plan_.voxels * b.out_width_),
          projected(b.plan_.voxels * b.tap_columns_),
          blended(b.plan_.voxels * b.tap_columns_),
          grad_attention(b.plan_.voxels * b.g_.K * V::kLanes),
          low_grad(b.low_precision_ ? b.plan_.voxels * b.low_depth_ : 0),
          low_transposed(b.low_precision_ ? even(b.plan_.voxels) * b.g_.O : 0),
          low_blended(b.low_precision_ ? even(b.plan_.voxels) * b.tap_columns_ : 0) {}
    Scratch<A> x, dx, attention, grad_output, projected, blended, grad_attention;
    // The tile in bfloat16: G by voxel, G by channel, and the blended input in pairs of voxels.
    Scratch<uint16_t> low_grad, low_transposed, low_blended;
    std::vector<Segment> segments;
    std::vector<TapRow> rows;
  };

  bool needs_projection() const { return wanted_ & (kInput | kAttention); }

  int64_t lattice_points() const {
    const Index3& s = plan_.step;
    return (g_.input.z / s.z + 1) * (g_.input.y / s.y + 1) * (g_.input.x / s.x + 1);
  }

  // [group][tap row][O][tap x][channels of the group]
  void pack_weight() {
    A* to = weight_;
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const int64_t first = group * plan_.group_width;
      const int64_t channels = std::min(plan_.group_width, g_.C - first);
      for (int64_t z = 0; z < g_.kernel.z; ++z)
        for (int64_t y = 0; y < g_.kernel.y; ++y)
          for (int64_t o = 0; o < g_.O; ++o)
            for (int64_t x = 0; x < g_.kernel.x; ++x, to += plan_.group_width)
              pack_row(args_.weight.data + o * args_.weight.n + first * args_.weight.c + z * args_.weight.s.z +
                           y * args_.weight.s.y + x * args_.weight.s.x,
                       0, args_.weight.c, 1, channels, to, plan_.group_width);
    }
  }

  void run_lattice(int64_t index, int64_t group, A* grad_weight, Workspace& w) {
    const int64_t per_sample = volume(plan_.step);
    const int64_t n = index / per_sample;
    const Lattice lattice = lattice_at(g_, plan_.step, index % per_sample);
    const Problem& sub = lattice.problem;
    const int64_t first = group * plan_.group_width;
    const int64_t channels = std::min(plan_.group_width, g_.C - first);
    if (wanted_ & (kWeight | kAttention)) move_rows(lattice, [&](int64_t z, int64_t y, int64_t at) {
        pack_row(lattice_row(args_.input, n, first, lattice.first_input, lattice.step, z, y, 0),
                 lattice.step.x * args_.input.s.x, args_.input.c, sub.input.x, channels, w.x + at,
                 plan_.group_width);
      });
    if (wanted_ & kInput)
      std::fill(w.dx.get(), w.dx + volume(sub.input) * plan_.group_width, A(0));

    const TileGrid grid(sub.output, plan_.voxels);
    const RunTable runs(sub, grid);
    for (int64_t tile = 0; tile < grid.count(); ++tile)
      run_tile(lattice, grid, runs, tile, n, group, grad_weight, w);

    if (wanted_ & kInput) move_rows(lattice, [&](int64_t z, int64_t y, int64_t at) {
        unpack_row(w.dx + at, plan_.group_width, sub.input.x, channels,
                   lattice_row(args_.grad_input, n, first, lattice.first_input, lattice.step, z, y, 0),
                   lattice.step.x * args_.grad_input.s.x, args_.grad_input.c);
      });
  }

  template <typename Move>
  void move_rows(const Lattice& lattice, const Move& move) const {
    const Index3& size = lattice.problem.input;
    for (int64_t z = 0; z < size.z; ++z)
      for (int64_t y = 0; y < size.y; ++y) move(z, y, (z * size.y + y) * size.x * plan_.group_width);
  }

  void run_tile(const Lattice& lattice, const TileGrid& grid, const RunTable& runs, int64_t tile, int64_t n,
                int64_t group, A* grad_weight, Workspace& w) {
    const Problem& sub = lattice.problem;
    const int64_t voxels = plan_.voxels, lanes = V::kLanes;
    const int64_t count = grid.at(tile, w.segments);
    pack_attention(lattice, args_.attention, n, w.segments, w.attention.get(), voxels);
    for (const Segment& s : w.segments)
      pack_row(lattice_row(args_.grad_output, n, 0, lattice.first_output, lattice.step, s.z, s.y, s.x),
               lattice.step.x * args_.grad_output.s.x, args_.grad_output.c, s.count, g_.O,
               w.grad_output + s.offset * out_width_, out_width_);
    if (wanted_ & kAttention) {
      A* da = w.grad_attention;
      std::fill(da, da + count * g_.K * lanes, A(0));
    }
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_) {
        round_rows(w.grad_output, out_width_, count, g_.O, w.low_grad, low_depth_);
        round_transposed(w.grad_output, out_width_, count, g_.O, w.low_transposed, even(plan_.voxels));
      }
    const Index3 voxel_strides{sub.input.y * sub.input.x * plan_.group_width, sub.input.x * plan_.group_width,
                               plan_.group_width};
    const int64_t channels = std::min(plan_.group_width, g_.C - group * plan_.group_width);
    const TapFunction<A> pass = tap_function<A>(wanted_, int(plan_.group_vectors));
    TapPass<A> t;
    t.tile_step = tap_columns_;
    t.x_step = sub.stride.x * plan_.group_width;
    t.a_branch = voxels;
    t.da_step = g_.K * lanes;
    const int64_t tap_rows = g_.kernel.z * g_.kernel.y;
    for (int64_t tap_row = 0; tap_row < tap_rows; ++tap_row) {
      const Index3 offset = tap_offset(sub, tap_row * g_.kernel.x);
      if (!find_tap_rows(sub, w.segments, offset, voxel_strides, w.rows)) continue;
      if (needs_projection()) project(group * tap_rows + tap_row, channels, count, w);
      for (size_t i = 0; i < w.segments.size(); ++i)
        for (int64_t x = 0; x < g_.kernel.x; ++x)
          for (const Run& run : runs.at(w.segments[i].part, x)) {
            const int64_t at = w.segments[i].offset + run.begin;
            t.g = w.projected + at * tap_columns_ + x * plan_.group_width;
            t.u = w.blended + at * tap_columns_ + x * plan_.group_width;
            t.x = w.x + run.begin * t.x_step;
            t.dx = w.dx + run.begin * t.x_step;
            t.a = w.attention + at;
            t.da = w.grad_attention + at * t.da_step;
            const int active = for_each_branch(run.branches & w.rows[i].inside, [&](int slot, int k) {
              t.offset[slot] = w.rows[i].at[k] + sub.dilation[k].x * (x - g_.kernel.x / 2) * plan_.group_width;
              t.branch[slot] = k;
            });
            pass(t, active, run.count);
          }
      if (wanted_ & kWeight) add_weight(grad_weight + tap_row * tap_columns_ * out_width_, channels, count, w);
    }
    if (wanted_ & kAttention) store_attention(lattice, n, group, w);
  }

  // g_t(p) = W_t^T G(p) for the taps of one row: projected[p][tap x][channel].
  void project(int64_t weight_row, int64_t channels, int64_t count, Workspace& w) const {
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_)
        return brgemm(w.low_grad, low_depth_, low_weight_ + weight_row * low_depth_ * tap_columns_, w.projected,
                      tap_columns_, count, tap_columns_, low_depth_, false);
    clear_missing(w.projected.get(), count * tap_columns_, plan_.group_width, channels);
    for_each_tap_columns<A>(g_.kernel.x, plan_.group_width, channels, [&](int64_t first, int64_t columns) {
      gemm<A>({w.grad_output, out_width_, 1, weight_ + weight_row * g_.O * tap_columns_ + first, tap_columns_,
               w.projected + first, tap_columns_, g_.O},
              count, columns, false);
    });
  }

  // dW_t += sum_p u_t(p) G(p)^T: [tap x][channel][O padded], or in low precision [O][tap x][channel].
  void add_weight(A* to, int64_t channels, int64_t count, Workspace& w) const {
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_) {
        round_pairs(w.blended, tap_columns_, count, tap_columns_, w.low_blended);
        return brgemm(w.low_transposed, even(plan_.voxels), w.low_blended, to, tap_columns_, g_.O, tap_columns_,
                      even(count), true);
      }
    for_each_tap_columns<A>(g_.kernel.x, plan_.group_width, channels, [&](int64_t first, int64_t rows) {
      gemm<A>({w.blended + first, 1, tap_columns_, w.grad_output, out_width_, to + first * out_width_, out_width_, count},
              rows, g_.O, true);
    });
  }

  void store_attention(const Lattice& lattice, int64_t n, int64_t group, Workspace& w) {
    for (const Segment& s : w.segments)
      for (int64_t p = 0; p < s.count; ++p) {
        const A* G = w.grad_output + (s.offset + p) * out_width_;
        A of_bias = 0;
        if (group == 0 && args_.bias != nullptr)
          for (int64_t o = 0; o < g_.O; ++o) of_bias += bias_[o] * G[o];
        const Index3 at{lattice.first_output.z + lattice.step.z * s.z, lattice.first_output.y + lattice.step.y * s.y,
                        lattice.first_output.x + lattice.step.x * (s.x + p)};
        A* to = grad_attention_ + (group * g_.N + n) * g_.K * output_size_ + ravel(at, g_.output);
        for (int64_t k = 0; k < g_.K; ++k)
          to[k * output_size_] =
              V::sum(V::load(w.grad_attention + ((s.offset + p) * g_.K + k) * V::kLanes)) + of_bias;
      }
  }

  void reduce_weight() {
    const View<T>& to = args_.grad_weight;
    args_.parallel(num_taps(g_), [&](int64_t begin, int64_t end) {
      for (int64_t tap = begin; tap < end; ++tap) {
        const Index3 j = unravel(tap, g_.kernel);
        T* at_tap = to.data + j.z * to.s.z + j.y * to.s.y + j.x * to.s.x;
        for (int64_t c = 0; c < g_.C; ++c) {
          const int64_t group = c / plan_.group_width, lane = c % plan_.group_width;
          for (int64_t o = 0; o < g_.O; ++o) {
            const int64_t row = tap / g_.kernel.x * tap_columns_, column = j.x * plan_.group_width + lane;
            const int64_t at =
                low_precision_ ? row * out_width_ + o * tap_columns_ + column : (row + column) * out_width_ + o;
            A total = 0;
            for (int64_t partial = 0; partial < plan_.partials; ++partial)
              total += grad_weight_[(group * plan_.partials + partial) * weight_size_ + at];
            from_accumulator(total, at_tap[o * to.n + c * to.c]);
          }
        }
      }
    });
  }

  void reduce_attention() {
    const View<T>& to = args_.grad_attention;
    const Index3& size = g_.output;
    const int64_t planes = g_.N * g_.K, rows = size.z * size.y;
    args_.parallel(planes * rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t plane = row / rows, z = row % rows / size.y, y = row % size.y;
        T* at = to.data + plane / g_.K * to.n + plane % g_.K * to.c + z * to.s.z + y * to.s.y;
        for (int64_t x = 0; x < size.x; ++x) {
          A total = 0;
          for (int64_t group = 0; group < plan_.groups; ++group)
            total += grad_attention_[(group * planes + plane) * output_size_ + (z * size.y + y) * size.x + x];
          from_accumulator(total, at[x * to.s.x]);
        }
      }
    });
  }

  const BackwardArguments<T>& args_;
  const Problem& g_;
  const BackwardPlan<A> plan_;
  const int wanted_;
  const int64_t out_width_, tap_columns_, weight_size_, output_size_;
  const bool low_precision_;
  const int64_t low_depth_;
  Scratch<A> weight_;
  Scratch<uint16_t> low_weight_;
  Scratch<A> bias_, grad_weight_, grad_attention_;
};

template <typename T, typename A>
void backward(const BackwardArguments<T>& args) {
  Backward<T, A>(args).run();
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
