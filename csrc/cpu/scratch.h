// Scratch memory of a call, kept from call to call.
#pragma once

#include <cstdint>
#include <new>

#include "huge_pages.h"

namespace pytransformer::PYTRANSFORMER_ISA {

// Memory that calls of one thread take, return and find again. Fresh pages from the system cost more
// than the arithmetic done on them (a fault for each 4 KB, which it also clears), so a few buffers are
// kept, up to `most_kept` bytes; those of 2 MB and more are asked for in huge pages.
class BufferPool {
 public:
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static BufferPool& of_this_thread() {
    static thread_local BufferPool pool;
    return pool;
  }
  ~BufferPool() {
    for (Buffer& b : kept_) release(b);
  }

  // The smallest kept buffer that is large enough, though not far too large, or a new one.
  Buffer take(size_t bytes) {
    Buffer* best = nullptr;
    for (Buffer& b : kept_) {
      if (b.data && b.bytes >= bytes && b.bytes / 4 <= bytes && (!best || b.bytes < best->bytes)) best = &b;
    }
    if (!best) return allocate(bytes);
    const Buffer found = *best;
    *best = {};
    total_ -= found.bytes;
    return found;
  }

  // In place of others, in turn, where there is no room for it.
  void give_back(Buffer buffer) {
    if (buffer.bytes > most_kept) return release(buffer);
    for (int tried = 0; tried < slots && (kept_[next_].data || total_ + buffer.bytes > most_kept); ++tried) {
      if (total_ + buffer.bytes > most_kept || full()) {
        total_ -= kept_[next_].bytes;
        release(kept_[next_]);
        if (total_ + buffer.bytes <= most_kept) break;
      }
      next_ = (next_ + 1) % slots;
    }
    kept_[next_] = buffer;
    total_ += buffer.bytes;
    next_ = (next_ + 1) % slots;
  }

 private:
  static constexpr int slots = 32;
  static constexpr size_t most_kept = size_t(128) << 20;
  static constexpr std::align_val_t small_alignment{64}, huge_alignment{huge_page};

  bool full() const {
    for (const Buffer& b : kept_) {
      if (!b.data) return false;
    }
    return true;
  }

  static Buffer allocate(size_t bytes) {
    if (bytes < huge_page) return {::operator new(bytes, small_alignment), bytes};
    bytes = (bytes + huge_page - 1) / huge_page * huge_page;
    void* data = ::operator new(bytes, huge_alignment);
    use_huge_pages(data, bytes);
    return {data, bytes};
  }

  static void release(Buffer& b) {
    if (b.data) ::operator delete(b.data, b.bytes < huge_page ? small_alignment : huge_alignment);
    b = {};
  }

  Buffer kept_[slots];
  size_t total_ = 0;
  int next_ = 0;
};

// Uninitialised memory on a cache line's boundary, for the duration of a call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : buffer_(BufferPool::of_this_thread().take(size_t(size) * sizeof(T))) {}
  ~Scratch() { BufferPool::of_this_thread().give_back(buffer_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(buffer_.data); }

 private:
  BufferPool::Buffer buffer_;
};

// The same for each of several threads. Their parts lie far apart, for hardware looks ahead in strides of kilobytes:
// what a core asks for beyond the end of its part it would take out of the caches of the core that works there, which
// then waits to have it back. That cost attention 3% of its time, and 12% where the cores share no cache.
template <class T>
class ThreadScratch {
 public:
  ThreadScratch(int64_t threads, int64_t size)
      : stride_(size > 0 ? (size * int64_t(sizeof(T)) + 2 * apart - 1) / apart * apart / int64_t(sizeof(T)) : 0),
        memory_(threads * stride_) {}
  T* of(int64_t thread) const { return memory_.get() + thread * stride_; }

 private:
  static constexpr int64_t apart = int64_t(128) << 10;
  int64_t stride_;
  Scratch<T> memory_;
};

}  // namespace pytransformer::PYTRANSFORMER_ISA
