#include "bfloat16_blend.h"

#include <algorithm>

#include "../geometry.h"
#include "bfloat16_gemm.h"

#if AUTOFOCUS_HAS_BFLOAT16
#include <immintrin.h>

#define AUTOFOCUS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace autofocus {

namespace {

// A vector register of pairs of numbers, the first of a pair in the lower half.
template <int bytes>
struct Register {
  typedef uint32_t Bits __attribute__((vector_size(bytes)));
  typedef Bits Unaligned __attribute__((aligned(2), may_alias));
  typedef float Floats __attribute__((vector_size(bytes)));
  static constexpr int64_t kNumbers = bytes / 2;

  static AUTOFOCUS_TARGET Bits load(const void* from) { return *static_cast<const Unaligned*>(from); }
  static AUTOFOCUS_TARGET Floats first(Bits both) { return (Floats)(both << 16); }
  static AUTOFOCUS_TARGET Floats second(Bits both) { return (Floats)(both & 0xffff0000u); }
};

// Rounds a block's first and second half, and stores the channels whose bit is set.
AUTOFOCUS_TARGET void store(uint16_t* to, __mmask32 there, __m512 first, __m512 second) {
  _mm512_mask_storeu_epi16(to, there, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
AUTOFOCUS_TARGET void store(uint16_t* to, __mmask32 there, __m256 first, __m256 second) {
  _mm256_mask_storeu_epi16(to, __mmask16(there), (__m256i)_mm256_cvtne2ps_pbh(second, first));
}

// The sums of one block.
template <int bytes>
struct Sums {
  using R = Register<bytes>;
  typename R::Floats first = {}, second = {};

  AUTOFOCUS_TARGET void add(float attention, const uint16_t* source) {
    const typename R::Bits both = R::load(source);
    first += attention * R::first(both);
    second += attention * R::second(both);
  }
  AUTOFOCUS_TARGET void store_to(uint16_t* to, __mmask32 there) const { store(to, there, first, second); }
};
template <>
struct Sums<0> {
  void add(float, const uint16_t*) {}
  void store_to(uint16_t*, __mmask32) const {}
};

// One block of all voxels, or two, of N branches, or of any number where N is 0. Of the last block `there` is stored.
template <int N, int bytes, int more_bytes>
AUTOFOCUS_TARGET void blend_blocks(int branches, const float* const* attentions, const uint16_t* const* sources,
                                   int64_t source_step, uint16_t* to, int64_t to_step, int64_t count, int64_t channel,
                                   __mmask32 there) {
  constexpr int64_t more = bytes / 2;
  constexpr __mmask32 whole = ~0u;
  const int n = N > 0 ? N : branches;
  // Local copies: the compiler cannot know that the stores leave the callers' arrays alone.
  const float* attention[N > 0 ? N : kMaxBranches];
  const uint16_t* source[N > 0 ? N : kMaxBranches];
  for (int k = 0; k < n; ++k) {
    attention[k] = attentions[k];
    source[k] = sources[k] + channel;
  }
  to += channel;
  for (int64_t p = 0, at = 0; p < count; ++p, at += source_step, to += to_step) {
    Sums<bytes> sums;
    Sums<more_bytes> more_sums;
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
      sums.add(attention[k][p], source[k] + at);
      more_sums.add(attention[k][p], source[k] + at + more);
    }
    sums.store_to(to, more_bytes > 0 ? whole : there);
    more_sums.store_to(to + more, there);
  }
}

template <int N>
AUTOFOCUS_TARGET void blend_branches(int branches, const float* const* attention, const uint16_t* const* source,
                                     int64_t source_step, uint16_t* to, int64_t to_step, int64_t count,
                                     int64_t channels) {
  for (int64_t channel = 0; channel < channels; channel += 2 * kBlockChannels) {
    const int64_t left = std::min(channels - channel, 2 * kBlockChannels);
    const bool two = left > kBlockChannels;
    const int64_t of_last = two ? left - kBlockChannels : left;
    const bool small = of_last <= kBlockChannels / 2;
    const auto run = two     ? small ? blend_blocks<N, 64, 32> : blend_blocks<N, 64, 64>
                     : small ? blend_blocks<N, 32, 0>
                             : blend_blocks<N, 64, 0>;
    run(branches, attention, source, source_step, to, to_step, count, channel, __mmask32((1ull << of_last) - 1));
  }
}

template <int bytes>
AUTOFOCUS_TARGET void pack_block(const float* from, uint16_t* to) {
  using R = Register<bytes>;
  const typename R::Bits first = R::load(from), second = R::load(from + R::kNumbers / 2);
  *(typename R::Unaligned*)to = first >> 16 | (second & 0xffff0000u);
}

}  // namespace

AUTOFOCUS_TARGET void pack_blocks(const float* from, int64_t count, int64_t width, uint16_t* to) {
  for (int64_t p = 0; p < count; ++p, from += width, to += width) {
    int64_t channel = 0;
    for (; channel + kBlockChannels <= width; channel += kBlockChannels) pack_block<64>(from + channel, to + channel);
    if (channel < width) pack_block<32>(from + channel, to + channel);
  }
}

AUTOFOCUS_TARGET void blend(int branches, const float* const* attention, const uint16_t* const* source,
                            int64_t source_step, uint16_t* to, int64_t to_step, int64_t count, int64_t channels) {
  switch (branches) {
    case 0:
      for (int64_t p = 0; p < count; ++p) std::fill(to + p * to_step, to + p * to_step + channels, uint16_t(0));
      return;
#define AUTOFOCUS_CASE(N) \
  case N: return blend_branches<N>(branches, attention, source, source_step, to, to_step, count, channels);
      AUTOFOCUS_CASE(1)
      AUTOFOCUS_CASE(2)
      AUTOFOCUS_CASE(3)
      AUTOFOCUS_CASE(4)
#undef AUTOFOCUS_CASE
    default: return blend_branches<0>(branches, attention, source, source_step, to, to_step, count, channels);
  }
}

}  // namespace autofocus

#else

namespace autofocus {

// Never called: has_bfloat16_gemm() is false.
void pack_blocks(const float*, int64_t, int64_t, uint16_t*) {}
void blend(int, const float* const*, const uint16_t* const*, int64_t, uint16_t*, int64_t, int64_t, int64_t) {}

}  // namespace autofocus

#endif
