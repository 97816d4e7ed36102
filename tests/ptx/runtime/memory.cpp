// Where an access may go: the block's shared memory, the tensors of the call, a thread's own stack.
//
// The tensors are told by whoever launches; those that overlap are one. Each place in the code remembers the tensor it
// touched last (`hint`), so that the usual check is two comparisons. With no tensors told, global memory is unchecked.
#include <algorithm>
#include <cstring>
#include <string>

#include "block.h"
#include "order.h"

namespace ptx {
namespace {

struct Extent {
  uint64_t low, high;
  std::string name;
  uint32_t granule;
  std::vector<order::GlobalCell> cells;
};
std::vector<Extent> extents;
uint8_t scratch[64];

bool inside(const Extent& e, uint64_t address, uint32_t bytes) {
  return address >= e.low && address + bytes <= e.high;
}

bool of_the_image(uint64_t address, uint32_t bytes) {
  for (const Constant* c = block.image->constants; c->name != nullptr && c->data != nullptr; ++c) {
    const auto low = reinterpret_cast<uint64_t>(c->data);
    if (address >= low && address + bytes <= low + c->bytes) return true;
  }
  const auto params = reinterpret_cast<uint64_t>(block.params);
  return address >= params && address + bytes <= params + block.image->params_bytes;
}

Extent* find(uint64_t address, uint32_t bytes, uint32_t& hint) {
  if (hint < extents.size() && inside(extents[hint], address, bytes)) return &extents[hint];
  for (uint32_t i = 0; i < extents.size(); ++i) {
    if (!inside(extents[i], address, bytes)) continue;
    hint = i;
    return &extents[i];
  }
  return nullptr;
}

const char* verb(bool write, Access kind) {
  return kind == Access::atomic ? "an atomic" : write ? "a write" : "a read";
}

uint8_t* nowhere() {
  std::memset(scratch, 0, sizeof scratch);
  return scratch;
}

uint8_t* out_of_bounds(uint64_t address, uint32_t bytes, bool write, Access kind, Line line) {
  const Extent* nearest = nullptr;
  uint64_t distance = ~uint64_t(0);
  for (const Extent& e : extents) {
    const uint64_t d = address < e.low ? e.low - address : address - std::min(address, e.high - 1);
    if (d < distance) nearest = &e, distance = d;
  }
  const long size = nearest ? long(nearest->high - nearest->low) : 0, at = nearest ? long(address - nearest->low) : 0;
  report("out-of-bounds", line, "%s of %u bytes at %s%+ld, which has %ld bytes", verb(write, kind), bytes,
         nearest ? nearest->name.c_str() : "?", at, size);
  return nowhere();
}

void check_alignment(uint64_t address, uint32_t bytes, bool write, Access kind, Line line) {
  if (address & (bytes - 1)) report("misaligned", line, "%s of %u bytes at 0x%lx", verb(write, kind), bytes, address);
}

}  // namespace

uint32_t dynamic_shared() {
  return block.dynamic_at;
}
uint32_t dynamic_shared_bytes() {
  return block.shared_end - block.dynamic_at;
}
uint64_t shared_pointer(uint64_t address) {
  return reinterpret_cast<uint64_t>(block.window) + address;
}
bool is_shared(uint64_t pointer) {
  return pointer - reinterpret_cast<uint64_t>(block.window) < shared_window;
}

uint32_t shared_address(uint64_t pointer) {
  return uint32_t(pointer - reinterpret_cast<uint64_t>(block.window));
}

bool would_change_shared(uint32_t address, const void* value, uint32_t bytes) {
  return address + bytes > block.shared_end || std::memcmp(block.window + address, value, bytes) != 0;
}

bool would_change_global(uint64_t address, const void* value, uint32_t bytes) {
  uint32_t hint = ~0u;
  return find(address, bytes, hint) == nullptr ||
         std::memcmp(reinterpret_cast<const void*>(address), value, bytes) != 0;
}

uint8_t* at_shared(uint32_t address, uint32_t bytes, bool write, Access kind, Line line, bool changes) {
  check_alignment(address, bytes, write, kind, line);
  if (!in_shared(address, bytes)) {
    report("out-of-bounds", line, "%s of %u bytes at shared+%u, which ends at %u", verb(write, kind), bytes, address,
           block.shared_end);
    return nowhere();
  }
  if (options.races) order::access_shared(address, bytes, write, kind, order::self(), line, changes);
  if (options.counts) counts::access(address, bytes, true, line);
  return block.window + address;
}

uint8_t* at_global(uint64_t address, uint32_t bytes, bool write, Access kind, Line line, uint32_t& hint, bool changes) {
  check_alignment(address, bytes, write, kind, line);
  auto* const memory = reinterpret_cast<uint8_t*>(address);
  if (extents.empty()) return memory;
  Extent* const extent = find(address, bytes, hint);
  if (extent == nullptr) {
    return of_the_image(address, bytes) ? memory : out_of_bounds(address, bytes, write, kind, line);
  }
  if (options.races) {
    if (extent->cells.empty()) extent->cells.resize((extent->high - extent->low) / extent->granule + 1);
    order::access_global(extent->cells, extent->granule, address - extent->low, extent->name.c_str(), address, bytes,
                         write, kind, order::self(), line, changes);
  }
  if (options.counts) counts::access(address, bytes, false, line, &extent->name);
  return memory;
}

uint8_t* at_generic(uint64_t address, uint32_t bytes, bool write, Access kind, Line line, uint32_t& hint,
                    bool changes) {
  if (is_shared(address)) return at_shared(shared_address(address), bytes, write, kind, line, changes);
  size_t size = 0;
  const auto stack = reinterpret_cast<uint64_t>(stack_of(current->number, &size));
  if (address - stack < size) return reinterpret_cast<uint8_t*>(address);
  return at_global(address, bytes, write, kind, line, hint, changes);
}

void forget_tensors() {
  extents.clear();
}

void add_tensor(const char* name, uint64_t data, uint64_t bytes, uint32_t element) {
  Extent added{data, data + bytes, name, std::min(element, 4u), {}};
  for (auto e = extents.begin(); e != extents.end();) {
    if (added.low >= e->high || e->low >= added.high) {
      ++e;
      continue;
    }
    added.low = std::min(added.low, e->low);
    added.high = std::max(added.high, e->high);
    added.granule = std::min(added.granule, e->granule);
    added.name = e->name + "|" + added.name;
    e = extents.erase(e);
  }
  extents.push_back(std::move(added));
}

}  // namespace ptx
