// The numbers that tensors hold, and their conversion to and from the accumulator's type: float, or double for double.
#pragma once

#include <cstdint>
#include <cstring>

namespace autofocus {
namespace AUTOFOCUS_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_accumulator(float value) { return value; }
inline double to_accumulator(double value) { return value; }
inline float to_accumulator(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }
inline float to_accumulator(Half value) {
  // Never through a subnormal float, which torch.set_flush_denormal(True) makes zero.
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  const uint32_t subnormal = float_bits(float(int32_t(rest)) * 0x1p-24f);
  const uint32_t normal = (rest << 13) + (rest < 0x7c00u ? 0x38000000u : 0x70000000u);  // the latter Inf and NaN
  return bits_float(sign | (rest < 0x0400u ? subnormal : normal));
}

inline void from_accumulator(float value, float& to) { to = value; }
inline void from_accumulator(double value, double& to) { to = value; }
inline void from_accumulator(float value, BFloat16& to) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t(value != value ? 0x7fc0u : rounded);
}
inline void from_accumulator(float value, Half& to) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 do the rounding
    result = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to.bits = uint16_t(sign | result);
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
