// Plain-mode backward: project once, then dot, blend and scatter in one pass over the taps (docs/math.md, section 3).
//
//   g_t(p)    = W_t^T G(p)                          one GEMM serves both gradients below
//   da_k(p)  += <g_t(p), x(q_k(p))>                 dot
//   u_t(p)   += a_k(p) x(q_k(p))                    blend, from the same loads of x
//   dx(q_k(p)) += a_k(p) g_t(p)                     scatter
//   dW_t      = sum_p u_t(p) G(p)^T                 the second GEMM
//
// A job owns one lattice and one group of input channels: no other job touches its part of dx, so the scatter needs no
// atomics. Where there are few lattices a job has a slab of one, and the dx of slabs are added where they overlap. dW
// and da are partial sums, added at the end.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "bfloat16_tiles.h"
#include "gemm.h"
#include "operands.h"
#include "partial_sums.h"
#include "slabs.h"
#include "tap_pass.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// How the work is cut: by the problem alone, never by the number of threads.
template <typename A>
struct PlainBackwardPlan {
  PlainBackwardPlan(const Problem& g, bool low_precision)
      // The x axis is cut too: smaller lattices keep x and dx of a job in the cache and give more jobs.
      : lattices(g, {lattice_step(g, &Index3::z, 8), lattice_step(g, &Index3::y, 8), lattice_step(g, &Index3::x, 16)}),
        group_vectors(vectors_of_group(g, lattices.count())),
        group_width(group_vectors * Vec<A>::kLanes),
        groups(ceil_div(g.C, group_width)),
        // A slab is at least as thick as what it reads beyond its outputs, so that dx is held twice at most.
        slabs(lattices, wanted_slabs(g), [](const Reach& reach) { return 2 * reach.most; }),
        slab_points(slabs.per_lattice() > 1 ? 0 : lattices.input_points()) {
    if (slabs.per_lattice() > 1)
      for (int64_t index = 0; index < slabs.count(); ++index)
        slab_points = std::max(slab_points, volume(slabs.at(index).problem.input));
    constexpr int64_t kPartials = 32;
    partials = std::clamp<int64_t>(kPartials / groups, 1, slabs.count());
    const int64_t tile_bytes = (AUTOFOCUS_VECTOR_BYTES == 64 && !low_precision ? 20 : 36) * 1024;
    const int64_t row = 2 * g.kernel.x * group_width + padded<A>(g.O) + g.K * Vec<A>::kLanes;
    // On AMX tiles are large: loading and storing a row's dW, once a tile, takes longer than a small tile's products.
    voxels = low_precision && has_amx() ? 128 : std::clamp<int64_t>(tile_bytes / sizeof(A) / row, 12, 64);
  }
  Lattices lattices;
  int64_t group_vectors;  // input channels of a job, in vectors
  int64_t group_width;
  int64_t groups;
  Slabs slabs;
  int64_t slab_points;  // input points of the largest
  int64_t partials;     // partial sums of dW per channel group
  int64_t voxels;       // of a tile

 private:
  // Channels are shared out evenly among groups of 128 bytes a voxel, or three vectors. They are of 64 bytes where wide
  // ones would be too few jobs, or their dW of a row of taps, which every tile loads and stores, too much for L1.
  static int64_t vectors_of_group(const Problem& g, int64_t lattices) {
    const int64_t all = vectors<A>(g.C), narrow = 64 / AUTOFOCUS_VECTOR_BYTES;
    const int64_t wide = std::min<int64_t>(all == 3 ? 3 : 2 * narrow, kMaxTapVectors);
    const int64_t weight_bytes = g.kernel.x * wide * AUTOFOCUS_VECTOR_BYTES * padded<A>(g.O);
    const bool takes_wide = lattices * ceil_div(all, wide) >= kJobs && weight_bytes <= 28 * 1024;
    return ceil_div(all, ceil_div(all, takes_wide ? wide : narrow));
  }
  int64_t wanted_slabs(const Problem& g) const {
    const int64_t jobs = lattices.count() * groups;
    return 2 * jobs < kJobs && g.K * lattices.output_points() * group_width >= kWorthSharing ? kJobs / jobs : 1;
  }
};

template <typename T, typename A>
class PlainBackward {
  using V = Vec<A>;

 public:
  explicit PlainBackward(const BackwardArguments<T>& args)
      : args_(args),
        g_(args.g),
        low_precision_(use_bfloat16<T>()),
        plan_(args.g, low_precision_),
        wanted_((args.grad_input.data ? kInput : 0) | (args.grad_weight.data ? kWeight : 0) |
                (args.grad_attention.data ? kAttention : 0)),
        reads_input_(wanted_ & (kWeight | kAttention)),
        projects_(wanted_ & (kInput | kAttention)),
        tap_rows_(g_.kernel.z * g_.kernel.y),
        out_width_(padded<A>(g_.O)),
        tap_columns_(g_.kernel.x * plan_.group_width),
        weight_size_(num_taps(g_) * plan_.group_width * out_width_),
        attention_size_(g_.N * g_.K * volume(g_.output)),
        slab_size_(plan_.slab_points * plan_.group_width),
        low_depth_(bfloat16_depth(g_.O)),
        weight_(projects_ ? pack_tap_columns<A>(g_, args.weight, true, plan_.group_width) : Scratch<A>(0)),
        low_weight_(
            round_matrices<T, A>(weight_, plan_.groups * tap_rows_, g_.O, tap_columns_, low_precision_ && projects_)),
        bias_(pack_bias<A>(args.bias, g_.O)),
        slab_grads_(wanted_ & kInput && plan_.slabs.per_lattice() > 1 ? plan_.slabs.count() * plan_.groups * slab_size_
                                                                      : 0),
        grad_weight_(wanted_ & kWeight ? plan_.groups * plan_.partials * weight_size_ : 0),
        grad_attention_(wanted_ & kAttention ? plan_.groups * attention_size_ : 0) {}

  void run() const {
    // Jobs of one partial sum follow each other in one thread: slabs partial, partial + partials, ...
    args_.parallel(plan_.groups * plan_.partials, [&](int64_t begin, int64_t end) {
      Workspace workspace(*this);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t group = job % plan_.groups, partial = job / plan_.groups;
        A* grad_weight = grad_weight_ + (group * plan_.partials + partial) * weight_size_;
        if (wanted_ & kWeight) std::fill(grad_weight, grad_weight + weight_size_, A(0));
        workspace.tiles_summed = 0;
        for (int64_t index = partial; index < plan_.slabs.count(); index += plan_.partials) {
          const Lattice slab = plan_.slabs.at(index);
          A* slab_grad =
              plan_.slabs.per_lattice() > 1 ? slab_grads_ + (index * plan_.groups + group) * slab_size_ : nullptr;
          run_job(Job(slab, plan_, group), slab_grad, grad_weight, workspace);
        }
        if (workspace.tiles_summed > kTilesOfASum) add_tile_sum(grad_weight, workspace);
      }
    });
    if (wanted_ & kInput && plan_.slabs.per_lattice() > 1) add_slab_grads();
    if (wanted_ & kWeight) reduce_grad_weight();
    if (wanted_ & kAttention)
      reduce_attention(g_, args_.parallel, plan_.groups, grad_attention_.get(), args_.grad_attention);
  }

 private:
  // Tiles that one sum of dW is taken over. A lattice of one axis is not cut into slabs and may have 10^5 of them,
  // which float32 cannot add one by one.
  static constexpr int64_t kTilesOfASum = 256;

  // One lattice, or a slab of one, and one group of input channels.
  struct Job {
    Job(const Lattice& lattice, const PlainBackwardPlan<A>& plan, int64_t group)
        : lattice(lattice),
          group(group),
          first(group * plan.group_width),
          channels(std::min(plan.group_width, lattice.problem.C - first)),
          grid(lattice.problem.output, plan.voxels),
          runs(lattice.problem, grid) {}
    const Lattice& lattice;
    const int64_t group, first, channels;
    const TileGrid grid;
    const RunTable runs;
  };

  struct Workspace {
    explicit Workspace(const PlainBackward& b)
        : x(b.reads_input_ ? b.slab_size_ : 0),
          own_dx(b.wanted_ & kInput && b.plan_.slabs.per_lattice() == 1 ? b.slab_size_ : 0),
          attention((b.g_.K + 1) * b.plan_.voxels),
          grad_output(b.plan_.voxels * b.out_width_),
          projected(bfloat16_rows(b.plan_.voxels) * b.tap_columns_),
          blended(b.plan_.voxels * b.tap_columns_),
          tile_sum(b.wanted_ & kWeight ? b.weight_size_ : 0),
          grad_attention(b.plan_.voxels * b.g_.K * V::kLanes),
          low_grad(b.low_precision_ ? bfloat16_rows(b.plan_.voxels) * b.low_depth_ : 0),
          low_transposed(b.low_precision_ ? bfloat16_rows(b.g_.O) * bfloat16_depth(b.plan_.voxels) : 0),
          low_blended(b.low_precision_ ? bfloat16_depth(b.plan_.voxels) * b.tap_columns_ : 0),
          tiles(b.low_precision_) {}
    Scratch<A> x, own_dx, attention, grad_output, projected, blended;
    Scratch<A> tile_sum;  // dW of the tiles after the first kTilesOfASum, until it is added to theirs
    Scratch<A> grad_attention;
    // The tile in bfloat16: G by voxel, G by channel, and the blended input in pairs of voxels.
    Scratch<uint16_t> low_grad, low_transposed, low_blended;
    AmxTiles tiles;
    A* dx;
    int64_t tiles_summed;  // into the present partial sum of dW
    std::vector<Segment> segments;
    std::vector<TapRow> rows;
  };

  // dx goes to `slab_grad`, or where there is none to the tensor.
  void run_job(const Job& job, A* slab_grad, A* grad_weight, Workspace& w) const {
    const Lattice& lattice = job.lattice;
    const Index3& size = lattice.problem.input;
    const int64_t row_size = size.x * plan_.group_width;
    if (reads_input_)
      for (int64_t row = 0; row < size.z * size.y; ++row)
        pack_row(lattice.input_row(args_.input, job.first, {row / size.y, row % size.y, 0}), size.x, job.channels,
                 w.x + row * row_size, plan_.group_width);
    w.dx = slab_grad ? slab_grad : w.own_dx.get();
    if (wanted_ & kInput) std::fill(w.dx, w.dx + size.z * size.y * row_size, A(0));
    for (int64_t tile = 0; tile < job.grid.count(); ++tile) run_tile(job, tile, grad_weight, w);
    if (wanted_ & kInput && !slab_grad)
      for (int64_t row = 0; row < size.z * size.y; ++row)
        unpack_row(w.dx + row * row_size, plan_.group_width, size.x, job.channels,
                   lattice.input_row(args_.grad_input, job.first, {row / size.y, row % size.y, 0}));
  }

  void run_tile(const Job& job, int64_t tile, A* grad_weight, Workspace& w) const {
    const Problem& sub = job.lattice.problem;
    const int64_t count = job.grid.at(tile, w.segments);
    load(job.lattice, count, w);
    if (wanted_ & kWeight) grad_weight = sum_of_tile(grad_weight, w);
    const Index3 voxel_strides{sub.input.y * sub.input.x * plan_.group_width, sub.input.x * plan_.group_width,
                               plan_.group_width};
    for (int64_t row = 0; row < tap_rows_; ++row) {
      if (!find_tap_rows(sub, w.segments, tap_offset(sub, row * g_.kernel.x), voxel_strides, w.rows)) continue;
      if (projects_) project(job, row, count, w);
      pass_row(job, w);
      if (wanted_ & kWeight) add_weight(job, count, grad_weight + row * tap_columns_ * out_width_, w);
    }
    if (wanted_ & kAttention) store_attention(job, w);
  }

  // Where the next tile's dW is added.
  A* sum_of_tile(A* grad_weight, Workspace& w) const {
    const int64_t tile = w.tiles_summed++;
    if (tile < kTilesOfASum) return grad_weight;
    if (tile % kTilesOfASum == 0) {
      if (tile > kTilesOfASum) add_tile_sum(grad_weight, w);
      std::fill(w.tile_sum.get(), w.tile_sum + weight_size_, A(0));
    }
    return w.tile_sum;
  }

  void add_tile_sum(A* grad_weight, const Workspace& w) const {
    for (int64_t i = 0; i < weight_size_; ++i) grad_weight[i] += w.tile_sum[i];
  }

  // Attention and G of the tile's voxels, and nothing yet in the gradient of attention.
  void load(const Lattice& lattice, int64_t count, Workspace& w) const {
    pack_attention(lattice, args_.attention, w.segments, w.attention.get(), plan_.voxels);
    for (const Segment& s : w.segments)
      pack_row(lattice.output_row(args_.grad_output, 0, s.first()), s.count, g_.O,
               w.grad_output + s.offset * out_width_, out_width_);
    if (wanted_ & kAttention) std::fill(w.grad_attention.get(), w.grad_attention + count * g_.K * V::kLanes, A(0));
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_) {
        round_rows(w.grad_output, out_width_, count, g_.O, w.low_grad, low_depth_);
        round_transposed(w.grad_output, out_width_, count, g_.O, w.low_transposed, bfloat16_depth(plan_.voxels));
      }
  }

  // g_t(p) for the taps of one row: projected[p][tap x][channel].
  void project(const Job& job, int64_t tap_row, int64_t count, Workspace& w) const {
    const int64_t row = job.group * tap_rows_ + tap_row;
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_)
        return bfloat16_gemm(w.low_grad, low_depth_, low_weight_ + row * low_depth_ * tap_columns_, w.projected,
                             tap_columns_, count, tap_columns_, g_.O, false);
    clear_missing(w.projected.get(), count * tap_columns_, plan_.group_width, job.channels);
    for_each_tap_columns<A>(g_.kernel.x, plan_.group_width, job.channels, [&](int64_t first, int64_t columns) {
      gemm<A>({w.grad_output, out_width_, 1, weight_ + row * g_.O * tap_columns_ + first, tap_columns_,
               w.projected + first, tap_columns_, g_.O},
              count, columns, false);
    });
  }

  // Dot, blend and scatter for the taps of one row.
  void pass_row(const Job& job, Workspace& w) const {
    const Problem& sub = job.lattice.problem;
    const int64_t width = plan_.group_width;
    const TapFunction<A> pass = tap_function<A>(wanted_, int(plan_.group_vectors));
    TapPass<A> t;
    t.tile_step = tap_columns_;
    t.input_step = sub.stride.x * width;
    t.attention_branch = plan_.voxels;
    t.grad_attention_step = g_.K * V::kLanes;
    for (size_t i = 0; i < w.segments.size(); ++i)
      for (int64_t x = 0; x < g_.kernel.x; ++x)
        for (const Run& run : job.runs.at(w.segments[i].part, x)) {
          const int64_t at = w.segments[i].offset + run.begin;
          t.projected = w.projected + at * tap_columns_ + x * width;
          t.blended = w.blended + at * tap_columns_ + x * width;
          t.input = w.x + run.begin * t.input_step;
          t.grad_input = w.dx + run.begin * t.input_step;
          t.attention = w.attention + at;
          t.grad_attention = w.grad_attention + at * t.grad_attention_step;
          const int active = for_each_branch(run.branches & w.rows[i].inside, [&](int slot, int k) {
            t.offset[slot] = w.rows[i].at[k] + sub.dilation[k].x * (x - g_.kernel.x / 2) * width;
            t.branch[slot] = k;
          });
          pass(t, active, run.count);
        }
  }

  // dW_t += sum_p u_t(p) G(p)^T: [tap x][channel][O padded], or in low precision [O][tap x][channel].
  void add_weight(const Job& job, int64_t count, A* to, Workspace& w) const {
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_) {
        round_pairs(w.blended, tap_columns_, count, tap_columns_, w.low_blended);
        return bfloat16_gemm(w.low_transposed, bfloat16_depth(plan_.voxels), w.low_blended, to, tap_columns_, g_.O,
                             tap_columns_, count, true);
      }
    for_each_tap_columns<A>(g_.kernel.x, plan_.group_width, job.channels, [&](int64_t first, int64_t rows) {
      gemm<A>(
          {w.blended + first, 1, tap_columns_, w.grad_output, out_width_, to + first * out_width_, out_width_, count},
          rows, g_.O, true);
    });
  }

  // The group's partial sums of da_k(p); <bias, G(p)> goes with the first.
  void store_attention(const Job& job, Workspace& w) const {
    const int64_t size = volume(g_.output);
    A* sums = grad_attention_ + job.group * attention_size_ + job.lattice.sample * g_.K * size;
    for (const Segment& s : w.segments)
      for (int64_t p = 0; p < s.count; ++p) {
        const A* grad_output = w.grad_output + (s.offset + p) * out_width_;
        A of_bias = 0;
        if (job.group == 0 && args_.bias != nullptr)
          for (int64_t o = 0; o < g_.O; ++o) of_bias += bias_[o] * grad_output[o];
        A* to = sums + ravel(job.lattice.output_at({s.z, s.y, s.x + p}), g_.output);
        for (int64_t k = 0; k < g_.K; ++k)
          to[k * size] = V::sum(V::load(w.grad_attention + ((s.offset + p) * g_.K + k) * V::kLanes)) + of_bias;
      }
  }

  void add_slab_grads() const {
    for (int64_t index = 0; index < plan_.lattices.count(); ++index) {
      const Lattice lattice = plan_.lattices.at(index);
      const Index3& size = lattice.problem.input;
      const int64_t row_size = size.x * plan_.group_width;
      std::vector<Lattice> slabs;
      for (int64_t i = 0; i < plan_.slabs.per_lattice(); ++i) slabs.push_back(plan_.slabs.of(lattice, i));
      args_.parallel(size.z * size.y * plan_.groups, [&](int64_t begin, int64_t end) {
        const Scratch<A> sum(row_size);
        for (int64_t job = begin; job < end; ++job) {
          const int64_t group = job % plan_.groups, row = job / plan_.groups;
          const Index3 first{row / size.y, row % size.y, 0};
          std::fill(sum.get(), sum + row_size, A(0));
          for (int64_t i = 0; i < plan_.slabs.per_lattice(); ++i) {
            const Index3 at = lattice.input_point(slabs[i].first_input), in_slab{first.z - at.z, first.y - at.y, 0};
            if (!inside(in_slab, slabs[i].problem.input)) continue;
            const A* grad = slab_grads_ +
                            ((index * plan_.slabs.per_lattice() + i) * plan_.groups + group) * slab_size_ +
                            ravel(in_slab, slabs[i].problem.input) * plan_.group_width;
            for (int64_t e = 0; e < row_size; ++e) sum[e] += grad[e];
          }
          const int64_t channel = group * plan_.group_width;
          unpack_row(sum.get(), plan_.group_width, size.x, std::min(plan_.group_width, g_.C - channel),
                     lattice.input_row(args_.grad_input, channel, first));
        }
      });
    }
  }

  void reduce_grad_weight() const {
    const auto first = [&](int64_t tap, int64_t o, int64_t c) {
      const int64_t group = c / plan_.group_width, row = tap / g_.kernel.x;
      const int64_t column = tap % g_.kernel.x * plan_.group_width + c % plan_.group_width;
      const int64_t at = low_precision_ ? row * tap_columns_ * out_width_ + o * tap_columns_ + column
                                        : (row * tap_columns_ + column) * out_width_ + o;
      return grad_weight_ + group * plan_.partials * weight_size_ + at;
    };
    reduce_weight<A>(g_, args_.parallel, plan_.partials, weight_size_, args_.grad_weight, first);
  }

  const BackwardArguments<T>& args_;
  const Problem& g_;
  const bool low_precision_;  // products in bfloat16
  const PlainBackwardPlan<A> plan_;
  const int wanted_;
  const bool reads_input_, projects_;
  const int64_t tap_rows_, out_width_;
  const int64_t tap_columns_;                   // of a tile's voxel: [tap x][channel of the group]
  const int64_t weight_size_, attention_size_;  // of a partial sum
  const int64_t slab_size_;                     // of the input of a job
  const int64_t low_depth_;
  const Scratch<A> weight_;
  const Scratch<uint16_t> low_weight_;
  const Scratch<A> bias_;
  const Scratch<A> slab_grads_;  // [slab][group][slab_size_], where there are several slabs
  const Scratch<A> grad_weight_, grad_attention_;
};

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
