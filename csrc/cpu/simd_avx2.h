// AVX2 + FMA: eight lanes, sixteen registers. bfloat16 is widened by a shift.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tensor_view.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int tile_rows = 6;
constexpr int tile_vecs = 2;

struct Mask {
  __m256 v;  // all ones or all zeros a lane

  static Mask first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
  }
  // Lane i is bit i; bits beyond the lanes are ignored.
  static Mask from_bits(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(bits)), bit), bit))};
  }
  uint32_t bits() const { return uint32_t(_mm256_movemask_ps(v)); }
  friend Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
  friend Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
  friend Mask operator~(Mask a) { return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
};

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const float* p, int n) {  // the first n lanes; the others are 0
    return {_mm256_maskload_ps(p, _mm256_castps_si256(Mask::first(n).v))};
  }
  template <class T>
  static Vec load(const T* p, int n) {
    T buffer[lanes] = {};
    for (int i = 0; i < n && i < lanes; ++i) buffer[i] = p[i];
    return load(buffer);
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bfloat16()); }
  void store(float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, _mm256_castps_si256(Mask::first(n).v), v); }
  template <class T>
  void store(T* p, int n) const {
    T buffer[lanes];
    store(buffer);
    for (int i = 0; i < n && i < lanes; ++i) p[i] = buffer[i];
  }

  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  friend Mask operator>=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
  friend Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
  // a >= b, or one of them is NaN.
  friend Mask not_less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)}; }

 private:
  __m128i to_bfloat16() const {  // round to nearest even; NaN stays a quiet NaN
    __m256i bits = _mm256_castps_si256(v);
    __m256i upper = _mm256_srli_epi32(bits, 16);
    __m256i bias = _mm256_add_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    __m256 unordered = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(unordered));
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    return _mm256_castsi256_si128(packed);
  }
};

inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}  // a * b + c
inline Vec fused(Vec a, Vec b, Vec c) {  // the same, where its single rounding matters
  return fma(a, b, c);
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}  // c - a * b
inline Vec select(Mask m, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, m.v)};
}
inline Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}
inline Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
inline Vec abs(Vec a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}
inline Vec sqrt(Vec a) {
  return {_mm256_sqrt_ps(a.v)};
}

// Nearest integer.
inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// a * 2^n for an integral n; 0 where n <= -127, and in the lanes not kept.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  __m256i exponent = _mm256_cvtps_epi32(_mm256_max_ps(n.v, _mm256_set1_ps(-127.0f)));
  exponent = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}
inline Vec scale_by_power_of_two(Vec a, Vec n, Mask keep) {
  return select(keep, scale_by_power_of_two(a, n), Vec::zero());
}

struct UVec {
  __m256i v;

  static UVec set1(uint32_t x) { return {_mm256_set1_epi32(int32_t(x))}; }
  static UVec block_order() { return {_mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7)}; }
  friend UVec operator+(UVec a, UVec b) { return {_mm256_add_epi32(a.v, b.v)}; }
  friend UVec operator^(UVec a, UVec b) { return {_mm256_xor_si256(a.v, b.v)}; }
};

// The low and the high half of the 64-bit products, lane by lane.
inline void multiply_wide(UVec a, UVec b, UVec& low, UVec& high) {
  __m256i even = _mm256_mul_epu32(a.v, b.v);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  low = {_mm256_mullo_epi32(a.v, b.v)};
  high = {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)};
}

// Blocks of four words, one in each lane, in block_order(): bit 8 * (i % 4) + n of bits[i / 4] says whether number n of
// block i, of 16 bits, the low half of each word first, is at least `limit`.
inline void numbers_at_least(const UVec (&word)[4], uint16_t limit, uint32_t* bits) {
  const __m256i first = _mm256_unpacklo_epi32(word[0].v, word[1].v),
                second = _mm256_unpackhi_epi32(word[0].v, word[1].v);
  const __m256i third = _mm256_unpacklo_epi32(word[2].v, word[3].v),
                fourth = _mm256_unpackhi_epi32(word[2].v, word[3].v);
  const auto at_least = [least = _mm256_set1_epi16(int16_t(limit))](__m256i x) {
    return _mm256_cmpeq_epi16(_mm256_max_epu16(x, least), x);
  };
  const auto store = [&](uint32_t* out, __m256i a, __m256i b) {
    *out = uint32_t(_mm256_movemask_epi8(_mm256_packs_epi16(at_least(a), at_least(b))));
  };
  store(bits, _mm256_unpacklo_epi64(first, third), _mm256_unpackhi_epi64(first, third));
  store(bits + 1, _mm256_unpacklo_epi64(second, fourth), _mm256_unpackhi_epi64(second, fourth));
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
