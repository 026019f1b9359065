// The product of windows: d[64 x 8 kTiles] += a[64 x 16] b[16 x 8 kTiles] over the four warps of a warpgroup, by
// warpgroup MMA on Hopper, by ldmatrix and mma.sync elsewhere. A lane of warp w has d[tile][i] = row 16 w + lane / 4 +
// 8 (i / 2), column 8 tile + lane % 4 * 2 + i % 2, on either.
//
// It may run on behind the call: between begin_products and wait_for_products d, and operands in registers, belong to
// it.
#pragma once

#include "../device.h"

namespace autofocus::cuda {

// Products whose operands a loop may prepare together: warpgroup MMA wants them behind each other, without it more than
// one costs registers.
#if defined(AUTOFOCUS_WARPGROUP_MMA)
constexpr int kUnrolledProducts = 5;
#else
constexpr int kUnrolledProducts = 1;
#endif

// Blocks of eight rows of 16 bytes, a row eight elements, in shared memory. In units of 16 bytes: `start` is where the
// first block lies, anywhere; the next eight of k are `along_k` away, the next eight of the other axis `along_rows`.
// All are below 2^14, as shared memory is.
struct Operand {
  uint32_t places;  // start and along_k as a descriptor has them: one addition moves both
  uint32_t along_rows;

  Operand() = default;
  __device__ Operand(uint32_t places_, uint32_t along_rows_) : places(places_), along_rows(along_rows_) {}
  __device__ Operand(uint32_t start, uint32_t along_k, uint32_t along_rows_)
      : Operand(along_k << 16 | start, along_rows_) {}

  __device__ Operand moved(uint32_t units) const { return {places + units, along_rows}; }
  __device__ uint32_t start() const { return places & 0xffffu; }
  __device__ uint32_t along_k() const { return places >> 16; }
};

__device__ inline uint64_t encoded(const Operand& operand) {
  return uint64_t(operand.along_rows) << 32 | operand.places;
}

// Four 8x8 blocks a call: those of row blocks `block`, and of the next one if `pair`, at either eight of k. In the
// order of a fragment of operand b, two row blocks behind each other.
template <bool kTransposed>
__device__ inline void load_blocks(uint32_t (&fragments)[4], const Operand& operand, int block, bool pair) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const int row_block = block + (pair ? matrix / 2 : 0);
  load_matrices<kTransposed>(
      fragments, operand.start() + row_block * operand.along_rows + matrix % 2 * operand.along_k() + lane % 8);
}

// d[m] += a b, with b as MMA fragments loaded once for all m.
template <typename T, bool kTransposed, int kCount, int kTiles>
__device__ inline void add_fragments(float (&d)[kCount][kTiles][4], const uint32_t (&a)[kCount][4], const Operand& b) {
#pragma unroll
  for (int tile = 0; tile < kTiles; tile += 2) {
    uint32_t fragments[4];
    load_blocks<kTransposed>(fragments, b, tile, tile + 1 < kTiles);
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      mma<T>(d[m][tile], a[m], {fragments[0], fragments[1]});
      if (tile + 1 < kTiles) mma<T>(d[m][tile + 1], a[m], {fragments[2], fragments[3]});
    }
  }
}

template <int kCount, int kTiles>
__device__ inline void clear(float (&d)[kCount][kTiles][4]) {
#pragma unroll
  for (auto& part : d)
#pragma unroll
    for (auto& tile : part)
#pragma unroll
      for (float& value : tile) value = 0.0f;
}

// Before the first product into registers, or from registers, that other instructions have touched.
__device__ inline void begin_products() {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_begin();
#endif
}
// Closes a group of products.
__device__ inline void commit_products() {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_commit();
#endif
}
// Waits until at most kPending groups are under way; `d` holds the sums of those that are not.
template <int kPending, int kCount, int kTiles>
__device__ inline void wait_for_products(float (&d)[kCount][kTiles][4]) {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_wait<kPending>(d);
#endif
}

template <int kPending>
__device__ inline void wait_for_products() {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_wait<kPending>();
#endif
}

// d[m] = a[m] b, added to d[m] if `add`.
template <typename T, int kCount, int kTiles>
__device__ inline void window_product(float (&d)[kCount][kTiles][4], const Operand (&a)[kCount], const Operand& b,
                                      bool add) {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) {
#pragma unroll
    for (int m = 0; m < kCount; ++m) warpgroup_mma<T>(d[m], encoded(a[m]), encoded(b), add);
  } else
#endif
  {
    uint32_t fragments[kCount][4];
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      uint32_t blocks[4];  // (row block, half of k); a fragment of operand a goes by half of k first
      load_blocks<false>(blocks, a[m], threadIdx.x / 32 % 4 * 2, true);
      fragments[m][0] = blocks[0];
      fragments[m][1] = blocks[2];
      fragments[m][2] = blocks[1];
      fragments[m][3] = blocks[3];
    }
    if (!add) clear(d);
    add_fragments<T, false>(d, fragments, b);
  }
}

// d += a b, where this warp's 16 rows of a are an MMA fragment in registers, and b's rows are k: a window read with its
// points as what is summed over.
template <typename T, int kTiles>
__device__ inline void window_product_over_points(float (&d)[1][kTiles][4], const uint32_t (&a)[4], const Operand& b) {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) {
    warpgroup_mma_over_points<T>(d[0], a, encoded(b));
  } else
#endif
  {
    const uint32_t fragments[1][4] = {{a[0], a[1], a[2], a[3]}};
    add_fragments<T, true>(d, fragments, b);
  }
}

}  // namespace autofocus::cuda
