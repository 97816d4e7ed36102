// Memory of large results and buffers, which the next ones find again.
//
// The system clears fresh pages when they are first touched, one fault a page. Where a result is larger than the
// caches that takes several times as long as to write it, and malloc, which keeps up to 32 MB (glibc), asks for fresh
// pages at every larger one. So what large results leave is kept here: the latest of it as it is, which costs nothing;
// of the older blocks the system may have the pages back whenever it needs them (MADV_FREE), and until then the next
// result finds them without a fault. To lend them so interrupts all threads, a tenth of a millisecond on a virtual
// machine.
#pragma once

#include <cstddef>

#include "huge_pages.h"

namespace pytransformer {

// Blocks are of so many bytes and their multiples, on such boundaries.
constexpr size_t large_unit = huge_page;

struct LargeMemory {
  void* data = nullptr;
  size_t bytes = 0;
};

// Uninitialised memory of at least so many bytes. Throws std::bad_alloc.
LargeMemory take_large(size_t bytes);

// Keeps it for the next who asks for a little less, or as much: all together at most a quarter of the memory that the
// machine has or the container may have, and a sixteenth of that as it is.
void give_back_large(LargeMemory memory) noexcept;

// Gives all that is kept to the system; returns its bytes.
size_t release_large() noexcept;

// So many bytes, for as long as it lives; null where there are none.
class LargeBuffer {
 public:
  explicit LargeBuffer(size_t bytes) : memory_(bytes > 0 ? take_large(bytes) : LargeMemory()) {}
  ~LargeBuffer() {
    if (memory_.data) give_back_large(memory_);
  }
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;
  void* data() const { return memory_.data; }

 private:
  LargeMemory memory_;
};

}  // namespace pytransformer
