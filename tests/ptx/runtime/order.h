// What happened before what: vector clocks, and the detectors that ask them.
//
// Every agent has a clock: each thread of the block, and beside it the copies it has under way, for their writes are
// ordered by waiting for them and not by the program. A thread knows, of every agent, the last time that happened
// before now; a barrier joins what its threads know. An access is noted in the cell of the memory it touches as (block,
// agent, time); a later access that does not know that time is a race, whatever order this run took.
//
// Between blocks only a pattern of the memory model orders: a fence and then a write to a flag (or an atomic), read by
// another block that then has a fence. `fence` remembers what its thread knows, an atomic hands that over to the flag,
// and whoever reads the flag and then passes a fence knows it too.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "machine.h"

namespace ptx::order {

struct Flag;
struct Seen {  // the first `count` releases of a flag
  Flag* flag;
  uint32_t count;
};

struct Knowledge {
  std::vector<uint32_t> clocks;     // of every agent
  std::vector<uint32_t> published;  // of every agent, what a proxy fence has shown to the async proxy
  std::vector<Seen> acquired;       // from other blocks
  std::vector<Seen> read;           // flags read, with no fence since
  void join(const Knowledge& other);
  void clear();
};

void start_launch();
void start_block();

void tell(uint32_t thread, Knowledge& into);  // the thread's time goes on: what it does next is not told
void learn(uint32_t thread, const Knowledge& from);
Knowledge& knowledge_of(uint32_t thread);
void tell_of_load(uint32_t barrier, uint32_t load, Knowledge& into);  // that it has come

constexpr uint32_t barriers_at_most = 64;

// Agents beside the threads.
uint32_t copies_of(uint32_t thread);  // cp.async
uint32_t stores_of(uint32_t thread);  // cp.async.bulk from shared memory
uint32_t loads_on(uint32_t barrier);  // cp.async.bulk that completes on an mbarrier
uint32_t products_of(uint32_t warp);  // wgmma: a warp that waits knows of its own part alone

enum class Proxy : uint8_t { generic, async };
struct Actor {
  uint32_t agent, clock;
  const Knowledge* knows;
  Proxy proxy = Proxy::generic;
};
Actor self();

// One access by `actor`. A store that `changes` nothing may meet another of the same line and block.
void access_shared(uint32_t address, uint32_t bytes, bool write, Access kind, const Actor& actor, Line line,
                   bool changes = true);

struct Epoch {
  uint32_t block = 0, agent = 0, clock = 0;
  uint32_t line : 22, bytes : 8, strong : 1, async : 1;
  Epoch() : line(0), bytes(0), strong(0), async(0) {}
};
constexpr int global_readers = 4;
struct GlobalCell {
  Epoch write, reads[global_readers];
};
void access_global(std::vector<GlobalCell>& cells, uint32_t granule, uint64_t offset, const char* name,
                   uint64_t address, uint32_t bytes, bool write, Access kind, const Actor& actor, Line line,
                   bool changes);

void mark_barrier(uint32_t address, bool live);  // an mbarrier stands here: plain accesses are errors

}  // namespace ptx::order
