// Dropout by Philox4x32-7, the same random bits as csrc/cpu/philox.h, which says what they are.
//
// Element e of a tensor owns number e % 8, of 16 bits, of block e / 8: the elements of an aligned octet share one block
// of seven rounds. The seed and the offset are read by the kernel from device memory.
#pragma once

#include "launch.h"

namespace pytransformer::cuda {

// A kernel's argument: what the host knows of a dropout.
struct DropoutArgument {
  const int64_t* rng = nullptr;  // (seed, offset); null: nothing is dropped
  uint32_t limit = 0;            // an element is kept iff its number, in the upper half of a word, is at least this
  float scale = 1;               // of what is kept: the reciprocal of its share
};

inline DropoutArgument dropout(float p, const Launch& launch) {
  if (p <= 0) return {};
  if (launch.rng == nullptr) fail("dropout with probability ", p, " needs rng");
  const auto dropped = uint32_t(double(p) * 65536.0 + 0.5);
  if (dropped >= 65536) return {launch.rng, 0xffffffffu, 0.0f};
  return {launch.rng, dropped << 16, 65536.0f / float(65536 - dropped)};
}

class Dropout {
 public:
  __device__ explicit Dropout(const DropoutArgument& a) : limit_(a.limit), scale_(a.scale), on_(a.rng) {
    if (!on_) return;
    key_ = make_uint2(uint32_t(a.rng[0]), uint32_t(uint64_t(a.rng[0]) >> 32));
    offset_ = make_uint2(uint32_t(a.rng[1]), uint32_t(uint64_t(a.rng[1]) >> 32));
  }

  __device__ explicit operator bool() const { return on_; }

  // Scales or zeroes the elements [first, first + N). Several elements start at a multiple of their number.
  template <int N>
  __device__ void apply(int64_t first, float (&x)[N]) const {
    if (!on_) return;
    uint4 block[1];
    blocks(uint64_t(first) / 8, 0, block);
    multiply(int(first % 8), block[0], x);
  }

  // The same for packs of elements, `step` apart, which is a multiple of 8: their rounds share the keys.
  template <int N, int COUNT>
  __device__ void apply(int64_t first, int step, float (&x)[COUNT][N]) const {
    if (!on_) return;
    uint4 block[COUNT];
    blocks(uint64_t(first) / 8, unsigned(step) / 8, block);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) multiply(int(first % 8), block[i], x[i]);
  }

  // Whether elements [8 * index, 8 * index + 8) are kept, one bit each.
  __device__ uint32_t keeps(uint64_t index) const {
    uint4 block[1];
    blocks(index, 0, block);
    const uint32_t words[4] = {block[0].x, block[0].y, block[0].z, block[0].w};
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      kept |= uint32_t(words[i] << 16 >= limit_) << 2 * i | uint32_t(words[i] >= limit_) << (2 * i + 1);
    }
    return kept;
  }

 private:
  // The random words of blocks first + i * step.
  template <int COUNT>
  __device__ void blocks(uint64_t first, unsigned step, uint4 (&c)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const uint64_t index = first + i * step;
      c[i] = make_uint4(uint32_t(index), uint32_t(index >> 32), offset_.x, offset_.y);
    }
    uint2 k = key_;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const uint64_t product0 = uint64_t(0xD2511F53u) * c[i].x, product1 = uint64_t(0xCD9E8D57u) * c[i].z;
        c[i] = make_uint4(uint32_t(product1 >> 32) ^ c[i].y ^ k.x, uint32_t(product1),
                          uint32_t(product0 >> 32) ^ c[i].w ^ k.y, uint32_t(product0));
      }
      k = make_uint2(k.x + 0x9E3779B9u, k.y + 0xBB67AE85u);
    }
  }

  // Neighbours, of which the first has number `place` of the block.
  template <int N>
  __device__ void multiply(int place, const uint4& block, float (&x)[N]) const {
    static_assert(N == 1 || N == 4 || N == 8);
    const bool low = N == 8 || place < 4;
    const uint32_t words[4] = {low ? block.x : block.z, low ? block.y : block.w, block.z, block.w};
    if constexpr (N == 1) {
      const uint32_t word = place % 4 < 2 ? words[0] : words[1];
      x[0] = multiply(x[0], place % 2 == 0 ? word << 16 : word);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = multiply(x[i], i % 2 == 0 ? words[i / 2] << 16 : words[i / 2]);
    }
  }

  // Not a product with 0: a dropped infinity is 0.
  __device__ float multiply(float x, uint32_t number) const { return number >= limit_ ? x * scale_ : 0.0f; }

  uint2 key_ = {}, offset_ = {};
  uint32_t limit_;
  float scale_;
  bool on_;
};

}  // namespace pytransformer::cuda
