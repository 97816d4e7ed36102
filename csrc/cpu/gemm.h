// Matrix product: C[M,N] = A[M,K] B[K,N], float32 accumulation, any layout of A and B.
//
// Operands are packed first, in parallel: A into tiles of tile_rows rows, B into panels as wide as a
// tile, each cut along k into blocks of block_depth. Packing is what makes the one inner loop serve
// every transposition: it is where a matrix is read by rows or by columns, where bfloat16 becomes an
// operand of the tile, and where ragged edges are padded with zeros. What is used by several products
// (the weights, by all tokens) is packed once for all of them. An A whose rows already lie along k, in the
// tile's own type, is read where it lies: a linear layer therefore computes its transpose, W x^T, with the
// weight as A. Of another type, it is packed by the thread that uses it, a block at a time, into memory that stays in
// L2.
//
// C is cut into blocks of block_rows x block_columns, and a thread that takes one computes all of it:
//
//     for a block of depth k:                          A[rows, k]: 74 KB, stays in L2
//       for each panel of B[k, columns]:               32 KB, from L2 for the first tile, then from L1
//         for each tile of A[rows, k]:                 3 KB, from L2
//           sums += A B in registers (tile.h)
//     epilogue(block, sums)
//
// Blocks are low for the sake of an A in place: where its rows are a multiple of 4 KB apart, as those of weights often
// are, they share an eighth of the sets of L2, and more of them would push each other out.
//
// While a tile is computed, its share of the next panel and of the next block of A is prefetched into
// L2: shared caches of servers are slow, and without this a quarter of the time goes to waiting for
// them; weights come from memory itself. (Not on AMX, whose tile is over before so many lines have been asked for: the
// products take a sixth less time without.) Where there are too few blocks for the threads they are made smaller.
//
// The sum over k is formed in float32, block by block: first within a block of depth, then over blocks.
// It does not depend on which thread computes it, nor on how many there are, so equal inputs give equal
// bits. The epilogue sees the finished sums of a block, once, while they are in L2: it adds biases,
// applies activations, turns rows into columns and rounds to the storage type.
#pragma once

#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"
#include "tile.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int64_t block_rows = 144;     // divisible by tile_rows and by the vector
constexpr int64_t block_columns = 256;  // divisible by tile_width
template <class Operand>
constexpr int64_t block_depth = 128 * depth_step<Operand>;
constexpr int64_t tile_width = tile_vecs * Vec::lanes;
constexpr int64_t pack_share = 192;  // rows or columns packed by one task; divisible by tile_rows and tile_width
static_assert(block_rows % tile_rows == 0 && block_rows % Vec::lanes == 0 && block_columns % tile_width == 0);
static_assert(tile_rows <= Vec::lanes, "packing by columns moves a row of a tile as one vector");
#ifdef PYTRANSFORMER_AMX
static_assert(block_rows % unit_rows == 0 && pack_share % unit_rows == 0);
#endif

// A matrix as an operand of a product. For A, `outer` counts the rows of the product, for B its columns;
// `pack` copies `count` of them from `outer` on, for `depth` values of k, padded to a depth_step.
template <class Operand>
struct Factor {
  const void* data;
  int64_t stride;    // of the rows in memory, in elements
  int tile;          // the extent of a tile along `outer`
  bool depth_major;  // how pack lays out a tile of A: [depth][tile_rows], or rows of depth
  void (*pack)(const Factor& from, int64_t outer, int64_t count, int64_t k, int64_t depth, Operand* to);
};

// A whose rows lie along k in memory: [count][depth], the same layout.
template <class T, class Operand>
void pack_left_rows(const Factor<Operand>& from, int64_t outer, int64_t count, int64_t k, int64_t depth, Operand* to) {
  const int64_t padded = round_up(depth, depth_step<Operand>);
  for (int64_t i = 0; i < count; ++i) {
    const T* source = static_cast<const T*>(from.data) + (outer + i) * from.stride + k;
    Operand* row = to + i * padded;
    prefetch_row(source + 4 * from.stride, depth);
    if constexpr (sizeof(T) == sizeof(Operand)) {
      __builtin_memcpy(row, source, size_t(depth) * sizeof(T));
    } else {
      for_vectors(depth, [&](int64_t c, int n) { store(row + c, load(source + c, n), n); });
    }
    if (padded > depth) row[depth] = from_float<Operand>(0.0f);
  }
}

#ifdef PYTRANSFORMER_BF16_DOT
inline void store_pairs(Vec even, Vec odd, bfloat16* to) {
  PairVec::zip(even, odd).store(to);
}
inline void store_pairs(const bfloat16* even, const bfloat16* odd, bfloat16* to) {
  PairVec::zip(even, odd, Vec::lanes).store(to);
}
#endif

// `n` elements of one k, or in the paired form of two, side by side. `more` says that k + 1 exists.
template <class T, class Operand>
inline __attribute__((always_inline)) void pack_step(const T* source, int64_t stride, bool more, int n, Operand* to) {
  if constexpr (depth_step<Operand> == 1) {
    store(to, load(source, n), n);
  } else if (n == Vec::lanes) {
    store_pairs(source, more ? source + stride : nullptr, to);
  } else {
    for (int i = 0; i < n; ++i) {
      to[2 * i] = source[i];
      to[2 * i + 1] = more ? source[stride + i] : bfloat16{0};
    }
  }
}

// `rows` of `count` elements into a buffer of rows of pack_share.
template <class T>
inline void copy_to_buffer(const T* source, int64_t stride, int64_t rows, int64_t count, T* buffer) {
  for (int64_t d = 0; d < rows; ++d) {
    const T* row = source + d * stride;
    prefetch_row(row + 4 * stride, count);
    __builtin_memcpy(buffer + d * pack_share, row, size_t(count) * sizeof(T));
  }
}

// A whose columns lie along k: tiles of [depth][tile_rows]. Sixteen rows in memory at a time go through
// a buffer: often they are a multiple of 4 KB apart, where they would push each other out of L1 before
// all tiles have had their part of a line.
template <class T, class Operand>
void pack_left_columns(const Factor<Operand>& from, int64_t outer, int64_t count, int64_t k, int64_t depth,
                       Operand* to) {
  constexpr int step = depth_step<Operand>;
  constexpr int64_t together = 16;
  const T* source = static_cast<const T*>(from.data) + k * from.stride + outer;
  const int64_t padded = round_up(depth, step);
  T buffer[together * pack_share];
  for (int64_t start = 0; start < depth; start += together) {
    const int64_t now = depth - start < together ? depth - start : together;
    copy_to_buffer(source + start * from.stride, from.stride, now, count, buffer);
    for (int64_t i = 0; i < count; i += tile_rows) {
      const int n = count - i < tile_rows ? int(count - i) : tile_rows;
      Operand* tile = to + i * padded + start * tile_rows;
      prefetch_row(tile + 4 * tile_rows * padded, now * tile_rows);  // the place of a tile to come
      for (int64_t d = 0; d < now; d += step) {
        const T* element = buffer + d * pack_share + i;
        if (n == tile_rows) {
          pack_step(element, pack_share, d + 1 < now, tile_rows, tile + d * tile_rows);
        } else {
          pack_step(element, pack_share, d + 1 < now, n, tile + d * tile_rows);
        }
      }
    }
  }
}

// B whose rows lie along its columns, [K][N] in memory: panels of [depth][tile_width].
template <class T, class Operand>
void pack_right_rows(const Factor<Operand>& from, int64_t outer, int64_t count, int64_t k, int64_t depth, Operand* to) {
  constexpr int step = depth_step<Operand>;
  const int64_t padded = round_up(depth, step);
  for (int64_t d = 0; d < depth; d += step) {
    const T* source = static_cast<const T*>(from.data) + (k + d) * from.stride + outer;
    for (int i = 0; i < step; ++i) prefetch_row(source + (8 + i) * from.stride, count);
    for (int64_t j = 0; j < count; j += Vec::lanes) {
      Operand* place = to + j / tile_width * tile_width * padded + d * tile_width + j % tile_width * step;
      if (count - j >= Vec::lanes) {
        pack_step(source + j, from.stride, d + 1 < depth, Vec::lanes, place);
      } else {
        pack_step(source + j, from.stride, d + 1 < depth, int(count - j), place);
      }
    }
  }
}

// One square of B^T: `columns` rows in memory, `units` operands or pairs of operands along each. load_row(i, n) has n
// of row i.
template <class LoadRow>
inline __attribute__((always_inline)) void pack_square(const LoadRow& load_row, int columns, int units, float* to) {
  Vec square[Vec::lanes];
  if (columns == Vec::lanes && units == Vec::lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec::lanes; ++i) square[i] = load_row(i, Vec::lanes);
  } else {
    for (int i = 0; i < Vec::lanes; ++i) square[i] = i < columns ? load_row(i, units) : Vec::zero();
  }
  transpose(square);
  for (int i = 0; i < units; ++i) square[i].store(to + i * tile_width);
}

// B whose rows lie along k, [N][K] in memory (the weight of a linear layer): panels of [depth][tile_width].
// A pair of bfloat16 is moved as one float.
template <class T, class Operand>
void pack_right_columns(const Factor<Operand>& from, int64_t outer, int64_t count, int64_t k, int64_t depth,
                        Operand* to) {
  constexpr int step = depth_step<Operand>;
  const int64_t padded = round_up(depth, step);
  for (int64_t j = 0; j < count; j += Vec::lanes) {
    const int columns = count - j < Vec::lanes ? int(count - j) : Vec::lanes;
    const T* source = static_cast<const T*>(from.data) + (outer + j) * from.stride + k;
    Operand* place = to + j / tile_width * tile_width * padded + j % tile_width * step;
    for_vectors(depth / step, [&](int64_t unit, int n) {
      for (int i = 0; i < Vec::lanes; ++i) __builtin_prefetch(source + (Vec::lanes + i) * from.stride + unit * step);
      const auto row = [&](int i, int units) {
        return load_operands(source + i * from.stride + unit * step, units * step, static_cast<Operand*>(nullptr));
      };
      pack_square(row, columns, n, reinterpret_cast<float*>(place + unit * step * tile_width));
    });
    if (padded > depth) {
      for (int i = 0; i < Vec::lanes; ++i) {
        Operand* pair = place + (depth - 1) * tile_width + 2 * i;
        pair[0] = i < columns ? from_float<Operand>(to_float(source[i * from.stride + depth - 1])) : Operand{};
        pair[1] = Operand{};
      }
    }
  }
}

#ifdef PYTRANSFORMER_AMX
// A whose columns lie along k, for AMX, which has its rows along k: [count][depth], turned a square of pairs at a time,
// through a buffer for the same reason.
template <class T, class Operand>
void pack_left_turned(const Factor<Operand>& from, int64_t outer, int64_t count, int64_t k, int64_t depth,
                      Operand* to) {
  constexpr int64_t together = 2 * unit_pairs;
  const T* source = static_cast<const T*>(from.data) + k * from.stride + outer;
  const int64_t padded = round_up(depth, depth_step<Operand>);
  alignas(64) T buffer[together * pack_share];
  for (int64_t start = 0; start < depth; start += together) {
    const int64_t now = depth - start < together ? depth - start : together;
    copy_to_buffer(source + start * from.stride, from.stride, now, count, buffer);
    for (int64_t i = 0; i < count; i += Vec::lanes) {
      const auto row = [&](int64_t d) { return d < now ? buffer + d * pack_share + i : nullptr; };
      Vec square[unit_pairs];
      for (int j = 0; j < unit_pairs; ++j) square[j] = PairVec::zip(row(2 * j), row(2 * j + 1), Vec::lanes).as_bits();
      transpose(square);
      const int pairs = int(ceil_div(now, 2));
      for (int64_t j = 0; j < Vec::lanes && i + j < count; ++j) {
        store(reinterpret_cast<float*>(to + (i + j) * padded + start), square[j], pairs);
      }
    }
  }
}
#endif

// The four ways a row-major matrix takes part in a product. `data` is the matrix as it lies in memory.
template <class Operand, class T>
Factor<Operand> left(const T* data, int64_t stride) {  // A = data
  return {data, stride, rows_of_tile<Operand>, false, pack_left_rows<T, Operand>};
}
template <class Operand, class T>
Factor<Operand> left_transposed(const T* data, int64_t stride) {  // A = data^T
#ifdef PYTRANSFORMER_AMX
  if constexpr (on_unit<Operand>) return {data, stride, unit_rows, false, pack_left_turned<T, Operand>};
#endif
  return {data, stride, tile_rows, true, pack_left_columns<T, Operand>};
}
template <class Operand, class T>
Factor<Operand> right(const T* data, int64_t stride) {  // B = data
  return {data, stride, int(tile_width), false, pack_right_rows<T, Operand>};
}
template <class Operand, class T>
Factor<Operand> right_transposed(const T* data, int64_t stride) {  // B = data^T
  return {data, stride, int(tile_width), false, pack_right_columns<T, Operand>};
}

// Brings `share` of `shares` equal parts of [from, from + bytes) into L2.
inline void prefetch_share(const void* from, int64_t bytes, int64_t share, int64_t shares) {
  constexpr int64_t line = 64;
  const int64_t lines = ceil_div(bytes, line);
  const char* p = static_cast<const char*>(from);
  for (int64_t i = lines * share / shares; i < lines * (share + 1) / shares; ++i)
    __builtin_prefetch(p + i * line, 0, 2);
}

// The extent of the block of depth that begins at k: as it is, and as it is padded.
template <class Operand>
int64_t depth_of_block(int64_t K, int64_t k) {
  return K - k < block_depth<Operand> ? K - k : block_depth<Operand>;
}
template <class Operand>
int64_t padded_depth(int64_t K, int64_t k) {
  return round_up(depth_of_block<Operand>(K, k), depth_step<Operand>);
}

// The rows of A in a block of C, over a block of depth: element (row, k), or pair of k, of the tile that begins at row
// i lies at data[i * pitch + row * row_stride + k / depth_step * depth_stride].
template <class Operand>
struct LeftBlock {
  const Operand* data;
  int64_t pitch, row_stride, depth_stride;
};

// A as the product reads it: packed, in place, or yet to be packed, block by block. It does not own the memory.
template <class Operand>
struct LeftView {
  const Operand* data;
  int64_t K;
  int64_t stride;  // in place: of the rows. Packed: 0
  int64_t outer;   // packed: how many rows there is room for
  bool depth_major;
  Factor<Operand> source = {};  // yet to be packed: from where

  static constexpr int step = depth_step<Operand>;
  bool in_place() const { return stride > 0; }
  bool packs() const { return source.pack != nullptr; }
  int64_t padded(int64_t k) const { return padded_depth<Operand>(K, k); }
  const Operand* at(int64_t first, int64_t k) const {
    return in_place() ? data + first * stride + k : data + outer * k + first * padded(k);
  }

  // Rows [first, first + rows) of the block of depth at k; those yet to be packed are, into `memory`.
  LeftBlock<Operand> block(int64_t first, int64_t rows, int64_t k, Operand* memory) const {
    if (packs()) source.pack(source, first, rows, k, depth_of_block<Operand>(K, k), memory);
    const int64_t pitch = in_place() ? stride : padded(k);
    return {packs() ? memory : at(first, k), pitch, depth_major ? step : pitch, depth_major ? tile_rows * step : step};
  }

  // Brings a share of rows [first, first + rows) of the block of depth at k into L2.
  void prefetch(int64_t first, int64_t rows, int64_t k, int64_t share, int64_t shares) const {
    if (packs()) return;
    const int64_t row_bytes = padded(k) * int64_t(sizeof(Operand));
    if (!in_place()) return prefetch_share(at(first, k), rows * row_bytes, share, shares);
    for (int64_t i = rows * share / shares; i < rows * (share + 1) / shares; ++i)
      prefetch_share(at(first + i, k), row_bytes, 0, 1);
  }
};

// Whether A, its rows along k, may be read where it lies. Its type must be the tile's own, and hold whole pairs.
template <class Operand, class T>
bool may_stay(int64_t K) {
  return sizeof(T) == sizeof(Operand) && K > 0 && K % depth_step<Operand> == 0;
}

// A packed operand: [K in blocks of block_depth][outer in tiles][what a tile needs of the block].
template <class Operand>
class Packed {
 public:
  Packed(const Factor<Operand>& from, int64_t outer, int64_t K)
      : outer_(round_up(outer, from.tile)),
        K_(K),
        depth_major_(from.depth_major),
        data_(outer_ * round_up(K, depth_step<Operand>)) {
    static_assert(pack_share % tile_rows == 0 && pack_share % tile_width == 0);
    const int64_t depths = ceil_div(K, block_depth<Operand>);
    parallel_tasks(ceil_div(outer, pack_share) * depths, [&](int64_t task) {
      const int64_t first = task / depths * pack_share, k = task % depths * block_depth<Operand>;
      const int64_t count = outer - first < pack_share ? outer - first : pack_share;
      from.pack(from, first, count, k, depth_of_block<Operand>(K, k), data_.get() + offset(first, k));
    });
  }

  // A right operand yet to be written, by store_depths.
  Packed(int64_t columns, int64_t K)
      : outer_(round_up(columns, tile_width)),
        K_(K),
        depth_major_(false),
        data_(outer_ * round_up(K, depth_step<Operand>)) {}

  // This operand as A.
  operator LeftView<Operand>() const { return {data_.get(), K_, 0, outer_, depth_major_}; }

  // B[k + i, first + j] = values[i * block_columns + j] for i < depths, j < count, as pack_right_rows would write
  // it. `k` begins a pair where there are pairs, `first` a panel.
  void store_depths(int64_t k, int64_t depths, int64_t first, int64_t count, const float* values) const {
    constexpr int step = depth_step<Operand>;
    for (int64_t i = 0; i < depths; i += step) {
      const int64_t start = (k + i) / block_depth<Operand> * block_depth<Operand>;
      for (int64_t j = 0; j < count; j += Vec::lanes) {
        const int n = count - j < Vec::lanes ? int(count - j) : Vec::lanes;
        Operand* to = data_.get() + offset((first + j) / tile_width * tile_width, start) +
                      (k + i - start) * tile_width + (first + j) % tile_width * step;
        const Vec even = load(values + i * block_columns + j, n);
        if constexpr (step == 1) {
          even.store(to);
        } else {
          const Vec odd = i + 1 < depths ? load(values + (i + 1) * block_columns + j, n) : Vec::zero();
          store_pairs(even, odd, to);
        }
      }
    }
  }

  int64_t K() const { return K_; }
  // Where the tile lies that begins at `first`.
  const Operand* at(int64_t first, int64_t k) const { return data_.get() + offset(first, k); }

 private:
  int64_t offset(int64_t first, int64_t k) const { return outer_ * k + first * padded_depth<Operand>(K_, k); }

  int64_t outer_, K_;
  bool depth_major_;
  Scratch<Operand> data_;
};

// One tile: c[Rows][Vecs] (+)= A B, with `row_stride` and `depth_stride` of A as in tile.h.
template <class Operand, int Rows, int Vecs>
__attribute__((noinline)) void tile_product(const Operand* a, int64_t row_stride, int64_t depth_stride,
                                            const Operand* b, int64_t steps, float* c, bool add) {
#ifdef PYTRANSFORMER_AMX
  if constexpr (on_unit<Operand>) {
    return multiply_on_unit<Vecs>(Rows, a, row_stride, b, tile_width * depth_step<Operand>, steps, c, block_columns,
                                  add);
  }
#endif
  Vec acc[Rows][Vecs];
  clear(acc);
  multiply_add(a, row_stride, depth_stride, b, tile_width * depth_step<Operand>, steps, acc);
#pragma GCC unroll 24  // an index that is not known would have the accumulators written to memory first
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      float* place = c + i * block_columns + j * Vec::lanes;
      (add ? acc[i][j] + Vec::load(place) : acc[i][j]).store(place);
    }
  }
}

template <class Operand>
struct TileProducts {
  template <int Rows, int Vecs>
  static constexpr auto of = &tile_product<Operand, Rows, Vecs>;
};
template <class Operand>
auto tile_product_for(int64_t rows, int64_t vecs) {
  return instance_for<TileProducts<Operand>, rows_of_tile<Operand>, tile_vecs>(rows, vecs);
}

// How C is cut into blocks.
struct BlockGrid {
  int64_t rows, columns;  // of a block
  int64_t blocks_down, blocks_across;

  // Of the largest blocks; where these would leave threads idle for more than a 32nd of the time, of smaller ones.
  template <class Operand>
  BlockGrid(int64_t M, int64_t N, const LeftView<Operand>& left)
      : BlockGrid(M, N, left, ceil_div(M, block_rows), ceil_div(N, block_columns)) {
    const int64_t threads = max_threads(), tiles = ceil_div(M, rows_of_tile<Operand>), panels = ceil_div(N, tile_width);
    const int64_t most = double(M) * double(N) * double(left.K) > 1e6 ? 8 * threads : 1;
    const int64_t least_down = blocks_down, least_across = blocks_across;
    const int64_t even = M * round_up(N, Vec::lanes) / threads;  // time, were all threads busy to the end
    const auto wasteful = [&] { return 31 * time(N, threads) > 32 * even; };
    // Narrower before lower: of a narrower block a thread more often packed B itself.
    for (int64_t down = least_down; wasteful() && down <= tiles && down * least_across <= most; ++down) {
      for (int64_t across = least_across; wasteful() && across <= panels && down * across <= most; ++across) {
        const BlockGrid other(M, N, left, down, across);
        if (32 * other.time(N, threads) < 31 * time(N, threads)) *this = other;
      }
    }
  }

 private:
  static constexpr int64_t tiled_lines = 48;  // rows that are whole tiles and whole lines
  static_assert(block_rows % tiled_lines == 0 && tiled_lines % tile_rows == 0 && tiled_lines % Vec::lanes == 0);

  template <class Operand>
  BlockGrid(int64_t M, int64_t N, const LeftView<Operand>& left, int64_t down, int64_t across) {
    // Whole lines of what is turned; and whole tiles of an A that lies in tiles, as of any small block.
    const int64_t even = ceil_div(M, down), unit = left.depth_major ? tiled_lines : Vec::lanes;
    rows = round_up(even, even > block_rows / 2 ? unit : rows_of_tile<Operand>);
    columns = round_up(ceil_div(N, across), tile_width);
    blocks_down = ceil_div(M, rows);
    blocks_across = ceil_div(N, columns);
  }

  // Until the last block is done, in products of a column of A and a row of B.
  int64_t time(int64_t N, int64_t threads) const {
    const int64_t width = round_up(N, Vec::lanes);
    return ceil_div(blocks_down * blocks_across, threads) * rows * (width < columns ? width : columns);
  }
};

// A block of C: where it lies in the product.
struct Block {
  int64_t row, column, rows, columns;
};

// sums (+)= A B over the block of depth that begins at k. A tile runs over at most `run` of it before it
// adds to the sums. `a` is A's part of it; `next` is the block that this thread will take up next, or has no rows.
template <class Operand>
void multiply_block(const LeftBlock<Operand>& a, const LeftView<Operand>& left, const Packed<Operand>& right,
                    const Block& block, const Block& next, int64_t k, int64_t run, float* sums) {
  constexpr int step = depth_step<Operand>;
  constexpr bool ahead = !on_unit<Operand>;
  const int64_t padded = left.padded(k);
  constexpr int64_t most_rows = rows_of_tile<Operand>;
  const int64_t tiles = ceil_div(block.rows, most_rows), panels = ceil_div(block.columns, tile_width);
  const int64_t panel_bytes = tile_width * padded * int64_t(sizeof(Operand));
  const bool last_k = k + block_depth<Operand> >= left.K;
  const Block& after = last_k ? next : block;
  const int64_t after_k = last_k ? 0 : k + block_depth<Operand>;

  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t j = panel * tile_width;
    const int64_t vecs = ceil_div(block.columns - j, Vec::lanes);
    const auto whole = tile_product_for<Operand>(most_rows, vecs);
    const Operand* b = right.at(block.column + j, k);
    const Operand* next_b = panel + 1 < panels ? b + tile_width * padded
                            : after.rows > 0   ? right.at(after.column, after_k)
                                               : nullptr;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t i = tile * most_rows;
      if (ahead && next_b) prefetch_share(next_b, panel_bytes, tile, tiles);
      if (ahead && after.rows > 0) {
        left.prefetch(after.row, after.rows, after_k, panel * tiles + tile, panels * tiles);
      }
      const auto product = block.rows - i < most_rows ? tile_product_for<Operand>(block.rows - i, vecs) : whole;
      int64_t d = 0;
      do {
        const int64_t now = padded - d < run ? padded - d : run;
        product(a.data + i * a.pitch + d / step * a.depth_stride, a.row_stride, a.depth_stride, b + d * tile_width,
                now / step, sums + i * block_columns + j, k + d > 0);
        d += now;
      } while (d < padded);
    }
  }
}

// The same over all of K, for a block of one panel whose A lies in place. There are few columns to use A for, and the
// time is that of reading it: tiles are higher where they are narrower, and go along whole rows, as the hardware
// expects of those who read much.
template <class Operand, int Vecs>
void multiply_rows(const LeftView<Operand>& left, const Packed<Operand>& right, const Block& block, int64_t run,
                   float* sums) {
  constexpr int step = depth_step<Operand>, usual = rows_of_tile<Operand>;
  constexpr int most = on_unit<Operand> ? usual : usual * tile_vecs / Vecs;
  for (int64_t i = 0; i < block.rows;) {
    const int64_t rows = block.rows - i;
    const int64_t now = rows >= most ? most : rows < usual ? rows : usual;
    const auto product = rows >= most ? &tile_product<Operand, most, Vecs> : tile_product_for<Operand>(now, Vecs);
    for (int64_t k = 0; k < left.K; k += run) {
      const int64_t depth = left.K - k < run ? left.K - k : run;
      product(left.at(block.row + i, k), left.stride, step, right.at(block.column, k), ceil_div(depth, step),
              sums + i * block_columns, k > 0);
    }
    i += now;
  }
}

template <class Operand>
struct RowProducts {
  template <int, int Vecs>
  static constexpr auto of = &multiply_rows<Operand, Vecs>;
};

// A whose rows lie along k: in place where that serves, else packed block by block, which costs a hundredth of the
// block.
template <class Operand>
struct LeftRows {
  LeftView<Operand> view;
  int64_t rows;

  template <class T>
  LeftRows(const T* data, int64_t stride, int64_t rows, int64_t K) : view{nullptr, K, 0, 0, false}, rows(rows) {
    if (may_stay<Operand, T>(K)) {
      view.data = reinterpret_cast<const Operand*>(data), view.stride = stride;
    } else {
      view.source = left<Operand>(data, stride);
    }
  }
};

// epilogue(block, sums): sums[i * block_columns + j] is C[block.row + i, block.column + j], float32, and
// may be overwritten. Every element is in one block; blocks come from several threads.
template <class Operand, class Epilogue>
void gemm(int64_t M, int64_t N, const LeftView<Operand>& left, const Packed<Operand>& right, const Epilogue& epilogue) {
  if (M <= 0 || N <= 0) return;
  const int threads = max_threads();
  const BlockGrid grid(M, N, left);
  // Of a few rows, other libraries take dot products, whose many partial sums are more accurate than
  // one long one. Reading the other operand takes most of the time there: short runs are to be had for nothing.
  const int64_t run = M <= 16 || N <= 16 ? 32 : block_depth<Operand>;
  const ThreadScratch<float> memory(threads, block_rows * block_columns);
  const ThreadScratch<Operand> left_memory(threads, left.packs() ? block_rows * block_depth<Operand> : 0);

  const int64_t tasks = grid.blocks_down * grid.blocks_across;
  const auto block_of = [&](int64_t task) {
    const int64_t row = task % grid.blocks_down * grid.rows, column = task / grid.blocks_down * grid.columns;
    return Block{row, column, M - row < grid.rows ? M - row : grid.rows,
                 N - column < grid.columns ? N - column : grid.columns};
  };

  parallel_tasks(tasks, [&](int64_t task) {
    float* sums = memory.of(thread_index());
    const Block block = block_of(task), next = task + 1 < tasks ? block_of(task + 1) : Block{};
    if (N <= tile_width && left.in_place()) {
      instance_for<RowProducts<Operand>, 1, tile_vecs>(1, ceil_div(N, Vec::lanes))(left, right, block, run, sums);
    } else {
      int64_t k = 0;
      do {  // once even for K = 0, to clear the sums
        const auto a = left.block(block.row, block.rows, k, left_memory.of(thread_index()));
        multiply_block(a, left, right, block, next, k, run, sums);
        k += block_depth<Operand>;
      } while (k < left.K);
    }
    epilogue(block, sums);
  });
}

template <class Operand, class Epilogue>
void gemm(int64_t N, const LeftRows<Operand>& left, const Packed<Operand>& right, const Epilogue& epilogue) {
  gemm<Operand>(left.rows, N, left.view, right, epilogue);
}

// An epilogue that takes a block row by row: body(row, column, count, values), count <= block_columns.
template <class Body>
auto by_rows(const Body& body) {
  return [&body](const Block& block, float* sums) {
    for (int64_t i = 0; i < block.rows; ++i) {
      body(block.row + i, block.column, block.columns, sums + i * block_columns);
    }
  };
}

// ---- Between a block [rows][block_columns] and the memory in which its columns are rows

// put(column, row, v, count): lane i of v, for i < count, is element `column` of row + i, and 0 beyond; load_row(row,
// column) has a vector of a row.
template <class LoadRow, class Put>
inline __attribute__((always_inline)) void turn(int64_t rows, int64_t columns, const LoadRow& load_row,
                                                const Put& put) {
  for (int64_t c = 0; c < columns; c += Vec::lanes) {
    for (int64_t r = 0; r < rows; r += Vec::lanes) {
      const int n = rows - r < Vec::lanes ? int(rows - r) : Vec::lanes;
      Vec square[Vec::lanes];
      for (int i = 0; i < Vec::lanes; ++i) {
        square[i] = i < n ? load_row(r + i, c) : Vec::zero();
      }
      transpose(square);
      for (int i = 0; i < Vec::lanes && c + i < columns; ++i) put(c + i, r, square[i], n);
    }
  }
}

// to[column * stride + row] = from[row][column] + addends[row], or + 0 without addends
template <class T>
void store_turned(const float* from, int64_t rows, int64_t columns, const float* addends, T* to, int64_t stride) {
  const auto put = [&](int64_t column, int64_t row, Vec v, int n) { store(to + column * stride + row, v, n); };
  const auto plain = [&](int64_t row, int64_t column) { return Vec::load(from + row * block_columns + column); };
  if (!addends) return turn(rows, columns, plain, put);
  turn(rows, columns, [&](int64_t row, int64_t column) { return plain(row, column) + Vec::set1(addends[row]); }, put);
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
