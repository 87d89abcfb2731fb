// Scalar conversions of bf16 and fp16 bit patterns, round to nearest even. Plain C++.
#pragma once
#include <cstdint>
#include <cstring>

#include "../conv3x3.h"

namespace vgg_fast {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bf16_to_float(uint16_t value) { return float_of(uint32_t{value} << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);  // a NaN stays one
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Part `part` of a value as a sum of bf16 values: each is the rounding of what the ones before it left over. What is
// not finite is all in the first part, and a finite value that would round up to infinity is cut off.
inline uint16_t bf16_part(float value, int64_t part) {
  for (;; --part) {
    uint16_t bits = float_to_bf16(value);
    const bool finite = (bits_of(value) & 0x7f800000u) != 0x7f800000u;
    if (finite && (bits & 0x7fffu) == 0x7f80u) bits = uint16_t(bits_of(value) >> 16);
    if (part == 0) return bits;
    value = finite ? value - bf16_to_float(bits) : 0.0f;
  }
}

inline float f16_to_float(uint16_t value) {
  const uint32_t sign = uint32_t{value & 0x8000u} << 16, rest = value & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // A denormal rest x 2^-24 is what lies above 2^-14 in 2^-14 (1 + rest / 2^10): no fp32 denormal on the way, as those
  // are slow, or zeros under FlushDenormals.
  const float denormal = float_of(0x38800000u | (rest << 13)) - 0x1p-14f;
  return float_of(sign | (rest >= 0x400u ? (rest << 13) + 0x38000000u : bits_of(denormal)));
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                                  // below 2^-14: the sum's last bit is 2^-24
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

// The value at `data`, of any alignment.
inline float read_value(const char* data, DType dtype) {
  uint16_t half;
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, data, sizeof value);
    return value;
  }
  std::memcpy(&half, data, sizeof half);
  return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

}  // namespace vgg_fast
