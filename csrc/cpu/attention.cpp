// Attention, forward: softmax(scale * query key^T + bias) value without the [T,S] matrix in memory.
//
// The online softmax of FlashAttention: a block of queries walks over the keys, block by block, with a
// running maximum m and sum l a query; where a block raises m, what was accumulated is scaled down by
// 2^(old - new). The scale and log2(e) are one multiplier inside the exponential.
//
// Memory. Keys and values are packed once a head, keys transposed so that keys lie in lanes: then the
// scores of a micro-tile are rows of P as the second product wants them, and maximum, exponential and
// sum are vertical operations. A block of queries (36 on AVX) times a block of 512 keys gives a score
// block of 72 KB that stays in L2. Each block of queries reads the packed head once: from L2, where it fits; a longer
// head comes from the shared cache, and up to six times as many queries are taken at once to ask for it less often.
// Inside it the packed panel is the outer loop: 64 keys x 64 features are 16 KB, fetched from L2 once and then served
// to six micro-tiles from L1. (The other order, each micro-tile streaming over all keys, asks L2 for 21 bytes a cycle
// on a core with two FMA ports.) The scores are read once more: their maximum is taken from the registers of the tile,
// masks are applied while a tile is in L1, and then a row at a time becomes weights. Values are multiplied in panels of
// 32 KB: every sum that a tile takes from memory and puts back there costs it cycles, so there should be few.
//
// Weights at once. Stores are what a tile of bfloat16 pairs waits for (a store of 64 bytes takes two cycles of a Zen 4,
// 24 of them 6% of a tile's time), and scores are stored only because a maximum is wanted before the exponential. But
// the maximum need not be the true one. Weights relative to a lower one are larger, by a power of two that float32 and
// bfloat16 bear without loss, and the division by their sum takes it out again. So, where weights are rounded to 16
// bits anyway, the first panel that a row sees gives its maximum, and from then on a tile without masks turns its sums
// into weights while they are in registers. If a sum of weights shows that a score was too high, by 2^8, the tile's
// weights of this block of keys are formed again, by way of scores.
//
// Masks. Band, key_lengths and key-padding masks become a range of keys a query; a micro-tile computes
// only vectors inside the range of its rows, so time follows the visible area. Other masks and biases
// go through a row of addends, -inf where masked. Masked scores are replaced, never added to, so what
// the masked key holds is irrelevant. The value product would still form 0 * NaN where one query of a
// tile sees a key that another does not: packing flags chunks that hold a NaN or an infinity, and
// flagged chunks are multiplied element by element, skipping zero probabilities.
//
// Dropout zeroes weights after they are summed. Its bits are drawn a row of a block at a time, 64 keys
// a word.
//
// Parallelism. With many heads a task is one key/value head with all its query heads, and its packed
// operands never leave the core's L2; the keys and values of the next are asked for meanwhile, or 3% of the
// time would go to waiting for them. With few, all heads are packed first, and a task is one block of queries, of a
// head the longest first, as a causal mask makes them.
#include "attention.h"

#include <cmath>

#include "attention_blocks.h"
#include "philox.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t near_bytes = 512 << 10;  // of a packed head, that stay in L2 beside a block's scores
constexpr int64_t key_block = 8 * key_chunk;
constexpr int64_t kept_words = key_block / 64;
constexpr int64_t value_bytes = 32 << 10;  // of a packed panel of values, for one product

// One key/value head, packed.
template <class Op>
struct PackedHead {
  Op* key;           // pack_columns
  Op* value;         // pack_rows
  uint8_t* flagged;  // per key_chunk: a value is NaN or infinite
};

// The key/value head that a thread will pack next: rows [next, end) of it are still to be asked for, `step` at a time.
struct Upcoming {
  int64_t b, g, next, end, step;
};

// One thread's state of a block of queries.
template <class Op>
struct QueryBlock {
  Op* query;       // [queries][depth_stride]
  float* scores;   // [queries][score_stride]
  Op* weights;     // the same shape, and for float the same memory
  float* out;      // [queries][columns_stride], not yet divided by the sum
  float* maxima;   // [queries][lanes], over one block of keys
  float* sums;     // [queries][lanes], of all weights so far
  float* top;      // [queries], what weights are relative to: the highest score so far, or little less
  float* addends;  // [tile_rows][panel]
  uint64_t* kept;  // [queries][kept_words], what dropout leaves
  // For weights at once:
  float* low;          // [queries], -top as an exponent of 2
  float* direct_sums;  // [queries][lanes], over one block of keys
  uint32_t* direct;    // [tiles of queries], bit i: panel i of a block of keys is weights already
  Upcoming* upcoming;  // one
};

template <class T>
class Forward : Scoring {
  using Op = operand_t<T>;
  static constexpr bool in_place = sizeof(Op) == sizeof(float);
  static constexpr int64_t tile_rows = rows_of_tile<Op>;
  static constexpr int64_t least_queries = (on_unit<Op> ? 4 : 6) * tile_rows, most_queries = 6 * least_queries;
  // Rows of a score block lie an odd number of cache lines apart. At a power of two they would share a
  // quarter of the sets of L1 and evict the packed panel from there.
  static constexpr int64_t score_stride = key_block + lanes * depth_step<Op>;
  static constexpr bool at_once = !in_place;  // weights at once, where a tile is fit for it
  static constexpr int64_t value_chunk = least(key_block, value_bytes / int64_t(panel * sizeof(Op)));
  static_assert(value_chunk % key_chunk == 0 && key_block % value_chunk == 0);
  static_assert(!at_once || key_block / panel <= 32, "a panel is a bit of a word");

 public:
  explicit Forward(const AttentionForward& a)
      : Scoring(a), a_(a), dropout_(Dropout::make(a.dropout_p, {a.seed, a.offset})) {
    const int64_t far = ceil_div(carve_head(nullptr).second, near_bytes);
    query_block_ = least(most_queries, far * least_queries);
    while (query_block_ > least_queries && batches * heads * blocks() < 4 * max_threads()) {
      query_block_ -= least_queries;
    }
  }

  void run() {
    const int64_t threads = max_threads(), kv_tasks = batches * kv_heads, head_size = carve_head(nullptr).second;
    const ThreadScratch<char> block_memory(threads, carve_block(nullptr).second);
    const auto block = [&] { return carve_block(block_memory.of(thread_index())).first; };

    if (kv_tasks >= 4 * threads || threads == 1) {
      const ThreadScratch<char> head_memory(threads, head_size);
      parallel_tasks(kv_tasks, [&](int64_t task) {
        const int64_t b = task / kv_heads, g = task % kv_heads;
        const PackedHead<Op> packed = carve_head(head_memory.of(thread_index())).first;
        const QueryBlock<Op> scratch = block();
        *scratch.upcoming = task + 1 < kv_tasks ? upcoming(task + 1) : Upcoming{};
        pack(b, g, 0, key_count, packed);
        for (int64_t h = g * group; h < (g + 1) * group; ++h)
          for (int64_t t = 0; t < queries_in(b) && !given_up(); t += query_block_) {
            query_rows(b, h, t, packed, scratch);
          }
      });
      return;
    }
    const Scratch<char> heads_memory(kv_tasks * head_size);
    const auto head = [&](int64_t i) { return carve_head(heads_memory.get() + i * head_size).first; };
    const int64_t key_blocks = ceil_div(key_count, key_block);
    parallel_tasks(kv_tasks * key_blocks, [&](int64_t task) {
      const int64_t i = task / key_blocks, first = task % key_blocks * key_block;
      pack(i / kv_heads, i % kv_heads, first, least(key_count, first + key_block), head(i));
    });
    parallel_tasks(batches * heads * blocks(), [&](int64_t task) {
      const int64_t i = blocks() - 1 - task % blocks(), bh = task / blocks();
      const int64_t b = bh / heads, h = bh % heads;
      if (i * query_block_ >= queries_in(b)) return;
      const QueryBlock<Op> scratch = block();
      *scratch.upcoming = {};
      query_rows(b, h, i * query_block_, head(b * kv_heads + h / group), scratch);
    });
  }

 private:
  int64_t blocks() const { return ceil_div(query_count, query_block_); }

  // Nothing, where a head takes more than its share of L2.
  Upcoming upcoming(int64_t task) const {
    if (query_block_ > least_queries) return {};
    const int64_t b = task / kv_heads;
    const Keys& keys = visibility_.keys(b);
    const int64_t steps = group * blocks() * ceil_div(key_count, panel);
    return {b, task % kv_heads, keys.begin, keys.end, ceil_div(keys.end - keys.begin, steps)};
  }

  // Asks L2 for the next rows of it. Called once for each panel of scores: more at a time would fill the queue of what
  // a core waits for.
  void look_ahead(Upcoming& up) const {
    const int64_t end = least(up.end, up.next + up.step);
    for (; up.next < end; ++up.next) {
      prefetch_row<T, 2>(key_row<const T>(a_.key, up.b, up.g, up.next), depth);
      prefetch_row<T, 2>(key_row<const T>(a_.value, up.b, up.g, up.next), columns);
    }
  }

  std::pair<QueryBlock<Op>, int64_t> carve_block(char* base) const {
    QueryBlock<Op> s;
    Carver carver(base);
    carver.take(s.query, query_block_ * depth_stride);
    carver.take(s.scores, query_block_ * score_stride);
    if constexpr (in_place) {
      s.weights = s.scores;
    } else {
      carver.take(s.weights, query_block_ * score_stride);
    }
    carver.take(s.out, query_block_ * columns_stride);
    carver.take(s.maxima, query_block_ * lanes);
    carver.take(s.sums, query_block_ * lanes);
    carver.take(s.top, query_block_);
    carver.take(s.addends, tile_rows * panel);
    carver.take(s.kept, query_block_ * kept_words);
    carver.take(s.low, query_block_);
    carver.take(s.direct_sums, at_once ? query_block_ * lanes : 0);
    carver.take(s.direct, at_once ? ceil_div(query_block_, tile_rows) : 0);
    carver.take(s.upcoming, 1);
    return {s, carver.used()};
  }

  std::pair<PackedHead<Op>, int64_t> carve_head(char* base) const {
    PackedHead<Op> p;
    Carver carver(base);
    carver.take(p.key, round_up(key_count, lanes) * round_up(depth, depth_step<Op>));
    carver.take(p.value, round_up(key_count, depth_step<Op>) * columns_stride);
    carver.take(p.flagged, ceil_div(key_count, key_chunk));
    return {p, carver.used()};
  }

  // Keys [from, to) of a head; `from` begins a chunk. What no query may see stays unwritten, but for its flags.
  void pack(int64_t b, int64_t g, int64_t from, int64_t to, const PackedHead<Op>& packed) const {
    const Keys& keys = visibility_.keys(b);
    std::memset(packed.flagged + from / key_chunk, 0, size_t(ceil_div(to - from, key_chunk)));
    from = most(from, round_down(keys.begin, key_chunk));
    to = least(to, keys.end);
    for (int64_t s = from; s < to; s += key_chunk) {
      const int64_t rows = least(key_chunk, to - s);
      const uint8_t* keep = keys.keep != nullptr ? keys.keep + s : nullptr;
      pack_columns(key_row<const T>(a_.key, b, g, s), a_.key.stride[2], rows, depth, keep,
                   packed.key + s * round_up(depth, depth_step<Op>));
      packed.flagged[s / key_chunk] = pack_rows(key_row<const T>(a_.value, b, g, s), a_.value.stride[2], s, rows,
                                                key_count, columns, keep, packed.value);
    }
  }

  // The keys that rows [r, r + count) of the block at query t see some of, as [begin, end).
  std::pair<int64_t, int64_t> range(const Keys& keys, int64_t t, int64_t count) const {
    const int64_t begin = visibility_.lower(keys, t);
    return {begin, most(begin, visibility_.upper(keys, t + count - 1))};
  }

  // A block of queries, from t on, of query head (b, h).
  void query_rows(int64_t b, int64_t h, int64_t t, const PackedHead<Op>& packed, const QueryBlock<Op>& s) const {
    const Keys& keys = visibility_.keys(b);
    const Rows rows{b, h, t, least(query_block_, queries_in(b) - t)};
    copy_rows(query_row<const T>(a_.query, b, h, t), a_.query.stride[2], rows.count, depth, nullptr, s.query,
              depth_stride);
    for (int64_t i = t + rows.count; i < least(t + 2 * rows.count, queries_in(b)); ++i) {
      prefetch_row(query_row<const T>(a_.query, b, h, i), depth);
    }
    for (int64_t i = 0; i < rows.count * columns_stride; ++i) s.out[i] = 0;
    for (int64_t i = 0; i < rows.count * lanes; ++i) s.sums[i] = 0;
    for (int64_t i = 0; i < rows.count; ++i) set_top(b, i, negative_infinity, s);
    const auto [begin, end] = range(keys, t, rows.count);
    // Blocks of keys lie the same for all queries: what a row sums in what order does not depend on its neighbours.
    for (int64_t n = round_down(begin, key_block); begin < end && n < end; n += key_block) {
      const int64_t count = least(key_block, end - n), seen = most(n, keys.begin);
      const uint8_t* keep = keys.keep;
      if (keep != nullptr && std::memchr(keep + seen, 1, size_t(n + count - seen)) == nullptr) continue;
      if (a_.dropout_p > 0) draw(rows, n, count, s);
      score(rows, n, count, packed, s);
      weigh(rows, n, count, packed, s);
      for (int64_t c = n; c < n + count; c += value_chunk) {
        add_values(rows, n, c, least(c + value_chunk, n + count), packed, s);
      }
    }
    store(rows, s);
  }

  // Dropout's bits for keys [n, n + count), from the first that a row sees to the last.
  void draw(const Rows& rows, int64_t n, int64_t count, const QueryBlock<Op>& s) const {
    for (int64_t i = 0; i < rows.count; ++i) {
      const auto [begin, end] = range(visibility_.keys(rows.b), rows.t + i, 1);
      const int64_t first = round_down(most(begin - n, 0), 64), last = least(end - n, count);
      if (first >= last) continue;
      dropout_.keep_bits(score_index(rows.b, rows.h, rows.t + i) + uint64_t(n + first), last - first,
                         s.kept + i * kept_words + first / 64);
    }
  }

  // Of the tile that begins at row r: how many rows it has, and the vectors [first, last) of keys [from, to) that some
  // of them see.
  struct Seen {
    int64_t rows, first, last;
    bool any() const { return first < last; }
  };
  Seen seen_by(const Rows& rows, int64_t r, int64_t from, int64_t to) const {
    const int64_t tile = least(tile_rows, rows.count - r);
    const auto [begin, end] = range(visibility_.keys(rows.b), rows.t + r, tile);
    return {tile, most(from, round_down(begin, lanes)), begin < end ? least(end, to) : from};
  }

  // Keys [n, n + count) against the block's queries, in the vectors that some row of a tile sees: scores and the maxima
  // of the visible ones, or weights at once.
  void score(const Rows& rows, int64_t n, int64_t count, const PackedHead<Op>& packed, const QueryBlock<Op>& s) const {
    for (int64_t i = 0; i < rows.count * lanes; ++i) s.maxima[i] = negative_infinity;
    if constexpr (at_once) {
      for (int64_t i = 0; i < rows.count * lanes; ++i) s.direct_sums[i] = 0;
      for (int64_t i = 0; i < ceil_div(rows.count, tile_rows); ++i) s.direct[i] = 0;
    }
    for (int64_t p = n; p < n + count; p += panel) {
      look_ahead(*s.upcoming);
      for (int64_t r = 0; r < rows.count; r += tile_rows) score_tile(rows, r, n, p, packed, s, at_once);
    }
  }

  // The same for the tile of queries from row r on and the panel of keys from p on.
  void score_tile(const Rows& rows, int64_t r, int64_t n, int64_t p, const PackedHead<Op>& packed,
                  const QueryBlock<Op>& s, bool may_be_direct) const {
    const Keys& keys = visibility_.keys(rows.b);
    const auto [tile, first, last] = seen_by(rows, r, p, p + panel);
    if (first >= last) return;
    const int64_t t = rows.t + r, place = r * score_stride + (first - n), steps = round_up(depth, depth_step<Op>);
    const bool mapped = maps(rows.b);
    const bool whole = !mapped && visibility_.lower(keys, t + tile - 1) <= first &&
                       visibility_.upper(keys, t) >= round_up(last, lanes);
    const Left<Op> query = {s.query + r * depth_stride, depth_stride, depth_step<Op>};
    const Op* key = packed.key + p * steps + (first - p) * depth_step<Op>;
    const int64_t key_stride = least(panel, round_up(keys.end - p, lanes)) * depth_step<Op>;
    if constexpr (at_once) {
      if (may_be_direct && whole && has_tops(r, tile, s)) {
        s.direct[r / tile_rows] |= 1u << (p - n) / panel;
        const Powers<Op> powers = {s.weights + place, score_stride, factor(rows.b), s.low + r,
                                   s.direct_sums + r * lanes};
        return multiply_tile(query, tile, key, key_stride, last - first, depth, powers);
      }
    }
    float *scores = s.scores + place, *maxima = s.maxima + r * lanes;
    const Result result = {scores, score_stride, false, whole ? maxima : nullptr};
    multiply_tile(query, tile, key, key_stride, last - first, depth, result);
    if (!whole) mask_tile({rows.b, rows.h, t, tile}, first, last, mapped, scores, maxima, s.addends);
    for (int64_t i = r; at_once && i < r + tile; ++i) {
      if (s.top[i] == negative_infinity) set_top(rows.b, i, highest(i, s), s);
    }
  }

  bool has_tops(int64_t r, int64_t tile, const QueryBlock<Op>& s) const {
    bool all = a_.dropout_p == 0;  // which is applied on the way from scores to weights
    for (int64_t i = r; i < r + tile; ++i) all &= s.top[i] != negative_infinity;
    return all;
  }

  // Scores of keys [first, last): mapped, if there are addends, and -inf where a row does not see them.
  void mask_tile(const Rows& rows, int64_t first, int64_t last, bool mapped, float* scores, float* maxima,
                 float* addends) const {
    const Keys& keys = visibility_.keys(rows.b);
    const bool shared = visibility_.addends().shared();
    if (mapped) {
      visibility_.addends().fill(rows.b, rows.h, rows.t, first, false, shared ? 1 : rows.count, last - first,
                                 keys.keep != nullptr ? keys.keep + first : nullptr, addends, panel);
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t low = most(visibility_.lower(keys, rows.t + i) - first, 0);
      const int64_t high = clamp(visibility_.upper(keys, rows.t + i) - first, 0, last - first);
      const float* own = !mapped ? nullptr : shared ? addends : addends + i * panel;
      mask_scores(scores + i * score_stride, last - first, low, high, own, Vec::load(maxima + i * lanes))
          .store(maxima + i * lanes);
    }
  }

  // The highest score of row i in a block of keys, of those that were not weighed at once.
  static float highest(int64_t i, const QueryBlock<Op>& s) { return Vec::load(s.maxima + i * lanes).max(); }

  void set_top(int64_t b, int64_t i, float top, const QueryBlock<Op>& s) const {
    s.top[i] = top;
    s.low[i] = top == negative_infinity ? 0.0f : -top * factor(b);
  }

  // Takes the maximum of a block of keys into account, of which no weights have been formed.
  void raise_top(int64_t b, int64_t i, const QueryBlock<Op>& s) const {
    const float here = highest(i, s), before = s.top[i];
    if (!(here > before)) return;
    set_top(b, i, here, s);
    if (before == negative_infinity) return;
    const Vec shrink = Vec::set1(std::exp2((before - here) * factor(b)));
    float *out = s.out + i * columns_stride, *sums = s.sums + i * lanes;
    for (int64_t c = 0; c < columns_stride; c += lanes) (Vec::load(out + c) * shrink).store(out + c);
    (Vec::load(sums) * shrink).store(sums);
  }

  // All scores of keys [n, n + count) to weights.
  void weigh(const Rows& rows, int64_t n, int64_t count, const PackedHead<Op>& packed, const QueryBlock<Op>& s) const {
    for (int64_t r = 0; r < rows.count; r += tile_rows) {
      const Seen seen = seen_by(rows, r, n, n + count);
      if (!seen.any()) continue;
      const uint32_t done = settle(rows, r, seen.rows, n, packed, s);
      for (int64_t i = r; done == 0 && i < r + seen.rows; ++i) raise_top(rows.b, i, s);
      for (int64_t p = n, end; p < seen.last; p = end) {
        const auto is_done = [&](int64_t at) { return at_once && (done >> (at - n) / panel & 1) != 0; };
        for (end = p + panel; end < seen.last && is_done(end) == is_done(p);) end += panel;
        const int64_t first = most(p, seen.first) - n, last = least(end, seen.last) - n;
        for (int64_t i = r; !is_done(p) && i < r + seen.rows; ++i) weigh_row(rows.b, i, first, last, s);
      }
    }
  }

  // Which panels of a tile are weights already: none, after all, if a score was too high.
  uint32_t settle(const Rows& rows, int64_t r, int64_t tile, int64_t n, const PackedHead<Op>& packed,
                  const QueryBlock<Op>& s) const {
    const uint32_t panels = at_once ? s.direct[r / tile_rows] : 0;
    if (panels == 0) return 0;
    bool fit = true;
    for (int64_t i = r; i < r + tile; ++i) fit &= fits(rows.b, i, s);
    for (int64_t j = 0; !fit && panels >> j; ++j) {
      if (panels >> j & 1) score_tile(rows, r, n, n + j * panel, packed, s, false);
    }
    for (int64_t i = r; fit && i < r + tile; ++i) {
      (Vec::load(s.sums + i * lanes) + Vec::load(s.direct_sums + i * lanes)).store(s.sums + i * lanes);
    }
    return fit ? panels : 0;
  }

  // Whether the weights of row i in a block of keys, formed or not, may be relative to its top as it is.
  bool fits(int64_t b, int64_t i, const QueryBlock<Op>& s) const {
    constexpr float headroom = 8;  // in powers of two
    const Vec most = Vec::set1(float(1 << int(headroom)));
    // A NaN among the sums, be it of an infinite score, is not less.
    return not_less(Vec::load(s.direct_sums + i * lanes), most).bits() == 0 &&
           !((highest(i, s) - s.top[i]) * factor(b) > headroom);
  }

  // Scores of row i to weights, for vectors [first, last) counted from the first key of the block.
  void weigh_row(int64_t b, int64_t i, int64_t first, int64_t last, const QueryBlock<Op>& s) const {
    const Vec top = Vec::set1(s.top[i] == negative_infinity ? 0.0f : s.top[i]), low = Vec::set1(s.low[i]);
    const Vec scale = Vec::set1(factor(b));
    const float* scores = s.scores + i * score_stride;
    const uint64_t* kept = a_.dropout_p > 0 ? s.kept + i * kept_words : nullptr;
    Op* weights = s.weights + i * score_stride;
    Vec sum = Vec::load(s.sums + i * lanes);
#pragma GCC unroll 4
    for (int64_t j = first; j < last; j += lanes) {
      const Vec score = Vec::load(scores + j);
      // In float32 the difference first: its rounding then matters least where the weight is largest.
      const Vec exponent = at_once ? fma(score, scale, low) : (score - top) * scale;
      const Vec weight = exp2_or_zero<exp_degree<T>>(exponent);
      sum = sum + weight;
      if (kept == nullptr) {
        weight.store(weights + j);
      } else {
        const Mask keep = Mask::from_bits(uint32_t(kept[j / 64] >> (j % 64)));
        select(keep, weight, Vec::zero()).store(weights + j);
      }
    }
    sum.store(s.sums + i * lanes);
  }

  // out += weights * value for keys [from, to) of a block that begins at n; `from` begins a chunk.
  void add_values(const Rows& rows, int64_t n, int64_t from, int64_t to, const PackedHead<Op>& packed,
                  const QueryBlock<Op>& s) const {
    const bool flagged =
        std::memchr(packed.flagged + from / key_chunk, 1, size_t(ceil_div(to - from, key_chunk))) != nullptr;
    for (int64_t c = 0; c < columns; c += flagged ? columns : panel) {
      const int64_t width = least(panel, columns_stride - c);
      for (int64_t r = 0; r < rows.count; r += tile_rows) {
        const auto [tile, first, last] = seen_by(rows, r, from, to);
        if (first >= last) continue;
        const Left<Op> weights = {s.weights + r * score_stride + (first - n), score_stride, depth_step<Op>};
        float* out = s.out + r * columns_stride + c;
        if (flagged) {
          multiply_rows_nonzero(weights, tile, key_row<const T>(a_.value, rows.b, rows.h / group, first),
                                a_.value.stride[2], columns, last - first, out, columns_stride);
        } else {
          const Op* value = packed.value + c * round_up(key_count, depth_step<Op>) + first * width;
          multiply_tile(weights, tile, value, width * depth_step<Op>, width, last - first,
                        Result{out, columns_stride, true});
        }
      }
    }
  }

  void store(const Rows& rows, const QueryBlock<Op>& s) const {
    for (int64_t i = 0; i < rows.count; ++i) {
      store_query<T>(a_, rows.b, rows.h, rows.t + i, s.out + i * columns_stride, s.top[i],
                     Vec::load(s.sums + i * lanes).sum(), dropout_.scale);
    }
  }

  const AttentionForward& a_;
  const Dropout dropout_;
  int64_t query_block_;
};

}  // namespace

void attention_fwd(const AttentionForward& a) {
  if (a.lse.numel() == 0) return;
  if (few_queries(a) || a.block_table) return attention_decode(a);
  with_storage(a.query.dtype, [&](auto type) { Forward<decltype(type)>(a).run(); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
