// Attention, backward: the probabilities are recomputed from lse, block by block. With
//     P = exp(scale Q K^T + bias - lse),  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O)
// the gradients are dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K and, for the bias, dS itself.
//
// All of a block is computed transposed, keys in rows and queries in lanes: P^T and dS^T then are left
// operands of dV and dK as they lie in memory, lse and delta are vectors, and dS is the left operand of
// dQ through its strides. (With bfloat16 pairs dQ needs pairs of keys, a second, interleaved copy.)
//
// Memory. A task is one key/value head. It keeps K and V, unpacked as left operands and K also packed
// for dQ, and float32 sums of dK and dV; queries come in blocks of 64, packed when their turn comes, and
// the sum of dQ lives only as long as the block. Each of the five products of a block runs with its
// packed 64 x 64 operand, 16 KB, in L1; nothing of size [T,S] or [T,D] is ever stored. A head that does not stay in
// L2 is walked through by a group of blocks together, each block of keys serving all of them while it is near.
//
// Parallelism. Where there are fewer heads than threads can use, the blocks of queries of a head are
// dealt out to several tasks in turn (so that causal ones cost the same), each with its own sums of dK
// and dV, added in order afterwards: equal inputs give equal bits at any one thread count.
//
// Masks are as in the forward pass: see attention.cpp. Every product is clipped to what some row of its
// tile sees. Queries that see nothing are packed as zeros, and dS is 0, not P times anything, where P is 0.
//
// Dropout multiplies P in dV and dP by the same m: kept / (1 - p). Its bits are drawn along the keys and
// turned, 64 x 64 at a time. Soft capping multiplies what dS gives to dQ and dK by its slope, 1 - tanh^2.
#include <cmath>

#include "attention.h"
#include "attention_blocks.h"
#include "philox.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t query_block = 64;
constexpr int64_t key_block = 96;           // whole squares of pairs
constexpr int64_t most_blocks = 4;          // of queries, in a group
constexpr int64_t near_bytes = 768 << 10;   // of a head, that stay in L2 beside a block
constexpr int64_t group_bytes = 640 << 10;  // of the operands of a group
static_assert(query_block == 64, "the bits of a key's queries are one word");

// One key/value head: operands and sums. Rows of key and grad_key have depth_stride elements, rows of
// value and grad_value columns_stride.
template <class Op>
struct Head {
  Op *key, *value;
  Op* key_rows;  // pack_rows
};
struct HeadSums {
  float *grad_key, *grad_value;
};

// A block of queries.
template <class Op>
struct Queries {
  Rows rows;
  int64_t begin, end;                // the keys that some of them see
  Op *query_columns, *grad_columns;  // pack_columns of query and grad_out
  Op *query_rows, *grad_rows;        // pack_rows of the same
  uint8_t* live;                     // [query_block] whether a query sees any key
  float *lse, *lse_low, *delta;      // [query_block]; lse in units of log2, and what its rounding lost
  float* grad_query;                 // [query_block][depth_stride]
};

// One thread's group of blocks of queries, and a block of keys against one of them.
template <class Op>
struct Block {
  Queries<Op> queries[most_blocks];
  float *scores, *addends;       // [key_block][query_block]
  float *grad_weights, *slopes;  // [tile_rows][query_block]
  Op *weights, *grad_scores;     // [key_block][query_block]
  Op* grad_score_pairs;          // the same, turned or in pairs of keys, as turn_scores has it for paired operands
  uint64_t* kept;                // [key_block] what dropout leaves: bit i is query i
};

template <class T>
class Backward : Scoring {
  using Op = operand_t<T>;
  static constexpr int64_t step = depth_step<Op>, tile_rows = rows_of_tile<Op>;

 public:
  explicit Backward(const AttentionBackward& a)
      : Scoring(a),
        a_(a),
        dropout_(Dropout::make(a.dropout_p, {a.seed, a.offset})),
        short_sums_(sizeof(T) == sizeof(float) && few_queries(a)) {
    const int64_t head_bytes = carve_head(nullptr).second + carve_sums(nullptr).second;
    Carver one;
    Queries<Op> unused;
    take_queries(one, unused);
    group_ = least(ceil_div(head_bytes, near_bytes), least(most_blocks, most(group_bytes / one.used(), 1)));
  }

  void run() {
    const int64_t threads = max_threads(), kv_tasks = batches * kv_heads, wanted = 4 * threads;
    const int64_t blocks = most(1, ceil_div(query_count, query_block));
    const int64_t parts = threads > 1 && kv_tasks < wanted ? least(blocks, ceil_div(wanted, kv_tasks)) : 1;

    const int64_t head_size = carve_head(nullptr).second, sum_size = carve_sums(nullptr).second;
    const int64_t block_size = carve_block(nullptr).second;
    const ThreadScratch<char> memory(threads, head_size + block_size + (parts == 1 ? sum_size : 0));
    const Scratch<char> sum_memory(parts == 1 ? 0 : kv_tasks * parts * sum_size);
    const auto sums = [&](int64_t i) { return carve_sums(sum_memory.get() + i * sum_size).first; };

    parallel_tasks(kv_tasks * parts, [&](int64_t task) {
      char* own = memory.of(thread_index());
      const int64_t b = task / parts / kv_heads, g = task / parts % kv_heads;
      const HeadSums own_sums = parts == 1 ? carve_sums(own + head_size + block_size).first : sums(task);
      kv_head(b, g, task % parts, parts, carve_head(own).first, own_sums, carve_block(own + head_size).first);
      if (parts == 1) store_sums(b, g, own_sums);
    });
    if (parts == 1) return;
    parallel_tasks(kv_tasks, [&](int64_t task) {
      const HeadSums total = sums(task * parts);
      for (int64_t part = 1; part < parts; ++part) {
        const HeadSums other = sums(task * parts + part);
        const int64_t keys = keys_in(task / kv_heads);
        for (int64_t i = 0; i < keys * depth_stride; ++i) total.grad_key[i] += other.grad_key[i];
        for (int64_t i = 0; i < keys * columns_stride; ++i) total.grad_value[i] += other.grad_value[i];
      }
      store_sums(task / kv_heads, task % kv_heads, total);
    });
  }

 private:
  std::pair<Head<Op>, int64_t> carve_head(char* base) const {
    Head<Op> head;
    Carver carver(base);
    carver.take(head.key, key_count * depth_stride);
    carver.take(head.value, key_count * columns_stride);
    carver.take(head.key_rows, round_up(key_count, step) * depth_stride);
    return {head, carver.used()};
  }

  std::pair<HeadSums, int64_t> carve_sums(char* base) const {
    HeadSums sums;
    Carver carver(base);
    carver.take(sums.grad_key, key_count * depth_stride);
    carver.take(sums.grad_value, key_count * columns_stride);
    return {sums, carver.used()};
  }

  void take_queries(Carver& carver, Queries<Op>& q) const {
    carver.take(q.query_columns, query_block * round_up(depth, step));
    carver.take(q.grad_columns, query_block * round_up(columns, step));
    carver.take(q.query_rows, query_block * depth_stride);
    carver.take(q.grad_rows, query_block * columns_stride);
    carver.take(q.live, query_block);
    carver.take(q.lse, query_block);
    carver.take(q.lse_low, query_block);
    carver.take(q.delta, query_block);
    carver.take(q.grad_query, query_block * depth_stride);
  }

  std::pair<Block<Op>, int64_t> carve_block(char* base) const {
    Block<Op> s;
    Carver carver(base);
    for (int64_t i = 0; i < group_; ++i) take_queries(carver, s.queries[i]);
    carver.take(s.scores, key_block * query_block);
    carver.take(s.addends, key_block * query_block);
    carver.take(s.grad_weights, tile_rows * query_block);
    carver.take(s.slopes, a_.softcap > 0 ? tile_rows * query_block : 0);
    carver.take(s.weights, key_block * query_block);
    carver.take(s.grad_scores, key_block * query_block);
    carver.take(s.grad_score_pairs, step == 2 ? key_block * query_block : 0);
    carver.take(s.kept, a_.dropout_p > 0 ? round_up(key_block, 64) : 0);
    return {s, carver.used()};
  }

  // Every parts-th block of queries, of all query heads that read key/value head (b, g).
  void kv_head(int64_t b, int64_t g, int64_t part, int64_t parts, const Head<Op>& head, const HeadSums& sums,
               Block<Op> s) const {
    for (int64_t i = 0; i < keys_in(b) * depth_stride; ++i) sums.grad_key[i] = 0;
    for (int64_t i = 0; i < keys_in(b) * columns_stride; ++i) sums.grad_value[i] = 0;
    const bool flagged = pack_head(b, g, head);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int64_t t = part * query_block; t < queries_in(b) && !given_up();) {
        int64_t blocks = 0;
        for (; blocks < group_ && t < queries_in(b); t += parts * query_block) {
          s.queries[blocks++].rows = {b, h, t, least(query_block, queries_in(b) - t)};
        }
        query_group(blocks, flagged, head, sums, s);
      }
    }
  }

  // True if a key holds a NaN or an infinity.
  bool pack_head(int64_t b, int64_t g, const Head<Op>& head) const {
    const Keys& keys = visibility_.keys(b);
    const int64_t first = round_down(keys.begin, step), rows = keys.end - first;
    if (rows <= 0) return false;
    const uint8_t* keep = keys.keep != nullptr ? keys.keep + first : nullptr;
    const T* key = key_row<const T>(a_.key, b, g, first);
    copy_rows(key, a_.key.stride[2], rows, depth, keep, head.key + first * depth_stride, depth_stride);
    copy_rows(key_row<const T>(a_.value, b, g, first), a_.value.stride[2], rows, columns, keep,
              head.value + first * columns_stride, columns_stride);
    return pack_rows(key, a_.key.stride[2], first, rows, key_count, depth, keep, head.key_rows);
  }

  // All of the gradients that flow through a group of blocks of queries, of one head and in order.
  void query_group(int64_t blocks, bool flagged, const Head<Op>& head, const HeadSums& sums, Block<Op>& s) const {
    const Keys& keys = visibility_.keys(s.queries[0].rows.b);
    int64_t first = keys.end, last = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      Queries<Op>& q = s.queries[i];
      q.begin = visibility_.lower(keys, q.rows.t), q.end = visibility_.upper(keys, q.rows.t + q.rows.count - 1);
      for (int64_t j = 0; j < query_block * depth_stride; ++j) q.grad_query[j] = 0;
      if (q.begin >= q.end) continue;
      pack_queries(q);
      first = least(first, q.begin), last = most(last, q.end);
    }
    for (int64_t n = round_down(first, step); n < last; n += key_block) {
      const int64_t seen = most(n, keys.begin), size = least(key_block, last - n);
      if (keys.keep != nullptr && std::memchr(keys.keep + seen, 1, size_t(n + size - seen)) == nullptr) continue;
      for (int64_t i = 0; i < blocks; ++i) {
        const Queries<Op>& q = s.queries[i];
        const int64_t count = least(size, q.end - n);
        if (count <= 0 || q.begin >= n + count) continue;
        if (a_.dropout_p > 0) draw(q.rows, n, count, s.kept);
        score_gradients(q, n, count, head, s);
        accumulate(q, n, count, flagged, head, sums, s);
      }
    }
    const Vec scale = Vec::set1(a_.scale);
    for (int64_t i = 0; i < blocks; ++i) {
      const auto& [b, h, t, count] = s.queries[i].rows;
      for (int64_t r = 0; r < count; ++r) {
        store_row(query_row<T>(a_.grad_query, b, h, t + r), s.queries[i].grad_query + r * depth_stride, depth, scale);
      }
    }
  }

  void pack_queries(const Queries<Op>& q) const {
    const auto [b, h, t, rows] = q.rows;
    const float* lse = query_row<const float>(a_.lse, b, h, t);
    for (int64_t r = 0; r < query_block; ++r) {
      q.live[r] = r < rows && lse[r] != negative_infinity;
      // Half an ulp of lse would scale all weights of the row: the conversion keeps what it rounds away.
      const double exact = q.live[r] ? double(lse[r]) * 1.4426950408889634 : double(-negative_infinity);
      q.lse[r] = float(exact);
      q.lse_low[r] = q.live[r] ? float(exact - double(q.lse[r])) : 0.0f;
      q.delta[r] = q.live[r] ? row_product(b, h, t + r) : 0.0f;
    }
    const T* query = query_row<const T>(a_.query, b, h, t);
    const T* grad = query_row<const T>(a_.grad_out, b, h, t);
    const int64_t query_stride = a_.query.stride[2], grad_stride = a_.grad_out.stride[2];
    pack_columns(query, query_stride, rows, depth, q.live, q.query_columns);
    pack_columns(grad, grad_stride, rows, columns, q.live, q.grad_columns);
    pack_rows(query, query_stride, 0, rows, query_block, depth, q.live, q.query_rows);
    pack_rows(grad, grad_stride, 0, rows, query_block, columns, q.live, q.grad_rows);
  }

  float row_product(int64_t b, int64_t h, int64_t t) const {
    const T *out = query_row<const T>(a_.out, b, h, t), *grad = query_row<const T>(a_.grad_out, b, h, t);
    Vec sum = Vec::zero();
    for (int64_t c = 0; c < columns; c += lanes) {
      sum = fma(load_some(out + c, columns - c), load_some(grad + c, columns - c), sum);
    }
    return sum.sum();
  }

  // Which queries [first, last) of the block see some of the keys [s, s + count); `first` begins a vector.
  std::pair<int64_t, int64_t> query_range(const Rows& rows, int64_t s, int64_t count) const {
    const Keys& keys = visibility_.keys(rows.b);
    const int64_t first = clamp(visibility_.first_query(keys, s) - rows.t, 0, rows.count);
    const int64_t last = clamp(visibility_.last_query(keys, s + count - 1) - rows.t, 0, rows.count);
    return {round_down(first, lanes), last};
  }

  // P^T and dS^T of keys [n, n + count) against the block's queries, in weights and grad_scores.
  void score_gradients(const Queries<Op>& q, int64_t n, int64_t count, const Head<Op>& head, const Block<Op>& s) const {
    const Rows& rows = q.rows;
    const Keys& keys = visibility_.keys(rows.b);
    const bool mapped = maps(rows.b);
    if (mapped) {
      visibility_.addends().fill(rows.b, rows.h, rows.t, n, true, count, rows.count,
                                 keys.keep != nullptr ? keys.keep + n : nullptr, s.addends, query_block);
    }
    for (int64_t r = 0; r < count; r += tile_rows) {
      const int64_t tile = least(tile_rows, count - r);
      multiply_columns(head.key + (n + r) * depth_stride, depth_stride, tile, q.query_columns, rows.count, depth,
                       query_range(rows, n + r, tile), s.scores + r * query_block);
    }
    for (int64_t r = 0; r < count; r += tile_rows) {
      const int64_t tile = least(tile_rows, count - r);
      const auto seen = query_range(rows, n + r, tile);
      multiply_columns(head.value + (n + r) * columns_stride, columns_stride, tile, q.grad_columns, rows.count, columns,
                       seen, s.grad_weights);
      for (int64_t i = 0; i < tile; ++i) {
        mask_row(keys, rows, n, r + i, seen, mapped, s, s.slopes + i * query_block);
        weigh_row(q, r + i, seen, s.grad_weights + i * query_block, s.slopes + i * query_block, s);
        if (a_.grad_bias) store_bias_gradient(rows, seen, n + r + i, s.scores + (r + i) * query_block);
      }
    }
  }

  // c[rows][queries] = a[rows][depth] * all panels of pack_columns, in the columns `seen`.
  void multiply_columns(const Op* a, int64_t a_stride, int64_t rows, const Op* packed, int64_t count, int64_t depth,
                        std::pair<int64_t, int64_t> seen, float* c) const {
    const int64_t run = short_sums_ ? short_sum : depth;
    for (int64_t p = 0; p < count; p += panel) {
      const int64_t width = least(panel, round_up(count - p, lanes));
      const int64_t first = most(p, seen.first), last = least(p + width, seen.second);
      if (first >= last) continue;
      const Op* b = packed + p * round_up(depth, step) + (first - p) * step;
      for (int64_t k = 0; k < depth; k += run) {
        const Result result = {c + first, query_block, k > 0};
        multiply_tile(Left<Op>{a + k, a_stride, step}, rows, b + k * width, width * step, last - first,
                      least(run, depth - k), result);
      }
    }
  }

  // Scores of key n + row: mapped, if there are addends, and -inf for the queries that do not see it.
  void mask_row(const Keys& keys, const Rows& rows, int64_t n, int64_t row, std::pair<int64_t, int64_t> seen,
                bool mapped, const Block<Op>& s, float* slopes) const {
    const int64_t key = n + row;
    const int64_t high = clamp(visibility_.last_query(keys, key) - rows.t, 0, rows.count);
    const int64_t low = key < keys.begin ? high : clamp(visibility_.first_query(keys, key) - rows.t, 0, high);
    if (!mapped && low <= seen.first && high >= round_up(seen.second, lanes)) return;
    float* scores = s.scores + row * query_block;
    const float* addends = s.addends + row * query_block;
    for (int64_t j = seen.first; j < seen.second; j += lanes) {
      Vec x = Vec::load(scores + j);
      if (a_.softcap > 0) {
        Vec slope;
        x = score_map_(x, Vec::load(addends + j), &slope);
        slope.store(slopes + j);
      } else if (mapped) {
        x = score_map_(x, Vec::load(addends + j));
      }
      const Mask visible = Mask::first(int(high - j)) & ~Mask::first(int(low - j));
      select(visible, x, Vec::set1(negative_infinity)).store(scores + j);
    }
  }

  // P and dS of one key; for the bias, dS stays also, in float32 and before the slope, in the place of the scores.
  void weigh_row(const Queries<Op>& q, int64_t row, std::pair<int64_t, int64_t> seen, const float* grad_weights,
                 const float* slopes, const Block<Op>& s) const {
    const bool drops = a_.dropout_p > 0, capped = a_.softcap > 0;
    const uint64_t kept = drops ? s.kept[row] : 0;
    const Vec scale = Vec::set1(factor(q.rows.b)), zero = Vec::zero(), rescale = Vec::set1(dropout_.scale);
    float* scores = s.scores + row * query_block;
    Op *weights = s.weights + row * query_block, *grad_scores = s.grad_scores + row * query_block;
    for (int64_t j = 0; j < seen.first; j += lanes) zero.store(grad_scores + j);
    for (int64_t j = seen.first; j < seen.second; j += lanes) {
      const Vec exponent = fused(Vec::load(scores + j), scale, zero - Vec::load(q.lse + j));
      const Vec p = exp2_or_zero<exp_degree<T>>(exponent - Vec::load(q.lse_low + j));
      Vec weight = p, upstream = Vec::load(grad_weights + j);
      if (drops) {
        const Mask keep = Mask::from_bits(uint32_t(kept >> j));
        weight = select(keep, p, zero);
        upstream = select(keep, upstream * rescale, zero);
      }
      const Vec d = select(p == zero, zero, p * (upstream - Vec::load(q.delta + j)));
      weight.store(weights + j);
      (capped ? d * Vec::load(slopes + j) : d).store(grad_scores + j);
      if (a_.grad_bias) d.store(scores + j);
    }
    for (int64_t j = round_up(seen.second, lanes); j < query_block; j += lanes) zero.store(grad_scores + j);
  }

  void store_bias_gradient(const Rows& rows, std::pair<int64_t, int64_t> seen, int64_t key,
                           const float* grad_scores) const {
    const TensorView& grad = a_.grad_bias;
    float* out = row_of<float>(grad, rows.b, rows.h, rows.t) + key;
    for (int64_t j = seen.first; j < seen.second; ++j) out[j * grad.stride[2]] = grad_scores[j];
  }

  // Dropout's bits for keys [n, n + count) of the block.
  void draw(const Rows& rows, int64_t n, int64_t count, uint64_t* kept) const {
    uint64_t words[query_block][round_up(key_block, 64) / 64] = {};
    for (int64_t i = 0; i < rows.count; ++i) {
      dropout_.keep_bits(score_index(rows.b, rows.h, rows.t + i) + uint64_t(n), count, words[i]);
    }
    for (int64_t w = 0; 64 * w < count; ++w) {
      for (int64_t i = 0; i < 64; ++i) kept[64 * w + i] = words[i][w];
      transpose_bits(kept + 64 * w);
    }
  }

  // The three products with P and dS.
  void accumulate(const Queries<Op>& q, int64_t n, int64_t count, bool flagged, const Head<Op>& head,
                  const HeadSums& sums, const Block<Op>& s) const {
    const Rows& rows = q.rows;
    const auto of_keys = [&](int64_t r, int64_t tile) { return query_range(rows, n + r, tile); };
    multiply_rows<Op>({s.weights, query_block, step}, count, q.grad_rows, query_block, 0, columns, of_keys,
                      sums.grad_value + n * columns_stride, columns_stride);
    multiply_rows<Op>({s.grad_scores, query_block, step}, count, q.query_rows, query_block, 0, depth, of_keys,
                      sums.grad_key + n * depth_stride, depth_stride);
    const Left<Op> turned = turn_scores(count, s);
    if (flagged) {
      const T* key = key_row<const T>(a_.key, rows.b, rows.h / group, n);
      multiply_rows_nonzero(turned, rows.count, key, a_.key.stride[2], depth, count, q.grad_query, depth_stride);
      return;
    }
    const Keys& keys_seen = visibility_.keys(rows.b);
    const auto of_queries = [&](int64_t r, int64_t tile) {
      return std::make_pair(clamp(visibility_.lower(keys_seen, rows.t + r) - n, 0, count),
                            clamp(visibility_.upper(keys_seen, rows.t + r + tile - 1) - n, 0, count));
    };
    multiply_rows<Op>(turned, rows.count, head.key_rows, key_count, n, depth, of_queries, q.grad_query, depth_stride);
  }

  // grad_scores as the left operand of dQ, queries in rows.
  static Left<Op> turn_scores(int64_t count, const Block<Op>& s) {
    if constexpr (step == 1) {
      return {s.grad_scores, 1, query_block};
    } else {
      return turn_pairs(count, s);
    }
  }
#if defined(PYTRANSFORMER_AMX)
  // In rows of keys; up to a whole vector of pairs, zeros.
  static Left<bfloat16> turn_pairs(int64_t count, const Block<bfloat16>& s) {
    for (int64_t k = 0; k < count; k += 2 * lanes) {
      for (int64_t j = 0; j < query_block; j += lanes) {
        Vec square[lanes];
        for (int64_t i = 0; i < lanes; ++i) square[i] = pair_of_keys(k + 2 * i, j, count, s).as_bits();
        transpose(square);
        for (int64_t i = 0; i < lanes; ++i) {
          square[i].store(reinterpret_cast<float*>(s.grad_score_pairs + (j + i) * key_block + k));
        }
      }
    }
    return {s.grad_score_pairs, key_block, 2};
  }
#elif defined(PYTRANSFORMER_BF16_DOT)
  // In pairs of keys.
  static Left<bfloat16> turn_pairs(int64_t count, const Block<bfloat16>& s) {
    for (int64_t k = 0; k < count; k += 2) {
      bfloat16* pairs = s.grad_score_pairs + k * query_block;
      for (int64_t j = 0; j < query_block; j += lanes) pair_of_keys(k, j, count, s).store(pairs + 2 * j);
    }
    return {s.grad_score_pairs, 2, 2 * query_block};
  }
#endif
#ifdef PYTRANSFORMER_BF16_DOT
  // Keys k and k + 1, of queries [j, j + lanes); a key beyond the last is zeros.
  static PairVec pair_of_keys(int64_t k, int64_t j, int64_t count, const Block<bfloat16>& s) {
    const auto row = [&](int64_t i) { return i < count ? s.grad_scores + i * query_block + j : nullptr; };
    return PairVec::zip(row(k), row(k + 1), lanes);
  }
#endif

  static void store_row(T* out, const float* from, int64_t count, Vec scale) {
    for (int64_t c = 0; c < count; c += lanes) store_some(out + c, Vec::load(from + c) * scale, count - c);
  }

  void store_sums(int64_t b, int64_t g, const HeadSums& sums) const {
    for (int64_t s = 0; s < keys_in(b); ++s) {
      store_row(key_row<T>(a_.grad_key, b, g, s), sums.grad_key + s * depth_stride, depth, Vec::set1(a_.scale));
      store_row(key_row<T>(a_.grad_value, b, g, s), sums.grad_value + s * columns_stride, columns,
                Vec::set1(dropout_.scale));
    }
  }

  const AttentionBackward& a_;
  const Dropout dropout_;
  const bool short_sums_;
  int64_t group_;
};

}  // namespace

void attention_bwd(const AttentionBackward& a) {
  if (a.query.shape[0] * a.key.shape[1] == 0) return;
  with_storage(a.query.dtype, [&](auto type) { Backward<decltype(type)>(a).run(); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
