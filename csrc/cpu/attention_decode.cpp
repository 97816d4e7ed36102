// Attention for few queries, as in decoding: one or a handful of queries against a long cache of keys.
//
// Nothing is packed: every key and value is read once, as it lies, and used by all rows that share its
// head (query heads of a group, queries of a head) while it is in L1. The call is bound by that reading, which
// is fastest from one address to the next: the hardware then looks ahead, and asking for keys only a little earlier
// than it does is worth a third of the time, for many at once the opposite. Scores are formed for as many keys
// at a time as there are lanes; a chunk of values is the panel of a tile, and of a next tile from L1.
//
// Keys and values in pages are read in place too, a stretch of rows at a time that lies in one page: as many keys as
// there are lanes where the size of a page is a multiple of these, fewer where it is not.
//
// Parallelism. The keys are split into parts, whose number depends on nothing but the number of keys, so
// that equal inputs give equal bits at any number of threads. A task is one part of one key/value head;
// its sums, relative to its own maximum, are combined afterwards, in order.
#include <cmath>

#include "attention.h"
#include "attention_blocks.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t split = 1024;  // keys of a task
constexpr int64_t value_chunk = 64;
// Scores of a row: with pages a vector of them may begin anywhere, and so end behind the last key.
constexpr int64_t score_stride = split + lanes;

// One thread's scratch.
template <class Op>
struct Part {
  Op* query;                // [rows][query_stride]
  float *scores, *addends;  // [rows][score_stride], [split]
  float* value;             // [value_chunk][lanes], the last part of a vector of values
  float *sums, *totals;     // [tile_rows][columns_stride] of a chunk, [rows][columns_stride]
};
// What a task leaves: sum(2^(score - top) value), not normalised.
struct Partial {
  float* out;        // [rows][columns_stride]
  float *top, *sum;  // [rows]
};

template <class T>
class Decode : Scoring {
  using Op = operand_t<T>;
  static constexpr int64_t ahead = 32 / int64_t(sizeof(T));  // keys, from which on the next are asked for

 public:
  explicit Decode(const AttentionForward& a)
      : Scoring(a), a_(a), rows_(group * query_count), query_stride_(round_up(depth, lanes * depth_step<Op>)) {}

  void run() {
    const int64_t splits = ceil_div(key_count, split), kv_tasks = batches * kv_heads;
    const int64_t partial_size = carve_partial(nullptr).second;
    const ThreadScratch<char> part_memory(max_threads(), carve_part(nullptr).second);
    const Scratch<char> partial_memory(kv_tasks * splits * partial_size);
    const auto partial = [&](int64_t i) { return carve_partial(partial_memory.get() + i * partial_size).first; };
    parallel_tasks(kv_tasks * splits, [&](int64_t task) {
      const Part<Op> part = carve_part(part_memory.of(thread_index())).first;
      const int64_t head = task / splits, first = task % splits * split;
      attend(head / kv_heads, head % kv_heads, first, part, partial(task));
    });
    for (int64_t head = 0; head < kv_tasks; ++head) {
      const Partial total = partial(head * splits);
      for (int64_t i = 1; i < splits; ++i) combine(head / kv_heads, total, partial(head * splits + i));
      store(head / kv_heads, head % kv_heads, total);
    }
  }

 private:
  std::pair<Part<Op>, int64_t> carve_part(char* base) const {
    Part<Op> s;
    Carver carver(base);
    carver.take(s.query, rows_ * query_stride_);
    carver.take(s.scores, rows_ * score_stride);
    carver.take(s.addends, split);
    carver.take(s.value, value_chunk * lanes);
    carver.take(s.sums, tile_rows * columns_stride);
    carver.take(s.totals, rows_ * columns_stride);
    return {s, carver.used()};
  }

  std::pair<Partial, int64_t> carve_partial(char* base) const {
    Partial s;
    Carver carver(base);
    carver.take(s.out, rows_ * columns_stride);
    carver.take(s.top, rows_);
    carver.take(s.sum, rows_);
    return {s, carver.used()};
  }

  // Row r of a key/value head as query t of head h.
  int64_t head_of(int64_t g, int64_t r) const { return g * group + r / query_count; }
  int64_t query_of(int64_t r) const { return r % query_count; }

  // Key s of head (b, g), or its value, and how many of `count` keys from there on follow at the stride of rows.
  const T* row_at(const TensorView& x, int64_t b, int64_t g, int64_t s) const {
    if (!a_.block_table) return key_row<const T>(x, b, g, s);
    const int32_t* pages = a_.block_table.ptr<const int32_t>() + b * a_.block_table.stride[0];
    return row_of<const T>(x, pages[s / page()], g, s % page());
  }
  int64_t stretch(int64_t s, int64_t count) const { return a_.block_table ? least(count, page() - s % page()) : count; }
  int64_t page() const { return a_.key.shape[2]; }

  // Keys [first, first + split) of head (b, g), as far as some row sees them.
  void attend(int64_t b, int64_t g, int64_t first, const Part<Op>& s, const Partial& result) const {
    for (int64_t i = 0; i < rows_ * columns_stride; ++i) result.out[i] = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      result.top[r] = negative_infinity;
      result.sum[r] = 0;
      const int64_t features = query_of(r) < queries_in(b) ? depth : 0;  // others than the sequence's are zeros
      copy_rows(query_row<const T>(a_.query, b, head_of(g, r), query_of(r)), 0, 1, features, nullptr,
                s.query + r * query_stride_, query_stride_);
    }
    const Keys& keys = visibility_.keys(b);
    const int64_t begin = most(first, visibility_.lower(keys, 0));
    const int64_t end = least(first + split, visibility_.upper(keys, query_count - 1));
    if (begin >= end) return;
    for (int64_t n = begin, count; n < end; n += count) {
      count = stretch(n, least(lanes, end - n));
      score(row_at(a_.key, b, g, n), count, s.scores + (n - begin), s);
    }
    for (int64_t r = 0; r < rows_; ++r) weigh(b, g, r, begin, end, s, result);
    for (int64_t n = begin; n < end; n += value_chunk) {
      add_values(b, g, n, least(value_chunk, end - n), s.scores + (n - begin), s, result);
    }
  }

  // scores[r][i] = query r . key i, for up to `lanes` keys.
  void score(const T* key, int64_t count, float* scores, const Part<Op>& s) const {
    for (int64_t i = 0; i < count; ++i) prefetch_row(key + (ahead + i) * a_.key.stride[2], depth);
    if constexpr (sizeof(T) == sizeof(float)) {
      score_in_order(key, count, scores, s);
    } else {
      score_by_lanes(key, count, scores, s);
    }
  }

  // Lane by lane along the features, or pairs of them, then across the lanes.
  void score_by_lanes(const T* key, int64_t count, float* scores, const Part<Op>& s) const {
    constexpr int64_t step = lanes * depth_step<Op>;
    constexpr Op* kind = nullptr;
    for (int64_t r = 0; r < rows_; ++r) {
      Vec sums[lanes];
      for (int i = 0; i < lanes; ++i) {
        const T* features = key_of(key, count, i);
        sums[i] = Vec::zero();
        for (int64_t j = 0; j < depth; j += step) {
          const Vec query = load_operands(s.query + r * query_stride_ + j, step, kind);
          sums[i] = multiply_operands(query, load_operands(features + j, depth - j, kind), sums[i], kind);
        }
      }
      sums_of_lanes(sums).store(scores + r * score_stride);
    }
  }

  // Feature by feature in short sums, keys in lanes: the order, and so the bits, in which the backward forms its
  // scores. Any other would make its probabilities, exp(score - lse), relatively wrong by the rounding of a score.
  void score_in_order(const T* key, int64_t count, float* scores, const Part<Op>& s) const {
    for (int64_t r = 0; r < rows_; ++r) Vec::zero().store(scores + r * score_stride);
    for (int64_t j = 0; j < depth; j += short_sum) {
      const int64_t features = least(short_sum, depth - j);
      Vec columns_of_keys[short_sum];
      for (int64_t f = 0; f < features; f += lanes) {
        Vec square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = load_some(key_of(key, count, i) + j + f, depth - j - f);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) columns_of_keys[f + i] = square[i];
      }
      for (int64_t r = 0; r < rows_; ++r) {
        const float* query = s.query + r * query_stride_ + j;
        Vec sum = Vec::zero();
        for (int64_t i = 0; i < features; ++i) sum = fma(Vec::set1(query[i]), columns_of_keys[i], sum);
        (Vec::load(scores + r * score_stride) + sum).store(scores + r * score_stride);
      }
    }
  }

  // Key i of `count`; beyond them, the last.
  const T* key_of(const T* key, int64_t count, int64_t i) const { return key + least(i, count - 1) * a_.key.stride[2]; }

  // Scores of row r to weights, their maximum and sum.
  void weigh(int64_t b, int64_t g, int64_t r, int64_t begin, int64_t end, const Part<Op>& s,
             const Partial& result) const {
    const Keys& keys = visibility_.keys(b);
    const int64_t t = query_of(r), low = visibility_.lower(keys, t) - begin;
    const int64_t high = least(visibility_.upper(keys, t), end) - begin;
    float* scores = s.scores + r * score_stride;
    const bool mapped = maps(b);
    if (mapped) {
      visibility_.addends().fill(b, head_of(g, r), t, begin, false, 1, end - begin,
                                 keys.keep != nullptr ? keys.keep + begin : nullptr, s.addends, 0);
    }
    result.top[r] =
        mask_scores(scores, end - begin, low, high, mapped ? s.addends : nullptr, Vec::set1(negative_infinity)).max();
    const Vec top = Vec::set1(result.top[r] == negative_infinity ? 0.0f : result.top[r]), scale = Vec::set1(factor(b));
    Vec sum = Vec::zero();
    for (int64_t j = 0; j < end - begin; j += lanes) {
      const Vec weight = exp2_or_zero<exp_degree<T>>((Vec::load(scores + j) - top) * scale);
      weight.store(scores + j);
      sum = sum + weight;
    }
    result.sum[r] = sum.sum();
  }

  // out += weights * value for keys [n, n + count).
  void add_values(int64_t b, int64_t g, int64_t n, int64_t count, const float* weights, const Part<Op>& s,
                  const Partial& result) const {
    const int64_t stride = a_.value.stride[2];
    const auto each_stretch = [&](const auto& body) {
      for (int64_t i = 0, some; i < count; i += some) {
        some = stretch(n + i, count - i);
        body(i, some, row_at(a_.value, b, g, n + i));
      }
    };
    Vec check = Vec::zero();  // 0 * x is NaN for a NaN or an infinity, and 0 for all others
    for (int64_t r = 0; r < rows_; r += tile_rows) {
      const int64_t rows = least(tile_rows, rows_ - r);
      each_stretch([&](int64_t i, int64_t some, const T* value) {
        const Left<float> left = {weights + r * score_stride + i, score_stride, 1};
        multiply_values(left, rows, value, some, s, Result{s.sums, columns_stride, i > 0});
      });
      for (int64_t i = 0; i < rows * columns_stride; i += lanes) {
        const Vec sum = Vec::load(s.sums + i);
        check = fma(sum, Vec::zero(), check);
        float* out = result.out + r * columns_stride + i;
        (Vec::load(out) + sum).store(s.totals + r * columns_stride + i);
      }
    }
    if (check.sum() == 0) {
      std::memcpy(result.out, s.totals, size_t(rows_ * columns_stride) * sizeof(float));
      return;
    }
    each_stretch([&](int64_t i, int64_t some, const T* value) {  // of what is not finite, some may lie behind a mask
      const Left<float> left = {weights + i, score_stride, 1};
      multiply_rows_nonzero(left, rows_, value, stride, columns, some, result.out, columns_stride);
    });
  }

  // target = weights * value for `count` rows of the latter, which are read as they lie, but for a last part of a
  // vector.
  void multiply_values(const Left<float>& weights, int64_t rows, const T* value, int64_t count, const Part<Op>& s,
                       const Result& target) const {
    const int64_t stride = a_.value.stride[2], whole = round_down(columns, lanes);
    for (int64_t c = 0; c < whole; c += panel) {
      multiply_tile(weights, rows, value + c, stride, least(panel, whole - c), count,
                    Result{target.c + c, target.stride, target.add});
    }
    if (whole == columns) return;
    for (int64_t i = 0; i < count; ++i) {
      load_some(value + i * stride + whole, columns - whole).store(s.value + i * lanes);
    }
    multiply_tile(weights, rows, s.value, lanes, lanes, count, Result{target.c + whole, target.stride, target.add});
  }

  void combine(int64_t b, const Partial& total, const Partial& part) const {
    for (int64_t r = 0; r < rows_; ++r) {
      if (part.sum[r] == 0) continue;
      const float top = total.top[r] > part.top[r] ? total.top[r] : part.top[r];
      const float keep = total.sum[r] == 0 ? 0.0f : std::exp2((total.top[r] - top) * factor(b));
      const float add = std::exp2((part.top[r] - top) * factor(b));
      float *out = total.out + r * columns_stride, *other = part.out + r * columns_stride;
      for (int64_t c = 0; c < columns_stride; ++c) out[c] = out[c] * keep + other[c] * add;
      total.sum[r] = total.sum[r] * keep + part.sum[r] * add;
      total.top[r] = top;
    }
  }

  void store(int64_t b, int64_t g, const Partial& s) const {
    for (int64_t r = 0; r < rows_; ++r) {
      if (query_of(r) >= queries_in(b)) continue;
      store_query<T>(a_, b, head_of(g, r), query_of(r), s.out + r * columns_stride, s.top[r], s.sum[r], 1.0f);
    }
  }

  const AttentionForward& a_;
  const int64_t rows_, query_stride_;
};

}  // namespace

void attention_decode(const AttentionForward& a) {
  with_storage(a.query.dtype, [&](auto type) { Decode<decltype(type)>(a).run(); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
