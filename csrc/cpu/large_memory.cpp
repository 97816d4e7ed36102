#include "large_memory.h"

#include <algorithm>
#include <fstream>
#include <mutex>
#include <new>
#include <vector>

#include "huge_pages.h"

// AddressSanitizer watches the memory of operator new.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define PYTRANSFORMER_KEEPS_MEMORY
#include <pthread.h>
#include <unistd.h>
#endif

namespace pytransformer {
namespace {

#ifdef PYTRANSFORMER_KEEPS_MEMORY

// What the machine has, or this container may have.
size_t available_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  size_t bytes = pages > 0 && size > 0 ? size_t(pages) * size_t(size) : 0;
  for (const char* limit : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    size_t allowed;  // not a number where there is no limit
    if (std::ifstream(limit) >> allowed) bytes = std::min(bytes, allowed);
  }
  return bytes;
}

void* map(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (huge_page - reinterpret_cast<uintptr_t>(begin) % huge_page) % huge_page;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, huge_page - before);
  use_huge_pages(begin + before, bytes);
  return begin + before;
}

void unmap(LargeMemory memory) {
  munmap(memory.data, memory.bytes);
}

void lend(LargeMemory memory) {
#ifdef MADV_FREE
  madvise(memory.data, memory.bytes, MADV_FREE);
#endif
}

#else  // nothing is kept: there is no way to lend it to the system

size_t available_memory() {
  return 0;
}

void* map(size_t bytes) {
  return ::operator new(bytes, std::align_val_t(huge_page), std::nothrow);
}

void unmap(LargeMemory memory) {
  ::operator delete(memory.data, std::align_val_t(huge_page));
}

void lend(LargeMemory) {}

#endif

// The blocks that nobody uses, the oldest first. System calls are made without the lock.
class Kept {
 public:
  // The smallest that is large enough and a quarter larger at most, of those the latest.
  LargeMemory find(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock);
    size_t best = blocks_.size();
    for (size_t i = blocks_.size(); i-- > 0;) {
      const size_t size = blocks_[i].memory.bytes;
      if (size < bytes || size > bytes + bytes / 4) continue;
      if (best == blocks_.size() || size < blocks_[best].memory.bytes) best = i;
    }
    return best == blocks_.size() ? LargeMemory() : remove(best);
  }

  // False where there is no room; what then stands in the way goes first.
  bool add(LargeMemory memory) {
    const std::lock_guard<std::mutex> guard(lock);
    if (total_ + memory.bytes > most_) return false;
    blocks_.push_back({memory, false});
    total_ += memory.bytes;
    warm_ += memory.bytes;
    return true;
  }

  // Back to where `too_warm` found it.
  void add_lent(LargeMemory memory) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto warm = [](const Block& block) { return !block.lent; };
    blocks_.insert(std::find_if(blocks_.begin(), blocks_.end(), warm), {memory, true});
    total_ += memory.bytes;
  }

  LargeMemory oldest() {
    const std::lock_guard<std::mutex> guard(lock);
    return blocks_.empty() ? LargeMemory() : remove(0);
  }

  // The oldest block that the system has not been lent, if there are more than it costs nothing to keep.
  LargeMemory too_warm() {
    const std::lock_guard<std::mutex> guard(lock);
    for (size_t i = 0; warm_ > most_ / 16 && i < blocks_.size(); ++i) {
      if (!blocks_[i].lent) return remove(i);
    }
    return {};
  }

  std::mutex lock;

 private:
  struct Block {
    LargeMemory memory;
    bool lent;
  };

  LargeMemory remove(size_t i) {
    const Block found = blocks_[i];
    blocks_.erase(blocks_.begin() + i);
    total_ -= found.memory.bytes;
    if (!found.lent) warm_ -= found.memory.bytes;
    return found.memory;
  }

  std::vector<Block> blocks_;  // those that are lent before the others
  size_t total_ = 0, warm_ = 0;
  const size_t most_ = available_memory() / 4;
};

// Never destroyed: tensors may outlive the module's static objects.
Kept& kept() {
  static Kept* const blocks = new Kept;
  return *blocks;
}

#ifdef PYTRANSFORMER_KEEPS_MEMORY
const int fork_handler =
    pthread_atfork([] { kept().lock.lock(); }, [] { kept().lock.unlock(); }, [] { kept().lock.unlock(); });
#endif

}  // namespace

LargeMemory take_large(size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + large_unit - 1) / large_unit * large_unit;
  LargeMemory found = kept().find(bytes);
  if (found.data) return found;
  found = {map(bytes), bytes};
  if (!found.data) {
    release_large();
    found.data = map(bytes);
  }
  if (!found.data) throw std::bad_alloc();
  return found;
}

void give_back_large(LargeMemory memory) noexcept {
  while (!kept().add(memory)) {
    const LargeMemory oldest = kept().oldest();
    if (!oldest.data) return unmap(memory);
    unmap(oldest);
  }
  for (LargeMemory block; (block = kept().too_warm()).data;) {
    lend(block);
    kept().add_lent(block);
  }
}

size_t release_large() noexcept {
  size_t released = 0;
  for (LargeMemory block; (block = kept().oldest()).data; released += block.bytes) unmap(block);
  return released;
}

}  // namespace pytransformer
