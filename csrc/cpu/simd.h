// One vector register of floats or doubles. Compiled once per instruction set: the file that includes this names the
// namespace (AUTOFOCUS_ISA) and the register width (AUTOFOCUS_VECTOR_BYTES), and switches the compiler's target.
#pragma once

#include <cstdint>
#include <cstring>

namespace autofocus {
namespace AUTOFOCUS_ISA {

template <typename A>
struct Vec {
  typedef A Native __attribute__((vector_size(AUTOFOCUS_VECTOR_BYTES)));
  typedef A Unaligned __attribute__((vector_size(AUTOFOCUS_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
  static constexpr int64_t kLanes = AUTOFOCUS_VECTOR_BYTES / sizeof(A);
  // Registers the GEMM may fill with accumulators, the rest hold operands.
  static constexpr int kAccumulators = AUTOFOCUS_VECTOR_BYTES == 64 ? 24 : 12;

  static inline __attribute__((always_inline)) Native load(const A* from) { return *(const Unaligned*)from; }
  static inline __attribute__((always_inline)) void store(A* to, Native value) { *(Unaligned*)to = value; }
  static inline __attribute__((always_inline)) Native broadcast(A value) { return value - Native{}; }

  // The lower half of a register.
  typedef A HalfNative __attribute__((vector_size(AUTOFOCUS_VECTOR_BYTES / 2)));
  typedef A HalfUnaligned __attribute__((vector_size(AUTOFOCUS_VECTOR_BYTES / 2), aligned(sizeof(A)), may_alias));
  static inline __attribute__((always_inline)) HalfNative load_half(const A* from) {
    return *(const HalfUnaligned*)from;
  }
  static inline __attribute__((always_inline)) void store_half(A* to, HalfNative value) { *(HalfUnaligned*)to = value; }
  static inline __attribute__((always_inline)) HalfNative lower(Native value) {
    HalfNative half;
    std::memcpy(&half, &value, sizeof half);
    return half;
  }

  static inline A sum(Native value) {
    A total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += value[lane];
    return total;
  }
};

template <typename A>
constexpr int64_t vectors(int64_t channels) {
  return (channels + Vec<A>::kLanes - 1) / Vec<A>::kLanes;
}

// `channels` rounded up to whole vectors.
template <typename A>
constexpr int64_t padded(int64_t channels) {
  return vectors<A>(channels) * Vec<A>::kLanes;
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
