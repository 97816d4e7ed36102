// What a bulk copy is told of a tensor. The real map's 128 bytes are known to drivers and hardware alone; the runner's
// own hold what cuTensorMapEncodeTiled was told, and a mark that they do.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint64_t marked = 0x70616d726f736e65;

  uint64_t mark, base;
  uint64_t size[5];    // of each dimension, the innermost first, in elements
  uint64_t stride[4];  // of all but the innermost, in bytes
  uint16_t box[5];
  uint8_t rank, width;  // of an element, in bytes
  uint8_t row;          // of the swizzle, in bytes; 16 where there is none
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace ptx
