// The kernel of forward and grad_attention: computes the branches y_k of a tile, one after the other, and hands each to
// an epilogue while it is in registers.
//
// In shared memory a point is 16 bytes, the channels of one chunk, and eight neighbours in x are what the product reads
// as a block of eight rows. So the 8x8 points of a tile's plane, seen through a tap, are an operand of 64 rows that
// begins wherever the tap says: nothing is unpacked or blended. The epilogue does not get a whole y_k but a term of it,
// the sum over one tz and one chunk of input channels. So it must be linear in y_k.
//
// An Epilogue has kInTurn (whether one thread block goes through all output channels of a tile, block by block) and
//   begin(tile, number)  before the first term of a block of output channels: may write the epilogue's shared memory,
//   begin_shared()       after a barrier of the block: may read it,
//   take(k, m0, y)       for each term of branch k, of the tile planes from share.z0 + m0 on,
//   end(tile)            after the last term of a tile.
#pragma once

#include "tile.h"

namespace autofocus::cuda {

template <typename T>
struct BranchesArguments {
  Source source;                  // Operands::input
  const unsigned char* weight;    // Operands::weight
  int64_t outputs;                // O
  const unsigned char* targets;   // the epilogue's operand: Operands::attention or grad_output
  Strided<const T> scale, shift;  // of the branches; null: none
  Target<T> result;               // output, or grad_attention
};

template <typename T>
BranchesArguments<T> branches_arguments(const Inputs& in, const Operands& operands, const unsigned char* targets,
                                        const Target<T>& result) {
  const int chunks = num_chunks(in.g.C, in.dtype);
  return {{operands.input(), chunks, 0, chunks},
          operands.weight(),
          in.g.O,
          targets,
          Strided<const T>(in.scale),
          Strided<const T>(in.shift),
          result};
}

// Copies the branch scale or shift, if there is one, of the 8 kTiles output channels from output0 on to shared memory
// as [branch, channel], in float.
template <int kTiles, typename T>
__device__ inline void copy_vectors(const Lattice& lattice, const Strided<const T>& matrix, int64_t output0,
                                    int64_t outputs, float* shared) {
  if (matrix.data == nullptr) return;
  for (int i = threadIdx.x; i < lattice.K * (8 * kTiles); i += int(blockDim.x)) {
    const int64_t channel = output0 + i % (8 * kTiles);
    shared[i] = channel < outputs ? branch_value(matrix, i / (8 * kTiles), channel) : 0.0f;
  }
}

// The epilogue's shared memory, behind the pipeline's own and the weight of a chunk.
template <int kTiles>
__device__ inline unsigned char* epilogue_memory(const Lattice& lattice) {
  return shared_memory() + pipeline_bytes(lattice) + chunk_weight_bytes(kTiles);
}

// Grid (thread blocks, blocks of 8 kTiles output channels), or (thread blocks) if Epilogue::kInTurn.
template <typename T, int kTiles, typename Epilogue>
__global__ __launch_bounds__(kMaxThreads, 1) void branches_kernel(Lattice lattice, BranchesArguments<T> args,
                                                                  const __grid_constant__ SourcePlanes planes) {
  if (kTiles > kNarrowTiles && !is_for_hopper()) return;  // never launched elsewhere (plan.cu), and would spill
  // Planes whose products are under way at once: as many as there are registers for.
  constexpr int kTogether = kTiles <= 2 ? kGroupPlanes : 1;
  const Share share;
  const int turns = Epilogue::kInTurn ? int(ceil_div(args.outputs, 8 * kTiles)) : 1;
  const int chunks = args.source.chunks;
  const unsigned char* weight = args.weight + int64_t(blockIdx.y) * chunks * chunk_weight_bytes(kTiles);
  Pipeline<Readers::kOneByOne> pipeline(lattice, args.source, planes, chunks * turns);
  const auto slabs = [&](const Turn& turn, int first, int last) {
    copy_slabs<kTiles>(lattice, pipeline, weight, turn.chunk, first, last);
  };
  Epilogue epilogue(lattice, args, share);

  for (pipeline.start(slabs); pipeline.running(); pipeline.advance()) {
    const int chunk = pipeline.turn().chunk;
    if (chunk % chunks == 0) {
      __syncthreads();  // others may still read what begin overwrites: that of the last tile or output channels
      epilogue.begin(pipeline.tile(), chunk / chunks);
    }
#pragma unroll 1
    for (int tz = -1; tz <= 1; ++tz) {
      pipeline.enter(tz, slabs);
      if (tz < 0 && chunk % chunks == 0) epilogue.begin_shared();
      const Operand slab(shared_units(shared_memory() + pipeline.behind() + (tz + 1) * kSlabBytes<kTiles>), 8 * kTiles,
                         8);
      // Without a copy engine half of the warpgroups write ahead before their products and half after them, so that the
      // tensor cores are always busy. With one, writing ahead costs little and comes first.
      const int writes_in = has_bulk_copies() ? 0 : uniform(reread_thread() / kGroupThreads % 2);
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if (turn == writes_in) {
          pipeline.ahead(tz);
          continue;
        }
#pragma unroll 1
        for (int i = 0; i < (reads(lattice, tz) ? lattice.K : 0); ++i) {
          const int k = branch_in_turn(lattice, tz, i);
          pipeline.enter_branch(tz, i);
#pragma unroll
          for (int m0 = 0; m0 < kGroupPlanes; m0 += kTogether) {
            uint32_t window[kTogether];
#pragma unroll
            for (int m = 0; m < kTogether; ++m) window[m] = first_window(lattice, pipeline, share.z0 + m0 + m, tz, k);
            float y[kTogether][kTiles][4];
            begin_products();
#pragma unroll kUnrolledProducts
            for (int pair = 0; pair < kTapPairs; ++pair) {
              Operand a[kTogether];
#pragma unroll
              for (int m = 0; m < kTogether; ++m) a[m] = two_taps(lattice, window[m], pair, k);
              window_product<T>(y, a, slab.moved(pair * (16 * kTiles)), pair > 0);
            }
            commit_products();
            wait_for_products<0>(y);
            epilogue.take(k, m0, y);
          }
        }
      }
    }
    if (pipeline.last_turn()) epilogue.end(pipeline.tile());
  }
}

}  // namespace autofocus::cuda
