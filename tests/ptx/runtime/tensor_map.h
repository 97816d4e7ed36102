// What a bulk copy is told of a tensor. The real map's 128 bytes are known to drivers and hardware alone; the runner's
// own hold what cuTensorMapEncodeTiled was told, and a mark that they do.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint64_t marked = 0x70616d726f736e65;
  enum Type : uint8_t {
    u8 = 0,
    u16 = 1,
    u32 = 2,
    s32 = 3,
    f16 = 6,
    f32 = 7,
    bf16 = 9
  };  // as CUtensorMapDataType has them

  // Of an element in bytes; 0 of a type that the runner does not know.
  static constexpr uint32_t width_of(uint32_t type) {
    switch (type) {
      case u8: return 1;
      case u16:
      case f16:
      case bf16: return 2;
      case u32:
      case s32:
      case f32: return 4;
      default: return 0;
    }
  }

  uint64_t mark, base;
  uint64_t size[5];    // of each dimension, the innermost first, in elements
  uint64_t stride[4];  // of all but the innermost, in bytes
  uint16_t box[5];
  uint8_t rank, type, width;  // of an element, in bytes
  uint8_t row;                // of the swizzle, in bytes; 16 where there is none
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace ptx
