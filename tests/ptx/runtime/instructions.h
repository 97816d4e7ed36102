// All that translated code includes: values and arithmetic, the machine, and the typed accesses to memory.
#pragma once

#include "arithmetic.h"
#include "machine.h"

namespace ptx {

template <class T>
inline T taken(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
inline T load_param(const uint8_t* at) {
  return taken<T>(at);
}
template <class T>
inline T load_private(uint64_t address, Access, Line) {
  return taken<T>(reinterpret_cast<uint8_t*>(address));
}
template <class T>
inline void store_private(uint64_t address, T value, Access, Line) {
  std::memcpy(reinterpret_cast<uint8_t*>(address), &value, sizeof value);
}
template <class T>
inline T load_shared(uint32_t address, Access kind, Line line) {
  return taken<T>(at_shared(address, sizeof(T), false, kind, line));
}
template <class T>
inline T load_global(uint64_t address, Access kind, Line line, uint32_t& hint) {
  return taken<T>(at_global(address, sizeof(T), false, kind, line, hint));
}
template <class T>
inline T load_generic(uint64_t address, Access kind, Line line, uint32_t& hint) {
  return taken<T>(at_generic(address, sizeof(T), false, kind, line, hint));
}

// Threads of one block may store one value at one place: `changes` tells the detectors that apart.
bool would_change_shared(uint32_t address, const void* value, uint32_t bytes);
bool would_change_global(uint64_t address, const void* value, uint32_t bytes);
template <class T>
inline void store_shared(uint32_t address, T value, Access kind, Line line) {
  const bool changes = !options.races || would_change_shared(address, &value, sizeof value);
  std::memcpy(at_shared(address, sizeof(T), true, kind, line, changes), &value, sizeof value);
}
template <class T>
inline void store_global(uint64_t address, T value, Access kind, Line line, uint32_t& hint) {
  const bool changes = !options.races || would_change_global(address, &value, sizeof value);
  std::memcpy(at_global(address, sizeof(T), true, kind, line, hint, changes), &value, sizeof value);
}
template <class T>
inline void store_generic(uint64_t address, T value, Access kind, Line line, uint32_t& hint) {
  const bool changes = !options.races || is_shared(address) || would_change_global(address, &value, sizeof value);
  std::memcpy(at_generic(address, sizeof(T), true, kind, line, hint, changes), &value, sizeof value);
}

template <class T, class F, class... X>
inline T exchanged(uint8_t* at, F function, X... operands) {
  const T old = taken<T>(at), next = T(function(old, operands...));
  std::memcpy(at, &next, sizeof next);
  return old;
}
template <class T, class F, class... X>
inline T atomic_shared(uint32_t address, Line line, F function, X... operands) {
  return exchanged<T>(at_shared(address, sizeof(T), true, Access::atomic, line), function, bits<T>(operands)...);
}
template <class T, class F, class... X>
inline T atomic_global(uint64_t address, Line line, uint32_t& hint, F function, X... operands) {
  // An addition of float32 flushes subnormal numbers in global memory, but not in shared memory.
  if constexpr (std::is_same_v<T, float>) {
    if (!is_shared(address)) {
      const auto flushing = [function](auto... x) { return flush(function(flush(x)...)); };
      return exchanged<T>(at_generic(address, sizeof(T), true, Access::atomic, line, hint), flushing, operands...);
    }
  }
  return exchanged<T>(at_generic(address, sizeof(T), true, Access::atomic, line, hint), function, bits<T>(operands)...);
}

}  // namespace ptx
