// The types that tensors are stored in: scalar conversions to and from float32, rounding to nearest-even, and the
// step from a tensor's dtype to a type. All arithmetic is done in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor_view.h"

namespace pytransformer::PYTRANSFORMER_ISA {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float x) {
  return x;
}
inline float to_float(bfloat16 x) {
  return float_of_bits(uint32_t(x.bits) << 16);
}
// The exponent and mantissa bits are a float32's but for its exponent's bias, which a multiplication puts right,
// denormals included.
inline float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  constexpr uint32_t least_normal = 0x38800000, overflow = 0x477ff000;  // 2^-14, 65520
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= overflow) return {uint16_t(sign | 0x7c00)};
  // Adding 1/2 leaves the multiples of a denormal's spacing, 2^-24, in the lower bits.
  if (magnitude < least_normal) return {uint16_t(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

// body(T{}) for the type T that tensors of `dtype` are stored in: float32, float16 or bfloat16.
template <class Body>
void with_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bfloat16: return body(bfloat16{});
    case DType::float16: return body(float16{});
    default: return body(float{});
  }
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
