// Long calls end early where somebody asks for it: Ctrl-C in Python, which is not looked at while a kernel runs.
#pragma once

#include <atomic>

namespace pytransformer {

// Thrown out of a call that was given up. What it was to write is undefined then.
struct Interrupted {};

// The tasks of an outermost parallel region (parallel.h), and whether what is left of them is wanted no more.
struct Tasks {
  const bool may_end;
  std::atomic<bool> ended{false};
};
inline thread_local Tasks* running_tasks = nullptr;  // of which this thread runs some

// While one exists, calls that its thread makes ask `wanted` every 50 ms, between tasks, and are given up if it says
// so. What asks may make calls of its own, which are none of the outer one's tasks: then the outer one asks on.
class Interruptible {
 public:
  explicit Interruptible(bool (*wanted)());
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  bool (*outer_)();
  Tasks* outer_tasks_;
};

// Asks, if it is time to and the calling thread is interruptible.
bool interruption_wanted();

}  // namespace pytransformer
