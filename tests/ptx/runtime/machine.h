// The machine that translated kernels run on: what an instruction may ask of it.
//
// A block's threads are fibers, each with a stack of its own, of which one runs at a time. A thread gives way only
// inside a call below that needs others (a barrier, a shuffle, a matrix multiplication), so a plain run costs little
// more than the arithmetic, and the order of threads is the runner's to choose: in turn, or at random from a seed.
// Blocks run one after another. Detectors watch every access against vector clocks, so that an order that a program
// does not enforce is reported although this run happened to take the right one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx {

using Line = uint32_t;  // of the kernel's PTX

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Constant {
  const char* name;
  void* data;
  uint32_t bytes;
};

// A translated kernel.
struct Image {
  const char* name;
  void (*body)(const uint8_t* params);
  uint32_t param_count;
  const uint32_t* param_offsets;
  const uint32_t* param_sizes;
  uint32_t params_bytes;
  uint32_t shared_bytes;  // of static shared variables, up to where the dynamic ones start
  uint32_t max_threads;
  bool uses_cp_async, uses_async_proxy;
  const Constant* constants;
};

struct Options {
  uint32_t seed = 0;    // 0: threads and blocks in turn; else a random schedule
  bool races = false;   // vector clocks: races, missing fences, reads of what nobody wrote
  bool counts = false;  // bank conflicts, sectors of global memory
};
extern Options options;

struct AsyncCopy {
  uint32_t to;
  const uint8_t* from;
  uint32_t bytes, given;  // the rest is filled with zeros
  uint32_t group;
};

struct SumUnderWay {  // of a wgmma that has not been waited for
  float value;
  uint32_t group;
};

struct Thread {
  void* stack_pointer = nullptr;
  Dim3 index;
  uint32_t number = 0, lane = 0, warp = 0;
  bool done = false;
  const char* waits_for = nullptr;
  Line waits_at = 0;
  uint32_t patience = 0;
  uint64_t turns = 0;  // backward branches so far
  std::vector<AsyncCopy> copies;
  uint32_t copy_group = 0;
  uint32_t products = 0;  // groups of wgmma committed
  bool products_fenced = false;
  std::vector<SumUnderWay> sums;
  uint32_t registers = 0;  // 0: as many as it was launched with
  uint32_t phase = 0;      // changes at every barrier and collective; accesses of one warp are lined up by it
};

extern Thread* current;
extern Dim3 grid_size, block_size, block_index;
constexpr uint32_t multiprocessors = 8;  // few: grids that fill the machine stay small

// -- memory.cpp
enum class Access : uint8_t { weak, strong, atomic };
uint32_t dynamic_shared();
uint32_t dynamic_shared_bytes();
uint64_t shared_pointer(uint64_t address);  // an address of shared memory as a generic one
uint32_t shared_address(uint64_t pointer);  // and back
bool is_shared(uint64_t pointer);
// The memory behind an access that has been checked; scratch memory where it is out of bounds.
uint8_t* at_shared(uint32_t address, uint32_t bytes, bool write, Access kind, Line line, bool changes = true);
uint8_t* at_global(uint64_t address, uint32_t bytes, bool write, Access kind, Line line, uint32_t& hint,
                   bool changes = true);
uint8_t* at_generic(uint64_t address, uint32_t bytes, bool write, Access kind, Line line, uint32_t& hint,
                    bool changes = true);

// -- schedule.cpp
void loop(Line line);
void trap(Line line);
uint32_t warp_count();
uint32_t warp_lanes();  // those that have not ended

// -- barriers.cpp
struct Total {
  uint32_t yes, all;
};
void barrier_sync(uint32_t number, uint32_t threads, Line line);  // threads == 0: all of the block
void barrier_arrive(uint32_t number, uint32_t threads, Line line);
Total barrier_count(uint32_t number, uint32_t threads, bool predicate, Line line);

// -- mbarrier.cpp
void mbarrier_init(uint32_t address, uint32_t count, Line line);
void mbarrier_inval(uint32_t address, Line line);
void mbarrier_arrive(uint32_t address, Line line);
void mbarrier_wait(uint32_t address, uint32_t parity, Line line);   // until the phase of this parity is over
bool mbarrier_test(uint32_t address, uint32_t parity, Line line);   // whether it is
void mbarrier_expect(uint32_t address, uint32_t bytes, Line line);  // of bulk copies, in this phase

// -- warp.cpp
enum class Shuffle : uint8_t { up, down, bfly, idx };
enum class Reduction : uint8_t { add, min, max, min_signed, max_signed, bit_and, bit_or, bit_xor };
void sync_warp(uint32_t mask, Line line);
uint32_t shuffle(Shuffle mode, uint32_t mask, uint32_t value, uint32_t distance, uint32_t bounds, bool* within,
                 Line line);
uint32_t ballot(uint32_t mask, bool predicate, Line line);
uint32_t reduce_warp(Reduction what, uint32_t mask, uint32_t value, Line line);
uint32_t elect(uint32_t mask, Line line);
inline bool uniform(uint32_t ballot, uint32_t lanes) {
  return ballot == 0 || ballot == lanes;
}

// -- matrix.cpp
enum class Fragments : uint8_t { bf16_k16, f16_k16, bf16_k8, f16_k8, tf32_k8, tf32_k4 };
void load_matrices(uint32_t* rows, int count, bool transposed, uint32_t address, Line line);
void store_matrices(const uint32_t* rows, int count, bool transposed, uint32_t address, Line line);
uint32_t transpose_matrix(uint32_t row, Line line);
void multiply(Fragments kind, float* d, const uint32_t* a, const uint32_t* b, const float* c, Line line);

// -- warpgroup.cpp
enum class WarpgroupType : uint8_t { bf16, f16, tf32 };
struct WarpgroupProduct {  // what one thread brings to a wgmma.mma_async of 64 rows
  WarpgroupType type;
  uint32_t columns;
  const uint32_t* a;  // four registers, or null: A is in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
  float a_sign, b_sign;
  bool a_mn_major, b_mn_major;
};
void multiply_warpgroup(const WarpgroupProduct& product, float* d, Line line);
void products_fence();
void products_commit();
void products_wait(uint32_t pending, void* const* registers, uint32_t count);  // those in which sums may be
void set_registers(uint32_t count, bool raises, Line line);                    // of each thread of the warpgroup

// -- async.cpp
void copy_async(uint32_t to, uint64_t from, uint32_t bytes, uint32_t given, Line line, uint32_t& hint);
void copies_commit();
void copies_wait(uint32_t pending, Line line);

// -- bulk.cpp
// The box of a tensor that begins at `at`, the innermost coordinate first.
void load_box(uint32_t to, uint64_t map, const int32_t* at, uint32_t rank, uint32_t barrier, Line line, uint32_t& hint);
void store_box(uint64_t map, const int32_t* at, uint32_t rank, uint32_t from, bool adds, Line line, uint32_t& hint);
void stores_commit();
void stores_wait(uint32_t pending);

// -- order.cpp
void fence(bool beyond_the_block);
void fence_async_proxy();

}  // namespace ptx
