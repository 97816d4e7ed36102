// Long calls end early where somebody asks for it: Ctrl-C in Python, which is not looked at while a kernel runs.
#pragma once

namespace pytransformer {

// Thrown out of a call that was given up. What it was to write is undefined then.
struct Interrupted {};

// While one exists, calls that its thread makes ask `wanted` every 50 ms, between tasks, and are given up if it says
// so. What asks may make calls of its own: then the outer one asks on.
class Interruptible {
 public:
  explicit Interruptible(bool (*wanted)());
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  bool (*outer_)();
};

// Asks, if it is time to and the calling thread is interruptible.
bool interruption_wanted();

}  // namespace pytransformer
