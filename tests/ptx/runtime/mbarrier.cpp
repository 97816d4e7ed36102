// mbarrier: barriers that lie in shared memory, whose threads arrive without waiting, and wait for a phase by its
// parity.
//
// A phase completes when as many arrivals as the barrier was made for have come, and as many bytes of bulk copies as
// were announced; who sees that knows what those who arrived knew then, and that the bytes are there. A wait gives way
// until its phase is over, so that one that never ends is a deadlock that says where. What stands in memory is the
// hardware's own: a plain access to it is an error, as is one before its making is known.
#include <unordered_map>

#include "block.h"
#include "order.h"

namespace ptx {
namespace {

struct Mbarrier {
  uint32_t number = 0;  // among those of the block
  uint32_t expected = 0, arrived = 0, phase = 0;
  int64_t bytes = 0;                // announced and not there yet
  uint32_t loads = 0;               // begun so far: the time of this barrier's agent
  uint32_t maker = 0, made_at = 0;  // a thread, and its time
  std::vector<uint32_t> waiting;
  order::Knowledge known, of_last;  // to those who have arrived in this phase, and in the one before
};
std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by address
uint32_t made = 0;

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

void end_phase_if_over(Mbarrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++barrier.phase;
  if (options.races) {
    std::swap(barrier.of_last, barrier.known);
    barrier.known.clear();
  }
  for (const uint32_t thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

}  // namespace

void reset_mbarriers() {
  mbarriers.clear();
  made = 0;
}

void mbarrier_init(uint32_t address, uint32_t count, Line line) {
  if (count == 0 || count >= 1u << 20) report("mbarrier", line, "a barrier cannot be made for %u arrivals", count);
  uint8_t* const memory = at_shared(address, 8, true, Access::weak, line);
  for (int i = 0; i < 8; ++i) memory[i] = 0;
  Mbarrier barrier;
  const auto before = mbarriers.find(address);
  barrier.number = before == mbarriers.end() ? made++ : before->second.number;
  if (barrier.number >= order::barriers_at_most) {
    report("mbarrier", line, "the runner tells %u barriers of a block apart", order::barriers_at_most);
    return;
  }
  barrier.expected = count;
  barrier.maker = current->number;
  if (options.races) {
    barrier.made_at = order::knowledge_of(current->number).clocks[current->number];
    order::mark_barrier(address, true);
  }
  mbarriers[address] = barrier;
}

void mbarrier_inval(uint32_t address, Line line) {
  const Mbarrier* const barrier = checked(address, line);
  if (barrier == nullptr) return;
  if (barrier->bytes != 0) report("mbarrier", line, "%ld bytes are yet to come there", barrier->bytes);
  if (options.races) order::mark_barrier(address, false);
  mbarriers.erase(address);
}

void mbarrier_arrive(uint32_t address, Line line) {
  Mbarrier* const barrier = checked(address, line);
  if (barrier == nullptr) return;
  if (options.races) order::tell(current->number, barrier->known);
  if (++barrier->arrived > barrier->expected) {
    report("mbarrier", line, "the mbarrier at shared+%u is for %u arrivals, and here is one more before its bytes",
           address, barrier->expected);
  }
  end_phase_if_over(*barrier);
}

void mbarrier_expect(uint32_t address, uint32_t bytes, Line line) {
  Mbarrier* const barrier = checked(address, line);
  if (barrier == nullptr) return;
  barrier->bytes += bytes;
  if (barrier->bytes >= 1 << 20) report("mbarrier", line, "%ld bytes are announced at one time", barrier->bytes);
}

uint32_t mbarrier_begin_load(uint32_t address, Line line) {
  Mbarrier* const barrier = checked(address, line);
  if (barrier == nullptr) return 0;
  if (options.races && order::knowledge_of(current->number).published[barrier->maker] < barrier->made_at) {
    report("proxy", line, "no fence.proxy.async since the mbarrier at shared+%u was made", address);
  }
  return ++barrier->loads;
}

uint32_t mbarrier_agent(uint32_t address) {
  return order::loads_on(mbarriers.at(address).number);
}

void mbarrier_end_load(uint32_t address, uint32_t load, uint32_t bytes) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) return;  // who made an end of it has been told
  Mbarrier& barrier = found->second;
  barrier.bytes -= bytes;
  if (options.races) order::tell_of_load(barrier.number, load, barrier.known);
  end_phase_if_over(barrier);
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
