// Scores of a tile: which of them are visible, which of them dropout keeps, and how a product becomes a score.
//
// What hides a score becomes a bit before it meets it. A word holds 32 keys of one query: the band and the length are
// a run of ones, and a packed bool mask is one load more. Out of the words a lane gathers one bit for each score that
// it holds of a fragment of 16 rows, 32 at most: element i of column group n is bit 4 n + i. Dropout makes the same
// kind of bits. So the unrolled loops over scores cost one select, and all else is paid in partial tiles only.
//
// The rows of a tile are queries in the forward and for dQ (visible_keys, keep_keys), and keys for dK and dV, whose
// tiles are transposed (visible_queries, keep_queries).
#pragma once

#include "attention_tile.cuh"
#include "numeric.cuh"

namespace pytransformer::cuda {

constexpr uint32_t all_lanes = 0xffffffffu;
constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;
constexpr float infinity = __builtin_huge_valf();

enum class TileKind { empty, partial, full };

// What hides the scores of a head, or of several that share a key head: `member` is the head's number among them. Lies
// in shared memory, since only partial tiles look at it: registers are for the others.
struct Visibility {
  const uint32_t* bits;
  const uint8_t* states;
  int64_t bits_head, bits_row, states_head, states_row;
  int T, S, length, lower, upper;

  Visibility() = default;
  __device__ Visibility(const AttentionArguments& a, int batch, int head)
      : bits(nullptr),
        states(nullptr),
        bits_head(a.mask.head),
        bits_row(a.mask.row),
        states_head(a.mask.states_head),
        states_row(a.mask.states_row),
        T(a.queries_in(batch)),
        S(a.S),
        length(a.keys_in(batch)),
        lower(a.lower),
        upper(a.upper) {
    if (a.mask.bits != nullptr) {
      bits = a.mask.bits + batch * a.mask.batch + head * a.mask.head;
      if (a.mask.states != nullptr) {
        states = a.mask.states + batch * a.mask.states_batch + head * a.mask.states_head;
      }
    }
    if (a.key_lengths != nullptr) {
      const int64_t given = a.key_lengths[batch];
      length = given < 0 ? 0 : given < S ? int(given) : S;
    }
    if (a.at_end) {  // query t stands at key length - T + t
      lower += length - T;
      upper += length - T;
    }
  }

  // Which of keys [s, s + 32) query t sees; s is a multiple of 32.
  __device__ uint32_t word(int t, int s, int member = 0) const {
    if (t >= T) return 0;
    const int from = max(t + lower - s, 0), end = min(min(t + upper + 1, length) - s, 32);
    if (from >= end) return 0;
    const uint32_t run = 0xffffffffu >> (32 - (end - from)) << from;
    return bits == nullptr ? run : run & bits[member * bits_head + t * bits_row + s / 32];
  }

  // Of scores [t, t + TS) x [s, s + SS) under a packed mask; `inside`: all else leaves them visible.
  template <int TS, int SS>
  __device__ TileKind kind(bool inside, int t, int s, int member) const {
    if (states == nullptr) return TileKind::partial;
    const int t_last = min(t + TS, T) - 1, s_last = min(s + SS, S) - 1;
    bool full = inside, empty = true;
    for (int row = t / mask_rows; row <= t_last / mask_rows; ++row) {
      for (int column = s / 32; column <= s_last / 32; ++column) {
        const uint8_t state = states[member * states_head + row * states_row + column];
        empty = empty && state == mask_empty;
        full = full && state == mask_full;
      }
    }
    return empty ? TileKind::empty : full ? TileKind::full : TileKind::partial;
  }
};

// Without a packed mask nothing is read to tell.
template <int TS, int SS>
__device__ inline TileKind tile_kind(const AttentionArguments& a, const Visibility& v, bool inside, int t, int s,
                                     int member = 0) {
  if (a.mask.bits == nullptr) return inside ? TileKind::full : TileKind::partial;
  return v.kind<TS, SS>(inside, t, s, member);
}

// Tiles [tile, end), of which those of [whole, whole_end) lie inside of the band, the lengths and the tensors.
struct Range {
  int tile, end, whole, whole_end;

  __device__ bool inside(int i) const { return i >= whole && i < whole_end; }
};

// Tiles of SS keys that queries [t, t + TS) see some of.
template <int TS, int SS>
__device__ inline Range key_tiles(const Visibility& v, int t) {
  const int t_last = min(t + TS, v.T) - 1;
  const int keys = max(min(v.length, t_last + v.upper + 1), 0);
  const int whole_keys = t + TS > v.T ? 0 : max(min(v.length, t + v.upper + 1), 0);
  const int before_whole = max(t_last + v.lower, 0);
  return {max(t + v.lower, 0) / SS, (keys + SS - 1) / SS, (before_whole + SS - 1) / SS, whole_keys / SS};
}

// Tiles of TS queries that see some of keys [s, s + SS).
template <int TS, int SS>
__device__ inline Range query_tiles(const Visibility& v, int s) {
  const int s_last = min(s + SS, v.S) - 1;
  const int queries = s >= v.length ? 0 : max(min(v.T, s_last - v.lower + 1), 0);
  const int whole_queries = s + SS > v.length ? 0 : max(min(v.T, s - v.lower + 1), 0);
  const int before_whole = max(s_last - v.upper, 0);
  return {max(s - v.upper, 0) / TS, (queries + TS - 1) / TS, (before_whole + TS - 1) / TS, whole_queries / TS};
}

// A lane holds rows `t` and `other` of the tile, which are queries (of the heads `member` and `other_member`).
template <int N>
__device__ inline uint32_t visible_keys(const Visibility& v, int t, int other, int s, int member = 0,
                                        int other_member = 0) {
  constexpr int width = N < 32 ? N : 32;
  uint32_t visible = 0;
#pragma unroll
  for (int first = 0; first < N; first += width) {
    const int shift = N < 32 ? s % 32 : 0;
    const uint32_t upper = v.word(t, s + first - shift, member) >> shift >> lane_column();
    const uint32_t lower = v.word(other, s + first - shift, other_member) >> shift >> lane_column();
#pragma unroll
    for (int n = 0; n < width / 8; ++n) {
      visible |= ((upper >> 8 * n & 3) | (lower >> 8 * n & 3) << 2) << (first / 2 + 4 * n);
    }
  }
  return visible;
}

// A lane holds keys s and s + 8; columns are queries from t on.
template <int N>
__device__ inline uint32_t visible_queries(const Visibility& v, int t, int s, int member) {
  uint32_t visible = 0;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = v.word(t + 8 * n + lane_column() + i, s - s % 32, member) >> s % 32;
      visible |= ((word & 1) | (word >> 8 & 1) << 2) << (4 * n + i);
    }
  }
  return visible;
}

// Whether dropout keeps elements [element, element + 8) of the scores.
__device__ inline uint32_t keep_eight(const Dropout& dropout, int64_t element) {
  const int lead = int(element % 8);
  uint32_t kept = dropout.keeps(uint64_t(element / 8)) >> lead;
  if (lead != 0) kept |= dropout.keeps(uint64_t(element / 8 + 1)) << (8 - lead);
  return kept & 255;
}

// Two column groups, 16 x 16 scores, are 32 runs of eight keys. Each lane draws the bits of one run, which are those of
// other lanes' scores for the most part, and what was drawn for all column groups is exchanged at once: the runs of
// groups 2 n and 2 n + 1 are byte n of a lane's word.

// Rows are queries; `row` is the index in [B*H*T] of this lane's upper row. Lane 4 g + j draws, of row g + 8 (j % 2),
// the keys of every other column group from group j / 2 on.
template <int N>
__device__ inline uint32_t keep_keys(const Dropout& dropout, int64_t row, int s, int S) {
  static_assert(N % 16 == 0);
  const int64_t first = (row + lane() % 2 * 8) * S + s + lane() % 4 / 2 * 8;
  uint32_t drawn = 0, kept = 0;
#pragma unroll 1
  for (int n = 0; n < N / 16; ++n) drawn |= keep_eight(dropout, first + 16 * n) << 8 * n;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t received = __shfl_sync(all_lanes, drawn, (lane() & ~3) | j);
    kept |= (received >> lane_column() & 0x03030303u) << 2 * j;
  }
  return kept;
}

// Rows are keys from s on; `row` is the index in [B*H*T] of the first query of the columns. Lane 4 g + j draws, of
// query 2 j + g % 2 of every other column group from group g / 4 on, keys 8 (g / 2 % 2) and on. Of the eight lanes
// with equal j, each needs one bit of all: their words are transposed.
template <int N>
__device__ inline uint32_t keep_queries(const Dropout& dropout, int64_t row, int s, int S) {
  static_assert(N % 16 == 0);
  const int g = lane_row();
  const int64_t first = (row + lane_column() + g % 2 + g / 4 * 8) * S + s + g / 2 % 2 * 8;
  uint32_t bits = 0;
#pragma unroll 1
  for (int n = 0; n < N / 16; ++n) bits |= keep_eight(dropout, first + int64_t(16 * n) * S) << 8 * n;
#pragma unroll
  for (int step = 4; step > 0; step /= 2) {
    const uint32_t low = step == 4 ? 0x0f0f0f0fu : step == 2 ? 0x33333333u : 0x55555555u;
    const uint32_t received = __shfl_xor_sync(all_lanes, bits, 4 * step);
    bits = g & step ? (bits & ~low) | (received & ~low) >> step : (bits & low) | (received & low) << step;
  }
  return bits;
}

// What a tile asks for beyond products and softmax. Each of these is a branch, across which the compiler mixes no
// instructions: where nothing is asked for, the backward passes a constant, and one branch is left.
struct Asked {
  bool hides = false;   // scores, by the band, a length or a mask
  bool shapes = false;  // scores, by a bias or a soft cap
  bool drops = false;   // weights

  Asked() = default;
  __device__ Asked(const AttentionArguments& a, bool partial)
      : hides(partial), shapes(a.shapes_scores()), drops(a.dropout.rng != nullptr) {}

  __device__ bool anything() const { return hides || shapes || drops; }
};

// Scores are kept in units in which exp is exp2 of score * factor. Plain ones are the product itself; others are
// scaled, capped and biased beforehand.
__device__ inline float score_factor(const AttentionArguments& a, const Asked& asked) {
  return asked.shapes ? 1.0f : a.scale * log2_e;
}

// The bias of one head.
template <class T>
__device__ inline float bias_at(const Bias& bias, int64_t offset) {
  if (bias.is_float32) return static_cast<const float*>(bias.data)[offset];
  return to_float(static_cast<const T*>(bias.data)[offset]);
}

// The score, times log2(e), of a product. A finite score stays finite: below -1e38 all are alike.
__device__ inline float shaped_score(float product, float bias, const AttentionArguments& a) {
  float x = product * a.scale;
  if (a.softcap > 0) x = tanhf(x / a.softcap) * a.softcap;
  x += bias;
  return x < -1e38f && x > -infinity ? -1e38f : x * log2_e;
}

// What the soft cap multiplies the gradient of a product by.
__device__ inline float softcap_slope(float product, const AttentionArguments& a) {
  const float th = tanhf(product * a.scale / a.softcap);
  return 1 - th * th;
}

}  // namespace pytransformer::cuda
