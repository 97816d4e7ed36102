// AVX-512 (F, BW, VL, DQ): sixteen lanes, thirty-two registers, a mask register a lane mask.
//
// With AVX512-BF16 two more instructions exist: a rounding conversion, and a dot product that
// multiplies pairs of bfloat16 values and adds both products to a float32 lane (PairVec, dot).
// PYTRANSFORMER_EMULATE_BF16 spells them out in AVX-512, so that the kernels built on them can be
// tested on machines that lack them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tensor_view.h"

#if defined(__AVX512BF16__) || defined(PYTRANSFORMER_EMULATE_BF16)
#define PYTRANSFORMER_BF16_DOT 1
#endif

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int tile_rows = 6;
constexpr int tile_vecs = 4;

struct Mask {
  __mmask16 v;

  static Mask first(int n) { return {n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1)}; }
  // Lane i is bit i; bits beyond the lanes are ignored.
  static Mask from_bits(uint32_t bits) { return {__mmask16(bits)}; }
  uint32_t bits() const { return v; }
  friend Mask operator&(Mask a, Mask b) { return {__mmask16(a.v & b.v)}; }
  friend Mask operator|(Mask a, Mask b) { return {__mmask16(a.v | b.v)}; }
  friend Mask operator~(Mask a) { return {__mmask16(~a.v)}; }
};

// 32-bit lanes to the nearest-even bfloat16; NaN stays a quiet NaN.
inline __m256i round_to_bfloat16(__m512 v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 unordered = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, unordered, bits, _mm512_set1_epi32(0x400000));
  const __m512i upper_halves = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                                0xb0009, 0x70005, 0x30001);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_halves, rounded));
#endif
}

struct Vec {
  static constexpr int lanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const float* p, int n) {  // the first n lanes; the others are 0
    return {_mm512_maskz_loadu_ps(Mask::first(n).v, p)};
  }
  static Vec load(const bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(Mask::first(n).v, p)); }
  static Vec load(const float16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(Mask::first(n).v, p))}; }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bfloat16(v)); }
  void store(float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_float16()); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, Mask::first(n).v, v); }
  void store(bfloat16* p, int n) const { _mm256_mask_storeu_epi16(p, Mask::first(n).v, round_to_bfloat16(v)); }
  void store(float16* p, int n) const { _mm256_mask_storeu_epi16(p, Mask::first(n).v, to_float16()); }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend Mask operator>=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
  friend Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  // a >= b, or one of them is NaN.
  friend Mask not_less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }

 private:
  __m256i to_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec widen(__m256i half) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))}; }
};

inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}  // a * b + c
inline Vec fused(Vec a, Vec b, Vec c) {  // the same, where its single rounding matters
  return fma(a, b, c);
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}  // c - a * b
inline Vec select(Mask m, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(m.v, b.v, a.v)};
}
inline Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline Vec abs(Vec a) {
  return {_mm512_abs_ps(a.v)};
}
inline Vec sqrt(Vec a) {
  return {_mm512_sqrt_ps(a.v)};
}

// Nearest integer.
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// a * 2^n for an integral n; 0 where the result underflows, and in the lanes not kept.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}
inline Vec scale_by_power_of_two(Vec a, Vec n, Mask keep) {
  return {_mm512_maskz_scalef_ps(keep.v, a.v, n.v)};
}

struct UVec {
  __m512i v;

  static UVec set1(uint32_t x) { return {_mm512_set1_epi32(int32_t(x))}; }
  static UVec block_order() { return {_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)}; }
  friend UVec operator+(UVec a, UVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
  friend UVec operator^(UVec a, UVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
};

// The low and the high half of the 64-bit products, lane by lane.
inline void multiply_wide(UVec a, UVec b, UVec& low, UVec& high) {
  __m512i even = _mm512_mul_epu32(a.v, b.v);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  low = {_mm512_mullo_epi32(a.v, b.v)};
  high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
}

#ifdef PYTRANSFORMER_BF16_DOT

// Sixteen pairs of bfloat16 values; the first of a pair lies in the lower half of its lane.
struct PairVec {
  __m512i v;

  static PairVec load(const bfloat16* p) { return {_mm512_loadu_si512(p)}; }
  static PairVec of_bits(Vec x) { return {_mm512_castps_si512(x.v)}; }
  Vec as_bits() const { return {_mm512_castsi512_ps(v)}; }
  // Pairs (even[i], odd[i]) for i < count, and zeros beyond. A row that is null is zeros.
  static PairVec zip(const bfloat16* even, const bfloat16* odd, int count) {
    const __mmask16 some = Mask::first(count).v;
    const auto row = [some](const bfloat16* p) {
      return p == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
    };
    return {_mm512_or_si512(row(even), _mm512_slli_epi32(row(odd), 16))};
  }
  // The same of values yet to be rounded.
  static PairVec zip(Vec even, Vec odd) {
    const auto wide = [](Vec x) { return _mm512_cvtepu16_epi32(round_to_bfloat16(x.v)); };
    return {_mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16))};
  }
  // One pair for all lanes.
  static PairVec broadcast(const bfloat16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm512_set1_epi32(pair)};
  }
  void store(bfloat16* p) const { _mm512_storeu_si512(p, v); }
};

// The largest magnitudes of the values seen, to tell whether all of them were finite.
class Magnitudes {
 public:
  void see(PairVec x) { largest_ = _mm512_max_epu16(largest_, _mm512_and_si512(x.v, _mm512_set1_epi16(0x7fff))); }
  bool finite() const { return _mm512_cmpge_epu16_mask(largest_, _mm512_set1_epi16(0x7f80)) == 0; }

 private:
  __m512i largest_ = _mm512_setzero_si512();
};

// Both vectors, one after the other.
inline void store(bfloat16* p, Vec first, Vec second) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
#else
  first.store(p);
  second.store(p + Vec::lanes);
#endif
}

// acc + a.first * b.first + a.second * b.second, lane by lane, accumulated in float32.
inline Vec dot(PairVec a, PairVec b, Vec acc) {
#if defined(__AVX512BF16__)
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
  __m512 a1 = _mm512_castsi512_ps(_mm512_and_si512(a.v, upper));
  __m512 b1 = _mm512_castsi512_ps(_mm512_and_si512(b.v, upper));
  __m512 a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16));
  __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16));
  return {_mm512_fmadd_ps(a0, b0, _mm512_fmadd_ps(a1, b1, acc.v))};
#endif
}

#endif  // PYTRANSFORMER_BF16_DOT

// Blocks of four words, one in each lane, in block_order(): bit 8 * (i % 4) + n of bits[i / 4] says whether number n of
// block i, of 16 bits, the low half of each word first, is at least `limit`.
inline void numbers_at_least(const UVec (&word)[4], uint16_t limit, uint32_t* bits) {
  const __m512i first = _mm512_unpacklo_epi32(word[0].v, word[1].v),
                second = _mm512_unpackhi_epi32(word[0].v, word[1].v);
  const __m512i third = _mm512_unpacklo_epi32(word[2].v, word[3].v),
                fourth = _mm512_unpackhi_epi32(word[2].v, word[3].v);
  const __m512i least = _mm512_set1_epi16(int16_t(limit));
  bits[0] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(first, third), least);
  bits[1] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(first, third), least);
  bits[2] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(second, fourth), least);
  bits[3] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(second, fourth), least);
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
