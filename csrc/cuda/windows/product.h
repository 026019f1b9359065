// The product of windows, which all passes but the TF32 gradient of the weight are made of: d[64 x 8 kTiles] += a[64 x
// k] b[k x 8 kTiles] by the four warps of a warpgroup, where k is 16, or 8 in TF32. Hopper computes it by warpgroup
// MMA, other GPUs by ldmatrix and mma.sync. Both leave the same sums with a lane of warp w: d[tile][i] is row 16 w +
// lane / 4 + 8 (i / 2), column 8 tile + lane % 4 * 2 + i % 2.
//
// On Hopper products are asynchronous. Between begin_products and wait_for_products they own d and any operand in
// registers: nobody else may read or write these.
#pragma once

#include "../device.h"

namespace autofocus::cuda {

// How far loops of products are unrolled. Warpgroup MMAs should follow each other directly; with mma.sync, operands of
// more than one product would cost registers.
#if defined(AUTOFOCUS_WARPGROUP_MMA)
constexpr int kUnrolledProducts = 5;
#else
constexpr int kUnrolledProducts = 1;
#endif

// An operand in shared memory. It consists of blocks of eight consecutive rows of 16 bytes: eight elements, or four in
// TF32. All lengths are in units of 16 bytes and below 2^14, as a descriptor has 14 bits for each. The first block
// begins at `start`, at any multiple of 16 bytes. The second half of k is `along_k` further on, the next eight rows (or
// columns of b) are `along_rows` further on.
struct Operand {
  uint32_t places;  // start in the lower half, along_k in the upper: one addition changes both
  uint32_t along_rows;

  Operand() = default;
  __device__ Operand(uint32_t places_, uint32_t along_rows_) : places(places_), along_rows(along_rows_) {}
  __device__ Operand(uint32_t start, uint32_t along_k, uint32_t along_rows_)
      : Operand(along_k << 16 | start, along_rows_) {}

  __device__ Operand moved(uint32_t units) const { return {places + units, along_rows}; }
  __device__ uint32_t start() const { return places & 0xffffu; }
  __device__ uint32_t along_k() const { return places >> 16; }
};

// The descriptor of warpgroup MMA, without swizzle.
__device__ inline uint64_t encoded(const Operand& operand) {
  return uint64_t(operand.along_rows) << 32 | operand.places;
}

// Loads four blocks: both halves of k of row block `block`, then of the next one if `pair` (else the same again). In
// this order they are the fragments of operand b for two tiles of columns.
template <bool kTransposed>
__device__ inline void load_blocks(uint32_t (&fragments)[4], const Operand& operand, int block, bool pair) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const int row_block = block + (pair ? matrix / 2 : 0);
  load_matrices<kTransposed>(
      fragments, operand.start() + row_block * operand.along_rows + matrix % 2 * operand.along_k() + lane % 8);
}

// d[m] += a[m] b by mma.sync, with b's fragments loaded once for all m.
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

// To be called before the first product whose d, or operand in registers, other instructions have touched.
__device__ inline void begin_products() {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_begin();
#endif
}
// Closes a group of products, the unit of waiting.
__device__ inline void commit_products() {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_commit();
#endif
}
// Waits until at most the newest kPending groups are under way; `d` then holds the sums of all others.
template <int kPending, int kCount, int kTiles>
__device__ inline void wait_for_products(float (&d)[kCount][kTiles][4]) {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_wait<kPending>(d);
#endif
}

// The same where sums are not read yet.
template <int kPending>
__device__ inline void wait_for_products() {
#if defined(AUTOFOCUS_WARPGROUP_MMA)
  if (has_warpgroup_mma()) warpgroup_wait<kPending>();
#endif
}

// d[m] = a[m] b, or d[m] += a[m] b if `add`.
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
      uint32_t blocks[4];  // by row block, then by half of k; a fragment of operand a is the other way round
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

// d += a b for grad_weight, summed over points: b is a window read transposed, whose points are k. Each warp has its 16
// rows of a as an MMA fragment in registers. 16-bit types only.
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
