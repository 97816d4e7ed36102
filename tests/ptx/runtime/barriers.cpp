// bar.sync, bar.arrive and bar.red: sixteen named barriers of a block.
//
// A barrier completes when the number of threads it was called with has arrived; called without one, when all threads
// that have not ended have. Misuse is reported: different counts in one phase, a count that is no multiple of a warp,
// a thread that arrives twice.
#include <algorithm>

#include "block.h"
#include "order.h"

namespace ptx {
namespace {

struct Barrier {
  uint32_t expected = 0, yes = 0;
  std::vector<uint32_t> arrived, waiting;
  order::Knowledge known;
  Total total{};  // of the last phase that completed
};
Barrier barriers[16];

void complete(Barrier& barrier) {
  barrier.total = {barrier.yes, uint32_t(barrier.arrived.size())};
  for (const uint32_t thread : barrier.waiting) {
    if (options.races) order::learn(thread, barrier.known);
    if (current == nullptr || current->done || thread != current->number) wake(thread);
  }
  barrier.arrived.clear();
  barrier.waiting.clear();
  barrier.yes = 0;
  if (options.races) barrier.known.clear();
}

bool full(const Barrier& barrier) {
  return barrier.arrived.size() == (barrier.expected == all_threads ? block.alive : barrier.expected);
}

Barrier& checked(uint32_t number, uint32_t expected, Line line) {
  if (number > 15) report("barrier", line, "there is no barrier %u", number);
  Barrier& barrier = barriers[number & 15];
  if (expected != all_threads && expected % 32) {
    report("barrier", line, "%u threads are not a whole number of warps", expected);
  }
  if (!barrier.arrived.empty() && barrier.expected != expected) {
    report("barrier", line, "barrier %u is called for %d and for %d threads", number, int(barrier.expected),
           int(expected));
  }
  if (std::count(barrier.arrived.begin(), barrier.arrived.end(), current->number)) {
    report("barrier", line, "a thread arrives twice in one phase of barrier %u", number);
  }
  barrier.expected = expected;
  return barrier;
}

Barrier& arrive(uint32_t number, uint32_t threads, bool yes, bool waits, Line line) {
  Barrier& barrier = checked(number, threads ? threads : all_threads, line);
  barrier.arrived.push_back(current->number);
  barrier.yes += yes;
  ++current->phase;
  if (options.races) order::tell(current->number, barrier.known);
  if (waits) barrier.waiting.push_back(current->number);
  if (full(barrier)) {
    complete(barrier);
  } else if (waits) {
    wait_for(number ? "named barrier" : "barrier", line);
  }
  return barrier;
}

}  // namespace

void reset_barriers() {
  for (Barrier& barrier : barriers) barrier = Barrier();
}

void release_barriers_of_all() {
  for (Barrier& barrier : barriers) {
    if (!barrier.arrived.empty() && barrier.expected == all_threads && full(barrier)) complete(barrier);
  }
}

void barrier_sync(uint32_t number, uint32_t threads, Line line) {
  arrive(number, threads, false, true, line);
}
void barrier_arrive(uint32_t number, uint32_t threads, Line line) {
  arrive(number, threads, false, false, line);
}
Total barrier_count(uint32_t number, uint32_t threads, bool predicate, Line line) {
  return arrive(number, threads, predicate, true, line).total;
}

}  // namespace ptx
