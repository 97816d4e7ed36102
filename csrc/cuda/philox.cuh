// Dropout by Philox4x32-10, the same random bits as csrc/cpu/philox.h, which says what they are.
//
// Element e of a tensor owns word e % 4 of block e / 4: the elements of an aligned quad share one block of ten rounds.
// The seed and the offset are read by the kernel from device memory.
#pragma once

#include "launch.h"

namespace pytransformer::cuda {

// A kernel's argument: what the host knows of a dropout.
struct DropoutArgument {
  const int64_t* rng = nullptr;  // (seed, offset); null: nothing is dropped
  uint32_t threshold = 0;        // an element is kept iff its word is at least this
  float scale = 1;               // of what is kept: 1 / (1 - p)
};

inline DropoutArgument dropout(float p, const Launch& launch) {
  if (p <= 0) return {};
  if (launch.rng == nullptr) fail("dropout with probability ", p, " needs rng");
  if (p >= 1) return {launch.rng, 0xffffffffu, 0.0f};
  return {launch.rng, uint32_t(double(p) * 4294967296.0 + 0.5), 1.0f / (1.0f - p)};
}

class Dropout {
 public:
  __device__ explicit Dropout(const DropoutArgument& a) : threshold_(a.threshold), scale_(a.scale), on_(a.rng) {
    if (!on_) return;
    key_ = make_uint2(uint32_t(a.rng[0]), uint32_t(uint64_t(a.rng[0]) >> 32));
    offset_ = make_uint2(uint32_t(a.rng[1]), uint32_t(uint64_t(a.rng[1]) >> 32));
  }

  __device__ explicit operator bool() const { return on_; }

  // Scales or zeroes the elements [first, first + N). Several elements start at a multiple of four.
  template <int N>
  __device__ void apply(int64_t first, float (&x)[N]) const {
    static_assert(N == 1 || N % 4 == 0);
    if (!on_) return;
    if constexpr (N == 1) {
      const uint4 words = block(first / 4);
      const int word = int(first % 4);
      const uint32_t low = word == 0 ? words.x : words.y, high = word == 2 ? words.z : words.w;
      x[0] = multiply(x[0], word < 2 ? low : high);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const uint4 words = block((first + i) / 4);
        x[i] = multiply(x[i], words.x);
        x[i + 1] = multiply(x[i + 1], words.y);
        x[i + 2] = multiply(x[i + 2], words.z);
        x[i + 3] = multiply(x[i + 3], words.w);
      }
    }
  }

  // The random words of elements [4 * index, 4 * index + 4).
  __device__ uint4 block(uint64_t index) const {
    uint4 c = make_uint4(uint32_t(index), uint32_t(index >> 32), offset_.x, offset_.y);
    uint2 k = key_;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(0xD2511F53u, c.x), high1 = __umulhi(0xCD9E8D57u, c.z);
      c = make_uint4(high1 ^ c.y ^ k.x, 0xCD9E8D57u * c.z, high0 ^ c.w ^ k.y, 0xD2511F53u * c.x);
      k = make_uint2(k.x + 0x9E3779B9u, k.y + 0xBB67AE85u);
    }
    return c;
  }

  __device__ bool keeps(uint32_t word) const { return word >= threshold_; }
  __device__ float scale() const { return scale_; }

 private:
  // Not a product with 0: a dropped infinity is 0.
  __device__ float multiply(float x, uint32_t word) const { return keeps(word) ? x * scale_ : 0.0f; }

  uint2 key_ = {}, offset_ = {};
  uint32_t threshold_;
  float scale_;
  bool on_;
};

}  // namespace pytransformer::cuda
