// Lanes that meet: shuffles, votes, reductions, bar.warp.sync.
//
// The lanes named by a mask meet at one kind of instruction; the last to come does the work for all; lanes that have
// ended are not waited for. Only bar.warp.sync orders memory. Lanes that meet at different lines are reported: what
// hardware does then is a matter of luck.
#include <algorithm>

#include "block.h"
#include "order.h"

namespace ptx {
namespace {

struct Meeting {
  bool open = false;
  uint32_t kind = 0, mask = 0, arrived = 0;
  Line line = 0;
  void* brought[32];
};
std::vector<std::vector<Meeting>> meetings;  // of each warp

Meeting& meeting_of(uint32_t kind, uint32_t mask, Line line) {
  auto& all = meetings[current->warp];
  const uint32_t lane = 1u << current->lane;
  for (Meeting& m : all) {
    if (m.open && m.mask == mask && m.kind == kind && !(m.arrived & lane)) return m;
  }
  auto unused = std::find_if(all.begin(), all.end(), [](const Meeting& m) { return !m.open; });
  if (unused == all.end()) unused = all.insert(all.end(), Meeting());
  unused->open = true;
  unused->kind = kind;
  unused->mask = mask;
  unused->arrived = 0;
  unused->line = line;
  return *unused;
}

template <class F>
void each_lane(uint32_t mask, F function) {
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) function(uint32_t(__builtin_ctz(lanes)));
}

enum Kind : uint32_t { kind_sync, kind_ballot, kind_reduce, kind_elect, kind_shuffle };

}  // namespace

void reset_warps() {
  meetings.assign(block.warps, {});
}

void meet(const char* what, uint32_t kind, uint32_t mask, void* brought, Line line,
          const std::function<void(void* const*, uint32_t)>& act) {
  const uint32_t lane = 1u << current->lane, present = block.lanes[current->warp];
  if (!(mask & lane)) report("mask", line, "%s: the mask %08x leaves out the lane that calls", what, mask);
  if (kind >= kind_aligned && present != ~0u) {
    report("mask", line, "%s needs all 32 lanes of the warp; those running are %08x", what, present);
    block.stopped = true;
    wait_for(what, line);
  }
  mask = (mask & present) | lane;
  ++current->phase;
  Meeting& meeting = meeting_of(kind, mask, line);
  if (meeting.line != line) {
    report("divergence", line, "%s: lanes of one warp meet here and at %s", what, format_line(meeting.line).c_str());
  }
  meeting.brought[current->lane] = brought;
  meeting.arrived |= lane;
  if (meeting.arrived != mask) {
    wait_for(what, line);
    return;
  }
  act(meeting.brought, mask);
  meeting.open = false;
  each_lane(mask & ~lane, [](uint32_t other) { wake(32 * current->warp + other); });
}

void sync_warp(uint32_t mask, Line line) {
  meet("bar.warp.sync", kind_sync, mask, nullptr, line, [](void* const*, uint32_t lanes) {
    if (!options.races) return;
    order::Knowledge known;
    each_lane(lanes, [&](uint32_t lane) { order::tell(32 * current->warp + lane, known); });
    each_lane(lanes, [&](uint32_t lane) { order::learn(32 * current->warp + lane, known); });
  });
}

uint32_t shuffle(Shuffle mode, uint32_t mask, uint32_t value, uint32_t distance, uint32_t bounds, bool* within,
                 Line line) {
  struct Brought {
    uint32_t value, distance, bounds, got;
    bool within;
  } mine{value, distance, bounds, value, false};
  meet("shfl", kind_shuffle + uint32_t(mode), mask, &mine, line, [=](void* const* brought, uint32_t lanes) {
    each_lane(lanes, [&](uint32_t lane) {
      auto& to = *static_cast<Brought*>(brought[lane]);
      const int by = to.distance & 31, clamp = to.bounds & 31, segment = to.bounds >> 8 & 31, self = lane;
      const int last = (self & segment) | (clamp & ~segment), first = self & segment;
      int from = mode == Shuffle::up     ? self - by
                 : mode == Shuffle::down ? self + by
                 : mode == Shuffle::bfly ? self ^ by
                                         : first | (by & ~segment);
      to.within = mode == Shuffle::up ? from >= last : from <= last;
      if (!to.within) from = self;
      if (!(lanes >> from & 1)) {
        report("shuffle", line, "lane %u reads from lane %d, which is not in the mask", lane, from);
        to.got = 0xdeadbeef;
      } else {
        to.got = static_cast<Brought*>(brought[from])->value;
      }
    });
  });
  *within = mine.within;
  return mine.got;
}

uint32_t ballot(uint32_t mask, bool predicate, Line line) {
  struct Brought {
    bool yes;
    uint32_t ballot;
  } mine{predicate, 0};
  meet("vote", kind_ballot, mask, &mine, line, [](void* const* brought, uint32_t lanes) {
    uint32_t votes = 0;
    each_lane(lanes, [&](uint32_t lane) { votes |= uint32_t(static_cast<Brought*>(brought[lane])->yes) << lane; });
    each_lane(lanes, [&](uint32_t lane) { static_cast<Brought*>(brought[lane])->ballot = votes; });
  });
  return mine.ballot;
}

namespace {

uint32_t reduced(Reduction what, uint32_t x, uint32_t y) {
  switch (what) {
    case Reduction::add: return x + y;
    case Reduction::min: return std::min(x, y);
    case Reduction::max: return std::max(x, y);
    case Reduction::min_signed: return std::min(int32_t(x), int32_t(y));
    case Reduction::max_signed: return std::max(int32_t(x), int32_t(y));
    case Reduction::bit_and: return x & y;
    case Reduction::bit_or: return x | y;
    case Reduction::bit_xor: return x ^ y;
  }
  return 0;
}

}  // namespace

uint32_t reduce_warp(Reduction what, uint32_t mask, uint32_t value, Line line) {
  uint32_t mine = value;
  meet("redux", kind_reduce, mask, &mine, line, [what](void* const* brought, uint32_t lanes) {
    uint32_t total = *static_cast<uint32_t*>(brought[__builtin_ctz(lanes)]);
    each_lane(lanes & (lanes - 1),
              [&](uint32_t lane) { total = reduced(what, total, *static_cast<uint32_t*>(brought[lane])); });
    each_lane(lanes, [&](uint32_t lane) { *static_cast<uint32_t*>(brought[lane]) = total; });
  });
  return mine;
}

uint32_t elect(uint32_t mask, Line line) {
  uint32_t leader = 0;
  meet("elect", kind_elect, mask, &leader, line, [](void* const* brought, uint32_t lanes) {
    each_lane(lanes, [&](uint32_t lane) { *static_cast<uint32_t*>(brought[lane]) = __builtin_ctz(lanes); });
  });
  return leader;
}

}  // namespace ptx
