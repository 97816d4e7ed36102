// What the attention kernels are made of: packing, the tiled product, and which keys a query sees.
//
// Every product of attention is a small dense matrix times a packed one. multiply_tile runs one
// micro-tile (tile.h) of up to tile_rows x tile_vecs vectors; callers loop over tiles with the packed
// panel outermost, so that a panel of some 16 KB is read from L2 once and from L1 for all further rows.
// A panel is `panel` columns wide, the last one only as many vectors as it needs.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "softcap.h"
#include "tile.h"
#include "vec_math.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int lanes = Vec::lanes;
constexpr int64_t panel = lanes * tile_vecs;
constexpr int64_t key_chunk = 64;  // keys are packed, and flagged, in chunks of this many
static_assert(key_chunk % panel == 0, "chunks consist of whole panels");

constexpr float negative_infinity = -std::numeric_limits<float>::infinity();

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return most(low, least(x, high));
}
inline int64_t round_down(int64_t a, int64_t b) {
  return a / b * b;
}

// Parts of one scratch allocation, each beginning on a cache line. The first pass, with no memory
// behind it, adds up the size; the second hands out the parts.
class Carver {
 public:
  explicit Carver(char* base = nullptr) : base_(base) {}
  template <class X>
  void take(X*& part, int64_t count) {
    part = base_ == nullptr ? nullptr : reinterpret_cast<X*>(base_ + used_);
    used_ += round_up(count * int64_t(sizeof(X)), 64);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// ---- One row (b, h, r) of a tensor

template <class T>
T* row_of(const TensorView& x, int64_t b, int64_t h, int64_t r) {
  return x.ptr<T>() + b * x.stride[0] + h * x.stride[1] + r * x.stride[2];
}

// The first `count` lanes, count in (0, lanes] or beyond; the others are 0.
template <class T>
Vec load_some(const T* p, int64_t count) {
  return count >= lanes ? Vec::load(p) : Vec::load(p, int(count));
}
template <class T>
void store_some(T* p, Vec v, int64_t count) {
  if (count >= lanes) {
    v.store(p);
  } else {
    v.store(p, int(count));
  }
}

// ---- Products

// The left operand: element (row, k), or pair of k, at data[row * row_stride + k * depth_stride].
template <class Op>
struct Left {
  const Op* data;
  int64_t row_stride, depth_stride;
};

// Where a product goes: c[row * stride + column], to which it is added if `add`. Where `maxima` is not
// null, maxima[row * lanes + lane] becomes the largest of itself and the results of that row and lane.
struct Result {
  float* c;
  int64_t stride;
  bool add = false;
  float* maxima = nullptr;
};

// Or where its exponentials go: 2^(scale * product + low[row]), rounded to operands, to weights[row * stride + column],
// and added to sums[row * lanes + lane].
template <class Op>
struct Powers {
  Op* weights;
  int64_t stride;
  float scale;
  const float* low;
  float* sums;
};

template <int Rows, int Vecs>
inline __attribute__((always_inline)) void finish(Vec (&acc)[Rows][Vecs], const Result& result) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      float* p = result.c + i * result.stride + j * lanes;
      (result.add ? acc[i][j] + Vec::load(p) : acc[i][j]).store(p);
    }
  }
  if (result.maxima == nullptr) return;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    Vec highest = Vec::load(result.maxima + i * lanes);
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) highest = max(highest, acc[i][j]);
    highest.store(result.maxima + i * lanes);
  }
}

template <int Rows, int Vecs, class Op>
inline __attribute__((always_inline)) void finish(Vec (&acc)[Rows][Vecs], const Powers<Op>& powers) {
  const auto [weights, stride, factor, low, sums] = powers;  // copies: a store of weights might alias the structure
  const Vec scale = Vec::set1(factor);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    Op* row = weights + i * stride;
    Vec sum = Vec::load(sums + i * lanes);
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      acc[i][j] = exp2_or_zero<exp_degree<Op>>(fma(acc[i][j], scale, Vec::set1(low[i])));
      sum = sum + acc[i][j];
    }
#pragma GCC unroll 4
    for (int j = 0; j + 1 < Vecs; j += 2) store(row + j * lanes, acc[i][j], acc[i][j + 1]);
    if constexpr (Vecs % 2 != 0) acc[i][Vecs - 1].store(row + (Vecs - 1) * lanes);
    sum.store(sums + i * lanes);
  }
}

// Long sums of float32 are formed in halves, which rounds them less; of bfloat16 it is the operands that are rounded.
template <class Op>
constexpr int64_t longest_sum = depth_step<Op> == 1 ? 128 : std::numeric_limits<int64_t>::max();

template <class Op, class B, class Target, int Rows, int Vecs>
void tile(const Left<Op>& a, const B* b, int64_t b_stride, int64_t steps, const Target& target) {
  Vec acc[Rows][Vecs];
  clear(acc);
  if (steps <= longest_sum<Op>) {
    multiply_add<Rows, Vecs>(a.data, a.row_stride, a.depth_stride, b, b_stride, steps, acc);
  } else {
    const int64_t half = steps / 2;
    Vec first[Rows][Vecs];
    clear(first);
    multiply_add<Rows, Vecs>(a.data, a.row_stride, a.depth_stride, b, b_stride, half, first);
    multiply_add<Rows, Vecs>(a.data + half * a.depth_stride, a.row_stride, a.depth_stride, b + half * b_stride,
                             b_stride, steps - half, acc);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[i][j] = first[i][j] + acc[i][j];
    }
  }
  finish(acc, target);
}

template <class Op, class B, class Target>
struct Tiles {
  template <int Rows, int Vecs>
  static constexpr auto of = &tile<Op, B, Target, Rows, Vecs>;
};

#ifdef PYTRANSFORMER_AMX
// On AMX the sums are in memory before anything else is done with them.
template <int Vecs>
void tile_on_unit(const Left<bfloat16>& a, int rows, const bfloat16* b, int64_t b_stride, int64_t pairs,
                  const Result& result) {
  multiply_on_unit<Vecs>(rows, a.data, a.row_stride, b, b_stride, pairs, result.c, result.stride, result.add);
  for (int i = 0; result.maxima != nullptr && i < rows; ++i) {
    Vec highest = Vec::load(result.maxima + i * lanes);
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) highest = max(highest, Vec::load(result.c + i * result.stride + j * lanes));
    highest.store(result.maxima + i * lanes);
  }
}

template <int Vecs>
void tile_on_unit(const Left<bfloat16>& a, int rows, const bfloat16* b, int64_t b_stride, int64_t pairs,
                  const Powers<bfloat16>& powers) {
  alignas(64) float sums[unit_rows * Vecs * lanes];
  multiply_on_unit<Vecs>(rows, a.data, a.row_stride, b, b_stride, pairs, sums, Vecs * lanes, false);
  for (int i = 0; i < rows; ++i) {
    Vec row[1][Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) row[0][j] = Vec::load(sums + (i * Vecs + j) * lanes);
    finish(row, Powers<bfloat16>{powers.weights + i * powers.stride, 0, powers.scale, powers.low + i,
                                 powers.sums + i * lanes});
  }
}

template <class Target>
struct TilesOnUnit {
  template <int, int Vecs>
  static constexpr void (*of)(const Left<bfloat16>&, int, const bfloat16*, int64_t, int64_t,
                              const Target&) = &tile_on_unit<Vecs>;
};
#endif

// target = a[rows][depth] * one panel b of `columns`; rows <= rows_of_tile<Op>.
template <class Op, class B, class Target = Result>
void multiply_tile(const Left<Op>& a, int64_t rows, const B* b, int64_t b_stride, int64_t columns, int64_t depth,
                   const Target& target) {
#ifdef PYTRANSFORMER_AMX
  if constexpr (on_unit<Op, B>) {
    return instance_for<TilesOnUnit<Target>, 1, tile_vecs>(1, ceil_div(columns, lanes))(
        a, int(rows), b, b_stride, ceil_div(depth, depth_step<Op>), target);
  }
#endif
  instance_for<Tiles<Op, B, Target>, tile_rows, tile_vecs>(rows, ceil_div(columns, lanes))(
      a, b, b_stride, ceil_div(depth, depth_step<Op>), target);
}

// c[rows][columns] += a[rows][depth] * the panels b that pack_rows wrote for `packed_depth` rows, a's
// first column meeting row `offset` of them. range(r, count) tells which [first, last) of the depth is to be
// summed for rows [r, r + count) of a.
template <class Op, class DepthRange>
void multiply_rows(const Left<Op>& a, int64_t rows, const Op* b, int64_t packed_depth, int64_t offset, int64_t columns,
                   const DepthRange& range, float* c, int64_t c_stride) {
  for (int64_t begin = 0; begin < columns; begin += panel) {
    const int64_t width = least(panel, round_up(columns - begin, lanes));
    const Op* source = b + begin * round_up(packed_depth, depth_step<Op>) + offset * width;
    for (int64_t r = 0; r < rows; r += rows_of_tile<Op>) {
      const int64_t tile = least(rows_of_tile<Op>, rows - r);
      auto [first, last] = range(r, tile);
      first = round_down(first, depth_step<Op>);
      if (first >= last) continue;
      const Op* left = a.data + r * a.row_stride + first / depth_step<Op> * a.depth_stride;
      multiply_tile(Left<Op>{left, a.row_stride, a.depth_stride}, tile, source + first * width, width * depth_step<Op>,
                    width, last - first, Result{c + r * c_stride + begin, c_stride, true});
    }
  }
}

// The same product, skipping the elements of a that are 0: what they would multiply may be NaN or
// infinite behind a mask. Slow, for operands known to hold such values. b is the unpacked tensor.
template <class T, class Op>
void multiply_rows_nonzero(Left<Op> a, int64_t rows, const T* b, int64_t b_stride, int64_t columns, int64_t depth,
                           float* c, int64_t c_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t pair = k / depth_step<Op>, half = k % depth_step<Op>;
      const float x = to_float(a.data[r * a.row_stride + pair * a.depth_stride + half]);
      if (x == 0) continue;
      for (int64_t j = 0; j < columns; j += lanes) {
        float* out = c + r * c_stride + j;
        fma(Vec::set1(x), load_some(b + k * b_stride + j, columns - j), Vec::load(out)).store(out);
      }
    }
  }
}

// ---- Packing. `keep`, where not null, says of each row whether it is used; the others become 0.

inline bool kept(const uint8_t* keep, int64_t row) {
  return keep == nullptr || keep[row] != 0;
}

// One square of what follows: `rows` rows of `steps` operands or pairs of them, made of up to `count` elements.
template <class Op, class T>
void pack_square(const T* source, int64_t stride, int64_t rows, int64_t count, int64_t steps, const uint8_t* keep,
                 Op* packed, int64_t width) {
  float* out = reinterpret_cast<float*>(packed);
  constexpr Op* kind = nullptr;
  Vec square[lanes];
  if (rows >= lanes && steps >= lanes && count >= lanes * depth_step<Op> && keep == nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = load_operands(source + i * stride, count, kind);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i].store(out + i * width);
    return;
  }
  for (int i = 0; i < lanes; ++i) {
    square[i] = i < rows && kept(keep, i) ? load_operands(source + i * stride, count, kind) : Vec::zero();
  }
  transpose(square);
  for (int64_t i = 0; i < least(lanes, steps); ++i) square[i].store(out + i * width);
}

// Rows become columns: packed[depth][rows of source], for products that sum over the features.
template <class Op, class T>
void pack_columns(const T* source, int64_t stride, int64_t rows, int64_t depth, const uint8_t* keep, Op* packed) {
  constexpr int64_t step = depth_step<Op>;
  const int64_t steps = ceil_div(depth, step);
  for (int64_t r = 0; r < rows; r += lanes) {
    const int64_t first = round_down(r, panel), width = least(panel, round_up(rows - first, lanes));
    Op* out = packed + first * steps * step + (r - first) * step;
    for (int64_t k = 0; k < steps; k += lanes) {
      pack_square(source + r * stride + k * step, stride, rows - r, depth - k * step, steps - k,
                  keep != nullptr ? keep + r : nullptr, out + k * width * step, width);
    }
  }
}

// Rows stay rows: packed[rows of source][columns], for products that sum over the rows. `first` is
// where in `total` rows these begin. True if a kept row holds a NaN or an infinity.
template <class T>
bool pack_rows(const T* source, int64_t stride, int64_t first, int64_t rows, int64_t total, int64_t columns,
               const uint8_t* keep, float* packed) {
  Vec check = Vec::zero();  // 0 * x is NaN for those, and 0 for all others
  for (int64_t c = 0; c < columns; c += panel) {
    const int64_t width = least(panel, round_up(columns - c, lanes));
    float* out = packed + c * total + first * width;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < width; j += lanes) {
        const Vec x = kept(keep, r) ? load_some(source + r * stride + c + j, columns - c - j) : Vec::zero();
        check = fma(x, Vec::zero(), check);
        x.store(out + r * width + j);
      }
    }
  }
  return !(check.sum() == 0);
}

#ifdef PYTRANSFORMER_BF16_DOT
// In pairs of rows; `first` is even.
inline bool pack_rows(const bfloat16* source, int64_t stride, int64_t first, int64_t rows, int64_t total,
                      int64_t columns, const uint8_t* keep, bfloat16* packed) {
  Magnitudes magnitudes;
  for (int64_t c = 0; c < columns; c += panel) {
    const int64_t width = least(panel, round_up(columns - c, lanes));
    bfloat16* out = packed + c * round_up(total, 2) + first * width;
    for (int64_t r = 0; r < rows; r += 2) {
      const auto row = [&](int64_t i) { return i < rows && kept(keep, i) ? source + i * stride + c : nullptr; };
      const bfloat16 *even = row(r), *odd = row(r + 1);
      for (int64_t j = 0; j < width; j += lanes) {
        const PairVec pairs =
            PairVec::zip(even ? even + j : nullptr, odd ? odd + j : nullptr, int(least(lanes, columns - c - j)));
        pairs.store(out + r * width + 2 * j);
        magnitudes.see(pairs);
      }
    }
  }
  return !magnitudes.finite();
}
#endif

// The left operand: rows of `stride_out` elements, zero beyond `columns`.
template <class Op, class T>
void copy_rows(const T* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep, Op* out,
               int64_t stride_out) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = source + r * stride;
    Op* to = out + r * stride_out;
    const int64_t count = kept(keep, r) ? columns : 0;
    if constexpr (std::is_same_v<T, Op>) {
      std::memcpy(to, from, size_t(count) * sizeof *to);
    } else {
      for (int64_t j = 0; j < count; j += lanes) load_some(from + j, count - j).store(to + j);
    }
    std::memset(to + count, 0, size_t(stride_out - count) * sizeof *to);
  }
}

// ---- Scores and probabilities

// Scores as the product leaves them to what the exponential takes, in units of log2:
// log2(e) * softcap(scale * score) + addend, with softcap(s) = c tanh(s / c); -inf where the addend is.
class ScoreMap {
 public:
  explicit ScoreMap(const AttentionProblem& a) : cap_{a.softcap}, scale_(Vec::set1(a.scale)) {}

  // `slope`, where it is asked for, becomes the derivative of softcap.
  Vec operator()(Vec score, Vec addend, Vec* slope = nullptr) const {
    const Vec masked = Vec::set1(negative_infinity), to_log2 = Vec::set1(log2_e);
    Vec x;
    if (cap_) {
      const Vec capped = cap_.value(score * scale_);
      if (slope != nullptr) *slope = cap_.slope(capped);
      x = fused(capped, to_log2, addend);
    } else {
      x = fused(score, scale_ * to_log2, addend);
    }
    return select(addend == masked, masked, x);
  }

 private:
  Softcap cap_;
  Vec scale_;
};

// ---- The problem's sizes

struct Dimensions {
  explicit Dimensions(const AttentionProblem& a)
      : batches(a.query.shape[0]),
        heads(a.query.shape[1]),
        kv_heads(a.key.shape[1]),
        query_count(a.query.shape[2]),
        key_count(a.key_count()),
        depth(a.query.shape[3]),
        columns(a.value.shape[3]),
        group(heads / kv_heads),
        depth_stride(round_up(depth, lanes)),
        columns_stride(round_up(columns, lanes)),
        cu_seq_q(a.cu_seq_q ? a.cu_seq_q.ptr<const int32_t>() : nullptr),
        cu_seq_k(a.cu_seq_k ? a.cu_seq_k.ptr<const int32_t>() : nullptr) {}

  // Where row (b, h, t) of the [B,H,T,S] scores begins: the index that dropout counts by.
  uint64_t score_index(int64_t b, int64_t h, int64_t t) const {
    return uint64_t((b * heads + h) * query_count + t) * uint64_t(key_count);
  }

  // Of sequence b: how many queries and keys, and row t of head h of what lies like the queries, or like the keys.
  int64_t queries_in(int64_t b) const { return cu_seq_q == nullptr ? query_count : cu_seq_q[b + 1] - cu_seq_q[b]; }
  int64_t keys_in(int64_t b) const { return cu_seq_k == nullptr ? key_count : cu_seq_k[b + 1] - cu_seq_k[b]; }
  template <class T>
  T* query_row(const TensorView& x, int64_t b, int64_t h, int64_t t) const {
    return row_of<T>(x, b, h, cu_seq_q == nullptr ? t : cu_seq_q[b] + t);
  }
  template <class T>
  T* key_row(const TensorView& x, int64_t b, int64_t g, int64_t s) const {
    return row_of<T>(x, b, g, cu_seq_k == nullptr ? s : cu_seq_k[b] + s);
  }

  int64_t batches, heads, kv_heads, query_count, key_count;  // counts of the longest sequence
  int64_t depth, columns;                                    // of query and key, of value
  int64_t group;                                             // query heads that share a key/value head
  int64_t depth_stride, columns_stride;
  const int32_t *cu_seq_q, *cu_seq_k;  // null unless sequences lie end to end
};

// Queries [t, t + count) of head (b, h).
struct Rows {
  int64_t b, h, t, count;
};

// ---- Visibility

// The keys that some query of a batch may see: `keep` of [begin, end), all of them where it is null.
// Everything else of key and value counts as 0 from the packing on.
struct Keys {
  int64_t begin = 0, end = 0;
  const uint8_t* keep = nullptr;  // indexed from key 0
  int64_t shift = 0;              // at which key query 0 stands
};

// Scores beyond scale * query * key: what the mask and bias tensors add, in units of log2.
class Addends {
 public:
  Addends(const AttentionProblem& a, bool mask_in_keys) : bias_(a.bias) {
    if (!mask_in_keys) mask_ = a.mask;
  }
  bool any() const { return mask_ || bias_; }
  // True if all queries of a head share one row.
  bool shared() const { return (!mask_ || mask_.stride[2] == 0) && (!bias_ || bias_.stride[2] == 0); }

  // out[i * out_stride + j] for i < outer, j < inner, where (i, j) are (query, key) or, if `turned`,
  // (key, query): the bias, or 0, and -inf where masked. `keep` is indexed from the first key.
  void fill(int64_t b, int64_t h, int64_t query, int64_t key, bool turned, int64_t outer, int64_t inner,
            const uint8_t* keep, float* out, int64_t out_stride) const {
    for (int64_t i = 0; i < outer; ++i) {
      float* row = out + i * out_stride;
      if (bias_) {
        with_storage(bias_.dtype,
                     [&](auto type) { add_bias<decltype(type)>(b, h, query, key, turned, i, inner, row); });
      } else {
        for (int64_t j = 0; j < inner; ++j) row[j] = 0;
      }
      if (mask_) {
        int64_t step;
        const uint8_t* m = start<const uint8_t>(mask_, b, h, query, key, turned, i, step);
        if (step == 1) {
          for (int64_t j = 0; j < inner; ++j) row[j] = m[j] ? row[j] : negative_infinity;
        } else {
          for (int64_t j = 0; j < inner; ++j) row[j] = m[j * step] ? row[j] : negative_infinity;
        }
      }
      if (keep != nullptr && turned) {
        if (!keep[i])
          for (int64_t j = 0; j < inner; ++j) row[j] = negative_infinity;
      } else if (keep != nullptr) {
        for (int64_t j = 0; j < inner; ++j) row[j] = keep[j] ? row[j] : negative_infinity;
      }
    }
  }

 private:
  template <class X>
  static X* start(const TensorView& x, int64_t b, int64_t h, int64_t query, int64_t key, bool turned, int64_t i,
                  int64_t& step) {
    step = x.stride[turned ? 2 : 3];
    return row_of<X>(x, b, h, query) + key * x.stride[3] + i * x.stride[turned ? 3 : 2];
  }
  template <class X>
  void add_bias(int64_t b, int64_t h, int64_t query, int64_t key, bool turned, int64_t i, int64_t inner,
                float* row) const {
    int64_t step;
    const X* source = start<const X>(bias_, b, h, query, key, turned, i, step);
    if (step == 1) {
      for (int64_t j = 0; j < inner; j += lanes) {
        store_some(row + j, load_some(source + j, inner - j) * Vec::set1(log2_e), inner - j);
      }
    } else {
      for (int64_t j = 0; j < inner; ++j) row[j] = to_float(source[j * step]) * log2_e;
    }
  }

  TensorView mask_, bias_;
};

// Who sees whom, resolved once a call. A mask that is the same for all heads and queries of a batch
// (key padding) is merged with key_lengths into Keys and costs nothing per score where it has no holes.
class Visibility {
 public:
  Visibility(const AttentionProblem& a, const Dimensions& d)
      : mask_in_keys_(bool(a.mask) && broadcast(a.mask, 1) && broadcast(a.mask, 2)),
        addends_(a, mask_in_keys_),
        keys_(d.batches),
        keep_(mask_in_keys_ ? d.batches * d.key_count : 0) {
    const int64_t reach = d.key_count + d.query_count;
    lower_ = clamp(a.band_lower, -reach, reach);
    upper_ = clamp(a.band_upper, -reach, reach);
    for (int64_t b = 0; b < d.batches; ++b) {
      Keys& keys = keys_.get()[b];
      keys = Keys{};
      keys.end = a.key_lengths ? clamp(a.key_lengths.ptr<int64_t>()[b], 0, d.key_count) : d.keys_in(b);
      if (a.at_end) keys.shift = keys.end - d.queries_in(b);
      if (mask_in_keys_) apply_mask(a.mask, b, d.key_count, keys);
    }
  }

  const Keys& keys(int64_t b) const { return keys_.get()[b]; }
  const Addends& addends() const { return addends_; }

  // The keys [lower, upper) that the band and Keys leave to query t; both grow with t.
  int64_t lower(const Keys& keys, int64_t t) const { return clamp(t + keys.shift + lower_, keys.begin, keys.end); }
  int64_t upper(const Keys& keys, int64_t t) const { return clamp(t + keys.shift + upper_ + 1, keys.begin, keys.end); }
  // The queries [first, last) whose band includes key s.
  int64_t first_query(const Keys& keys, int64_t s) const { return most(s - keys.shift - upper_, 0); }
  int64_t last_query(const Keys& keys, int64_t s) const { return most(s - keys.shift - lower_ + 1, 0); }

 private:
  static bool broadcast(const TensorView& x, int dim) { return x.stride[dim] == 0 || x.shape[dim] == 1; }

  void apply_mask(const TensorView& mask, int64_t b, int64_t length, Keys& keys) {
    uint8_t* keep = keep_.get() + b * length;
    const uint8_t* m = row_of<const uint8_t>(mask, b, 0, 0);
    int64_t first = keys.end, last = 0, count = 0;
    for (int64_t s = 0; s < keys.end; ++s) {
      keep[s] = m[s * mask.stride[3]] != 0;
      if (!keep[s]) continue;
      first = least(first, s);
      last = s + 1;
      ++count;
    }
    keys.begin = count > 0 ? first : 0;
    keys.end = last;
    if (count < last - keys.begin) keys.keep = keep;
  }

  bool mask_in_keys_;
  Addends addends_;
  Scratch<Keys> keys_;
  Scratch<uint8_t> keep_;
  int64_t lower_ = 0, upper_ = 0;
};

// ---- What all directions share: sizes, who sees whom, and how scores become exponents of 2

class Scoring : protected Dimensions {
 protected:
  explicit Scoring(const AttentionProblem& a)
      : Dimensions(a),
        visibility_(a, *this),
        score_map_(a),
        scale_(a.scale),
        scale_first_(visibility_.addends().any() || a.softcap > 0 || !(a.scale > 0)) {}

  // Whether the scores of a batch are mapped before their maximum is taken. Otherwise the scale, which then keeps
  // their order, is left to the exponent.
  bool maps(int64_t b) const { return visibility_.keys(b).keep != nullptr || scale_first_; }
  // From scores, mapped or not, to units of log2; and to natural ones.
  float factor(int64_t b) const { return maps(b) ? 1.0f : scale_ * log2_e; }
  double unit(int64_t b) const { return maps(b) ? 0.6931471805599453 : double(scale_); }

  // Of `count` scores of a row: mapped, where there are addends, and -inf outside [low, high). Returns the largest
  // of each lane and `highest`.
  Vec mask_scores(float* scores, int64_t count, int64_t low, int64_t high, const float* addends, Vec highest) const {
    for (int64_t j = 0; j < count; j += lanes) {
      Vec x = Vec::load(scores + j);
      if (addends != nullptr) x = score_map_(x, Vec::load(addends + j));
      x = select(Mask::first(int(high - j)) & ~Mask::first(int(low - j)), x, Vec::set1(negative_infinity));
      x.store(scores + j);
      highest = max(highest, x);
    }
    return highest;
  }

  // Output and lse of query (b, h, t), of the sum of its values weighted by 2^(score - top) and of these weights.
  template <class T>
  void store_query(const AttentionForward& a, int64_t b, int64_t h, int64_t t, const float* values, float top,
                   float sum, float rescale) const {
    const Vec inverse = Vec::set1(sum == 0 ? 0.0f : rescale / sum);
    T* out = query_row<T>(a.out, b, h, t);
    for (int64_t c = 0; c < columns; c += lanes) store_some(out + c, Vec::load(values + c) * inverse, columns - c);
    *query_row<float>(a.lse, b, h, t) =
        sum == 0 ? negative_infinity : float(double(top) * unit(b) + std::log(double(sum)));
  }

  const Visibility visibility_;
  const ScoreMap score_map_;

 private:
  const float scale_;
  const bool scale_first_;
};

}  // namespace

// Few queries: rows that share a key/value head. Packing keys and values for them costs more than using them. Other
// libraries take dot products there, whose many partial sums are more accurate than one long one; so here sums over
// features are formed of short ones, in the forward and, bit for bit the same, in the backward.
inline bool few_queries(const AttentionProblem& a) {
  return a.query.shape[1] / a.key.shape[1] * a.query.shape[2] <= 8 && a.dropout_p == 0;
}
constexpr int64_t short_sum = 16;
static_assert(short_sum % lanes == 0);

// attention_fwd for few queries, keys in pages or not: attention_decode.cpp.
void attention_decode(const AttentionForward& a);

}  // namespace pytransformer::PYTRANSFORMER_ISA
