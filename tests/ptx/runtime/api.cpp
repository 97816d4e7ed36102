// The C functions that Python and the stand-in for the CUDA runtime call.
#include <cstring>
#include <mutex>
#include <string>

#include "block.h"

namespace ptx {

void forget_tensors();
void add_tensor(const char* name, uint64_t data, uint64_t bytes, uint32_t element);
const char* report_text();
void clear_report();
void set_patience(uint64_t limit);
namespace counts {
const char* table();
void clear();
}  // namespace counts

namespace {
int capability = 80;
std::mutex one_at_a_time;
// Given a kernel's name, its image: found, and translated when first asked for, by Python.
using Finder = const Image* (*)(const char* name);
Finder finder = nullptr;
// Told of a launch and its dynamic shared memory in place of running it.
using Recorder = void (*)(const char* name, uint64_t dynamic_bytes);
Recorder recorder = nullptr;
}  // namespace

}  // namespace ptx

using namespace ptx;

extern "C" {

void ptx_options(uint32_t seed, int races, int counted) {
  options.seed = seed;
  options.races = races;
  options.counts = counted;
}

// After how many backward branches a thread is stuck; 0: the usual number.
void ptx_set_patience(uint64_t limit) {
  set_patience(limit);
}

void ptx_forget_tensors() {
  forget_tensors();
}

void ptx_add_tensor(const char* name, uint64_t data, uint64_t bytes, uint32_t element) {
  add_tensor(name, data, bytes, element);
}

const char* ptx_report() {
  return report_text();
}
const char* ptx_counts() {
  return counts::table();
}

void ptx_clear() {
  clear_report();
  counts::clear();
}

void ptx_set_finder(Finder function) {
  finder = function;
}

void ptx_set_recorder(Recorder function) {
  recorder = function;
}

int ptx_recorded(const char* name, size_t dynamic_bytes) {
  if (recorder == nullptr) return 0;
  recorder(name, dynamic_bytes);
  return 1;
}

const Image* ptx_find(const char* name) {
  return finder == nullptr ? nullptr : finder(name);
}

uint32_t ptx_static_shared(const Image* image) {
  return image->shared_bytes;
}
uint32_t ptx_max_threads(const Image* image) {
  return image->max_threads;
}
int ptx_capability() {
  return capability;
}
void ptx_set_capability(int value) {
  capability = value;
}
int ptx_multiprocessors() {
  return multiprocessors;
}

// `arguments` as cudaLaunchKernel takes them: a pointer to each.
int ptx_launch(const Image* image, const uint32_t* grid, const uint32_t* threads, size_t dynamic_bytes,
               void* const* arguments) {
  alignas(128) static uint8_t params[4096];
  if (image->params_bytes > sizeof params) return 1;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  for (uint32_t i = 0; i < image->param_count; ++i) {
    std::memcpy(params + image->param_offsets[i], arguments[i], image->param_sizes[i]);
  }
  run(*image, {grid[0], grid[1], grid[2]}, {threads[0], threads[1], threads[2]}, dynamic_bytes, params);
  return 0;
}
}
