// Plain-mode forward: blend, then project (docs/math.md, section 2).
//
// Per lattice: pack the input to [voxel][channel], then per tile of output voxels and row of taps blend the K branches
// into a tile that stays in the L1 cache and multiply it by the weight of those taps. No branch ever exists.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "bfloat16_blend.h"
#include "bfloat16_tiles.h"
#include "blend.h"
#include "gemm.h"
#include "operands.h"
#include "slabs.h"
#include "source.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Channels are reduced in chunks, so that a blended tile of all taps of a row fits the L1 cache for any C. Each begins
// at a multiple of `granule`.
struct Chunks {
  Chunks(int64_t channels, int64_t granule)
      : channels(channels),
        count(ceil_div(channels, 64)),
        largest(std::min(channels, ceil_div(ceil_div(channels, count), granule) * granule)) {}
  int64_t begin(int64_t chunk) const { return std::min(chunk * largest, channels); }
  int64_t size(int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }
  int64_t channels, count, largest;
};

// E is what is blended and multiplied: A, or bfloat16 (bfloat16_blend.h).
template <typename T, typename A, typename E>
class PlainForward {
  using V = Vec<A>;

 public:
  explicit PlainForward(const ForwardArguments<T>& args)
      : args_(args),
        g_(args.g),
        chunks_(g_.C, kBFloat16 ? kBlockChannels : 1),
        tap_rows_(g_.kernel.z * g_.kernel.y),
        out_width_(padded<A>(g_.O)),
        blended_width_(kBFloat16 ? bfloat16_depth(g_.kernel.x * chunks_.largest)
                                 : (g_.kernel.x - 1) * chunks_.largest + padded<A>(chunks_.largest)),
        voxels_(std::clamp<int64_t>(kTileBytes / (blended_width_ * sizeof(E) + out_width_ * sizeof(A)), 12, 64)),
        weight_(kBFloat16 ? tap_rows_ * chunks_.count * blended_width_ * out_width_ : num_taps(g_) * g_.C * out_width_),
        bias_(pack_bias<A>(args.bias, g_.O)) {
    pack_weight();
  }

  void run() const {
    // The x axis stays whole: its rows are long, and read in place they are read in order.
    const Lattices lattices(g_, {lattice_step(g_, &Index3::z, 8), lattice_step(g_, &Index3::y, 8), 1});
    const int64_t last_chunk = chunks_.count - 1;
    const int64_t spill = chunks_.begin(last_chunk) + padded<A>(chunks_.size(last_chunk)) - g_.C;
    // All threads at one lattice after another, or a lattice for each where they are many and too small to share, as
    // in a batch of tiny volumes.
    const int64_t points = std::max(lattices.input_points(), lattices.output_points());
    const bool together = lattices.count() < kJobs || g_.K * points * out_width_ >= kWorthSharing;
    const ParallelFor over = together ? serial : args_.parallel, within = together ? args_.parallel : serial;
    over(lattices.count(), [&](int64_t begin, int64_t end) {
      const SourceMaker<T, A, E> make_source(args_, within, lattices, spill);
      for (int64_t index = begin; index < end; ++index) {
        const Lattice lattice = lattices.at(index);
        run_lattice(lattice, make_source(lattice), within);
      }
    });
  }

 private:
  static constexpr bool kBFloat16 = !std::is_same_v<E, A>;
  static constexpr int64_t kTileBytes = 48 * 1024;

  // One lattice and how its outputs are cut.
  struct Cut {
    Cut(const Lattice& lattice, const Source<E>& source, int64_t voxels)
        : lattice(lattice), source(source), grid(lattice.problem.output, voxels), runs(lattice.problem, grid) {}
    const Lattice& lattice;
    const Source<E>& source;
    const TileGrid grid;
    const RunTable runs;
  };

  struct Workspace {
    explicit Workspace(const PlainForward& f)
        : attention((f.g_.K + 1) * f.voxels_),
          out(bfloat16_rows(f.voxels_) * f.out_width_),
          blended(bfloat16_rows(f.voxels_) * f.blended_width_),
          tiles(kBFloat16) {}
    Scratch<A> attention, out;
    Scratch<E> blended;  // [voxel][tap x][channel of the chunk], and room for a vector's spill or for a whole depth
    std::vector<Segment> segments;
    std::vector<TapRow> rows;
    AmxTiles tiles;
  };

  // [tap row][chunk][tap x][channel of the chunk][O padded], in bfloat16 in pairs along the reduction.
  void pack_weight() const {
    const Scratch<A> unrounded(kBFloat16 ? blended_width_ * out_width_ : 0);
    for (int64_t row = 0; row < tap_rows_; ++row)
      for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
        A* to = unrounded;
        if constexpr (!kBFloat16) to = weight(row, chunk);
        for (int64_t x = 0; x < g_.kernel.x; ++x)
          for (int64_t c = chunks_.begin(chunk); c < chunks_.begin(chunk + 1); ++c, to += out_width_)
            pack_row(Row<const T>{weight_at(g_, args_.weight, 0, c, row, x), 0, args_.weight.n}, 1, g_.O, to,
                     out_width_);
        if constexpr (kBFloat16) round_pairs(unrounded, out_width_, depth(chunk), out_width_, weight(row, chunk));
      }
  }

  // What a product sums over.
  int64_t depth(int64_t chunk) const { return g_.kernel.x * chunks_.size(chunk); }

  E* weight(int64_t tap_row, int64_t chunk) const {
    if constexpr (kBFloat16) return weight_ + (tap_row * chunks_.count + chunk) * blended_width_ * out_width_;
    return weight_ + (tap_row * g_.C + chunks_.begin(chunk)) * g_.kernel.x * out_width_;
  }

  void run_lattice(const Lattice& lattice, const Source<E>& source, ParallelFor parallel) const {
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
    const Source<E>& source = cut.source;
    const int64_t channels = chunks_.size(chunk), first_channel = chunks_.begin(chunk);
    for (int64_t x = 0; x < g_.kernel.x; ++x) {
      const Index3 tap{first_tap.z, first_tap.y, first_tap.x + x};
      const bool centre = tap.z == 0 && tap.y == 0 && tap.x == 0;
      for (size_t i = 0; i < w.segments.size(); ++i) {
        const Segment& s = w.segments[i];
        for (const Run& run : cut.runs.at(s.part, x)) {
          const int64_t at = s.offset + run.begin;
          const A* attention[kMaxBranches];
          const E* voxels[kMaxBranches];
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
                w.blended + at * blended_width_ + x * channels, blended_width_, run.count, channels);
        }
      }
    }
  }

  // out(p) (+)= sum_t W_t u_t(p) over the taps of one row and the channels of one chunk.
  void project(int64_t tap_row, int64_t chunk, int64_t count, bool accumulate, Workspace& w) const {
    const int64_t depth = this->depth(chunk);
    if constexpr (kBFloat16) {
      const int64_t whole = bfloat16_depth(depth);
      for (int64_t p = 0; p < count && depth < whole; ++p)
        std::fill(w.blended + p * blended_width_ + depth, w.blended + p * blended_width_ + whole, E(0));
      bfloat16_gemm(w.blended, blended_width_, weight(tap_row, chunk), w.out, out_width_, count, out_width_, depth,
                    accumulate);
    } else {
      gemm<A>({w.blended, blended_width_, 1, weight(tap_row, chunk), out_width_, w.out, out_width_, depth}, count, g_.O,
              accumulate);
    }
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
  const Scratch<E> weight_;
  const Scratch<A> bias_;
};

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
