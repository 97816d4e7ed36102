// Memory in pages of 2 MB instead of 4 KB.
//
// The system clears a fresh page when it is first touched, one fault a page: of huge pages there are fewer. And they
// leave more of the address translation in its caches for whoever reads the result.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pytransformer {

constexpr size_t small_page = size_t(4) << 10, huge_page = size_t(2) << 20;

// Asks for huge pages in fresh memory: a hint, of which the system makes what its settings say
// (/sys/kernel/mm/transparent_hugepage). It changes no contents.
inline void use_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + small_page - 1) / small_page * small_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / small_page * small_page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace pytransformer
