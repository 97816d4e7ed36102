// Vector clocks: the cells of memory, the judgement of an access, and what fences and flags hand on. See order.h.
#include "order.h"

#include <algorithm>
#include <deque>
#include <unordered_map>

#include "block.h"

namespace ptx::order {

struct Release {
  uint32_t block;
  std::shared_ptr<const Knowledge> known;   // at the last fence before it
  std::shared_ptr<const Knowledge> beyond;  // at the last fence of the scope of the device
};
struct Flag {
  std::vector<Release> releases;
};

namespace {

constexpr uint32_t granule = 2;  // bytes to a cell of shared memory

struct SharedCell {
  Epoch write;
  bool live_barrier = false;
  uint32_t block = 0;  // that `reads` are of
};
struct Fenced {
  std::shared_ptr<const Knowledge> block, device;
};

uint32_t agents = 0, readers = 0, first_block = 0;
std::vector<Knowledge> knowledge;
std::vector<Fenced> fenced;
std::vector<SharedCell> cells;
std::vector<Epoch> reads;  // of shared memory: `readers` columns for each cell, two for each warp and two for others
std::unordered_map<uint64_t, Flag> flags;

std::string name_of(uint32_t agent) {
  const uint32_t n = block.threads;
  if (agent < n) return "thread " + std::to_string(agent);
  if (agent < 2 * n) return "cp.async of thread " + std::to_string(agent - n);
  if (agent < 3 * n) return "a bulk store of thread " + std::to_string(agent - 2 * n);
  agent -= 3 * n;
  if (agent < barriers_at_most) return "a bulk load on mbarrier " + std::to_string(agent);
  return "wgmma of warp " + std::to_string(agent - barriers_at_most);
}

std::string described(const Epoch& e) {
  const std::string who =
      e.block == block.serial ? name_of(e.agent) : "thread " + std::to_string(e.agent) + " of another block";
  return who + " at " + format_line(e.line);
}

bool handed_over(const Epoch& e, const Knowledge& known) {
  for (const Seen& seen : known.acquired) {
    for (uint32_t i = 0; i < seen.count; ++i) {
      const Release& release = seen.flag->releases[i];
      if (release.block != e.block || release.beyond == nullptr) continue;
      if (release.beyond->clocks[e.agent] >= e.clock) return true;
    }
  }
  return false;
}

// Of the bulk loads on a barrier the later one may come first.
bool overtakes(uint32_t agent) {
  return agent >= loads_on(0) && agent < loads_on(barriers_at_most);
}

bool ordered(const Epoch& e, const Actor& actor) {
  if (e.block < first_block) return true;
  if (e.block == block.serial) {
    return (e.agent == actor.agent && !overtakes(e.agent)) || e.clock <= actor.knows->clocks[e.agent];
  }
  return handed_over(e, *actor.knows);
}

struct Place {
  const char* space;
  uint64_t offset;
};

// A store of the value that is there may meet the same instruction storing it too, in this block: Triton's way of
// broadcasting, and a scalar that every thread stores.
bool harmless(const Epoch& old, const Epoch& now, bool changes) {
  return !changes && old.block == now.block && old.line == now.line;
}

void judge(const Epoch& old, bool old_writes, const Epoch& now, bool writes, bool changes, const Actor& actor,
           Place place) {
  if (!(old.bytes & now.bytes) || (old.strong && now.strong) || ordered(old, actor)) return;
  if (old_writes && writes && harmless(old, now, changes)) return;
  report("race", now.line, "%s+%lu: %s by %s is not ordered after the %s by %s", place.space, place.offset,
         writes ? "the write" : "the read", name_of(now.agent).c_str(), old_writes ? "write" : "read",
         described(old).c_str());
}

void judge_proxy(const Epoch& old, const Epoch& now, bool writes, const Actor& actor, Place place) {
  if (actor.proxy != Proxy::async || old.async || old.block != block.serial) return;
  if (old.clock <= actor.knows->published[old.agent]) return;
  report("proxy", now.line, "%s+%lu: %s %s what %s wrote with no fence.proxy.async between them", place.space,
         place.offset, name_of(now.agent).c_str(), writes ? "overwrites" : "reads", described(old).c_str());
}

Epoch epoch(const Actor& actor, Access kind, Line line) {
  Epoch e;
  e.block = block.serial;
  e.agent = actor.agent;
  e.clock = actor.clock;
  e.line = line;
  e.strong = kind != Access::weak;
  e.async = actor.proxy == Proxy::async;
  return e;
}

uint8_t covered(uint64_t cell_start, uint32_t width, uint64_t start, uint64_t end) {
  const uint64_t from = std::max(cell_start, start) - cell_start, to = std::min(cell_start + width, end) - cell_start;
  return uint8_t((1u << to) - (1u << from));
}

uint32_t column(uint32_t agent) {
  if (agent < block.threads) return agent / 32;
  if (agent < 2 * block.threads) return (agent - block.threads) / 32;
  const uint32_t first_product = 3 * block.threads + barriers_at_most;
  return agent < first_product ? block.warps + agent % 2 : block.warps + 2 + agent - first_product;
}

// As this block finds it: nobody has touched it.
SharedCell& cell_at(uint32_t index) {
  SharedCell& cell = cells[index];
  if (cell.block == block.serial) return cell;
  cell = SharedCell();
  cell.block = block.serial;
  std::fill_n(reads.begin() + size_t(index) * readers, readers, Epoch());
  return cell;
}

void touch_shared(uint32_t index, Epoch now, bool write, bool changes, const Actor& actor) {
  SharedCell& cell = cell_at(index);
  const Place place{"shared", shared_base + uint64_t(index) * granule};
  Epoch* const readers_here = &reads[size_t(index) * readers];
  if (cell.live_barrier) report("mbarrier", now.line, "a plain access to the mbarrier at shared+%lu", place.offset);
  if (!write && cell.write.block == 0) {
    report("uninitialised", now.line, "%s reads shared+%lu, which nobody has written", name_of(now.agent).c_str(),
           place.offset);
  }
  judge(cell.write, true, now, write, changes, actor, place);
  judge_proxy(cell.write, now, write, actor, place);
  if (!write) {
    readers_here[column(now.agent)] = now;
    return;
  }
  for (uint32_t i = 0; i < readers; ++i) {
    judge(readers_here[i], false, now, true, true, actor, place);
    if (readers_here[i].bytes & now.bytes) readers_here[i] = Epoch();
  }
  now.bytes |=
      cell.write.bytes && cell.write.agent == now.agent && cell.write.clock == now.clock ? cell.write.bytes : 0;
  cell.write = now;
}

// Shared flags live as long as their block; global ones as long as the launch.
Flag& flag_at(uint64_t address) {
  return flags[address];
}

void merge(std::vector<Seen>& into, const std::vector<Seen>& from) {
  for (const Seen& seen : from) {
    const auto same = std::find_if(into.begin(), into.end(), [&](const Seen& s) { return s.flag == seen.flag; });
    if (same == into.end()) {
      into.push_back(seen);
    } else {
      same->count = std::max(same->count, seen.count);
    }
  }
}

void synchronise(uint64_t address, bool reads_it, bool writes_it) {
  Knowledge& mine = knowledge[current->number];
  Flag& flag = flag_at(address);
  const Fenced& last = fenced[current->number];
  if (reads_it) merge(mine.read, {{&flag, uint32_t(flag.releases.size())}});
  if (writes_it && last.block != nullptr) flag.releases.push_back({block.serial, last.block, last.device});
}

}  // namespace

void Knowledge::join(const Knowledge& other) {
  if (clocks.empty()) clocks.resize(other.clocks.size());
  for (size_t i = 0; i < clocks.size(); ++i) clocks[i] = std::max(clocks[i], other.clocks[i]);
  if (published.empty()) published.resize(other.published.size());
  for (size_t i = 0; i < published.size(); ++i) published[i] = std::max(published[i], other.published[i]);
  merge(acquired, other.acquired);
  merge(read, other.read);
}

void Knowledge::clear() {
  std::fill(clocks.begin(), clocks.end(), 0);
  std::fill(published.begin(), published.end(), 0);
  acquired.clear();
  read.clear();
}

void start_launch() {
  first_block = block.serial + 1;
  flags.clear();
}

void start_block() {
  const uint32_t n = block.threads;
  const Image& image = *block.image;
  agents = image.uses_async_proxy ? 3 * n + barriers_at_most + block.warps : image.uses_cp_async ? 2 * n : n;
  readers = image.uses_async_proxy ? 2 * block.warps + 2 : block.warps;
  Knowledge nothing;
  nothing.clocks.assign(agents, 0);
  if (image.uses_async_proxy) nothing.published.assign(agents, 0);
  knowledge.assign(n, nothing);
  for (uint32_t i = 0; i < n; ++i) knowledge[i].clocks[i] = 1;
  fenced.assign(n, Fenced());
  cells.resize((block.shared_end - shared_base) / granule + 8);
  reads.resize(cells.size() * readers);
}

void tell(uint32_t thread, Knowledge& into) {
  into.join(knowledge[thread]);
  ++knowledge[thread].clocks[thread];
}

void learn(uint32_t thread, const Knowledge& from) {
  Knowledge& mine = knowledge[thread];
  const uint32_t now = mine.clocks[thread];
  mine.join(from);
  mine.clocks[thread] = std::max(now, mine.clocks[thread]);
}

void tell_of_load(uint32_t barrier, uint32_t load, Knowledge& into) {
  if (into.clocks.empty()) into.clocks.resize(agents);
  uint32_t& clock = into.clocks[loads_on(barrier)];
  clock = std::max(clock, load);
}

Knowledge& knowledge_of(uint32_t thread) {
  return knowledge[thread];
}
uint32_t copies_of(uint32_t thread) {
  return block.threads + thread;
}
uint32_t stores_of(uint32_t thread) {
  return 2 * block.threads + thread;
}
uint32_t loads_on(uint32_t barrier) {
  return 3 * block.threads + barrier;
}
uint32_t products_of(uint32_t warp) {
  return 3 * block.threads + barriers_at_most + warp;
}

Actor self() {
  const Knowledge& mine = knowledge[current->number];
  return {current->number, mine.clocks[current->number], &mine};
}

void access_shared(uint32_t address, uint32_t bytes, bool write, Access kind, const Actor& actor, Line line,
                   bool changes) {
  if (kind != Access::weak && actor.agent < block.threads)
    synchronise(address, !write || kind == Access::atomic, write);
  Epoch now = epoch(actor, kind, line);
  const uint32_t start = address - shared_base, end = start + bytes;
  for (uint32_t index = start / granule; index <= (end - 1) / granule; ++index) {
    now.bytes = covered(uint64_t(index) * granule, granule, start, end);
    touch_shared(index, now, write, changes, actor);
  }
}

void access_global(std::vector<GlobalCell>& all, uint32_t width, uint64_t offset, const char* name, uint64_t address,
                   uint32_t bytes, bool write, Access kind, const Actor& actor, Line line, bool changes) {
  if (kind != Access::weak && actor.agent < block.threads)
    synchronise(address, !write || kind == Access::atomic, write);
  Epoch now = epoch(actor, kind, line);
  for (uint64_t index = offset / width; index <= (offset + bytes - 1) / width; ++index) {
    GlobalCell& cell = all[index];
    const Place place{name, index * width};
    now.bytes = covered(index * width, width, offset, offset + bytes);
    judge(cell.write, true, now, write, changes, actor, place);
    if (!write) {
      cell.reads[now.agent / 32 % global_readers] = now;
      continue;
    }
    for (Epoch& old : cell.reads) judge(old, false, now, true, true, actor, place);
    cell = GlobalCell();
    cell.write = now;
  }
}

void mark_barrier(uint32_t address, bool live) {
  for (uint32_t i = 0; i < 8 / granule; ++i) cell_at((address - shared_base) / granule + i).live_barrier = live;
}

}  // namespace ptx::order

namespace ptx {

void fence(bool beyond_the_block) {
  if (!options.races) return;
  using namespace order;
  Knowledge& mine = knowledge_of(current->number);
  for (const Seen& seen : mine.read) {
    for (uint32_t i = 0; i < seen.count; ++i) {
      const Release& release = seen.flag->releases[i];
      if (release.block == block.serial) mine.join(*release.known);
      if (beyond_the_block && release.beyond != nullptr) merge(mine.acquired, release.beyond->acquired);
    }
  }
  if (beyond_the_block) merge(mine.acquired, mine.read);
  const auto known = std::make_shared<const Knowledge>(mine);
  fenced[current->number].block = known;
  if (beyond_the_block) fenced[current->number].device = known;
  ++mine.clocks[current->number];
}

void fence_async_proxy() {
  if (!options.races) return;
  order::Knowledge& mine = order::knowledge_of(current->number);
  for (size_t i = 0; i < mine.published.size(); ++i) mine.published[i] = std::max(mine.published[i], mine.clocks[i]);
  ++mine.clocks[current->number];
}

}  // namespace ptx
