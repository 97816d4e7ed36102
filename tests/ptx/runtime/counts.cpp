// How well accesses use the memory: bank conflicts of shared memory, sectors of global memory.
//
// The lanes of a warp that execute an instruction for the n-th time since their last meeting count as one request.
// Shared memory serves 32 banks of 4 bytes in a wavefront, in phases of as many lanes as fill 128 bytes; a request
// takes as many wavefronts as its busiest bank has different words. Global memory moves sectors of 32 bytes; caches are
// not modelled, so that what is asked for twice counts twice. Uses are counted by instruction and tensor.
#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>

#include "block.h"

namespace ptx::counts {
namespace {

struct Use {
  bool shared = false;
  uint32_t bytes = 0;  // of one lane
  uint64_t requests = 0, moved = 0, ideal = 0;
};
struct Request {
  const std::string* tensor = nullptr;
  uint64_t address[32];
  uint32_t lanes = 0, bytes = 0;
  bool shared = false;
  Line line = 0;
};

std::map<std::tuple<std::string, Line, std::string>, Use> uses;  // of (kernel, line, tensor)
std::unordered_map<uint64_t, Request> open;
std::unordered_map<uint64_t, std::pair<uint32_t, uint32_t>> occurrences;  // of (thread, line): phase and count
std::string text;

size_t distinct(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values.size();
}

uint32_t wavefronts(std::vector<uint64_t> words) {
  distinct(words);
  uint32_t banks[32] = {}, most = 0;
  for (const uint64_t word : words) most = std::max(most, ++banks[word % 32]);
  return most;
}

void close(const Request& request) {
  Use& use = uses[{block.image->name, request.line, request.tensor ? *request.tensor : ""}];
  use.shared = request.shared;
  use.bytes = request.bytes;
  ++use.requests;
  if (!request.shared) {
    std::vector<uint64_t> sectors, bytes;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t i = 0; request.lanes >> lane & 1 && i < request.bytes; ++i) {
        bytes.push_back(request.address[lane] + i);
        sectors.push_back((request.address[lane] + i) / 32);
      }
    }
    use.moved += distinct(sectors);
    use.ideal += (distinct(bytes) + 31) / 32;
    return;
  }
  const uint32_t lanes = 128 / std::max(request.bytes, 4u);
  for (uint32_t first = 0; first < 32; first += lanes) {
    std::vector<uint64_t> words;
    for (uint32_t lane = first; lane < first + lanes; ++lane) {
      for (uint32_t i = 0; request.lanes >> lane & 1 && i < request.bytes; i += 4) {
        words.push_back((request.address[lane] + i) / 4);
      }
    }
    if (words.empty()) continue;
    use.moved += wavefronts(words);
    use.ideal += 1;
  }
}

}  // namespace

void access(uint64_t address, uint32_t bytes, bool shared, Line line, const std::string* tensor) {
  const Thread& thread = *current;
  auto& [phase, count] = occurrences[uint64_t(thread.number) << 33 | uint64_t(shared) << 32 | line];
  if (phase != thread.phase) count = 0;
  phase = thread.phase;
  const uint64_t key = (uint64_t(line) << 42) ^ (uint64_t(thread.warp) << 36) ^ (uint64_t(phase) << 18) ^ count++ ^
                       (uint64_t(shared) << 63);
  Request& request = open[key];
  request.line = line;
  request.tensor = tensor;
  request.bytes = bytes;
  request.shared = shared;
  request.address[thread.lane] = address;
  request.lanes |= 1u << thread.lane;
}

void matrix_row_group(const uint32_t* addresses, Line line, bool first) {
  std::vector<uint64_t> words;
  for (int row = 0; row < 8; ++row) {
    for (uint32_t i = 0; i < 16; i += 4) words.push_back((addresses[row] + i) / 4);
  }
  Use& use = uses[{block.image->name, line, ""}];
  use.shared = true;
  use.bytes = 16;
  use.requests += first;
  use.moved += wavefronts(words);
  use.ideal += 1;
}

void end_of_block() {
  for (const auto& [key, request] : open) close(request);
  open.clear();
  occurrences.clear();
}

// One line for each use: kernel, line, space, tensor, bytes of a lane, requests, moved, ideal.
const char* table() {
  text.clear();
  for (const auto& [where, use] : uses) {
    const auto& [kernel, line, tensor] = where;
    text += kernel + "\t" + std::to_string(line) + "\t" + (use.shared ? "shared" : "global") + "\t" + tensor + "\t" +
            std::to_string(use.bytes) + "\t" + std::to_string(use.requests) + "\t" + std::to_string(use.moved) + "\t" +
            std::to_string(use.ideal) + "\n";
  }
  return text.c_str();
}

void clear() {
  uses.clear();
  open.clear();
}

}  // namespace ptx::counts
