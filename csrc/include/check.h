// Host-side argument checks of the compiled modules.
//
// The Python layer has already checked every call and speaks to the user; these checks guard the
// boundary, so that a wrong pointer or shape becomes a ValueError and never a write out of bounds.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pytransformer {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace pytransformer

// CHECK(condition, "op: argument must be ..., got ", value)
#define PYTRANSFORMER_CHECK(condition, ...)               \
  do {                                                    \
    if (!(condition)) ::pytransformer::fail(__VA_ARGS__); \
  } while (false)
