// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the random
// bits of every dropout in this library, on every backend.
//
// Element e of a tensor (its index in the contiguous order of the tensor's logical shape) owns word
// e % 4 of the block whose 128-bit counter is (e / 4, offset) and whose 64-bit key is `seed`.
// It is kept iff its word >= round(p * 2^32). Nothing but (seed, offset) is stored for the backward.
#pragma once

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

struct PhiloxKey {
  uint64_t seed = 0;
  uint64_t offset = 0;
};

// The words of blocks [block, block + lanes): word[w] of lane i belongs to element 4 * (block + i) + w.
// `block` is a multiple of lanes, so that the low counter word never carries inside a vector.
inline void philox_blocks(uint64_t block, PhiloxKey key, UVec (&word)[4]) {
  const UVec multiplier0 = UVec::set1(0xD2511F53u), multiplier1 = UVec::set1(0xCD9E8D57u);
  UVec c0 = UVec::set1(uint32_t(block)) + UVec::iota();
  UVec c1 = UVec::set1(uint32_t(block >> 32));
  UVec c2 = UVec::set1(uint32_t(key.offset)), c3 = UVec::set1(uint32_t(key.offset >> 32));
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    UVec low0, high0, low1, high1;
    multiply_wide(multiplier0, c0, low0, high0);
    multiply_wide(multiplier1, c2, low1, high1);
    c0 = high1 ^ c1 ^ UVec::set1(k0);
    c1 = low1;
    c2 = high0 ^ c3 ^ UVec::set1(k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// Bit j of word i changes places with bit i of word j, for 64 words.
inline void transpose_bits(uint64_t* words) {
  uint64_t mask = 0x00000000ffffffff;
  for (int half = 32; half > 0; half /= 2, mask ^= mask << half) {
    for (int i = 0; i < 64; i = ((i | half) + 1) & ~half) {
      const uint64_t swapped = ((words[i] >> half) ^ words[i + half]) & mask;
      words[i] ^= swapped << half;
      words[i + half] ^= swapped;
    }
  }
}

struct Dropout {
  PhiloxKey key;
  uint32_t threshold = 0;  // keep iff word >= threshold
  float scale = 1.0f;      // 1 / (1 - p)

  static constexpr int64_t spare = 128;  // what multipliers() may write besides what is asked for

  static Dropout make(float p, PhiloxKey key) {
    if (p >= 1.0f) return {key, 0xffffffffu, 0.0f};
    return {key, uint32_t(double(p) * 4294967296.0 + 0.5), 1.0f / (1.0f - p)};
  }

  // Bit w * 64 + i of the words says whether element first + 64 * w + i is kept.
  void keep_bits(uint64_t first, int64_t count, uint64_t* words) const {
    const int64_t lead = int64_t(first % 64);
    uint64_t group = first / 64, low = kept(group);
    for (int64_t left = count; left > 0; left -= 64) {
      const uint64_t high = lead + left > 64 ? kept(++group) : 0;
      *words++ = lead == 0 ? low : low >> lead | high << (64 - lead);
      low = high;
    }
  }

  // multiplier[i] = scale or 0 for the elements [first, first + count).
  // `multiplier` has room for count + spare floats; returns where element `first` lies in it.
  const float* multipliers(uint64_t first, int64_t count, float* multiplier) const {
    const Vec value = Vec::set1(scale);
    const int64_t lead = int64_t(first % 64);
    for (int64_t done = 0; done < lead + count; done += 64) {
      const uint64_t bits = kept((first + uint64_t(done)) / 64);
      for (int i = 0; i < 64; i += Vec::lanes) {
        select(Mask::from_bits(uint32_t(bits >> i)), value, Vec::zero()).store(multiplier + done + i);
      }
    }
    return multiplier + lead;
  }

 private:
  // Bits 0 to 15 of x at every fourth place.
  static uint64_t spread(uint64_t x) {
    x = (x | x << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    x = (x | x << 6) & 0x0303030303030303;
    return (x | x << 3) & 0x1111111111111111;
  }

  // Whether elements [64 * group, 64 * group + 64) are kept, one bit each.
  uint64_t kept(uint64_t group) const {
    const UVec limit = UVec::set1(threshold);
    uint64_t bits = 0;
    for (int i = 0; i < 16; i += Vec::lanes) {
      UVec word[4];
      philox_blocks(16 * group + uint64_t(i), key, word);
      for (int w = 0; w < 4; ++w) bits |= spread((word[w] >= limit).bits()) << (w + 4 * i);
    }
    return bits;
  }
};

}  // namespace pytransformer::PYTRANSFORMER_ISA
