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

#include <atomic>
#include <cstdint>
#include <memory>

#include "interrupt.h"
#include "simd_amx.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef PYTRANSFORMER_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace pytransformer {

inline thread_local int current_thread = -1;  // in the innermost region; -1: in none of this header's

// Gives a variable another value for as long as this lives.
template <class T>
class Set {
 public:
  Set(T& place, T value) : place_(place), before_(place) { place = value; }
  ~Set() { place_ = before_; }
  Set(const Set&) = delete;
  Set& operator=(const Set&) = delete;

 private:
  T& place_;
  T before_;
};

// Runs body(thread) on each of `count` threads. With a count of 1 it is called from here, as thread 0 of those that
// work on it, and what it throws passes.
template <class Body>
void on_threads(int count, const Body& body) {
  if (count == 1) {
    const Set here(current_thread, current_thread < 0 ? -1 : 0);
    return body(0);
  }
#ifdef PYTRANSFORMER_STD_THREADS
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&body, i] {
      const Set here(current_thread, i);
      body(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
#elif defined(_OPENMP)
#pragma omp parallel
  if (const int thread = omp_get_thread_num(); thread < count) {
    const Set here(current_thread, thread);
    body(thread);
  }
#endif
}

// Inside a parallel region?
inline bool in_parallel() {
#ifdef _OPENMP
  return omp_in_parallel();
#elif defined(PYTRANSFORMER_STD_THREADS)
  return current_thread >= 0;
#else
  return false;
#endif
}

// True in a process that was forked after this module was loaded (set by an atfork handler).
bool in_forked_child();

inline int max_threads() {
#ifdef _OPENMP
  return in_parallel() || in_forked_child() ? 1 : omp_get_max_threads();
#elif defined(PYTRANSFORMER_STD_THREADS)
  return in_parallel() ? 1 : PYTRANSFORMER_STD_THREADS;
#else
  return 1;
#endif
}

}  // namespace pytransformer

namespace pytransformer::PYTRANSFORMER_ISA {

inline int thread_index() {
  return current_thread < 0 ? 0 : current_thread;
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

// Tasks [0, tasks) in contiguous shares, one a thread, and how far each share has been taken.
class Shares {
 public:
  Shares(int64_t tasks, int threads) : threads_(threads), shares_(new Share[size_t(threads)]) {
    for (int i = 0; i < threads; ++i) {
      shares_[i].next = tasks * i / threads;
      shares_[i].end = tasks * (i + 1) / threads;
    }
  }

  // Runs body(task) for what is left of the thread's own share, and then of the others.
  template <class Body>
  void take(int thread, const Body& body) {
    for (int i = 0; i < threads_; ++i) {
      Share& share = shares_[(thread + i) % threads_];
      for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(task);
    }
  }

 private:
  struct alignas(128) Share {  // of no line that another thread's core asks for
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  int threads_;
  std::unique_ptr<Share[]> shares_;
};

// Whether what this thread does is wanted no more. Tasks that take long look at it now and then, and return.
inline bool given_up() {
  if (running_tasks == nullptr) return false;
  if (running_tasks->may_end && interruption_wanted()) running_tasks->ended.store(true, std::memory_order_relaxed);
  return running_tasks->ended.load(std::memory_order_relaxed);
}

// Runs body(task) for every task in [0, tasks). A thread takes the tasks of its own share one by one, in order, then
// those that others have not come to. Which share that is depends on the number of tasks only, and so what a thread
// wrote in one region it mostly finds in its own caches in the next, and in the next call: between cores that do not
// share a cache a line takes 350 ns, seven times what it takes between those that do (Zen 4), and products of matrices
// whose operands went to and fro that way were a sixth slower. For unequal tasks: put the longest first.
//
// The calling thread asks between its tasks whether the call is to be given up (interrupt.h), and what is left of them
// is then skipped, in regions inside of these tasks, too. The outermost region throws: not when it runs inside one that
// is not of this header, out of which nothing may be thrown.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  const int threads = tasks > 1 ? max_threads() : 1;
  Tasks own{!in_parallel()};
  Tasks* const outermost = running_tasks != nullptr ? running_tasks : &own;
  Shares shares(tasks, threads);
  on_threads(threads, [&](int thread) {
    const Set running(running_tasks, outermost);
#ifdef PYTRANSFORMER_AMX
    const MatrixUnit unit;
#endif
    shares.take(thread, [&](int64_t task) {
      if (!given_up()) body(task);
    });
  });
  if (own.ended) throw Interrupted();
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
  if (threads <= 1) return body(0, count, 0);
#pragma omp parallel for schedule(static, 1)
  for (int part = 0; part < threads; ++part) {
    body(count * part / threads, count * (part + 1) / threads, part);
  }
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
