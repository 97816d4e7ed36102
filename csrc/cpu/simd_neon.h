// AArch64 NEON (Advanced SIMD): four lanes, thirty-two registers. Part of the architecture's base, so that every
// AArch64 CPU runs it. bfloat16 is widened by a shift.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "tensor_view.h"

namespace pytransformer::PYTRANSFORMER_ISA {

// 4 x 4 accumulators, no more rows than lanes (gemm.h): as many chains as two to four FMA pipes of latency 4 need.
constexpr int tile_rows = 4;
constexpr int tile_vecs = 4;

struct Mask {
  uint32x4_t v;  // all ones or all zeros a lane

  static Mask first(int n) { return {vcltq_s32(lane_numbers(), vdupq_n_s32(n))}; }
  // Lane i is bit i; bits beyond the lanes are ignored.
  static Mask from_bits(uint32_t bits) { return {vtstq_u32(vdupq_n_u32(bits), bit_of_lane())}; }
  uint32_t bits() const { return vaddvq_u32(vandq_u32(v, bit_of_lane())); }
  friend Mask operator&(Mask a, Mask b) { return {vandq_u32(a.v, b.v)}; }
  friend Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.v, b.v)}; }
  friend Mask operator~(Mask a) { return {vmvnq_u32(a.v)}; }

 private:
  static int32x4_t lane_numbers() {
    static constexpr int32_t numbers[4] = {0, 1, 2, 3};
    return vld1q_s32(numbers);
  }
  static uint32x4_t bit_of_lane() {
    static constexpr uint32_t bits[4] = {1, 2, 4, 8};
    return vld1q_u32(bits);
  }
};

struct Vec {
  static constexpr int lanes = 4;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec set1(float x) { return {vdupq_n_f32(x)}; }

  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const float16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }
  static Vec load(const bfloat16* p) {
    const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(half, 16))};
  }
  template <class T>
  static Vec load(const T* p, int n) {  // the first n lanes; the others are 0
    T buffer[lanes] = {};
    for (int i = 0; i < lanes; ++i)
      if (i < n) buffer[i] = p[i];
    return load(buffer);
  }

  void store(float* p) const { vst1q_f32(p, v); }
  void store(float16* p) const { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  void store(bfloat16* p) const {  // round to nearest even; NaN stays a quiet NaN
    const uint32x4_t bits = vreinterpretq_u32_f32(v), upper = vshrq_n_u32(bits, 16);
    const uint32x4_t bias = vaddq_u32(vandq_u32(upper, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16), quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet)));
  }
  template <class T>
  void store(T* p, int n) const {
    T buffer[lanes];
    store(buffer);
    for (int i = 0; i < lanes; ++i)
      if (i < n) p[i] = buffer[i];
  }

  float sum() const { return vaddvq_f32(v); }
  float max() const { return vmaxnmvq_f32(v); }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  friend Mask operator<(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
  friend Mask operator>=(Vec a, Vec b) { return {vcgeq_f32(a.v, b.v)}; }
  friend Mask operator==(Vec a, Vec b) { return {vceqq_f32(a.v, b.v)}; }
  // a >= b, or one of them is NaN.
  friend Mask not_less(Vec a, Vec b) { return ~(a < b); }
};

inline Vec fma(Vec a, Vec b, Vec c) {
  return {vfmaq_f32(c.v, a.v, b.v)};
}  // a * b + c
inline Vec fused(Vec a, Vec b, Vec c) {  // the same, where its single rounding matters
  return fma(a, b, c);
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {vfmsq_f32(c.v, a.v, b.v)};
}  // c - a * b
inline Vec select(Mask m, Vec a, Vec b) {
  return {vbslq_f32(m.v, a.v, b.v)};
}
// Of these two, b where either is NaN, as on the other sets (NEON's own return NaN).
inline Vec min(Vec a, Vec b) {
  return select(a < b, a, b);
}
inline Vec max(Vec a, Vec b) {
  return select(b < a, a, b);
}
inline Vec abs(Vec a) {
  return {vabsq_f32(a.v)};
}
inline Vec sqrt(Vec a) {
  return {vsqrtq_f32(a.v)};
}

// Nearest integer.
inline Vec round(Vec a) {
  return {vrndnq_f32(a.v)};
}

// a * 2^n for an integral n; 0 where n <= -127, and in the lanes not kept.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const int32x4_t exponent = vcvtq_s32_f32(max(n, Vec::set1(-127.0f)).v);
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23)))};
}
inline Vec scale_by_power_of_two(Vec a, Vec n, Mask keep) {
  return select(keep, scale_by_power_of_two(a, n), Vec::zero());
}

struct UVec {
  uint32x4_t v;

  static UVec set1(uint32_t x) { return {vdupq_n_u32(x)}; }
  static UVec block_order() {
    static constexpr uint32_t numbers[4] = {0, 1, 2, 3};
    return {vld1q_u32(numbers)};
  }
  friend UVec operator+(UVec a, UVec b) { return {vaddq_u32(a.v, b.v)}; }
  friend UVec operator^(UVec a, UVec b) { return {veorq_u32(a.v, b.v)}; }
};

// The low and the high half of the 64-bit products, lane by lane.
inline void multiply_wide(UVec a, UVec b, UVec& low, UVec& high) {
  const uint64x2_t first = vmull_u32(vget_low_u32(a.v), vget_low_u32(b.v)), last = vmull_high_u32(a.v, b.v);
  low = {vuzp1q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(last))};
  high = {vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(last))};
}

// Blocks of four words, one in each lane, in block_order(): bit 8 * (i % 4) + n of bits[i / 4] says whether number n of
// block i, of 16 bits, the low half of each word first, is at least `limit`.
inline void numbers_at_least(const UVec (&word)[4], uint16_t limit, uint32_t* bits) {
  const uint32x4x2_t even = vzipq_u32(word[0].v, word[2].v), odd = vzipq_u32(word[1].v, word[3].v);
  static constexpr uint16_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  bits[0] = 0;
  for (int half = 0; half < 2; ++half) {
    const uint32x4x2_t blocks = vzipq_u32(even.val[half], odd.val[half]);
    for (int i = 0; i < 2; ++i) {
      const uint16x8_t kept = vcgeq_u16(vreinterpretq_u16_u32(blocks.val[i]), vdupq_n_u16(limit));
      bits[0] |= uint32_t(vaddvq_u16(vandq_u16(kept, vld1q_u16(places)))) << 8 * (2 * half + i);
    }
  }
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
