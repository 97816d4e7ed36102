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
// packed 64 x 64 operand, 16 KB, in L1; nothing of size [T,S] or [T,D] is ever stored.
//
// Parallelism. Where there are fewer heads than threads can use, the blocks of queries of a head are
// dealt out to several tasks in turn (so that causal ones cost the same), each with its own sums of dK
// and dV, added in order afterwards: equal inputs give equal bits at any one thread count. Tasks that
// add to the same part of a broadcast bias's gradient run one after the other on one thread.
//
// Masks are as in the forward pass: see attention.cpp. Queries that see nothing are packed as zeros, and
// dS is 0, not P times anything, where P is 0.
#include <cmath>

#include "attention.h"
#include "attention_blocks.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t query_block = 64;
constexpr int64_t key_block = 96;

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

// One thread's block of queries, and a block of keys against it.
template <class Op>
struct Block {
  Op *query_columns, *grad_columns;  // pack_columns of query and grad_out
  Op *query_rows, *grad_rows;        // pack_rows of the same
  uint8_t* live;                     // [query_block] whether a query sees any key
  float *lse, *lse_low, *delta;      // [query_block]; lse in units of log2, and what its rounding lost
  float* grad_query;                 // [query_block][depth_stride]
  float *scores, *addends;           // [key_block][query_block]
  float* grad_weights;               // [tile_rows][query_block]
  Op *weights, *grad_scores;         // [key_block][query_block]
  Op* grad_score_pairs;              // [key_block / 2][query_block][2], for paired operands
};

template <class T>
class Backward {
  using Op = operand_t<T>;
  static constexpr int64_t step = depth_step<Op>;

 public:
  explicit Backward(const AttentionBackward& a)
      : a_(a),
        visibility_(a),
        batches_(a.query.shape[0]),
        heads_(a.query.shape[1]),
        kv_heads_(a.key.shape[1]),
        queries_(a.query.shape[2]),
        keys_(a.key.shape[2]),
        depth_(a.query.shape[3]),
        columns_(a.value.shape[3]),
        group_(heads_ / kv_heads_),
        depth_stride_(round_up(depth_, lanes)),
        columns_stride_(round_up(columns_, lanes)),
        scale_first_(visibility_.addends().any() || !(a.scale > 0)) {}

  void run() {
    const int64_t threads = max_threads();
    // May tasks that differ in batch, head or queries run side by side?
    const TensorView& bias = a_.grad_bias;
    const bool batches_apart = !bias || bias.stride[0] != 0 || batches_ == 1;
    const bool heads_apart = !bias || bias.stride[1] != 0 || kv_heads_ == 1;
    const bool queries_apart = !bias || bias.stride[2] != 0;
    const int64_t batch_tasks = batches_apart ? batches_ : 1, head_tasks = heads_apart ? kv_heads_ : 1;
    const int64_t blocks = most(1, ceil_div(queries_, query_block)), wanted = 4 * threads;
    const bool split = threads > 1 && queries_apart && batch_tasks * head_tasks < wanted;
    const int64_t parts = split ? least(blocks, ceil_div(wanted, batch_tasks * head_tasks)) : 1;

    const int64_t sum_count = parts == 1 ? threads : batches_ * kv_heads_ * parts;
    const int64_t head_size = carve_head(nullptr).second, sum_size = carve_sums(nullptr).second;
    const int64_t block_size = carve_block(nullptr).second;
    const Buffer<char> memory(threads * (head_size + block_size));
    const Buffer<char> sum_memory(sum_count * sum_size);
    const auto sums = [&](int64_t i) { return carve_sums(sum_memory.data() + i * sum_size).first; };

    parallel_tasks(batch_tasks * head_tasks * parts, [&](int64_t task) {
      char* own = memory.data() + thread_index() * (head_size + block_size);
      const Head<Op> head = carve_head(own).first;
      const Block<Op> block = carve_block(own + head_size).first;
      const int64_t part = task % parts, g0 = task / parts % head_tasks, b0 = task / parts / head_tasks;
      for (int64_t b = b0; b < batches_; b += batch_tasks) {
        for (int64_t g = g0; g < kv_heads_; g += head_tasks) {
          const HeadSums own_sums = sums(parts == 1 ? thread_index() : (b * kv_heads_ + g) * parts + part);
          kv_head(b, g, part, parts, head, own_sums, block);
          if (parts == 1) store_sums(b, g, own_sums);
        }
      }
    });
    if (parts == 1) return;
    parallel_tasks(batches_ * kv_heads_, [&](int64_t task) {
      const HeadSums total = sums(task * parts);
      for (int64_t part = 1; part < parts; ++part) {
        const HeadSums other = sums(task * parts + part);
        for (int64_t i = 0; i < keys_ * depth_stride_; ++i) total.grad_key[i] += other.grad_key[i];
        for (int64_t i = 0; i < keys_ * columns_stride_; ++i) total.grad_value[i] += other.grad_value[i];
      }
      store_sums(task / kv_heads_, task % kv_heads_, total);
    });
  }

 private:
  std::pair<Head<Op>, int64_t> carve_head(char* base) const {
    Head<Op> head;
    Carver carver(base);
    carver.take(head.key, keys_ * depth_stride_);
    carver.take(head.value, keys_ * columns_stride_);
    carver.take(head.key_rows, round_up(keys_, step) * depth_stride_);
    return {head, carver.used()};
  }

  std::pair<HeadSums, int64_t> carve_sums(char* base) const {
    HeadSums sums;
    Carver carver(base);
    carver.take(sums.grad_key, keys_ * depth_stride_);
    carver.take(sums.grad_value, keys_ * columns_stride_);
    return {sums, carver.used()};
  }

  std::pair<Block<Op>, int64_t> carve_block(char* base) const {
    Block<Op> s;
    Carver carver(base);
    carver.take(s.query_columns, query_block * round_up(depth_, step));
    carver.take(s.grad_columns, query_block * round_up(columns_, step));
    carver.take(s.query_rows, query_block * depth_stride_);
    carver.take(s.grad_rows, query_block * columns_stride_);
    carver.take(s.live, query_block);
    carver.take(s.lse, query_block);
    carver.take(s.lse_low, query_block);
    carver.take(s.delta, query_block);
    carver.take(s.grad_query, query_block * depth_stride_);
    carver.take(s.scores, key_block * query_block);
    carver.take(s.addends, key_block * query_block);
    carver.take(s.grad_weights, tile_rows * query_block);
    carver.take(s.weights, key_block * query_block);
    carver.take(s.grad_scores, key_block * query_block);
    carver.take(s.grad_score_pairs, step == 2 ? key_block * query_block : 0);
    return {s, carver.used()};
  }

  // Every parts-th block of queries, of all query heads that read key/value head (b, g).
  void kv_head(int64_t b, int64_t g, int64_t part, int64_t parts, const Head<Op>& head, const HeadSums& sums,
               const Block<Op>& s) const {
    for (int64_t i = 0; i < keys_ * depth_stride_; ++i) sums.grad_key[i] = 0;
    for (int64_t i = 0; i < keys_ * columns_stride_; ++i) sums.grad_value[i] = 0;
    const bool flagged = pack_head(b, g, head);
    for (int64_t h = g * group_; h < (g + 1) * group_; ++h) {
      for (int64_t t = part * query_block; t < queries_; t += parts * query_block) {
        query_rows(b, h, t, flagged, head, sums, s);
      }
    }
  }

  // True if a key holds a NaN or an infinity.
  bool pack_head(int64_t b, int64_t g, const Head<Op>& head) const {
    const Keys& keys = visibility_.keys(b);
    const int64_t first = round_down(keys.begin, step), rows = keys.end - first;
    if (rows <= 0) return false;
    const uint8_t* keep = keys.keep != nullptr ? keys.keep + first : nullptr;
    const T* key = row_of<const T>(a_.key, b, g, first);
    copy_rows(key, a_.key.stride[2], rows, depth_, keep, head.key + first * depth_stride_, depth_stride_);
    copy_rows(row_of<const T>(a_.value, b, g, first), a_.value.stride[2], rows, columns_, keep,
              head.value + first * columns_stride_, columns_stride_);
    return pack_rows(key, a_.key.stride[2], first, rows, keys_, depth_, keep, head.key_rows);
  }

  // All of the gradients that flow through queries [t, t + query_block) of head (b, h).
  void query_rows(int64_t b, int64_t h, int64_t t, bool flagged, const Head<Op>& head, const HeadSums& sums,
                  const Block<Op>& s) const {
    const Keys& keys = visibility_.keys(b);
    const int64_t rows = least(query_block, queries_ - t);
    const int64_t begin = visibility_.lower(keys, t), end = visibility_.upper(keys, t + rows - 1);
    for (int64_t i = 0; i < query_block * depth_stride_; ++i) s.grad_query[i] = 0;
    if (begin < end) pack_queries(b, h, t, rows, s);
    for (int64_t n = round_down(begin, step); begin < end && n < end; n += key_block) {
      const int64_t count = least(key_block, end - n);
      const int64_t seen = most(n, keys.begin);
      if (keys.keep != nullptr && std::memchr(keys.keep + seen, 1, size_t(n + count - seen)) == nullptr) continue;
      score_gradients(b, h, t, rows, n, count, head, s);
      accumulate(b, h, rows, n, count, flagged, head, sums, s);
    }
    const Vec scale = Vec::set1(a_.scale);
    for (int64_t r = 0; r < rows; ++r) {
      store_row(row_of<T>(a_.grad_query, b, h, t + r), s.grad_query + r * depth_stride_, depth_, scale);
    }
  }

  void pack_queries(int64_t b, int64_t h, int64_t t, int64_t rows, const Block<Op>& s) const {
    const float* lse = a_.lse.template ptr<float>() + (b * heads_ + h) * queries_ + t;
    for (int64_t r = 0; r < query_block; ++r) {
      s.live[r] = r < rows && lse[r] != negative_infinity;
      // Half an ulp of lse would scale all weights of the row: the conversion keeps what it rounds away.
      const double exact = s.live[r] ? double(lse[r]) * 1.4426950408889634 : double(-negative_infinity);
      s.lse[r] = float(exact);
      s.lse_low[r] = s.live[r] ? float(exact - double(s.lse[r])) : 0.0f;
      s.delta[r] = s.live[r] ? row_product(b, h, t + r) : 0.0f;
    }
    const T* query = row_of<const T>(a_.query, b, h, t);
    const T* grad = row_of<const T>(a_.grad_out, b, h, t);
    const int64_t query_stride = a_.query.stride[2], grad_stride = a_.grad_out.stride[2];
    pack_columns(query, query_stride, rows, depth_, s.live, s.query_columns);
    pack_columns(grad, grad_stride, rows, columns_, s.live, s.grad_columns);
    pack_rows(query, query_stride, 0, rows, query_block, depth_, s.live, s.query_rows);
    pack_rows(grad, grad_stride, 0, rows, query_block, columns_, s.live, s.grad_rows);
  }

  float row_product(int64_t b, int64_t h, int64_t t) const {
    const T *out = row_of<const T>(a_.out, b, h, t), *grad = row_of<const T>(a_.grad_out, b, h, t);
    Vec sum = Vec::zero();
    for (int64_t c = 0; c < columns_; c += lanes) {
      sum = fma(load_some(out + c, columns_ - c), load_some(grad + c, columns_ - c), sum);
    }
    return sum.sum();
  }

  // P^T and dS^T of keys [n, n + count) against the block's queries, in weights and grad_scores.
  void score_gradients(int64_t b, int64_t h, int64_t t, int64_t rows, int64_t n, int64_t count, const Head<Op>& head,
                       const Block<Op>& s) const {
    const Keys& keys = visibility_.keys(b);
    const bool adds = keys.keep != nullptr || scale_first_;
    if (adds) {
      visibility_.addends().fill(b, h, t, n, true, count, rows, keys.keep != nullptr ? keys.keep + n : nullptr,
                                 s.addends, query_block);
    }
    for (int64_t r = 0; r < count; r += tile_rows) {
      const int64_t tile = least(tile_rows, count - r);
      multiply_columns(head.key + (n + r) * depth_stride_, depth_stride_, tile, s.query_columns, rows, depth_,
                       s.scores + r * query_block);
    }
    for (int64_t r = 0; r < count; r += tile_rows) {
      const int64_t tile = least(tile_rows, count - r);
      multiply_columns(head.value + (n + r) * columns_stride_, columns_stride_, tile, s.grad_columns, rows, columns_,
                       s.grad_weights);
      for (int64_t i = 0; i < tile; ++i) {
        const int64_t row = (r + i) * query_block;
        mask_row(keys, t, rows, n + r + i, s.scores + row, adds ? s.addends + row : nullptr);
        weigh_row(s.scores + row, s.grad_weights + i * query_block, rows, adds ? 1.0f : a_.scale * log2_e, s,
                  s.weights + row, s.grad_scores + row, s.scores + row);
        if (a_.grad_bias) add_bias_gradient(b, h, t, rows, n + r + i, s.scores + row);
      }
    }
  }

  // c[rows][queries] = a[rows][depth] * all panels of pack_columns.
  static void multiply_columns(const Op* a, int64_t a_stride, int64_t rows, const Op* packed, int64_t queries,
                               int64_t depth, float* c) {
    for (int64_t p = 0; p < queries; p += panel) {
      const int64_t width = least(panel, round_up(queries - p, lanes));
      multiply_tile<Op>({a, a_stride, step}, rows, packed + p * round_up(depth, step), width * step, width, depth,
                        c + p, query_block, false);
    }
  }

  // Scores of key s: plus addends, and -inf for the queries that do not see it.
  void mask_row(const Keys& keys, int64_t t, int64_t rows, int64_t s, float* scores, const float* addends) const {
    const int64_t vectors = round_up(rows, lanes);
    if (addends != nullptr) {
      const Vec scale = Vec::set1(a_.scale * log2_e), masked = Vec::set1(negative_infinity);
      for (int64_t j = 0; j < vectors; j += lanes) {
        const Vec add = Vec::load(addends + j);
        select(add == masked, masked, fused(Vec::load(scores + j), scale, add)).store(scores + j);
      }
    }
    int64_t low = clamp(visibility_.first_query(s, queries_) - t, 0, rows);
    const int64_t high = clamp(visibility_.last_query(s, queries_) - t, low, rows);
    if (s < keys.begin) low = high;
    for (int64_t j = 0; j < low; ++j) scores[j] = negative_infinity;
    for (int64_t j = high; j < vectors; ++j) scores[j] = negative_infinity;
  }

  // P and dS of one key; `exact` receives dS in float32. It may be the row of scores.
  static void weigh_row(const float* scores, const float* grad_weights, int64_t rows, float scale, const Block<Op>& s,
                        Op* weights, Op* grad_scores, float* exact) {
    const Vec factor = Vec::set1(scale), zero = Vec::zero();
    for (int64_t j = 0; j < rows; j += lanes) {
      const Vec exponent = fused(Vec::load(scores + j), factor, zero - Vec::load(s.lse + j));
      const Vec p = power_of_two<T>(exponent - Vec::load(s.lse_low + j));
      const Vec d = p * (Vec::load(grad_weights + j) - Vec::load(s.delta + j));
      const Vec ds = select(p == zero, zero, d);
      p.store(weights + j);
      ds.store(grad_scores + j);
      ds.store(exact + j);
    }
  }

  void add_bias_gradient(int64_t b, int64_t h, int64_t t, int64_t rows, int64_t s, const float* grad_scores) const {
    const TensorView& bias = a_.grad_bias;
    float* out = row_of<float>(bias, b, h, t) + s * bias.stride[3];
    for (int64_t j = 0; j < rows; ++j) out[j * bias.stride[2]] += grad_scores[j];
  }

  // The three products with P and dS.
  void accumulate(int64_t b, int64_t h, int64_t rows, int64_t n, int64_t count, bool flagged, const Head<Op>& head,
                  const HeadSums& sums, const Block<Op>& s) const {
    multiply_rows<Op>({s.weights, query_block, step}, count, s.grad_rows, query_block, 0, columns_, rows,
                      sums.grad_value + n * columns_stride_, columns_stride_);
    multiply_rows<Op>({s.grad_scores, query_block, step}, count, s.query_rows, query_block, 0, depth_, rows,
                      sums.grad_key + n * depth_stride_, depth_stride_);
    if constexpr (step == 2) pair_keys(count, s);
    const Left<Op> turned = {step == 2 ? s.grad_score_pairs : s.grad_scores, step, step * query_block};
    if (flagged) {
      multiply_rows_nonzero(turned, rows, row_of<const T>(a_.key, b, h / group_, n), a_.key.stride[2], depth_, count,
                            s.grad_query, depth_stride_);
    } else {
      multiply_rows<Op>(turned, rows, head.key_rows, keys_, n, depth_, count, s.grad_query, depth_stride_);
    }
  }

  // grad_scores in pairs of keys.
  static void pair_keys(int64_t count, const Block<Op>& s) {
    for (int64_t k = 0; k < count; k += 2) {
      const Op* even = s.grad_scores + k * query_block;
      Op* pairs = s.grad_score_pairs + k * query_block;
      for (int64_t j = 0; j < query_block; ++j) {
        pairs[2 * j] = even[j];
        pairs[2 * j + 1] = k + 1 < count ? even[query_block + j] : Op{};
      }
    }
  }

  static void store_row(T* out, const float* from, int64_t count, Vec scale) {
    for (int64_t c = 0; c < count; c += lanes) store_some(out + c, Vec::load(from + c) * scale, count - c);
  }

  void store_sums(int64_t b, int64_t g, const HeadSums& sums) const {
    for (int64_t s = 0; s < keys_; ++s) {
      store_row(row_of<T>(a_.grad_key, b, g, s), sums.grad_key + s * depth_stride_, depth_, Vec::set1(a_.scale));
      store_row(row_of<T>(a_.grad_value, b, g, s), sums.grad_value + s * columns_stride_, columns_, Vec::set1(1));
    }
  }

  const AttentionBackward& a_;
  const Visibility visibility_;
  const int64_t batches_, heads_, kv_heads_, queries_, keys_, depth_, columns_, group_;
  const int64_t depth_stride_, columns_stride_;
  const bool scale_first_;
};

}  // namespace

void attention_bwd(const AttentionBackward& a) {
  if (a.query.shape[0] * a.key.shape[1] == 0) return;
  if (a.query.dtype == DType::bfloat16) {
    Backward<bfloat16>(a).run();
  } else {
    Backward<float>(a).run();
  }
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
