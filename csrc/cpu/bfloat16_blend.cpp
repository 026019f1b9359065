#include "bfloat16_blend.h"

#include <algorithm>
#include <type_traits>

#include "../geometry.h"
#include "bfloat16_gemm.h"

#if AUTOFOCUS_HAS_BFLOAT16
#include <immintrin.h>

#define AUTOFOCUS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace autofocus {

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Numbers __attribute__((vector_size(32)));
typedef Bits UnalignedBits __attribute__((aligned(2), may_alias));
typedef Numbers UnalignedNumbers __attribute__((aligned(2), may_alias));

AUTOFOCUS_TARGET Bits load_bits(const void* from) { return *static_cast<const UnalignedBits*>(from); }

// The sums of a block's channels, and how it lies in memory.
struct WholeBlock {
  Floats first = {}, second = {};

  static AUTOFOCUS_TARGET void pack(const float* from, uint16_t* to) {
    *(UnalignedBits*)to = load_bits(from) >> 16 | (load_bits(from + 16) & 0xffff0000u);
  }
  AUTOFOCUS_TARGET void add(float attention, const uint16_t* source) {
    const Bits pairs = load_bits(source);
    first += attention * (Floats)(pairs << 16);
    second += attention * (Floats)(pairs & 0xffff0000u);
  }
  AUTOFOCUS_TARGET void store(uint16_t* to, __mmask32 there) const {
    _mm512_mask_storeu_epi16(to, there, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
};
struct HalfBlock {
  Floats sum = {};

  static AUTOFOCUS_TARGET void pack(const float* from, uint16_t* to) {
    *(UnalignedNumbers*)to = __builtin_convertvector(load_bits(from) >> 16, Numbers);
  }
  AUTOFOCUS_TARGET void add(float attention, const uint16_t* source) {
    const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    sum += attention * (Floats)((Bits)_mm512_maskz_cvtepu16_epi32(__mmask16(~0u), numbers) << 16);
  }
  AUTOFOCUS_TARGET void store(uint16_t* to, __mmask32 there) const {
    _mm256_mask_storeu_epi16(to, __mmask16(there), (__m256i)_mm512_cvtneps_pbh(sum));
  }
};
struct NoBlock {
  void add(float, const uint16_t*) {}
  void store(uint16_t*, __mmask32) const {}
};

// All voxels of a block, or of two, of which the first is whole: N branches, or any number where N is 0. Of the last
// block `there` is stored.
template <int N, typename First, typename Second>
AUTOFOCUS_TARGET void blend_blocks(int branches, const float* const* attentions, const uint16_t* const* sources,
                                   int64_t source_step, uint16_t* to, int64_t to_step, int64_t count, __mmask32 there) {
  constexpr bool two = !std::is_same_v<Second, NoBlock>;
  constexpr __mmask32 whole = ~0u;
  const int n = N > 0 ? N : branches;
  // Local copies: the compiler cannot know that the stores leave the callers' arrays alone.
  const float* attention[N > 0 ? N : kMaxBranches];
  const uint16_t* source[N > 0 ? N : kMaxBranches];
  for (int k = 0; k < n; ++k) {
    attention[k] = attentions[k];
    source[k] = sources[k];
  }
  for (int64_t p = 0, at = 0; p < count; ++p, at += source_step, to += to_step) {
    First first;
    Second second;
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
      first.add(attention[k][p], source[k] + at);
      second.add(attention[k][p], source[k] + at + kBlockChannels);
    }
    first.store(to, two ? whole : there);
    second.store(to + kBlockChannels, there);
  }
}

// By halves of blocks, from one to four.
template <int N>
constexpr decltype(&blend_blocks<N, HalfBlock, NoBlock>) kBlends[] = {
    blend_blocks<N, HalfBlock, NoBlock>, blend_blocks<N, WholeBlock, NoBlock>, blend_blocks<N, WholeBlock, HalfBlock>,
    blend_blocks<N, WholeBlock, WholeBlock>};

}  // namespace

AUTOFOCUS_TARGET void pack_blocks(const float* from, int64_t count, int64_t width, uint16_t* to) {
  for (int64_t p = 0; p < count; ++p, from += width, to += width) {
    int64_t channel = 0;
    for (; channel + kBlockChannels <= width; channel += kBlockChannels) WholeBlock::pack(from + channel, to + channel);
    if (channel < width) HalfBlock::pack(from + channel, to + channel);
  }
}

void blend(int branches, const float* const* attention, const uint16_t* const* source, int64_t source_step,
           uint16_t* to, int64_t to_step, int64_t count, int64_t channels) {
  if (branches == 0) {
    for (int64_t p = 0; p < count; ++p) std::fill(to + p * to_step, to + p * to_step + channels, uint16_t(0));
    return;
  }
  static constexpr const decltype(&blend_blocks<0, HalfBlock, NoBlock>)* of_branches[] = {
      kBlends<0>, kBlends<1>, kBlends<2>, kBlends<3>, kBlends<4>};
  const int64_t halves = (channels - 1) / (kBlockChannels / 2);
  const int64_t of_last = channels - (channels > kBlockChannels ? kBlockChannels : 0);
  of_branches[branches <= 4 ? branches : 0][halves](branches, attention, source, source_step, to, to_step, count,
                                                    __mmask32((1ull << of_last) - 1));
}

}  // namespace autofocus

#else

namespace autofocus {

// Never called: has_bfloat16_gemm() is false.
void pack_blocks(const float*, int64_t, int64_t, uint16_t*) {}
void blend(int, const float* const*, const uint16_t* const*, int64_t, uint16_t*, int64_t, int64_t, int64_t) {}

}  // namespace autofocus

#endif
