// Plain-mode forward: blend, then project (docs/math.md, section 2).
//
// Per lattice: pack the input to [voxel][channel], then per tile of output voxels and row of taps blend the K branches
// into a tile that stays in the L1 cache and multiply it by the weight of those taps. No branch ever exists.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "bfloat16_tiles.h"
#include "blend.h"
#include "gemm.h"
#include "operands.h"
#include "slabs.h"
#include "source.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Channels are reduced in chunks, so that a blended tile of all taps of a row fits the L1 cache for any C.
struct Chunks {
  explicit Chunks(int64_t channels) : channels(channels), count(ceil_div(channels, 64)) {}
  int64_t begin(int64_t chunk) const { return channels * chunk / count; }
  int64_t size(int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }
  int64_t largest() const { return size(count - 1); }
  int64_t channels, count;
};

template <typename T, typename A>
class PlainForward {
  using V = Vec<A>;

 public:
  explicit PlainForward(const ForwardArguments<T>& args)
      : args_(args),
        g_(args.g),
        chunks_(g_.C),
        tap_rows_(g_.kernel.z * g_.kernel.y),
        out_width_(padded<A>(g_.O)),
        blended_width_((g_.kernel.x - 1) * chunks_.largest() + padded<A>(chunks_.largest())),
        voxels_(std::clamp<int64_t>(kTileBytes / sizeof(A) / (blended_width_ + out_width_), 12, 64)),
        low_precision_(use_bfloat16<T>()),
        low_depth_(bfloat16_depth(g_.kernel.x * chunks_.largest())),
        weight_(num_taps(g_) * g_.C * out_width_),
        low_weight_(low_precision_ ? tap_rows_ * chunks_.count * low_depth_ * out_width_ : 0),
        bias_(pack_bias<A>(args.bias, g_.O)) {
    pack_weight();
  }

  void run() const {
    // The x axis stays whole: its rows are long, and read in place they are read in order.
    const Lattices lattices(g_, {lattice_step(g_, &Index3::z, 8), lattice_step(g_, &Index3::y, 8), 1});
    const int64_t last_chunk_end = chunks_.begin(chunks_.count - 1) + padded<A>(chunks_.largest());
    // All threads at one lattice after another, or a lattice for each where they are many and too small to share, as
    // in a batch of tiny volumes.
    const int64_t points = std::max(lattices.input_points(), lattices.output_points());
    const bool together = lattices.count() < kJobs || g_.K * points * out_width_ >= kWorthSharing;
    const ParallelFor over = together ? serial : args_.parallel, within = together ? args_.parallel : serial;
    over(lattices.count(), [&](int64_t begin, int64_t end) {
      const SourceMaker<T, A> make_source(args_, within, lattices, last_chunk_end - g_.C);
      for (int64_t index = begin; index < end; ++index) {
        const Lattice lattice = lattices.at(index);
        run_lattice(lattice, make_source(lattice), within);
      }
    });
  }

 private:
  static constexpr int64_t kTileBytes = 48 * 1024;

  // One lattice and how its outputs are cut.
  struct Cut {
    Cut(const Lattice& lattice, const Source<A>& source, int64_t voxels)
        : lattice(lattice), source(source), grid(lattice.problem.output, voxels), runs(lattice.problem, grid) {}
    const Lattice& lattice;
    const Source<A>& source;
    const TileGrid grid;
    const RunTable runs;
  };

  struct Workspace {
    explicit Workspace(const PlainForward& f)
        : attention((f.g_.K + 1) * f.voxels_),
          blended(f.voxels_ * f.blended_width_),
          out(bfloat16_rows(f.voxels_) * f.out_width_),
          low_blended(f.low_precision_ ? bfloat16_rows(f.voxels_) * f.low_depth_ : 0),
          tiles(f.low_precision_) {}
    // blended: [voxel][tap x][channel of the chunk], and room for the last vector's spill.
    Scratch<A> attention, blended, out;
    Scratch<uint16_t> low_blended;
    AmxTiles tiles;
    std::vector<Segment> segments;
    std::vector<TapRow> rows;
  };

  // [tap row][chunk][tap x][channel of the chunk][O padded], and in bfloat16 [tap row][chunk] blocks of pairs along the
  // reduction: every chunk on its own, since its depth may be odd.
  void pack_weight() const {
    A* to = weight_;
    for (int64_t row = 0; row < tap_rows_; ++row)
      for (int64_t chunk = 0; chunk < chunks_.count; ++chunk)
        for (int64_t x = 0; x < g_.kernel.x; ++x)
          for (int64_t c = chunks_.begin(chunk); c < chunks_.begin(chunk + 1); ++c, to += out_width_)
            pack_row(Row<const T>{weight_at(g_, args_.weight, 0, c, row, x), 0, args_.weight.n}, 1, g_.O, to,
                     out_width_);
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_)
        for (int64_t row = 0; row < tap_rows_; ++row)
          for (int64_t chunk = 0; chunk < chunks_.count; ++chunk)
            round_pairs(weight(row, chunk), out_width_, g_.kernel.x * chunks_.size(chunk), out_width_,
                        low_weight(row, chunk));
  }

  A* weight(int64_t tap_row, int64_t chunk) const {
    return weight_ + (tap_row * g_.C + chunks_.begin(chunk)) * g_.kernel.x * out_width_;
  }
  uint16_t* low_weight(int64_t tap_row, int64_t chunk) const {
    return low_weight_ + (tap_row * chunks_.count + chunk) * low_depth_ * out_width_;
  }

  void run_lattice(const Lattice& lattice, const Source<A>& source, ParallelFor parallel) const {
    const Cut cut(lattice, source, voxels_);
    parallel(cut.grid.count(), [&](int64_t begin, int64_t end) {
      Workspace w(*this);
      for (int64_t tile = begin; tile < end; ++tile) run_tile(cut, tile, w);
    });
  }

  void run_tile(const Cut& cut, int64_t tile, Workspace& w) const {
    const Problem& sub = cut.lattice.problem;
    const int64_t count = cut.grid.at(tile, w.segments);
    pack_attention(cut.lattice, args_.attention, w.segments, w.attention.get(), voxels_);
    bool empty = true;
    for (int64_t row = 0; row < tap_rows_; ++row) {
      const Index3 offset = tap_offset(sub, row * g_.kernel.x);
      if (!find_tap_rows(sub, w.segments, offset, cut.source.strides, w.rows)) continue;
      for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
        blend_row(cut, offset, chunk, w);
        project(row, chunk, count, !empty, w);
        empty = false;
      }
    }
    if (empty) std::fill(w.out.get(), w.out + count * out_width_, A(0));
    store(cut.lattice, w);
  }

  // u_t(p) of the tile for the taps of one row, from `first_tap` on, and one chunk.
  void blend_row(const Cut& cut, const Index3& first_tap, int64_t chunk, Workspace& w) const {
    const Problem& sub = cut.lattice.problem;
    const Source<A>& source = cut.source;
    const int64_t channels = chunks_.size(chunk), first_channel = chunks_.begin(chunk);
    for (int64_t x = 0; x < g_.kernel.x; ++x) {
      const Index3 tap{first_tap.z, first_tap.y, first_tap.x + x};
      const bool centre = tap.z == 0 && tap.y == 0 && tap.x == 0;
      for (size_t i = 0; i < w.segments.size(); ++i) {
        const Segment& s = w.segments[i];
        for (const Run& run : cut.runs.at(s.part, x)) {
          const int64_t at = s.offset + run.begin;
          const A *attention[kMaxBranches], *voxels[kMaxBranches];
          int active = for_each_branch(run.branches & w.rows[i].inside, [&](int slot, int k) {
            const int64_t along_x = sub.dilation[k].x * tap.x + run.begin * sub.stride.x;
            attention[slot] = w.attention + k * voxels_ + at;
            voxels[slot] = source.voxel(input_position(sub, s.first(), k, tap), w.rows[i].at[k]) +
                           along_x * source.strides.x + first_channel;
          });
          if (centre && active > 0) {  // all branches read the same voxel
            attention[0] = w.attention + g_.K * voxels_ + at;
            active = 1;
          }
          blend(active, attention, voxels, sub.stride.x * source.strides.x,
                w.blended + at * blended_width_ + x * channels, blended_width_, run.count, vectors<A>(channels));
        }
      }
    }
  }

  // out(p) (+)= sum_t W_t u_t(p) over the taps of one row and the channels of one chunk.
  void project(int64_t tap_row, int64_t chunk, int64_t count, bool accumulate, Workspace& w) const {
    const int64_t depth = g_.kernel.x * chunks_.size(chunk);
    if constexpr (std::is_same_v<T, BFloat16>)
      if (low_precision_) {
        round_rows(w.blended, blended_width_, count, depth, w.low_blended, low_depth_);
        return bfloat16_gemm(w.low_blended, low_depth_, low_weight(tap_row, chunk), w.out, out_width_, count,
                             out_width_, depth, accumulate);
      }
    gemm<A>({w.blended, blended_width_, 1, weight(tap_row, chunk), out_width_, w.out, out_width_, depth}, count, g_.O,
            accumulate);
  }

  // Adds bias sum_k a_k(p) and writes the tile.
  void store(const Lattice& lattice, Workspace& w) const {
    for (const Segment& s : w.segments) {
      const A* attention = w.attention + g_.K * voxels_ + s.offset;
      A* out = w.out + s.offset * out_width_;
      if (args_.bias != nullptr)
        for (int64_t p = 0; p < s.count; ++p)
          for (int64_t v = p * out_width_, o = 0; o < out_width_; v += V::kLanes, o += V::kLanes)
            V::store(out + v, V::load(out + v) + V::broadcast(attention[p]) * V::load(bias_ + o));
      unpack_row(out, out_width_, s.count, g_.O, lattice.output_row(args_.output, 0, s.first()));
    }
  }

  const ForwardArguments<T>& args_;
  const Problem& g_;
  const Chunks chunks_;
  const int64_t tap_rows_, out_width_;
  const int64_t blended_width_;  // of a voxel
  const int64_t voxels_;         // of a tile
  const bool low_precision_;     // projects in bfloat16
  const int64_t low_depth_;
  const Scratch<A> weight_;
  const Scratch<uint16_t> low_weight_;
  const Scratch<A> bias_;
};

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
