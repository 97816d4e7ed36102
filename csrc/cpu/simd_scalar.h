// Four lanes by the compiler's own vector extension: no instruction set beyond the platform's base
// (SSE2 on x86-64, NEON on AArch64). The fallback everywhere, and the simplest one to debug.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "storage.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int tile_rows = 4;
constexpr int tile_vecs = 2;

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef uint32_t uint4 __attribute__((vector_size(16)));

struct Mask {
  int4 v;  // -1 or 0 a lane

  static Mask first(int n) {
    const int4 lane = {0, 1, 2, 3};
    return {lane < n};
  }
  // Lane i is bit i; bits beyond the lanes are ignored.
  static Mask from_bits(uint32_t bits) {
    const int4 bit = {1, 2, 4, 8}, all = {int(bits), int(bits), int(bits), int(bits)};
    return {(all & bit) != 0};
  }
  uint32_t bits() const { return uint32_t((v[0] & 1) | (v[1] & 2) | (v[2] & 4) | (v[3] & 8)); }
  friend Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
  friend Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
  friend Mask operator~(Mask a) { return {~a.v}; }
};

struct Vec {
  static constexpr int lanes = 4;
  float4 v;

  static Vec zero() { return {float4{}}; }
  static Vec set1(float x) { return {float4{x, x, x, x}}; }

  static Vec load(const float* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static Vec load(const bfloat16* p) {
    uint4 bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    return {(float4)(bits << 16)};
  }
  static Vec load(const float16* p) { return {float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}}; }
  template <class T>
  static Vec load(const T* p, int n) {  // the first n lanes; the others are 0
    T buffer[lanes] = {};
    for (int i = 0; i < lanes; ++i)
      if (i < n) buffer[i] = p[i];
    return load(buffer);
  }

  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  void store(bfloat16* p) const {
    uint4 bits = (uint4)v;
    uint4 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    int4 ordered = v == v;
    rounded = ((uint4)ordered & rounded) | (~(uint4)ordered & ((bits >> 16) | 0x40));
    for (int i = 0; i < lanes; ++i) p[i].bits = uint16_t(rounded[i]);
  }
  void store(float16* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = from_float<float16>(v[i]);
  }
  template <class T>
  void store(T* p, int n) const {
    T buffer[lanes];
    store(buffer);
    for (int i = 0; i < lanes; ++i)
      if (i < n) p[i] = buffer[i];
  }

  float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  float max() const {
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend Mask operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  friend Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
  // a >= b, or one of them is NaN.
  friend Mask not_less(Vec a, Vec b) { return ~(a < b); }
};

inline Vec fma(Vec a, Vec b, Vec c) {
  return {a.v * b.v + c.v};
}  // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {c.v - a.v * b.v};
}  // c - a * b
// a * b + c with one rounding (but for a tie in double): what the wider sets' fma does. Slow.
inline Vec fused(Vec a, Vec b, Vec c) {
  typedef double double4 __attribute__((vector_size(32)));
  const auto wide = [](Vec x) { return __builtin_convertvector(x.v, double4); };
  return {__builtin_convertvector(wide(a) * wide(b) + wide(c), float4)};
}
inline Vec select(Mask m, Vec a, Vec b) {
  return {(float4)((m.v & (int4)a.v) | (~m.v & (int4)b.v))};
}
inline Vec min(Vec a, Vec b) {
  return select(a < b, a, b);
}
inline Vec max(Vec a, Vec b) {
  return select(b < a, a, b);
}
inline Vec abs(Vec a) {
  return {(float4)((int4)a.v & 0x7fffffff)};
}
inline Vec sqrt(Vec a) {
  for (int i = 0; i < Vec::lanes; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
}

// Nearest integer, for |a| < 2^22.
inline Vec round(Vec a) {
  const Vec magic = Vec::set1(12582912.0f);
  return (a + magic) - magic;
}

// a * 2^n for an integral n; 0 where n <= -127, and in the lanes not kept.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  int4 exponent = __builtin_convertvector(max(n, Vec::set1(-127.0f)).v, int4);
  return {a.v * (float4)((exponent + 127) << 23)};
}
inline Vec scale_by_power_of_two(Vec a, Vec n, Mask keep) {
  return select(keep, scale_by_power_of_two(a, n), Vec::zero());
}

struct UVec {
  uint4 v;

  static UVec set1(uint32_t x) { return {uint4{x, x, x, x}}; }
  static UVec block_order() { return {uint4{0, 1, 2, 3}}; }
  friend UVec operator+(UVec a, UVec b) { return {a.v + b.v}; }
  friend UVec operator^(UVec a, UVec b) { return {a.v ^ b.v}; }
};

// The low and the high half of the 64-bit products, lane by lane.
inline void multiply_wide(UVec a, UVec b, UVec& low, UVec& high) {
  for (int i = 0; i < Vec::lanes; ++i) {
    uint64_t product = uint64_t(a.v[i]) * b.v[i];
    low.v[i] = uint32_t(product);
    high.v[i] = uint32_t(product >> 32);
  }
}

// Blocks of four words, one in each lane, in block_order(): bit 8 * (i % 4) + n of bits[i / 4] says whether number n of
// block i, of 16 bits, the low half of each word first, is at least `limit`.
inline void numbers_at_least(const UVec (&word)[4], uint16_t limit, uint32_t* bits) {
  bits[0] = 0;
  for (int i = 0; i < Vec::lanes; ++i) {
    for (int w = 0; w < 4; ++w) {
      const uint32_t x = word[w].v[i];
      bits[0] |= (uint32_t((x & 0xffff) >= limit) | uint32_t(x >> 16 >= limit) << 1) << (8 * i + 2 * w);
    }
  }
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
