// Attention, forward: softmax(scale * query key^T + bias) value without the [T,S] matrix in memory.
//
// The online softmax of FlashAttention: a block of queries walks over the keys, block by block, with a
// running maximum m and sum l a query; where a block raises m, what was accumulated is scaled down by
// 2^(old - new). The scale and log2(e) are one multiplier inside the exponential.
//
// Memory. Keys and values are packed once a head, keys transposed so that keys lie in lanes: then the
// scores of a micro-tile are rows of P as the second product wants them, and maximum, exponential and
// sum are vertical operations. A block of queries (36 on AVX) times a block of 512 keys gives a score
// block of 72 KB that stays in L2. Inside it the packed panel is the outer loop: 64 keys x 64 features
// are 16 KB, fetched from L2 once and then served to six micro-tiles from L1. (The other order, each
// micro-tile streaming over all keys, asks L2 for 21 bytes a cycle on a core with two FMA ports.)
//
// Masks. Band, key_lengths and key-padding masks become a range of keys a query; a micro-tile computes
// only vectors inside the range of its rows, so time follows the visible area. Other masks and biases
// go through a row of addends, -inf where masked. Masked scores are replaced, never added to, so what
// the masked key holds is irrelevant. The value product would still form 0 * NaN where one query of a
// tile sees a key that another does not: packing flags chunks that hold a NaN or an infinity, and
// flagged chunks are multiplied element by element, skipping zero probabilities.
//
// Parallelism. With many heads a task is one key/value head with all its query heads, and its packed
// operands never leave the core's L2. With few, all heads are packed first, and a task is one block of
// queries; with a causal mask the longest go first.
#include "attention.h"

#include <cmath>

#include "attention_blocks.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t query_block = 6 * tile_rows;
constexpr int64_t key_block = 8 * key_chunk;
// Rows of a score block lie an odd number of cache lines apart. At a power of two they would share a
// quarter of the sets of L1 and evict the packed panel from there.
constexpr int64_t score_stride = key_block + lanes;

// One key/value head, packed.
template <class Op>
struct PackedHead {
  Op* key;           // pack_columns
  Op* value;         // pack_rows
  uint8_t* flagged;  // per key_chunk: a value is NaN or infinite
};

// One thread's state of a block of queries.
template <class Op>
struct QueryBlock {
  Op* query;      // [query_block][depth_stride]
  float* scores;  // [query_block][score_stride]
  Op* weights;    // the same shape, and for float the same memory
  float* out;     // [query_block][out_stride], not yet divided by the sum
  float* top;     // the running maximum score
  float* sum;
  float* addends;  // [key_block]
};

template <class T>
class Forward {
  using Op = operand_t<T>;
  static constexpr bool in_place = sizeof(Op) == sizeof(float);

 public:
  explicit Forward(const AttentionForward& a)
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
        out_stride_(round_up(columns_, lanes)),
        // The factor is left to the exponent only where it keeps the order of the scores.
        scale_first_(visibility_.addends().any() || !(a.scale > 0)) {}

  void run() {
    const int64_t threads = max_threads(), kv_tasks = batches_ * kv_heads_;
    const bool by_head = kv_tasks >= 4 * threads || (threads == 1);
    const int64_t packed_heads = by_head ? threads : kv_tasks;
    const Buffer<char> block_memory(threads * carve_block(nullptr).second);
    const Buffer<char> head_memory(packed_heads * carve_head(nullptr).second);
    const auto block = [&](int64_t i) { return carve_block(at(block_memory, i, carve_block(nullptr).second)).first; };
    const auto head = [&](int64_t i) { return carve_head(at(head_memory, i, carve_head(nullptr).second)).first; };
    const int64_t blocks = ceil_div(queries_, query_block);

    if (by_head) {
      parallel_tasks(kv_tasks, [&](int64_t task) {
        const int64_t b = task / kv_heads_, g = task % kv_heads_;
        const PackedHead<Op> packed = head(thread_index());
        const QueryBlock<Op> scratch = block(thread_index());
        pack(b, g, 0, keys_, packed);
        for (int64_t h = g * group_; h < (g + 1) * group_; ++h)
          for (int64_t i = 0; i < blocks; ++i) query_rows(b, h, i * query_block, packed, scratch);
      });
      return;
    }
    const int64_t key_blocks = ceil_div(keys_, key_block);
    parallel_tasks(kv_tasks * key_blocks, [&](int64_t task) {
      const int64_t i = task / key_blocks, first = task % key_blocks * key_block;
      pack(i / kv_heads_, i % kv_heads_, first, least(keys_, first + key_block), head(i));
    });
    parallel_tasks(batches_ * heads_ * blocks, [&](int64_t task) {
      const int64_t i = blocks - 1 - task / (batches_ * heads_), bh = task % (batches_ * heads_);
      const int64_t b = bh / heads_, h = bh % heads_;
      query_rows(b, h, i * query_block, head(b * kv_heads_ + h / group_), block(thread_index()));
    });
  }

 private:
  static char* at(const Buffer<char>& memory, int64_t i, int64_t size) { return memory.data() + i * size; }

  std::pair<QueryBlock<Op>, int64_t> carve_block(char* base) const {
    QueryBlock<Op> s;
    Carver carver(base);
    carver.take(s.query, query_block * depth_stride_);
    carver.take(s.scores, query_block * score_stride);
    if constexpr (in_place) {
      s.weights = s.scores;
    } else {
      carver.take(s.weights, query_block * score_stride);
    }
    carver.take(s.out, query_block * out_stride_);
    carver.take(s.top, query_block);
    carver.take(s.sum, query_block);
    carver.take(s.addends, key_block);
    return {s, carver.used()};
  }

  std::pair<PackedHead<Op>, int64_t> carve_head(char* base) const {
    PackedHead<Op> p;
    Carver carver(base);
    carver.take(p.key, round_up(keys_, lanes) * round_up(depth_, depth_step<Op>));
    carver.take(p.value, round_up(keys_, depth_step<Op>) * out_stride_);
    carver.take(p.flagged, ceil_div(keys_, key_chunk));
    return {p, carver.used()};
  }

  // Keys [from, to) of a head; `from` begins a chunk. Chunks that no query may see stay unwritten.
  void pack(int64_t b, int64_t g, int64_t from, int64_t to, const PackedHead<Op>& packed) const {
    const Keys& keys = visibility_.keys(b);
    from = most(from, round_down(keys.begin, key_chunk));
    to = least(to, keys.end);
    for (int64_t s = from; s < to; s += key_chunk) {
      const int64_t rows = least(key_chunk, to - s);
      const uint8_t* keep = keys.keep != nullptr ? keys.keep + s : nullptr;
      pack_columns(row_of<const T>(a_.key, b, g, s), a_.key.stride[2], rows, depth_, keep,
                   packed.key + s * round_up(depth_, depth_step<Op>));
      packed.flagged[s / key_chunk] = pack_rows(row_of<const T>(a_.value, b, g, s), a_.value.stride[2], s, rows, keys_,
                                                columns_, keep, packed.value);
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
    const int64_t rows = least(query_block, queries_ - t);
    copy_rows(row_of<const T>(a_.query, b, h, t), a_.query.stride[2], rows, depth_, nullptr, s.query, depth_stride_);
    for (int64_t i = 0; i < rows * out_stride_; ++i) s.out[i] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      s.top[r] = negative_infinity;
      s.sum[r] = 0;
    }
    const auto [begin, end] = range(keys, t, rows);
    for (int64_t n = round_down(begin, key_chunk); begin < end && n < end; n += key_block) {
      const int64_t count = least(key_block, end - n);
      const int64_t seen = most(n, keys.begin);
      if (keys.keep != nullptr && std::memchr(keys.keep + seen, 1, size_t(n + count - seen)) == nullptr) continue;
      score(keys, t, rows, n, count, packed, s);
      for (int64_t r = 0; r < rows; r += tile_rows) normalise(b, h, t, r, least(tile_rows, rows - r), n, count, s);
      for (int64_t c = 0; c < count; c += key_chunk) {
        add_values(b, h, t, rows, n, n + c, least(n + c + key_chunk, n + count), packed, s);
      }
    }
    store(b, h, t, rows, s);
  }

  // scores = query key^T for keys [n, n + count), in the vectors that some row of a tile sees.
  void score(const Keys& keys, int64_t t, int64_t rows, int64_t n, int64_t count, const PackedHead<Op>& packed,
             const QueryBlock<Op>& s) const {
    for (int64_t p = n; p < n + count; p += panel) {
      const Op* key = packed.key + p * round_up(depth_, depth_step<Op>);
      const int64_t width = least(panel, round_up(keys.end - p, lanes));
      for (int64_t r = 0; r < rows; r += tile_rows) {
        const int64_t tile = least(tile_rows, rows - r);
        const auto [begin, end] = range(keys, t + r, tile);
        if (begin >= end || p >= end || p + panel <= begin) continue;
        multiply_tile<Op>({s.query + r * depth_stride_, depth_stride_, depth_step<Op>}, tile, key,
                          width * depth_step<Op>, least(width, end - p), depth_, s.scores + r * score_stride + (p - n),
                          score_stride, false);
      }
    }
  }

  // Scores of a tile of rows to weights 2^(score - maximum), with masks, bias and running sums.
  void normalise(int64_t b, int64_t h, int64_t t, int64_t r, int64_t tile, int64_t n, int64_t count,
                 const QueryBlock<Op>& s) const {
    const Keys& keys = visibility_.keys(b);
    auto [begin, end] = range(keys, t + r, tile);
    begin = round_down(most(begin - n, 0), lanes);
    end = least(end - n, count);
    if (begin >= end) return;
    const Addends& addends = visibility_.addends();
    const bool adds = has_addends(b);
    for (int64_t i = r; i < r + tile; ++i) {
      if (adds) {
        if (i == r || !addends.shared()) {
          addends.fill(b, h, t + i, n + begin, false, 1, end - begin,
                       keys.keep != nullptr ? keys.keep + n + begin : nullptr, s.addends, 0);
        }
        apply_addends(s.scores + i * score_stride + begin, s.addends, end - begin);
      }
      // Beyond the keys of this row, up to whole vectors: -inf.
      const int64_t low = clamp(visibility_.lower(keys, t + i) - n, begin, round_up(end, lanes));
      const int64_t high = clamp(visibility_.upper(keys, t + i) - n, low, end);
      float* row = s.scores + i * score_stride;
      for (int64_t j = begin; j < low; ++j) row[j] = negative_infinity;
      for (int64_t j = high; j < round_up(end, lanes); ++j) row[j] = negative_infinity;
      weigh(row, begin, end, adds ? 1.0f : a_.scale * log2_e, i, s);
    }
  }

  void apply_addends(float* row, const float* addends, int64_t count) const {
    const Vec scale = Vec::set1(a_.scale * log2_e), masked = Vec::set1(negative_infinity);
    for (int64_t j = 0; j < count; j += lanes) {
      const Vec add = Vec::load(addends + j);
      select(add == masked, masked, fused(Vec::load(row + j), scale, add)).store(row + j);
    }
  }

  // Row i of the block: the online softmax over vectors [begin, end).
  void weigh(const float* row, int64_t begin, int64_t end, float scale, int64_t i, const QueryBlock<Op>& s) const {
    Vec most_here = Vec::set1(negative_infinity), other = most_here;
    int64_t j = begin;
    for (; j + lanes < end; j += 2 * lanes) {
      most_here = max(most_here, Vec::load(row + j));
      other = max(other, Vec::load(row + j + lanes));
    }
    if (j < end) most_here = max(most_here, Vec::load(row + j));
    const float here = max(most_here, other).max(), before = s.top[i];
    const float top = here > before ? here : before;
    const float base = top == negative_infinity ? 0.0f : top;
    if (top != before && before != negative_infinity) rescale(i, std::exp2((before - base) * scale), s);
    s.top[i] = top;

    // The difference first: its rounding then matters least where the weight is largest.
    const Vec factor = Vec::set1(scale), maximum = Vec::set1(base);
    Vec sum = Vec::zero(), other_sum = Vec::zero();
    Op* weights = s.weights + i * score_stride;
    for (j = begin; j + lanes < end; j += 2 * lanes) {
      const Vec first = power_of_two<T>((Vec::load(row + j) - maximum) * factor);
      const Vec second = power_of_two<T>((Vec::load(row + j + lanes) - maximum) * factor);
      sum = sum + first;
      other_sum = other_sum + second;
      first.store(weights + j);
      second.store(weights + j + lanes);
    }
    if (j < end) {
      const Vec last = power_of_two<T>((Vec::load(row + j) - maximum) * factor);
      sum = sum + last;
      last.store(weights + j);
    }
    s.sum[i] += (sum + other_sum).sum();
  }

  bool has_addends(int64_t b) const { return visibility_.keys(b).keep != nullptr || scale_first_; }

  void rescale(int64_t i, float factor, const QueryBlock<Op>& s) const {
    float* out = s.out + i * out_stride_;
    for (int64_t c = 0; c < out_stride_; ++c) out[c] *= factor;
    s.sum[i] *= factor;
  }

  // out += weights * value for keys [from, to) of one chunk; the weights begin at key n.
  void add_values(int64_t b, int64_t h, int64_t t, int64_t rows, int64_t n, int64_t from, int64_t to,
                  const PackedHead<Op>& packed, const QueryBlock<Op>& s) const {
    const Keys& keys = visibility_.keys(b);
    const bool flagged = packed.flagged[from / key_chunk];
    for (int64_t c = 0; c < columns_; c += flagged ? columns_ : panel) {
      const int64_t width = least(panel, out_stride_ - c);
      for (int64_t r = 0; r < rows; r += tile_rows) {
        const int64_t tile = least(tile_rows, rows - r);
        const auto [begin, end] = range(keys, t + r, tile);
        const int64_t first = round_down(most(begin, from), lanes), last = least(end, to);
        if (begin >= end || first >= last) continue;
        const Left<Op> weights = {s.weights + r * score_stride + (first - n), score_stride, depth_step<Op>};
        float* out = s.out + r * out_stride_ + c;
        if (flagged) {
          multiply_rows_nonzero(weights, tile, row_of<const T>(a_.value, b, h / group_, first), a_.value.stride[2],
                                columns_, last - first, out, out_stride_);
        } else {
          const Op* value = packed.value + c * round_up(keys_, depth_step<Op>) + first * width;
          multiply_tile<Op>(weights, tile, value, width * depth_step<Op>, width, last - first, out, out_stride_, true);
        }
      }
    }
  }

  void store(int64_t b, int64_t h, int64_t t, int64_t rows, const QueryBlock<Op>& s) const {
    // Scores are as the product left them, or with bias or mask in units of log2.
    const double unit = has_addends(b) ? 0.6931471805599453 : double(a_.scale);
    float* lse = a_.lse.template ptr<float>() + (b * heads_ + h) * queries_ + t;
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = s.sum[r];
      const Vec inverse = Vec::set1(sum == 0 ? 0.0f : 1.0f / sum);
      T* out = row_of<T>(a_.out, b, h, t + r);
      for (int64_t c = 0; c < columns_; c += lanes) {
        store_some(out + c, Vec::load(s.out + r * out_stride_ + c) * inverse, columns_ - c);
      }
      lse[r] = sum == 0 ? negative_infinity : float(double(s.top[r]) * unit + std::log(double(sum)));
    }
  }

  const AttentionForward& a_;
  const Visibility visibility_;
  const int64_t batches_, heads_, kv_heads_, queries_, keys_, depth_, columns_, group_;
  const int64_t depth_stride_, out_stride_;
  const bool scale_first_;
};

}  // namespace

void attention_fwd(const AttentionForward& a) {
  if (a.lse.numel() == 0) return;
  if (a.query.dtype == DType::bfloat16) {
    Forward<bfloat16>(a).run();
  } else {
    Forward<float>(a).run();
  }
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
