// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the random
// bits of every dropout in this library, on every backend. Seven rounds are the fewest that pass all
// of TestU01's tests there.
//
// A block has four words of 32 bits, or eight numbers of 16, the low half of each word first. Element e
// of a tensor (its index in the contiguous order of the tensor's logical shape) owns number e % 8 of the
// block whose 128-bit counter is (e / 8, offset) and whose 64-bit key is `seed`. It is kept iff its
// number >= round(p * 2^16). Nothing but (seed, offset) is stored for the backward.
#pragma once

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

struct PhiloxKey {
  uint64_t seed = 0;
  uint64_t offset = 0;
};

// The words of blocks [block, block + lanes), in the order of UVec::block_order(). `block` is a multiple of lanes, so
// that the low counter word never carries inside a vector.
inline void philox_blocks(uint64_t block, PhiloxKey key, UVec (&word)[4]) {
  const UVec multiplier0 = UVec::set1(0xD2511F53u), multiplier1 = UVec::set1(0xCD9E8D57u);
  UVec c0 = UVec::set1(uint32_t(block)) + UVec::block_order();
  UVec c1 = UVec::set1(uint32_t(block >> 32));
  UVec c2 = UVec::set1(uint32_t(key.offset)), c3 = UVec::set1(uint32_t(key.offset >> 32));
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int round = 0; round < 7; ++round) {
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
  uint32_t dropped = 0;  // of 65536: keep iff the number is at least this
  float scale = 1.0f;    // of what is kept: the reciprocal of its share

  static constexpr int64_t spare = 128;  // what multipliers() may write besides what is asked for

  static Dropout make(float p, PhiloxKey key) {
    const auto dropped = uint32_t(double(p) * 65536.0 + 0.5);
    return {key, dropped, dropped < 65536 ? 65536.0f / float(65536 - dropped) : 0.0f};
  }

  // Bit w * 64 + i of the words says whether element first + 64 * w + i is kept.
  void keep_bits(uint64_t first, int64_t count, uint64_t* words) const {
    const int64_t lead = int64_t(first % 64);
    Kept kept(*this, first / 64);
    uint64_t low = kept.next();
    for (int64_t left = count; left > 0; left -= 64) {
      const uint64_t high = lead + left > 64 ? kept.next() : 0;
      *words++ = lead == 0 ? low : low >> lead | high << (64 - lead);
      low = high;
    }
  }

  // multiplier[i] = scale or 0 for the elements [first, first + count).
  // `multiplier` has room for count + spare floats; returns where element `first` lies in it.
  const float* multipliers(uint64_t first, int64_t count, float* multiplier) const {
    const Vec value = Vec::set1(scale);
    const int64_t lead = int64_t(first % 64);
    Kept kept(*this, first / 64);
    for (int64_t done = 0; done < lead + count; done += 64) {
      const uint64_t bits = kept.next();
      for (int i = 0; i < 64; i += Vec::lanes) {
        select(Mask::from_bits(uint32_t(bits >> i)), value, Vec::zero()).store(multiplier + done + i);
      }
    }
    return multiplier + lead;
  }

 private:
  // Whether elements are kept, one bit each: 64 of them in each call of next(), from element 64 * group on.
  class Kept {
   public:
    Kept(const Dropout& dropout, uint64_t group) : dropout_(dropout), group_(group) {
      if (group % 2 != 0) draw();
    }

    uint64_t next() {
      if (group_ % 2 == 0) draw();
      return bits_[group_++ % 2];
    }

   private:
    // Sixteen blocks, which decide on 128 elements.
    void draw() {
      uint32_t bits[4] = {};
      for (int i = 0; i < 16 && dropout_.dropped < 65536; i += Vec::lanes) {
        UVec word[4];
        philox_blocks(group_ / 2 * 16 + uint64_t(i), dropout_.key, word);
        numbers_at_least(word, uint16_t(dropout_.dropped), bits + i / 4);
      }
      for (int j = 0; j < 2; ++j) bits_[j] = bits[2 * j] | uint64_t(bits[2 * j + 1]) << 32;
    }

    const Dropout& dropout_;
    uint64_t group_;
    uint64_t bits_[2] = {};
  };
};

}  // namespace pytransformer::PYTRANSFORMER_ISA
