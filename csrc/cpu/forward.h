// Plain-mode forward: blend, then project (docs/math.md, section 2).
//
// Per lattice: pack the input to [voxel][channel], then per tile of output voxels and row of taps blend the K branches
// into a tile that stays in the L1 cache and multiply it by the weights of those taps. No branch ever exists.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "blend.h"
#include "gemm.h"
#include "lowprecision.h"
#include "pack.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Channels are reduced in chunks, so that a blended tile of all taps of a row fits the L1 cache for any C.
struct Chunks {
  explicit Chunks(int64_t channels, int64_t largest = 64)
      : channels(channels), count((channels + largest - 1) / largest) {}
  int64_t begin(int64_t chunk) const { return channels * chunk / count; }
  int64_t size(int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }
  int64_t channels, count;
};

// Weights as the projection reads them: [tap row][chunk][tap x][channel of the chunk][O padded].
template <typename T, typename A>
void pack_forward_weight(const Problem& g, const View<const T>& weight, const Chunks& chunks, A* to) {
  const int64_t width = padded<A>(g.O);
  for (int64_t z = 0; z < g.kernel.z; ++z)
    for (int64_t y = 0; y < g.kernel.y; ++y)
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
        for (int64_t x = 0; x < g.kernel.x; ++x)
          for (int64_t c = chunks.begin(chunk); c < chunks.begin(chunk + 1); ++c, to += width)
            pack_row(weight.data + c * weight.c + z * weight.s.z + y * weight.s.y + x * weight.s.x, 0, weight.n, 1,
                     g.O, to, width);
}

// The weights of attention for one tile: rows 0..K-1 the branches, row K their sum.
template <typename T, typename A>
void pack_attention(const Lattice& lattice, const View<const T>& attention, int64_t n,
                    const std::vector<Segment>& segments, A* to, int64_t row) {
  const int64_t K = lattice.problem.K;
  for (const Segment& s : segments) {
    A* sum = to + K * row + s.offset;
    std::fill(sum, sum + s.count, A(0));
    for (int64_t k = 0; k < K; ++k) {
      A* ak = to + k * row + s.offset;
      pack_row(lattice_row(attention, n, k, lattice.first_output, lattice.step, s.z, s.y, s.x),
               lattice.step.x * attention.s.x, 1, s.count, 1, ak, 1);
      for (int64_t p = 0; p < s.count; ++p) sum[p] += ak[p];
    }
  }
}

template <typename T, typename A>
void pack_input(const ForwardArguments<T>& args, const Lattice& lattice, int64_t n, A* to) {
  const Index3& size = lattice.problem.input;
  const int64_t width = padded<A>(args.g.C);
  args.parallel(size.z * size.y, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      pack_row(lattice_row(args.input, n, 0, lattice.first_input, lattice.step, row / size.y, row % size.y, 0),
               lattice.step.x * args.input.s.x, args.input.c, size.x, args.g.C, to + row * size.x * width, width);
  });
}

template <typename T, typename A>
void forward(const ForwardArguments<T>& args) {
  using V = Vec<A>;
  const Problem& g = args.g;
  const Chunks chunks(g.C);
  const int64_t chunk_width = padded<A>(chunks.size(chunks.count - 1));
  const int64_t in_width = padded<A>(g.C), out_width = padded<A>(g.O);
  // A row of the blended tile: the taps of a row side by side, then room for the last vector's spill.
  const int64_t blended_width = (g.kernel.x - 1) * chunks.size(chunks.count - 1) + chunk_width;
  constexpr int64_t kTileBytes = 48 * 1024;
  const int64_t voxels = std::clamp<int64_t>(kTileBytes / sizeof(A) / (blended_width + out_width), 12, 64);

  Scratch<A> weight(num_taps(g) * g.C * out_width);
  pack_forward_weight(g, args.weight, chunks, weight.get());
  // The same in bfloat16, in pairs along the reduction; every chunk on its own, since its depth may be odd.
  const bool low_precision = use_brgemm<T>();
  const int64_t low_depth = even(g.kernel.x * chunks.size(chunks.count - 1));
  const int64_t low_size = low_depth * out_width;
  const int64_t tap_rows = g.kernel.z * g.kernel.y;
  Scratch<uint16_t> low_weight(low_precision ? tap_rows * chunks.count * low_size : 0);
  if constexpr (std::is_same_v<T, BFloat16>)
    if (low_precision)
      for (int64_t row = 0; row < tap_rows; ++row)
        for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
          round_pairs(weight + (row * g.C + chunks.begin(chunk)) * g.kernel.x * out_width, out_width,
                      g.kernel.x * chunks.size(chunk), out_width, low_weight + (row * chunks.count + chunk) * low_size);
  Scratch<A> bias(out_width);
  std::fill(bias.get(), bias + out_width, A(0));
  if (args.bias != nullptr) pack_row(args.bias, 0, 1, 1, g.O, bias.get(), out_width);

  const Index3 step{axis_factor(g, &Index3::z, 8), axis_factor(g, &Index3::y, 8), 1};
  const Lattice largest = lattice_at(g, step, 0);
  const Index3 most{largest.problem.input.z + 1, largest.problem.input.y + 1, largest.problem.input.x};
  // Channels-last rows of the right type are read where they are. The last vector of a voxel reads `spill` elements more
  // than it has, which no sum uses. Past the end of the tensor there may be none to read, so its last row is copied; the
  // other rows end early enough if rows are `apart`.
  const int64_t spill = chunks.begin(chunks.count - 1) + chunk_width - g.C;
  const auto apart = [&](int64_t size, int64_t stride) { return size == 1 || stride >= spill; };
  const bool direct = std::is_same_v<T, A> && args.input.c == 1 && apart(g.N, args.input.n) &&
                      apart(g.input.z, args.input.s.z) && apart(g.input.y, args.input.s.y);
  Scratch<A> packed(direct ? 0 : volume(most) * in_width);
  const bool copies_last = direct && spill > 0 && g.N * volume(g.input) > 0;
  Scratch<A> last_row(copies_last ? (g.input.x - 1) * args.input.s.x + g.C + spill : 0);
  if (copies_last)
    for (int64_t x = 0; x < g.input.x; ++x)
      pack_row(lattice_row(args.input, g.N - 1, 0, {}, {1, 1, 1}, g.input.z - 1, g.input.y - 1, x), 0, 1, 1, g.C,
               last_row + x * args.input.s.x, g.C);

  for (int64_t job = 0; job < g.N * volume(step); ++job) {
    const int64_t n = job / volume(step);
    const Lattice lattice = lattice_at(g, step, job % volume(step));
    const Problem& sub = lattice.problem;
    if (volume(sub.output) == 0) continue;
    const A* source_base = packed;
    Index3 source_strides{sub.input.y * sub.input.x * in_width, sub.input.x * in_width, in_width};
    if (!direct) pack_input(args, lattice, n, packed.get());
    if constexpr (std::is_same_v<T, A>)
      if (direct) {
        source_base = lattice_row(args.input, n, 0, lattice.first_input, step, 0, 0, 0);
        source_strides = {step.z * args.input.s.z, step.y * args.input.s.y, step.x * args.input.s.x};
      }
    const Index3 last{sub.input.z - 1, sub.input.y - 1, 0};
    const int64_t last_at = last.z * source_strides.z + last.y * source_strides.y;
    const bool has_last = copies_last && n == g.N - 1 &&
                          lattice.first_input.z + step.z * last.z == g.input.z - 1 &&
                          lattice.first_input.y + step.y * last.y == g.input.y - 1;
    const TileGrid grid(sub.output, voxels);
    const RunTable runs(sub, grid);

    args.parallel(grid.count(), [&](int64_t begin, int64_t end) {
      Scratch<A> attention((g.K + 1) * voxels), blended(voxels * blended_width), out(voxels * out_width);
      Scratch<uint16_t> low_blended(low_precision ? voxels * low_depth : 0);
      std::vector<Segment> segments;
      std::vector<TapRow> rows;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t count = grid.at(tile, segments);
        pack_attention(lattice, args.attention, n, segments, attention.get(), voxels);
        bool first = true;
        for (int64_t tap_row = 0; tap_row < tap_rows; ++tap_row) {
          const Index3 offset = tap_offset(sub, tap_row * g.kernel.x);
          const A* w_row = weight + tap_row * g.kernel.x * g.C * out_width;
          if (!find_tap_rows(sub, segments, offset, source_strides, rows)) continue;
          for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
            const int64_t channels = chunks.size(chunk);
            for (int64_t x = 0; x < g.kernel.x; ++x) {
              const int64_t offset_x = x - g.kernel.x / 2;
              const bool centre = offset.z == 0 && offset.y == 0 && offset_x == 0;
              for (size_t i = 0; i < segments.size(); ++i) {
                const Segment& s = segments[i];
                for (const Run& run : runs.at(s.part, x)) {
                  const int64_t at = s.offset + run.begin;
                  const A *attention_row[kMaxBranches], *source[kMaxBranches];
                  int active = for_each_branch(run.branches & rows[i].inside, [&](int slot, int k) {
                    const int64_t along_x = sub.dilation[k].x * offset_x + run.begin * sub.stride.x;
                    attention_row[slot] = attention + k * voxels + at;
                    const Index3 q = input_position(sub, {s.z, s.y, s.x}, k, offset);
                    const bool in_last = has_last && q.z == last.z && q.y == last.y;
                    source[slot] = (in_last ? last_row + (rows[i].at[k] - last_at) : source_base + rows[i].at[k]) +
                                   along_x * source_strides.x + chunks.begin(chunk);
                  });
                  if (centre && active > 0) {  // all branches read the same voxel
                    attention_row[0] = attention + g.K * voxels + at;
                    active = 1;
                  }
                  blend(active, attention_row, source, sub.stride.x * source_strides.x,
                        blended + at * blended_width + x * channels, blended_width, run.count, vectors<A>(channels));
                }
              }
            }
            const int64_t depth = g.kernel.x * channels;
            if constexpr (std::is_same_v<T, BFloat16>) {
              if (low_precision) {
                round_rows(blended, blended_width, count, depth, low_blended, low_depth);
                brgemm(low_blended, low_depth, low_weight + (tap_row * chunks.count + chunk) * low_size, out, out_width,
                       count, out_width, even(depth), !first);
                first = false;
                continue;
              }
            }
            gemm<A>({blended, blended_width, 1, w_row + g.kernel.x * chunks.begin(chunk) * out_width, out_width, out,
                     out_width, depth},
                    count, g.O, !first);
            first = false;
          }
        }
        for (const Segment& s : segments) {
          const A* sum = attention + g.K * voxels + s.offset;
          A* result = out + s.offset * out_width;
          if (first) std::fill(result, result + s.count * out_width, A(0));
          if (args.bias != nullptr)
            for (int64_t p = 0; p < s.count; ++p)
              for (int64_t v = 0; v < out_width; v += V::kLanes)
                V::store(result + p * out_width + v, V::load(result + p * out_width + v) +
                                                       V::broadcast(sum[p]) * V::load(bias + v));
          unpack_row(result, out_width, s.count, g.O,
                     lattice_row(args.output, n, 0, lattice.first_output, lattice.step, s.z, s.y, s.x),
                     lattice.step.x * args.output.s.x, args.output.c);
        }
      }
      if (low_precision) brgemm_done();
    });
  }
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
