// cp.async: copies from global to shared memory that a thread starts and waits for by groups.
//
// A copy is made when it is waited for, the latest that the program allows: who reads too early finds what was there
// before. With a random schedule some are made at once, the earliest: who still reads what is overwritten is hit.
#include <cstring>

#include "block.h"
#include "order.h"

namespace ptx {
namespace {

void make(const AsyncCopy& copy) {
  uint8_t* const to = block.window + copy.to;
  std::memcpy(to, copy.from, copy.given);
  std::memset(to + copy.given, 0, copy.bytes - copy.given);
}

// The checked source: one access where the bytes given are a whole element, else byte by byte.
const uint8_t* source_of(uint64_t from, uint32_t given, Line line, uint32_t& hint) {
  if (given == 0) return nullptr;
  const bool whole = (given & (given - 1)) == 0 && from % given == 0;
  const uint8_t* const source = at_global(from, whole ? given : 1, false, Access::weak, line, hint);
  for (uint32_t i = 1; !whole && i < given; ++i) at_global(from + i, 1, false, Access::weak, line, hint);
  return source;
}

}  // namespace

void copy_async(uint32_t to, uint64_t from, uint32_t bytes, uint32_t given, Line line, uint32_t& hint) {
  Thread& thread = *current;
  if (given > bytes) report("cp.async", line, "%u bytes are given for a copy of %u", given, bytes);
  if (from % bytes) report("misaligned", line, "a cp.async of %u bytes from 0x%lx", bytes, from);
  if (to % bytes) report("misaligned", line, "a cp.async of %u bytes to shared+%u", bytes, to);
  if (!in_shared(to, bytes)) {
    report("out-of-bounds", line, "a cp.async of %u bytes to shared+%u, which ends at %u", bytes, to, block.shared_end);
    return;
  }
  const uint8_t* const source = source_of(from, given, line, hint);
  if (options.races) {
    const order::Actor copier{order::copies_of(thread.number), thread.copy_group + 1,
                              &order::knowledge_of(thread.number)};
    order::access_shared(to, bytes, true, Access::weak, copier, line);
  }
  if (options.counts) counts::access(to, bytes, true, line);
  const AsyncCopy copy{to, source, bytes, given, thread.copy_group};
  if (options.seed && random_below(2)) {
    make(copy);
  } else {
    thread.copies.push_back(copy);
  }
}

void copies_commit() {
  ++current->copy_group;
}

void copies_wait(uint32_t pending, Line) {
  Thread& thread = *current;
  const uint32_t done = thread.copy_group > pending ? thread.copy_group - pending : 0;
  size_t kept = 0;
  for (const AsyncCopy& copy : thread.copies) {
    if (copy.group < done) {
      make(copy);
    } else {
      thread.copies[kept++] = copy;
    }
  }
  thread.copies.resize(kept);
  if (!options.races || !block.image->uses_cp_async) return;
  uint32_t& known = order::knowledge_of(thread.number).clocks[order::copies_of(thread.number)];
  known = std::max(known, done);
}

void finish_copies(Thread& thread) {
  if (!thread.copies.empty()) report("cp.async", 0, "a thread ends with copies under way");
  for (const AsyncCopy& copy : thread.copies) make(copy);
  thread.copies.clear();
}

}  // namespace ptx
