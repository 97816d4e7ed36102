// Threads for the CPU kernels: torch's own OpenMP runtime, on torch's terms.
//
// The module links libgomp by its plain soname, so the process has one runtime whichever of torch and
// this library is imported first, and torch.set_num_threads (omp_set_num_threads) rules both.
// A call made inside another parallel region runs serially. So does a call in a forked child:
// libgomp's thread pool does not survive fork, and a parallel region there would wait for ever.
//
// ThreadSanitizer does not see how libgomp's threads wait for each other. A build for it has no OpenMP and defines
// PYTRANSFORMER_STD_THREADS, a number: as many std::threads then run what is parallel.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef PYTRANSFORMER_STD_THREADS
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace pytransformer {

#ifdef PYTRANSFORMER_STD_THREADS
inline thread_local int current_thread = -1;  // -1: outside of any parallel region

// Runs body(thread) on each of `count` threads.
template <class Body>
void on_threads(int count, const Body& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&body, i] {
      current_thread = i;
      body(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A parallel region inside another, run by the thread that met it: as OpenMP has it, this one is number 0 there.
class NestedRegion {
 public:
  NestedRegion() : outer_(current_thread) {
    if (outer_ > 0) current_thread = 0;
  }
  ~NestedRegion() { current_thread = outer_; }

 private:
  int outer_;
};
#endif

// True in a process that was forked after this module was loaded (set by an atfork handler).
bool in_forked_child();

inline int max_threads() {
#ifdef _OPENMP
  if (omp_in_parallel() || in_forked_child()) return 1;
  return omp_get_max_threads();
#elif defined(PYTRANSFORMER_STD_THREADS)
  return current_thread >= 0 ? 1 : PYTRANSFORMER_STD_THREADS;
#else
  return 1;
#endif
}

}  // namespace pytransformer

namespace pytransformer::PYTRANSFORMER_ISA {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#elif defined(PYTRANSFORMER_STD_THREADS)
  return current_thread >= 0 ? current_thread : 0;
#else
  return 0;
#endif
}

// How many threads elementwise work on so many elements is worth: waking one costs about what 16k of them do.
inline int threads_for(int64_t elements) {
  const int64_t worth = 1 + elements / 16384;
  return worth < max_threads() ? int(worth) : max_threads();
}

// Whether more than an eighth of the threads' time would go to waiting for the last of so many equal tasks.
inline bool idle(int64_t tasks, int threads) {
  const int64_t rounds = (tasks + threads - 1) / threads;
  return 8 * (rounds * threads - tasks) > rounds * threads;
}

// Runs body(task) for every task in [0, tasks); threads take tasks one by one, in order, as they
// become free. For unequal tasks: put the longest first.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  [[maybe_unused]] const bool threaded = tasks > 1 && max_threads() > 1;
#ifdef PYTRANSFORMER_STD_THREADS
  if (threaded) {
    std::atomic<int64_t> next{0};
    return on_threads(max_threads(), [&](int) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task);
    });
  }
  const NestedRegion nested;
#endif
#pragma omp parallel for schedule(dynamic, 1) if (threaded)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// Runs body(begin, end, thread) once for each of `threads` equal, contiguous parts of [0, count).
// The parts depend on `threads` only, so a reduction over parts in order is deterministic.
template <class Body>
void parallel_ranges(int64_t count, int threads, const Body& body) {
#ifdef PYTRANSFORMER_STD_THREADS
  if (threads > 1) {
    return on_threads(threads, [&](int part) { body(count * part / threads, count * (part + 1) / threads, part); });
  }
#endif
#pragma omp parallel for schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    body(count * part / threads, count * (part + 1) / threads, part);
  }
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
