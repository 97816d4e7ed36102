// Attention for few queries, as in decoding: one or a handful of queries against a long cache of keys.
//
// Nothing is packed: every key and value is read once, as it lies, and used by all rows that share its
// head (query heads of a group, queries of a head) while it is in L1. The call is bound by that reading.
// Scores are formed for as many keys at a time as there are lanes; values go through L1 in chunks, as the
// panel of a tile.
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

// One thread's scratch.
struct Part {
  float* query;             // [rows][depth_stride]
  float *scores, *addends;  // [rows][split], [split]
  float* value;             // a chunk of values, pack_rows
};
// What a task leaves: sum(2^(score - top) value), not normalised.
struct Partial {
  float* out;        // [rows][columns_stride]
  float *top, *sum;  // [rows]
};

template <class T>
class Decode : Dimensions {
 public:
  explicit Decode(const AttentionForward& a)
      : Dimensions(a),
        a_(a),
        visibility_(a),
        score_map_(a),
        scale_first_(visibility_.addends().any() || a.softcap > 0 || !(a.scale > 0)),
        rows_(group * query_count) {}

  void run() {
    const int64_t splits = ceil_div(key_count, split), kv_tasks = batches * kv_heads;
    const int64_t part_size = carve_part(nullptr).second, partial_size = carve_partial(nullptr).second;
    const Buffer<char> part_memory(max_threads() * part_size);
    const Buffer<char> partial_memory(kv_tasks * splits * partial_size);
    const auto partial = [&](int64_t i) { return carve_partial(partial_memory.data() + i * partial_size).first; };
    parallel_tasks(kv_tasks * splits, [&](int64_t task) {
      const Part part = carve_part(part_memory.data() + thread_index() * part_size).first;
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
  std::pair<Part, int64_t> carve_part(char* base) const {
    Part s;
    Carver carver(base);
    carver.take(s.query, rows_ * depth_stride);
    carver.take(s.scores, rows_ * split);
    carver.take(s.addends, split);
    carver.take(s.value, value_chunk * columns_stride);
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

  bool maps(int64_t b) const { return visibility_.keys(b).keep != nullptr || scale_first_; }
  float factor(int64_t b) const { return maps(b) ? 1.0f : a_.scale * log2_e; }

  // Keys [first, first + split) of head (b, g), as far as some row sees them.
  void attend(int64_t b, int64_t g, int64_t first, const Part& s, const Partial& result) const {
    for (int64_t i = 0; i < rows_ * columns_stride; ++i) result.out[i] = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      result.top[r] = negative_infinity;
      result.sum[r] = 0;
      copy_rows(row_of<const T>(a_.query, b, head_of(g, r), query_of(r)), 0, 1, depth, nullptr,
                s.query + r * depth_stride, depth_stride);
    }
    const Keys& keys = visibility_.keys(b);
    const int64_t begin = most(first, visibility_.lower(keys, 0));
    const int64_t end = least(first + split, visibility_.upper(keys, query_count - 1));
    if (begin >= end) return;
    for (int64_t n = begin; n < end; n += lanes) score(b, g, n, least(lanes, end - n), s.scores + (n - begin), s);
    for (int64_t r = 0; r < rows_; ++r) weigh(b, g, r, begin, end, s, result);
    for (int64_t n = begin; n < end; n += value_chunk) {
      add_values(b, g, n, least(value_chunk, end - n), s.scores + (n - begin), s, result);
    }
  }

  // scores[r][i] = query r . key n + i, for up to `lanes` keys.
  void score(int64_t b, int64_t g, int64_t n, int64_t count, float* scores, const Part& s) const {
    const T* key = row_of<const T>(a_.key, b, g, n);
    if constexpr (sizeof(T) == sizeof(float)) {
      score_in_order(key, count, scores, s);
    } else {
      score_by_lanes(key, count, scores, s);
    }
  }

  // Lane by lane along the features, then across the lanes.
  void score_by_lanes(const T* key, int64_t count, float* scores, const Part& s) const {
    for (int64_t r = 0; r < rows_; ++r) {
      Vec square[lanes];
      for (Vec& sums : square) sums = Vec::zero();
      for (int64_t j = 0; j < depth; j += lanes) {
        const Vec query = Vec::load(s.query + r * depth_stride + j);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = fma(query, load_key(key, count, i, j), square[i]);
      }
      transpose(square);
      for (int i = lanes / 2; i > 0; i /= 2) {
        for (int k = 0; k < i; ++k) square[k] = square[k] + square[k + i];
      }
      square[0].store(scores + r * split);
    }
  }

  // Feature by feature, keys in lanes: the order, and so the bits, in which the backward forms its scores.
  // Any other would make its probabilities, exp(score - lse), relatively wrong by the rounding of a score.
  void score_in_order(const T* key, int64_t count, float* scores, const Part& s) const {
    for (int64_t r = 0; r < rows_; ++r) Vec::zero().store(scores + r * split);
    for (int64_t j = 0; j < depth; j += lanes) {
      Vec square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = load_key(key, count, i, j);
      transpose(square);
      for (int64_t r = 0; r < rows_; ++r) {
        const float* query = s.query + r * depth_stride + j;
        Vec sum = Vec::load(scores + r * split);
        for (int i = 0; i < least(lanes, depth - j); ++i) sum = fma(Vec::set1(query[i]), square[i], sum);
        sum.store(scores + r * split);
      }
    }
  }

  // Features [j, j + lanes) of key i of `count`; beyond them, of the last.
  Vec load_key(const T* key, int64_t count, int64_t i, int64_t j) const {
    const T* row = key + least(i, count - 1) * a_.key.stride[2] + j;
    __builtin_prefetch(row + 2 * lanes * a_.key.stride[2]);
    return load_some(row, depth - j);
  }

  // Scores of row r to weights, their maximum and sum.
  void weigh(int64_t b, int64_t g, int64_t r, int64_t begin, int64_t end, const Part& s, const Partial& result) const {
    const Keys& keys = visibility_.keys(b);
    const int64_t t = query_of(r), low = visibility_.lower(keys, t) - begin, high = visibility_.upper(keys, t) - begin;
    float* scores = s.scores + r * split;
    const bool mapped = maps(b);
    if (mapped) {
      visibility_.addends().fill(b, head_of(g, r), t, begin, false, 1, end - begin,
                                 keys.keep != nullptr ? keys.keep + begin : nullptr, s.addends, 0);
    }
    Vec highest = Vec::set1(negative_infinity);
    for (int64_t j = 0; j < end - begin; j += lanes) {
      Vec x = Vec::load(scores + j);
      if (mapped) x = score_map_(x, Vec::load(s.addends + j));
      const Mask seen = Mask::first(int(least(high, end - begin) - j)) & ~Mask::first(int(low - j));
      x = select(seen, x, Vec::set1(negative_infinity));
      x.store(scores + j);
      highest = max(highest, x);
    }
    result.top[r] = highest.max();
    const Vec top = Vec::set1(result.top[r] == negative_infinity ? 0.0f : result.top[r]), scale = Vec::set1(factor(b));
    Vec sum = Vec::zero();
    for (int64_t j = 0; j < end - begin; j += lanes) {
      const Vec weight = power_of_two<T>((Vec::load(scores + j) - top) * scale);
      weight.store(scores + j);
      sum = sum + weight;
    }
    result.sum[r] = sum.sum();
  }

  // out += weights * value for keys [n, n + count).
  void add_values(int64_t b, int64_t g, int64_t n, int64_t count, const float* weights, const Part& s,
                  const Partial& result) const {
    const Keys& keys = visibility_.keys(b);
    const T* value = row_of<const T>(a_.value, b, g, n);
    const int64_t stride = a_.value.stride[2];
    const bool flagged = pack_rows(value, stride, 0, count, value_chunk, columns,
                                   keys.keep != nullptr ? keys.keep + n : nullptr, s.value);
    const Left<float> left = {weights, split, 1};
    if (flagged) {
      multiply_rows_nonzero(left, rows_, value, stride, columns, count, result.out, columns_stride);
    } else {
      const auto all = [&](int64_t, int64_t) { return std::make_pair(int64_t(0), count); };
      multiply_rows<float>(left, rows_, s.value, value_chunk, 0, columns, all, result.out, columns_stride);
    }
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
    const double unit = maps(b) ? 0.6931471805599453 : double(a_.scale);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t h = head_of(g, r), t = query_of(r);
      const Vec inverse = Vec::set1(s.sum[r] == 0 ? 0.0f : 1.0f / s.sum[r]);
      T* out = row_of<T>(a_.out, b, h, t);
      for (int64_t c = 0; c < columns; c += lanes) {
        store_some(out + c, Vec::load(s.out + r * columns_stride + c) * inverse, columns - c);
      }
      a_.lse.template ptr<float>()[(b * heads + h) * query_count + t] =
          s.sum[r] == 0 ? negative_infinity : float(double(s.top[r]) * unit + std::log(double(s.sum[r])));
    }
  }

  const AttentionForward& a_;
  const Visibility visibility_;
  const ScoreMap score_map_;
  const bool scale_first_;
  const int64_t rows_;
};

}  // namespace

void attention_decode(const AttentionForward& a) {
  with_storage(a.query.dtype, [&](auto type) { Decode<decltype(type)>(a).run(); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
