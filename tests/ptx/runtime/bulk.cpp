// cp.async.bulk.tensor: a box of a tensor, from global to shared memory, copied by an engine of the hardware that one
// thread asks. Where the box goes beyond the tensor there are zeros. Rows of it lie one behind the other, the chunks of
// 16 bytes permuted by their address (the swizzle of the map).
//
// The bytes come when nobody else can go on, the latest that the program allows, or with a random schedule at any time;
// they count at an mbarrier, zeros too. For the detectors they are written by an agent of that barrier's, through the
// async proxy, which knows what the asking thread knew: who reads them must have waited for the barrier's phase.
#include <algorithm>
#include <cstring>
#include <vector>

#include "block.h"
#include "order.h"
#include "tensor_map.h"

namespace ptx {
namespace {

constexpr uint32_t chunk_bytes = 16;

struct Piece {  // of one chunk
  uint32_t to;
  const uint8_t* from;  // null: zeros
  uint32_t bytes;
};

// A map that is where maps may be, and is one.
const TensorMap* checked_map(uint64_t address, uint32_t rank, Line line) {
  uint32_t hint = ~0u;
  if (address % 64) report("bulk", line, "a tensor map at 0x%lx, no multiple of 64", address);
  const auto* const map =
      reinterpret_cast<const TensorMap*>(at_global(address & ~7ull, 8, false, Access::weak, line, hint));
  if (map->mark != TensorMap::marked) {
    report("bulk", line, "what is at 0x%lx is no tensor map", address);
    return nullptr;
  }
  if (map->rank == rank) return map;
  report("bulk", line, "a copy of %u dimensions by a map of %u", rank, map->rank);
  return nullptr;
}

// The checked source of `bytes` bytes, in accesses of at most a sector.
const uint8_t* source_of(uint64_t from, uint32_t bytes, Line line, uint32_t& hint) {
  for (uint32_t done = 0; done < bytes;) {
    uint32_t step = 32;
    while ((from + done) % step || step > bytes - done) step /= 2;
    at_global(from + done, step, false, Access::weak, line, hint);
    done += step;
  }
  return reinterpret_cast<const uint8_t*>(from);
}

// Where a byte of the box lies.
uint32_t swizzled(uint32_t address, uint32_t row) {
  return address ^ ((address >> 7 & (row / chunk_bytes - 1)) << 4);
}

struct Box {
  const TensorMap& map;
  const int32_t* at;
  uint32_t rows = 1;  // of box[0] elements

  Box(const TensorMap& m, const int32_t* first) : map(m), at(first) {
    for (uint32_t d = 1; d < map.rank; ++d) rows *= map.box[d];
  }
  uint32_t row_bytes() const { return map.box[0] * map.width; }

  // Where row `index` begins, were it to begin at column 0; false where it lies beyond the tensor.
  bool find_row(uint32_t index, uint64_t& begin) const {
    begin = map.base;
    for (uint32_t d = 1; d < map.rank; ++d) {
      const int64_t i = int64_t(at[d]) + index % map.box[d];
      index /= map.box[d];
      if (i < 0 || uint64_t(i) >= map.size[d]) return false;
      begin += uint64_t(i) * map.stride[d - 1];
    }
    return true;
  }

  // The pieces of row `index`, which is to lie at `to`.
  void add_row(std::vector<Piece>& pieces, uint32_t index, uint32_t to, Line line, uint32_t& hint) const {
    uint64_t begin = 0;
    const bool there = find_row(index, begin);
    const int64_t first = std::max<int64_t>(at[0], 0);
    const int64_t end = there ? std::min<int64_t>(int64_t(at[0]) + map.box[0], map.size[0]) : 0;
    if (first < end) source_of(begin + first * map.width, (end - first) * map.width, line, hint);
    for (uint32_t i = 0; i < row_bytes(); i += map.width) {
      const int64_t column = int64_t(at[0]) + i / map.width;
      const bool given = column >= first && column < end;
      const auto* const from = given ? reinterpret_cast<const uint8_t*>(begin + column * map.width) : nullptr;
      pieces.push_back({swizzled(to + i, map.row), from, map.width});
    }
  }
};

void make(const std::vector<Piece>& pieces) {
  for (const Piece& piece : pieces) {
    if (piece.from != nullptr) {
      std::memcpy(block.window + piece.to, piece.from, piece.bytes);
    } else {
      std::memset(block.window + piece.to, 0, piece.bytes);
    }
  }
}

}  // namespace

void load_box(uint32_t to, uint64_t map_address, const int32_t* at, uint32_t rank, uint32_t barrier, Line line,
              uint32_t& hint) {
  const TensorMap* const map = checked_map(map_address, rank, line);
  if (map == nullptr) return;
  const Box box(*map, at);
  const uint32_t bytes = box.rows * box.row_bytes();
  if (to % 128) report("misaligned", line, "a bulk copy to shared+%u", to);
  if (to < shared_base || uint64_t(to) + bytes > block.shared_end) {
    report("out-of-bounds", line, "a bulk copy of %u bytes to shared+%u, which ends at %u", bytes, to,
           block.shared_end);
    return;
  }
  std::vector<Piece> pieces;
  for (uint32_t row = 0; row < box.rows; ++row) {
    box.add_row(pieces, row, to + row * box.row_bytes(), line, hint);
  }
  const uint32_t load = mbarrier_begin_load(barrier, line);
  if (load == 0) return;
  if (options.races) {
    const order::Actor engine{mbarrier_agent(barrier), load, &order::knowledge_of(current->number),
                              order::Proxy::async};
    order::access_shared(to, bytes, true, Access::weak, engine, line);
  }
  later([=, pieces = std::move(pieces)] {
    make(pieces);
    mbarrier_end_load(barrier, load, bytes);
  });
}

}  // namespace ptx

// As cuTensorMapEncodeTiled has it, of maps that the runner knows: no interleaving, no steps between elements, zeros
// beyond the tensor. 0, or 1 where it must be refused.
extern "C" int ptx_encode_tensor_map(void* to, uint32_t width, uint32_t rank, uint64_t base, const uint64_t* size,
                                     const uint64_t* stride, const uint32_t* box, uint32_t swizzle_row) {
  ptx::TensorMap map{};
  if (rank < 1 || rank > 5 || base % 16 || box[0] * width % 16) return 1;
  if (swizzle_row > 16 && box[0] * width > swizzle_row) return 1;
  map.mark = ptx::TensorMap::marked;
  map.base = base;
  map.rank = uint8_t(rank);
  map.width = uint8_t(width);
  map.row = uint8_t(swizzle_row);
  for (uint32_t d = 0; d < rank; ++d) {
    if (size[d] < 1 || size[d] > uint64_t(1) << 32 || box[d] < 1 || box[d] > 256) return 1;
    map.size[d] = size[d];
    map.box[d] = uint16_t(box[d]);
    if (d == 0) continue;
    if (stride[d - 1] == 0 || stride[d - 1] % 16 || stride[d - 1] >= uint64_t(1) << 40) return 1;
    map.stride[d - 1] = stride[d - 1];
  }
  std::memset(to, 0, 128);
  std::memcpy(to, &map, sizeof map);
  return 0;
}
