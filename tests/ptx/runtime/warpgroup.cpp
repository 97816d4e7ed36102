// wgmma: products of the 128 threads of a warpgroup, whose operands lie in shared memory and are read in their own
// time; and setmaxnreg, by which they leave registers to other warpgroups.
//
// A matrix descriptor says where an operand of 64 rows (or N columns) by 32 bytes of K begins, how it is swizzled and
// how its pieces lie apart (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"). Rows of K are
// contiguous, or with `mn_major` rows of M or N are. The product is made when the last thread of the warpgroup has
// come, the earliest; for the detectors its reads last until a wait, as those of an agent beside the threads, through
// the async proxy: what threads wrote must have been fenced for it.
//
// Nor are its results there before a wait. Until then a register holds a mark, a signalling NaN (which no arithmetic
// makes) with the number of a sum under way: another product adds to that sum, and anything else that reads it has a
// NaN. The wait puts sums in the place of their marks. Sums are made as those of mma.sync (products.h), which no GPU
// has been asked about.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "block.h"
#include "instructions.h"
#include "order.h"
#include "products.h"

namespace ptx {
namespace {

constexpr uint32_t threads_of_group = 128, groups = 8, k_bytes = 32;

struct Brought {
  const WarpgroupProduct* product;
  float* d;
};
struct Group {
  std::vector<Brought> brought = std::vector<Brought>(threads_of_group);
  std::vector<uint32_t> waiting;
};
Group group_of[groups];

// What is known to all threads of a group, and so before any of the product's reads.
order::Knowledge known_to_all(uint32_t first) {
  order::Knowledge known = order::knowledge_of(first);
  for (uint32_t i = 1; i < threads_of_group; ++i) {
    const order::Knowledge& other = order::knowledge_of(first + i);
    for (size_t n = 0; n < known.clocks.size(); ++n) known.clocks[n] = std::min(known.clocks[n], other.clocks[n]);
    for (size_t n = 0; n < known.published.size(); ++n)
      known.published[n] = std::min(known.published[n], other.published[n]);
  }
  return known;
}

struct Descriptor {
  uint32_t start, leading, stride, row, base;  // bytes; `row` is a row of the swizzle, 16 where there is none

  explicit Descriptor(uint64_t d)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        row(d >> 62 == 0 ? 16 : 256u >> (d >> 62)),
        base(d >> 49 & 7) {}

  // Of element (i, k): i counts rows of A or columns of B.
  uint32_t address(uint32_t i, uint32_t k, uint32_t width, bool mn_major) const {
    const uint32_t per_row = row / width;
    uint32_t offset;
    if (mn_major) {
      const uint32_t apart = row == 16 ? stride : leading, of_k = row == 16 ? leading : stride;
      offset = i / per_row * apart + i % per_row * width + k % 8 * row + k / 8 * of_k;
    } else {
      offset = i / 8 * stride + i % 8 * row + (row == 16 ? k / per_row * leading + k % per_row * width : k * width);
    }
    return swizzled(start + offset, row);
  }
};

float number(const uint8_t* at, WarpgroupType type) {
  uint32_t word = 0;
  std::memcpy(&word, at, type == WarpgroupType::tf32 ? 4 : 2);
  if (type == WarpgroupType::tf32) return bits<float>(word & ~0x1fffu);
  return type == WarpgroupType::bf16 ? float(bits<bfloat16>(uint16_t(word))) : float(bits<half>(uint16_t(word)));
}

using Operand = std::vector<float>;  // [rows or columns][k]

// What the detectors hear of: a product's reads, by the four warps.
struct Readers {
  order::Knowledge known;
  order::Actor warp[4];

  Readers(const Readers&) = delete;
  explicit Readers(uint32_t group) : known(known_to_all(group * threads_of_group)) {
    for (uint32_t w = 0; w < 4; ++w)
      warp[w] = {order::products_of(4 * group + w), current->products + 1, &known, order::Proxy::async};
  }
  void read(uint32_t address, uint32_t width, uint32_t first, uint32_t last, Line line) const {
    for (uint32_t w = first; w <= last; ++w) order::access_shared(address, width, false, Access::weak, warp[w], line);
  }
};

// `count` rows of A or columns of B; of A each warp reads 16 rows.
Operand from_shared(uint64_t descriptor, bool mn_major, uint32_t count, bool is_a, WarpgroupType type,
                    const Readers* readers, Line line) {
  const Descriptor d(descriptor);
  const uint32_t width = type == WarpgroupType::tf32 ? 4 : 2, k_count = k_bytes / width;
  if (d.base != 0) report("wgmma", line, "the runner does not know a matrix descriptor with base offset %u", d.base);
  Operand found(count * k_count);
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t k = 0; k < k_count; ++k) {
      const uint32_t address = d.address(i, k, width, mn_major);
      if (!in_shared(address, width)) {
        report("out-of-bounds", line, "wgmma reads element (%u, %u) of an operand at shared+%u, which ends at %u", i, k,
               address, block.shared_end);
        return found;
      }
      if (readers != nullptr) readers->read(address, width, is_a ? i / 16 : 0, is_a ? i / 16 : 3, line);
      found[i * k_count + k] = number(block.window + address, type);
    }
  }
  return found;
}

// A in registers: each warp holds 16 rows, as the left operand of mma.sync.
Operand from_registers(const Group& group, WarpgroupType type) {
  const uint32_t packed = type == WarpgroupType::tf32 ? 1 : 2, k_count = 8 * packed;
  Operand found(64 * k_count);
  for (uint32_t n = 0; n < threads_of_group; ++n) {
    const uint32_t row = n / 32 * 16 + n % 32 / 4, t = n % 4;
    for (uint32_t r = 0; r < 4; ++r) {
      const uint32_t word = group.brought[n].product->a[r];
      for (uint32_t h = 0; h < packed; ++h) {
        const uint32_t element = packed == 1 ? word : word >> (16 * h);
        uint8_t raw[4];
        std::memcpy(raw, &element, 4);
        found[(row + 8 * (r % 2)) * k_count + packed * t + h + 4 * packed * (r / 2)] = number(raw, type);
      }
    }
  }
  return found;
}

void check_agreement(const Group& group, const WarpgroupProduct& p, Line line) {
  for (const Brought& x : group.brought) {
    const WarpgroupProduct& other = *x.product;
    if (other.b_descriptor != p.b_descriptor || other.accumulate != p.accumulate ||
        (p.a == nullptr && other.a_descriptor != p.a_descriptor)) {
      report("wgmma", line, "the threads of a warpgroup bring different descriptors or scales");
      return;
    }
  }
}

// d (+)= A B of all threads, eight columns at a time: a row of these is held by four lanes.
template <int K>
void add_products(const Group& group, const Operand& A, const Operand& B) {
  const WarpgroupProduct& p = *group.brought[0].product;
  const int lowest = p.type == WarpgroupType::f16 ? -14 : -126;
  std::vector<products::Row<K>> rows;
  for (uint32_t m = 0; m < 64; ++m) {
    float row[K];
    for (uint32_t k = 0; k < K; ++k) row[k] = A[m * K + k] * p.a_sign * p.b_sign;
    rows.push_back(products::row(row, lowest));
  }
  for (uint32_t n = 0; n < p.columns; n += 8) {
    products::Row<8> columns[K];
    for (uint32_t k = 0; k < K; ++k) {
      float row[8];
      for (uint32_t i = 0; i < 8; ++i) row[i] = B[(n + i) * K + k];
      columns[k] = products::row(row, lowest);
    }
    for (uint32_t m = 0; m < 64; ++m) {
      const Brought* const lanes = &group.brought[m / 16 * 32 + m % 8 * 4];
      const uint32_t first = n / 2 + m % 16 / 8 * 2;
      float c[8], d[8];
      for (uint32_t i = 0; i < 8; ++i) c[i] = p.accumulate ? lanes[i / 2].d[first + i % 2] : 0.0f;
      products::add(rows[m], columns, products::row(c, -126), d);
      for (uint32_t i = 0; i < 8; ++i) lanes[i / 2].d[first + i % 2] = d[i];
    }
  }
}

void make(const Group& group, uint32_t number, Line line) {
  const WarpgroupProduct& p = *group.brought[0].product;
  check_agreement(group, p, line);
  std::optional<Readers> watched;
  if (options.races) watched.emplace(number);
  const Readers* const readers = watched ? &*watched : nullptr;
  const Operand A = p.a != nullptr ? from_registers(group, p.type)
                                   : from_shared(p.a_descriptor, p.a_mn_major, 64, true, p.type, readers, line);
  const Operand B = from_shared(p.b_descriptor, p.b_mn_major, p.columns, false, p.type, readers, line);
  p.type == WarpgroupType::tf32 ? add_products<8>(group, A, B) : add_products<16>(group, A, B);
}

// Sums under way are numbered by the lower bits of their marks.
constexpr uint32_t mark = 0xffa00000, number_of_mark = 0x001fffff;

// The sum under way that a mark stands for; null of any other value, and of a mark that was read too early.
SumUnderWay* sum_of(uint32_t word) {
  const bool marked = (word & ~number_of_mark) == mark && (word & number_of_mark) < current->sums.size();
  return marked ? &current->sums[word & number_of_mark] : nullptr;
}

// Leaves in `d` what to add to, and tells the numbers of the sums.
std::vector<uint32_t> take_up_sums(float* d, uint32_t count) {
  std::vector<SumUnderWay>& sums = current->sums;
  std::vector<uint32_t> numbers(count);
  for (uint32_t i = 0; i < count; ++i) {
    const SumUnderWay* const sum = sum_of(bits<uint32_t>(d[i]));
    numbers[i] = uint32_t(sum ? sum - sums.data() : sums.size());
    if (sum != nullptr) {
      d[i] = sum->value;
    } else {
      sums.push_back({});
    }
  }
  return numbers;
}

void leave_marks(float* d, const std::vector<uint32_t>& numbers, Line line) {
  if (current->sums.size() > number_of_mark) report("wgmma", line, "more sums under way than there are marks for");
  for (size_t i = 0; i < numbers.size(); ++i) {
    current->sums[numbers[i]] = {d[i], current->products + 1};
    d[i] = bits<float>(mark | numbers[i]);
  }
}

// What a block has, and its threads can pass on, is what it was launched with: of a multiprocessor's registers, which
// it has for itself, as many eights as there are for each of its threads.
std::vector<uint32_t> waiting_for_registers;

uint32_t registers_at_launch() {
  return 65536 / block.image->max_threads / 8 * 8;
}

uint32_t registers_taken() {
  uint32_t sum = 0;
  for (const Thread& thread : block.thread) sum += thread.registers ? thread.registers : registers_at_launch();
  return sum;
}

}  // namespace

void reset_warpgroups() {
  for (Group& group : group_of) group.waiting.clear();
  waiting_for_registers.clear();
}

void set_registers(uint32_t count, bool raises, Line line) {
  Thread& thread = *current;
  const uint32_t before = thread.registers ? thread.registers : registers_at_launch();
  if (count < 24 || count > 256 || count % 8) report("setmaxnreg", line, "a thread cannot have %u registers", count);
  if (raises ? count < before : count > before) {
    report("setmaxnreg", line, "%s from %u to %u registers", raises ? "an increase" : "a decrease", before, count);
  }
  while (raises && registers_taken() - before + count > registers_at_launch() * block.threads) {
    waiting_for_registers.push_back(thread.number);
    wait_for("setmaxnreg", line);
  }
  thread.registers = count;
  if (raises) return;
  for (const uint32_t other : waiting_for_registers) wake(other);
  waiting_for_registers.clear();
}

void multiply_warpgroup(const WarpgroupProduct& product, float* d, Line line) {
  Thread& thread = *current;
  const uint32_t number = thread.number / threads_of_group;
  if (number >= groups || (number + 1) * threads_of_group > block.threads) {
    report("wgmma", line, "thread %u belongs to no whole warpgroup", thread.number);
    return;
  }
  if (!thread.products_fenced) report("wgmma", line, "no wgmma.fence before the first product behind a wait");
  ++thread.phase;
  const std::vector<uint32_t> sums = take_up_sums(d, product.columns / 2);
  Group& group = group_of[number];
  group.brought[thread.number % threads_of_group] = {&product, d};
  if (group.waiting.size() + 1 < threads_of_group) {
    group.waiting.push_back(thread.number);
    wait_for("wgmma", line);
  } else {
    make(group, number, line);
    for (const uint32_t other : group.waiting) wake(other);
    group.waiting.clear();
  }
  leave_marks(d, sums, line);
}

void products_fence() {
  current->products_fenced = true;
}

void products_commit() {
  ++current->products;
}

void products_wait(uint32_t pending, void* const* registers, uint32_t count) {
  Thread& thread = *current;
  const uint32_t done = thread.products > pending ? thread.products - pending : 0;
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, registers[i], sizeof word);
    const SumUnderWay* const sum = sum_of(word);
    if (sum != nullptr && sum->group <= done) std::memcpy(registers[i], &sum->value, sizeof sum->value);
  }
  const auto is_done = [done](const SumUnderWay& sum) { return sum.group <= done; };
  if (std::all_of(thread.sums.begin(), thread.sums.end(), is_done)) thread.sums.clear();
  thread.products_fenced = false;  // who has waited may write to registers of products
  if (!options.races) return;
  uint32_t& known = order::knowledge_of(thread.number).clocks[order::products_of(thread.warp)];
  known = std::max(known, done);
}

}  // namespace ptx
