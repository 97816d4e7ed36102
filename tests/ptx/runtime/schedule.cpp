// Fibers and the order they run in.
//
// A switch saves the six registers that the x86-64 ABI gives to the callee and swaps stacks: a few nanoseconds. A
// ready thread runs until it must wait; the queue is first in first out, or with a seed a queue whose head is now and
// then swapped with any other. Blocks run one at a time, with a seed in random order. Nobody ready and somebody alive
// is a deadlock, and the report says where each thread waits. A loop that never lets others decide its end is found
// by counting backward branches: after some thousands the thread gives way, after some hundred millions it is stuck.
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <numeric>

#include "block.h"
#include "order.h"

extern "C" void ptx_switch(void** save, void* load);
asm(R"(
.text
.globl ptx_switch
.type ptx_switch,@function
ptx_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptx_switch,.-ptx_switch
)");

namespace ptx {

Options options;
Thread* current = nullptr;
Dim3 grid_size, block_size, block_index;
Block block;

namespace {

constexpr size_t stack_bytes = 1 << 20;  // a large kernel is compiled without optimisation: a slot for each register
constexpr uint32_t patience = 1 << 14;   // backward branches before a thread gives way
constexpr uint64_t usual_limit = uint64_t(1) << 28;
uint64_t endless = usual_limit;  // and before it is taken to be stuck

std::vector<uint32_t> ready;
size_t head = 0;
std::vector<std::function<void()>> actions;
uint8_t* stacks = nullptr;
uint32_t stack_count = 0;
void* main_stack = nullptr;
uint64_t random_state = 1;

bool act() {
  if (actions.empty()) return false;
  const size_t which = options.seed ? random_below(actions.size()) : 0;
  auto action = std::move(actions[which]);
  actions.erase(actions.begin() + which);
  Thread* const outer = current;
  current = nullptr;
  action();
  current = outer;
  return true;
}

Thread* next_ready() {
  if (options.seed && !actions.empty() && random_below(64) == 0) act();
  if (head == ready.size()) {
    ready.clear();
    head = 0;
    return nullptr;
  }
  if (options.seed && random_below(4) == 0) {
    std::swap(ready[head], ready[head + random_below(ready.size() - head)]);
  }
  const uint32_t number = ready[head++];
  if (head > 4096) {
    ready.erase(ready.begin(), ready.begin() + head);
    head = 0;
  }
  return &block.thread[number];
}

void leave() {
  Thread* const self = current;
  Thread* const next = block.stopped ? nullptr : next_ready();
  if (next == self) return;
  current = next;
  ptx_switch(&self->stack_pointer, next ? next->stack_pointer : main_stack);
}

void fiber() {
  block.image->body(block.params);
  Thread& thread = *current;
  thread.done = true;
  finish_copies(thread);
  finish_stores(thread.number);
  --block.alive;
  block.lanes[thread.warp] &= ~(1u << thread.lane);
  release_barriers_of_all();
  leave();
  __builtin_unreachable();
}

void report_deadlock() {
  std::map<std::string, uint32_t> places;
  for (const Thread& thread : block.thread) {
    if (!thread.done) ++places[std::string(thread.waits_for) + " at " + format_line(thread.waits_at)];
  }
  std::string text;
  for (const auto& [place, count] : places) text += std::to_string(count) + " at " + place + "; ";
  report("deadlock", 0, "%u of %u threads wait for ever: %s", block.alive, block.threads, text.c_str());
  block.stopped = true;
}

void make_stacks() {
  if (stack_count >= block.threads) return;
  if (stacks != nullptr) munmap(stacks, stack_count * stack_bytes);
  stack_count = block.threads;
  stacks = static_cast<uint8_t*>(mmap(nullptr, stack_count * stack_bytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void start_thread(uint32_t number) {
  Thread& thread = block.thread[number];
  thread.number = number;
  thread.lane = number % 32;
  thread.warp = number / 32;
  thread.patience = patience;
  thread.index = {number % block_size.x, number / block_size.x % block_size.y, number / (block_size.x * block_size.y)};
  block.lanes[thread.warp] |= 1u << thread.lane;
  auto* stack = reinterpret_cast<uintptr_t*>(stacks + (number + 1) * stack_bytes - 64);
  *--stack = 0;
  *--stack = reinterpret_cast<uintptr_t>(fiber);
  for (int i = 0; i < 6; ++i) *--stack = 0;
  thread.stack_pointer = stack;
}

void start_block() {
  ++block.serial;
  block.thread.assign(block.threads, Thread());
  block.lanes.assign(block.warps, 0);
  block.alive = block.threads;
  block.stopped = false;
  ready.clear();
  head = 0;
  actions.clear();
  reset_barriers();
  reset_mbarriers();
  reset_stores();
  reset_warps();
  reset_warpgroups();
  if (options.races) order::start_block();
  std::memset(block.window, 0xff, block.shared_end);  // what a real block may find there
  for (uint32_t i = 0; i < block.threads; ++i) start_thread(i);
  std::vector<uint32_t> warps(block.warps);
  std::iota(warps.begin(), warps.end(), 0);
  for (uint32_t i = block.warps; options.seed && i > 1; --i) std::swap(warps[i - 1], warps[random_below(i)]);
  for (const uint32_t warp : warps) {
    for (uint32_t i = 32 * warp; i < std::min(32 * warp + 32, block.threads); ++i) ready.push_back(i);
  }
}

void run_block() {
  start_block();
  while (block.alive && !block.stopped) {
    Thread* const next = next_ready();
    if (next != nullptr) {
      current = next;
      ptx_switch(&main_stack, next->stack_pointer);
    } else if (!act()) {
      report_deadlock();
    }
  }
  if (!block.stopped && !actions.empty()) report("bulk", 0, "a block ends with %zu copies under way", actions.size());
  while (act()) {
  }
  current = nullptr;
  if (options.counts) counts::end_of_block();
}

bool fits(const Image& image, Dim3 threads, size_t dynamic_bytes) {
  const uint64_t count = threads.count(), bytes = image.shared_bytes + dynamic_bytes;
  if (count == 0 || count > image.max_threads || count > 1024) {
    report("launch", 0, "%lu threads in a block; its bound is %u", count, std::min(image.max_threads, 1024u));
  } else if (bytes > shared_limit) {
    report("launch", 0, "%lu bytes of shared memory", bytes);
  } else {
    return true;
  }
  return false;
}

}  // namespace

uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 11) % n;
}

void wake(uint32_t thread) {
  ready.push_back(thread);
}

void wait_for(const char* what, Line line) {
  current->waits_for = what;
  current->waits_at = line;
  leave();
}

void give_way() {
  wake(current->number);
  leave();
}

void later(std::function<void()> action) {
  actions.push_back(std::move(action));
}

void loop(Line line) {
  if (--current->patience) return;
  current->patience = patience;
  current->turns += patience;
  if (current->turns > endless) {
    report("endless", line, "a thread has taken this branch or others %lu times", current->turns);
    block.stopped = true;
  }
  current->waits_for = "loop";
  current->waits_at = line;
  give_way();
}

void set_patience(uint64_t limit) {
  endless = limit ? limit : usual_limit;
}

void trap(Line line) {
  report("trap", line, "the kernel stopped itself");
}

uint32_t warp_count() {
  return block.warps;
}
uint32_t warp_lanes() {
  return block.lanes[current->warp];
}

uint8_t* stack_of(uint32_t thread, size_t* bytes) {
  *bytes = stack_bytes;
  return stacks + thread * stack_bytes;
}

void run(const Image& image, Dim3 grid, Dim3 threads, size_t dynamic_bytes, const uint8_t* params) {
  block.image = &image;
  block.params = params;
  grid_size = grid;
  block_size = threads;
  block_index = {0, 0, 0};
  if (!fits(image, threads, dynamic_bytes)) return;
  block.threads = threads.count();
  block.warps = (block.threads + 31) / 32;
  random_state = options.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  if (block.window == nullptr) {
    block.window =
        static_cast<uint8_t*>(mmap(nullptr, shared_window, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  block.dynamic_at = shared_base + image.shared_bytes;
  block.shared_end = block.dynamic_at + dynamic_bytes;
  make_stacks();
  if (options.races) order::start_launch();
  std::vector<uint32_t> blocks(grid.count());
  std::iota(blocks.begin(), blocks.end(), 0);
  for (uint32_t i = blocks.size(); options.seed && i > 1; --i) std::swap(blocks[i - 1], blocks[random_below(i)]);
  for (const uint32_t number : blocks) {
    block_index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    run_block();
    if (block.stopped) return;
  }
}

}  // namespace ptx
