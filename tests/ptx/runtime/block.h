// The block that is running: its threads, its shared memory, and how the parts of the runtime reach one another.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

constexpr uint32_t shared_base = 0x400;        // the first address of shared memory; below is the system's
constexpr uint32_t shared_window = 256 << 10;  // as far as an address of shared memory may reach
constexpr uint32_t shared_limit = 227 << 10;   // what a block may have, on devices of compute capability 9
constexpr uint32_t all_threads = ~0u;

struct Block {
  const Image* image = nullptr;
  const uint8_t* params = nullptr;
  uint32_t threads = 0, warps = 0, alive = 0;
  uint32_t serial = 0;  // counts the blocks of all launches
  std::vector<Thread> thread;
  std::vector<uint32_t> lanes;  // of each warp, those that have not ended
  uint8_t* window = nullptr;    // of shared memory
  uint32_t dynamic_at = 0, shared_end = 0;
  bool stopped = false;  // after an error that leaves nothing to run
};
extern Block block;

inline bool in_shared(uint32_t address, uint32_t bytes) {
  return address >= shared_base && uint64_t(address) + bytes <= block.shared_end;
}
// Where a byte lies whose place is permuted, as tensor cores and the copy engine both have it: chunks of 16 bytes in
// rows of `row` bytes, by the number of their 128 bytes.
inline uint32_t swizzled(uint32_t address, uint32_t row) {
  return address ^ ((address >> 7 & (row / 16 - 1)) << 4);
}

// -- schedule.cpp
void wait_for(const char* what, Line line);  // gives way until somebody wakes the current thread
void wake(uint32_t thread);
void give_way();                           // to any other that is ready
void later(std::function<void()> action);  // something that the hardware does in its own time
uint32_t random_below(uint32_t n);
void run(const Image& image, Dim3 grid, Dim3 threads, size_t dynamic_bytes, const uint8_t* params);
uint8_t* stack_of(uint32_t thread, size_t* bytes);

// -- barriers.cpp
void reset_barriers();
void release_barriers_of_all();  // a thread has ended: who waits for all waits for fewer

// -- mbarrier.cpp
void reset_mbarriers();
uint32_t mbarrier_begin_load(uint32_t address, Line line);  // its number at this barrier, from 1 on; 0: there is none
uint32_t mbarrier_agent(uint32_t address);                  // in whose name the detectors hear of it
void mbarrier_end_load(uint32_t address, uint32_t load, uint32_t bytes);

// -- warp.cpp
void reset_warps();
constexpr uint32_t kind_aligned = 0x100;  // kinds of instructions from here on need the whole warp
// The lanes of `mask` meet; the last one calls `act` with what each lane brought, indexed by lane.
void meet(const char* what, uint32_t kind, uint32_t mask, void* brought, Line line,
          const std::function<void(void* const* brought, uint32_t mask)>& act);

// -- warpgroup.cpp
void reset_warpgroups();

// -- async.cpp
void finish_copies(Thread& thread);

// -- bulk.cpp
void reset_stores();
void finish_stores(uint32_t thread);

// -- report.cpp
[[gnu::format(printf, 3, 4)]] void report(const char* kind, Line line, const char* format, ...);
std::string format_line(Line line);  // of the running kernel: the front end replaces it by the source line
bool reported(const char* kind);

// -- counts.cpp
namespace counts {
void access(uint64_t address, uint32_t bytes, bool shared, Line line, const std::string* tensor = nullptr);
void matrix_row_group(const uint32_t* addresses, Line line, bool first);
void end_of_block();
}  // namespace counts

}  // namespace ptx
