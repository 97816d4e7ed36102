// mbarrier: barriers that lie in shared memory, whose threads arrive without waiting, and wait for a phase by its
// parity.
//
// A phase completes when as many arrivals as the barrier was made for have come; who sees that knows what those who
// arrived knew then. A wait gives way until its phase is over, so that one that never ends is a deadlock that says
// where. What stands in memory is the hardware's own: a plain access to it is an error, as is one before its making is
// known.
#include <unordered_map>

#include "block.h"
#include "order.h"

namespace ptx {
namespace {

struct Mbarrier {
  uint32_t expected = 0, arrived = 0, phase = 0;
  uint32_t maker = 0, made_at = 0;  // a thread, and its time
  std::vector<uint32_t> waiting;
  order::Knowledge known, of_last;  // to those who have arrived in this phase, and in the one before
};
std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by address

Mbarrier* checked(uint32_t address, Line line) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) {
    report("mbarrier", line, "there is no mbarrier at shared+%u", address);
    return nullptr;
  }
  Mbarrier& barrier = found->second;
  if (options.races && barrier.maker != current->number &&
      order::knowledge_of(current->number).clocks[barrier.maker] < barrier.made_at) {
    report("race", line, "the use of the mbarrier at shared+%u is not ordered after its making by thread %u", address,
           barrier.maker);
  }
  return &barrier;
}

bool is_over(const Mbarrier& barrier, uint32_t parity) {
  return barrier.phase % 2 != parity % 2;
}

void learn_from(const Mbarrier& barrier) {
  if (options.races && barrier.phase > 0) order::learn(current->number, barrier.of_last);
}

}  // namespace

void reset_mbarriers() {
  mbarriers.clear();
}

void mbarrier_init(uint32_t address, uint32_t count, Line line) {
  if (count == 0 || count >= 1u << 20) report("mbarrier", line, "a barrier cannot be made for %u arrivals", count);
  uint8_t* const memory = at_shared(address, 8, true, Access::weak, line);
  for (int i = 0; i < 8; ++i) memory[i] = 0;
  Mbarrier barrier;
  barrier.expected = count;
  barrier.maker = current->number;
  if (options.races) {
    barrier.made_at = order::knowledge_of(current->number).clocks[current->number];
    order::mark_barrier(address, true);
  }
  mbarriers[address] = barrier;
}

void mbarrier_arrive(uint32_t address, Line line) {
  Mbarrier* const barrier = checked(address, line);
  if (barrier == nullptr) return;
  if (options.races) order::tell(current->number, barrier->known);
  if (++barrier->arrived < barrier->expected) return;
  barrier->arrived = 0;
  ++barrier->phase;
  if (options.races) {
    std::swap(barrier->of_last, barrier->known);
    barrier->known.clear();
  }
  for (const uint32_t thread : barrier->waiting) wake(thread);
  barrier->waiting.clear();
}

void mbarrier_wait(uint32_t address, uint32_t parity, Line line) {
  Mbarrier* const barrier = checked(address, line);
  if (barrier == nullptr) return;
  while (!is_over(*barrier, parity)) {
    barrier->waiting.push_back(current->number);
    wait_for("mbarrier", line);
  }
  learn_from(*barrier);
}

bool mbarrier_test(uint32_t address, uint32_t parity, Line line) {
  const Mbarrier* const barrier = checked(address, line);
  if (barrier == nullptr || !is_over(*barrier, parity)) return false;
  learn_from(*barrier);
  return true;
}

}  // namespace ptx
