// cp.async.bulk.tensor: a box of a tensor, copied by an engine of the hardware that one thread asks, between global and
// shared memory, or added to what is there (cp.reduce). Rows of it lie one behind the other, the chunks of 16 bytes
// permuted by their address (the swizzle of the map). Where the box goes beyond the tensor zeros come, and nothing
// goes.
//
// What comes to shared memory comes when nobody else can go on, the latest that the program allows, or with a random
// schedule at any time; its bytes count at an mbarrier, zeros too. For the detectors they are written by an agent of
// that barrier's, through the async proxy, which knows what the asking thread knew: who reads them must have waited for
// the barrier's phase. What goes from there is read by an agent of the thread's, until the thread has waited for the
// group of it, then or earlier: who writes there sooner is a race, and may be hit.
#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "block.h"
#include "instructions.h"
#include "order.h"
#include "tensor_map.h"

namespace ptx {
namespace {

struct Element {
  uint32_t shared;
  uint8_t* global;  // null: beyond the tensor
};
using Elements = std::vector<Element>;

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

// Checks `bytes` bytes, in accesses of at most a sector.
void access_all(uint64_t address, uint32_t bytes, bool write, Access kind, Line line, uint32_t& hint) {
  for (uint32_t done = 0; done < bytes;) {
    uint32_t step = 32;
    while ((address + done) % step || step > bytes - done) step /= 2;
    at_global(address + done, step, write, kind, line, hint);
    done += step;
  }
}

struct Box {
  const TensorMap& map;
  const int32_t* at;
  uint32_t rows = 1;  // of box[0] elements

  Box(const TensorMap& m, const int32_t* first) : map(m), at(first) {
    for (uint32_t d = 1; d < map.rank; ++d) rows *= map.box[d];
  }
  uint32_t row_bytes() const { return map.box[0] * map.width; }
  uint32_t bytes() const { return rows * row_bytes(); }

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

  // The elements of row `index`, of which shared memory has the first at `shared`.
  void add_row(Elements& elements, uint32_t index, uint32_t shared, bool write, Access kind, Line line,
               uint32_t& hint) const {
    uint64_t begin = 0;
    const bool there = find_row(index, begin);
    const int64_t first = std::max<int64_t>(at[0], 0);
    const int64_t end = there ? std::min<int64_t>(int64_t(at[0]) + map.box[0], map.size[0]) : 0;
    if (first < end) access_all(begin + first * map.width, (end - first) * map.width, write, kind, line, hint);
    for (uint32_t i = 0; i < map.box[0]; ++i) {
      const int64_t column = int64_t(at[0]) + i;
      const bool given = column >= first && column < end;
      auto* const global = given ? reinterpret_cast<uint8_t*>(begin + column * map.width) : nullptr;
      elements.push_back({swizzled(shared + i * map.width, map.row), global});
    }
  }

  // All of them; none where shared memory has no room for the box.
  Elements elements(uint32_t shared, bool write, Access kind, Line line, uint32_t& hint) const {
    Elements found;
    if (shared % 128) report("misaligned", line, "a bulk copy at shared+%u", shared);
    if (!in_shared(shared, bytes())) {
      report("out-of-bounds", line, "a bulk copy of %u bytes at shared+%u, which ends at %u", bytes(), shared,
             block.shared_end);
      return found;
    }
    for (uint32_t row = 0; row < rows; ++row) {
      add_row(found, row, shared + row * row_bytes(), write, kind, line, hint);
    }
    return found;
  }
};

void bring(const Elements& elements, uint32_t width) {
  for (const Element& x : elements) {
    if (x.global != nullptr) {
      std::memcpy(block.window + x.shared, x.global, width);
    } else {
      std::memset(block.window + x.shared, 0, width);
    }
  }
}

template <class T>
void add(const uint8_t* shared, uint8_t* global) {
  const T sum = T(taken<T>(global) + taken<T>(shared));
  std::memcpy(global, &sum, sizeof sum);
}

struct Store {
  Elements elements;
  TensorMap map;
  bool adds;
  uint32_t group;

  void make() const {
    for (const Element& x : elements) {
      if (x.global != nullptr) make(block.window + x.shared, x.global);
    }
  }

 private:
  void make(const uint8_t* shared, uint8_t* global) const {
    if (!adds) {
      std::memcpy(global, shared, map.width);
    } else if (map.type == TensorMap::f32) {
      add<float>(shared, global);
    } else if (map.type == TensorMap::f16) {
      add<half>(shared, global);
    } else if (map.type == TensorMap::bf16) {
      add<bfloat16>(shared, global);
    } else {
      add<uint32_t>(shared, global);
    }
  }
};
struct Stores {
  std::vector<Store> under_way;
  uint32_t groups = 0;  // committed
};
std::unordered_map<uint32_t, Stores> stores_of_thread;

}  // namespace

void reset_stores() {
  stores_of_thread.clear();
}

void load_box(uint32_t to, uint64_t map_address, const int32_t* at, uint32_t rank, uint32_t barrier, Line line,
              uint32_t& hint) {
  const TensorMap* const map = checked_map(map_address, rank, line);
  if (map == nullptr) return;
  const Box box(*map, at);
  Elements elements = box.elements(to, false, Access::weak, line, hint);
  const uint32_t load = elements.empty() ? 0 : mbarrier_begin_load(barrier, line);
  if (load == 0) return;
  if (options.races) {
    const order::Actor engine{mbarrier_agent(barrier), load, &order::knowledge_of(current->number),
                              order::Proxy::async};
    order::access_shared(to, box.bytes(), true, Access::weak, engine, line);
  }
  later([=, elements = std::move(elements), width = map->width, bytes = box.bytes()] {
    bring(elements, width);
    mbarrier_end_load(barrier, load, bytes);
  });
}

void store_box(uint64_t map_address, const int32_t* at, uint32_t rank, uint32_t from, bool adds, Line line,
               uint32_t& hint) {
  const TensorMap* const map = checked_map(map_address, rank, line);
  if (map == nullptr) return;
  if (adds && map->width < 4 && map->type != TensorMap::f16 && map->type != TensorMap::bf16) {
    report("bulk", line, "there are no sums of elements of type %u", map->type);
    return;
  }
  const Box box(*map, at);
  Stores& stores = stores_of_thread[current->number];
  const Access kind = adds ? Access::atomic : Access::weak;
  const Store store{box.elements(from, true, kind, line, hint), *map, adds, stores.groups};
  if (options.races && !store.elements.empty()) {
    const order::Actor engine{order::stores_of(current->number), stores.groups + 1,
                              &order::knowledge_of(current->number), order::Proxy::async};
    order::access_shared(from, box.bytes(), false, Access::weak, engine, line);
  }
  if (options.seed && random_below(2)) {
    store.make();
  } else {
    stores.under_way.push_back(store);
  }
}

void stores_commit() {
  ++stores_of_thread[current->number].groups;
}

void stores_wait(uint32_t pending) {
  Stores& stores = stores_of_thread[current->number];
  const uint32_t done = stores.groups > pending ? stores.groups - pending : 0;
  const auto is_done = [done](const Store& store) { return store.group < done; };
  for (const Store& store : stores.under_way) {
    if (is_done(store)) store.make();
  }
  stores.under_way.erase(std::remove_if(stores.under_way.begin(), stores.under_way.end(), is_done),
                         stores.under_way.end());
  if (!options.races) return;
  uint32_t& known = order::knowledge_of(current->number).clocks[order::stores_of(current->number)];
  known = std::max(known, done);
}

void finish_stores(uint32_t thread) {
  const auto found = stores_of_thread.find(thread);
  if (found == stores_of_thread.end() || found->second.under_way.empty()) return;
  report("bulk", 0, "a thread ends with bulk stores under way");
  for (const Store& store : found->second.under_way) store.make();
  stores_of_thread.erase(found);
}

}  // namespace ptx

// As cuTensorMapEncodeTiled has it, of maps that the runner knows: no interleaving, no steps between elements, zeros
// beyond the tensor. 0, or 1 where it must be refused.
extern "C" int ptx_encode_tensor_map(void* to, uint32_t type, uint32_t rank, uint64_t base, const uint64_t* size,
                                     const uint64_t* stride, const uint32_t* box, uint32_t swizzle_row) {
  ptx::TensorMap map{};
  const uint32_t width = ptx::TensorMap::width_of(type);
  if (width == 0) return 1;
  if (rank < 1 || rank > 5 || base % 16 || box[0] * width % 16) return 1;
  if (swizzle_row > 16 && box[0] * width > swizzle_row) return 1;
  map.mark = ptx::TensorMap::marked;
  map.base = base;
  map.rank = uint8_t(rank);
  map.type = uint8_t(type);
  map.width = uint8_t(width);
  map.row = uint8_t(swizzle_row);
  for (uint32_t d = 0; d < rank; ++d) {
    if (size[d] < 1 || size[d] > uint64_t(1) << 32 || box[d] < 1 || box[d] > 256) return 1;
    map.size[d] = size[d];
    map.box[d] = uint16_t(box[d]);
    if (d == 0) continue;
    if (stride[d - 1] % 16 || stride[d - 1] < size[0] * width || stride[d - 1] >= uint64_t(1) << 40) return 1;
    map.stride[d - 1] = stride[d - 1];
  }
  std::memset(to, 0, 128);
  std::memcpy(to, &map, sizeof map);
  return 0;
}
