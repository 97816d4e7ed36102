// Matrix product: C[M,N] = A[M,K] B[K,N], float32 accumulation, any layout of A and B.
//
// C is cut into blocks of block_rows x block_columns, and a thread that takes one computes all of it:
//
//     for a block of depth k:
//       pack A[rows, k] and B[k, columns]               256 KB each as float32, together in L2
//       for each panel of B, tile_vecs vectors wide:    64 KB, read again for every tile, from L2
//         for each tile of A, tile_rows rows:           6 KB, from L1
//           C += A B in registers (tile.h)
//     epilogue(row, column, count, values) for every row of the block
//
// Packing is what makes the one inner loop serve every transposition: it is where a matrix is read by
// rows or by columns, where bfloat16 becomes an operand of the tile, and where ragged edges are padded
// with zeros. It reads an element once for 256 multiply-adds. Blocks share nothing and wait for nothing;
// that each packs its own operands is the price (4% of the arithmetic). Where there are too few blocks
// for the threads they are made narrower, then lower.
//
// The sum over k is formed in float32, block by block: first within a block of depth, then over blocks.
// It does not depend on which thread computes it, nor on how many there are, so equal inputs give equal
// bits. The epilogue sees the finished sums, once, while they are in L2: it adds biases, applies
// activations and rounds to the storage type.
#pragma once

#include <new>

#include "parallel.h"
#include "simd.h"
#include "tile.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int64_t block_rows = 264;     // divisible by tile_rows: 4 and 6
constexpr int64_t block_columns = 256;  // divisible by tile_width
constexpr int64_t block_depth = 256;
constexpr int64_t tile_width = tile_vecs * Vec::lanes;
static_assert(block_rows % tile_rows == 0 && block_columns % tile_width == 0 && block_depth % 2 == 0);
static_assert(tile_rows <= Vec::lanes, "packing by columns moves a row of a tile as one vector");

// body(index, count) for every vector of [0, size); count < lanes only at its end.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::lanes <= size; i += Vec::lanes) body(i, Vec::lanes);
  if (i < size) body(i, int(size - i));
}

template <class T>
inline __attribute__((always_inline)) Vec load(const T* p, int count) {
  return count == Vec::lanes ? Vec::load(p) : Vec::load(p, count);
}

template <class T>
inline __attribute__((always_inline)) void store(T* p, Vec v, int count) {
  if (count == Vec::lanes) {
    v.store(p);
  } else {
    v.store(p, count);
  }
}

// Uninitialised memory on a cache line's boundary.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), alignment))) {}
  ~Scratch() { ::operator delete(data_, alignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t alignment{64};
  T* data_;
};

// An operand of a product: a part of it is `pack`ed when a block needs it. For A, `outer` counts rows
// of the product, for B columns; both are packed for `depth` values of k, padded to a depth_step.
template <class Operand>
struct Factor {
  const void* data;
  int64_t stride;    // of the rows in memory, in elements
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
    if constexpr (sizeof(T) == sizeof(Operand)) {
      __builtin_memcpy(row, source, size_t(depth) * sizeof(T));
    } else {
      for_vectors(depth, [&](int64_t c, int n) { store(row + c, load(source + c, n), n); });
    }
    if (padded > depth) row[depth] = from_float<Operand>(0.0f);
  }
}

// `n` elements of one k, or in the paired form of two, side by side. `more` says that k + 1 exists.
template <class T, class Operand>
inline __attribute__((always_inline)) void pack_step(const T* source, int64_t stride, bool more, int n, Operand* to) {
  if constexpr (depth_step<Operand> == 1) {
    store(to, load(source, n), n);
  } else {
    for (int i = 0; i < n; ++i) {
      to[2 * i] = source[i];
      to[2 * i + 1] = more ? source[stride + i] : bfloat16{0};
    }
  }
}

// A whose columns lie along k: tiles of [depth][tile_rows]. A few k at a time for all tiles, so that
// the rows in memory are read along their length.
template <class T, class Operand>
void pack_left_columns(const Factor<Operand>& from, int64_t outer, int64_t count, int64_t k, int64_t depth,
                       Operand* to) {
  constexpr int step = depth_step<Operand>;
  constexpr int64_t together = 8;
  const T* source = static_cast<const T*>(from.data) + k * from.stride + outer;
  const int64_t padded = round_up(depth, step);
  for (int64_t start = 0; start < depth; start += together) {
    const int64_t end = start + together < depth ? start + together : depth;
    for (int64_t i = 0; i < count; i += tile_rows) {
      const int n = count - i < tile_rows ? int(count - i) : tile_rows;
      Operand* tile = to + i * padded;
      for (int64_t d = start; d < end; d += step) {
        const T* element = source + d * from.stride + i;
        if (n == tile_rows) {
          pack_step(element, from.stride, d + 1 < depth, tile_rows, tile + d * tile_rows);
        } else {
          pack_step(element, from.stride, d + 1 < depth, n, tile + d * tile_rows);
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

// One square of B^T: `columns` rows in memory, `units` operands or pairs of operands along each.
template <class T>
inline __attribute__((always_inline)) void pack_square(const T* source, int64_t stride, int columns, int units,
                                                       float* to) {
  Vec square[Vec::lanes];
  if (columns == Vec::lanes && units == Vec::lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec::lanes; ++i) square[i] = Vec::load(source + i * stride);
  } else {
    for (int i = 0; i < Vec::lanes; ++i) square[i] = i < columns ? load(source + i * stride, units) : Vec::zero();
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
      if constexpr (step == 1) {
        pack_square(source + unit, from.stride, columns, n, place + unit * tile_width);
      } else {
        // A distance of `stride` bfloat16 need not be whole floats: pairs are gathered row by row.
        float square[Vec::lanes * Vec::lanes];
        for (int i = 0; i < columns; ++i) {
          __builtin_memcpy(square + i * Vec::lanes, source + i * from.stride + 2 * unit, size_t(n) * sizeof(float));
        }
        pack_square(square, Vec::lanes, columns, n, reinterpret_cast<float*>(place + 2 * unit * tile_width));
      }
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

// The four ways a row-major matrix takes part in a product. `data` is the matrix as it lies in memory.
template <class Operand, class T>
Factor<Operand> left(const T* data, int64_t stride) {  // A = data
  return {data, stride, false, pack_left_rows<T, Operand>};
}
template <class Operand, class T>
Factor<Operand> left_transposed(const T* data, int64_t stride) {  // A = data^T
  return {data, stride, true, pack_left_columns<T, Operand>};
}
template <class Operand, class T>
Factor<Operand> right(const T* data, int64_t stride) {  // B = data
  return {data, stride, false, pack_right_rows<T, Operand>};
}
template <class Operand, class T>
Factor<Operand> right_transposed(const T* data, int64_t stride) {  // B = data^T
  return {data, stride, false, pack_right_columns<T, Operand>};
}

// One tile: c[Rows][Vecs] (+)= A B, with `row_stride` and `depth_stride` of A as in tile.h.
template <class Operand, int Rows, int Vecs>
__attribute__((noinline)) void tile_product(const Operand* a, int64_t row_stride, int64_t depth_stride,
                                            const Operand* b, int64_t steps, float* c, bool add) {
  Vec acc[Rows][Vecs];
  clear(acc);
  multiply_add(a, row_stride, depth_stride, b, tile_width * depth_step<Operand>, steps, acc);
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Vecs; ++j) {
      float* place = c + i * block_columns + j * Vec::lanes;
      (add ? acc[i][j] + Vec::load(place) : acc[i][j]).store(place);
    }
  }
}

// The instance of tile_product for a tile of rows x vecs.
template <class Operand, int Rows = tile_rows, int Vecs = tile_vecs>
inline auto tile_product_for(int rows, int vecs) {
  if constexpr (Vecs > 1) {
    if (vecs < Vecs) return tile_product_for<Operand, Rows, Vecs - 1>(rows, vecs);
  }
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_product_for<Operand, Rows - 1, Vecs>(rows, vecs);
  }
  return &tile_product<Operand, Rows, Vecs>;
}

// How C is cut into blocks.
struct BlockGrid {
  int64_t rows, columns;  // of a block
  int64_t blocks_down, blocks_across;

  BlockGrid(int64_t M, int64_t N, int64_t K, int threads) {
    blocks_down = ceil_div(M, block_rows);
    blocks_across = ceil_div(N, block_columns);
    const bool worth_sharing = double(M) * double(N) * double(K) > 1e6;
    if (worth_sharing) {
      // Narrower blocks until the threads finish together, or nearly so.
      const int64_t panels = ceil_div(N, tile_width), tiles = ceil_div(M, tile_rows);
      while (idle(threads) && blocks_across < panels) ++blocks_across;
      while (idle(threads) && blocks_down < tiles && blocks_down * blocks_across < 8 * threads) ++blocks_down;
    }
    rows = round_up(ceil_div(M, blocks_down), tile_rows);
    columns = round_up(ceil_div(N, blocks_across), tile_width);
    blocks_down = ceil_div(M, rows);
    blocks_across = ceil_div(N, columns);
  }

 private:
  // Whether more than an eighth of the threads' time would go to waiting for the last block.
  bool idle(int threads) const {
    const int64_t blocks = blocks_down * blocks_across, rounds = ceil_div(blocks, threads);
    return 8 * (rounds * threads - blocks) > rounds * threads;
  }
};

// A thread's packed operands and block of C, together in L2.
template <class Operand>
struct BlockBuffers {
  static constexpr int64_t left_bytes = block_rows * block_depth * sizeof(Operand);
  static constexpr int64_t right_bytes = block_columns * block_depth * sizeof(Operand);
  static constexpr int64_t total_bytes = left_bytes + right_bytes + block_rows * block_columns * sizeof(float);

  Operand *left, *right;
  float* sums;

  BlockBuffers(char* memory, int thread) {
    memory += thread * total_bytes;
    left = reinterpret_cast<Operand*>(memory);
    right = reinterpret_cast<Operand*>(memory + left_bytes);
    sums = reinterpret_cast<float*>(memory + left_bytes + right_bytes);
  }
};

// sums (+)= the packed left operand times the packed right one, of `depth`; a tile runs over at most
// `run` of it before it adds to the sums.
template <class Operand>
void multiply_block(const BlockBuffers<Operand>& buffers, int64_t rows, int64_t columns, int64_t depth, int64_t run,
                    bool depth_major, bool add) {
  constexpr int step = depth_step<Operand>;
  const int64_t padded = round_up(depth, step);
  const int64_t row_stride = depth_major ? step : padded, depth_stride = depth_major ? tile_rows * step : step;
  for (int64_t j = 0; j < columns; j += tile_width) {
    const int vecs = columns - j < tile_width ? int(ceil_div(columns - j, Vec::lanes)) : tile_vecs;
    const auto whole = tile_product_for<Operand>(tile_rows, vecs);
    for (int64_t i = 0; i < rows; i += tile_rows) {
      const auto product = rows - i < tile_rows ? tile_product_for<Operand>(int(rows - i), vecs) : whole;
      const Operand* a = buffers.left + i * padded;
      const Operand* b = buffers.right + j * padded;
      float* c = buffers.sums + i * block_columns + j;
      int64_t d = 0;
      do {
        const int64_t now = padded - d < run ? padded - d : run;
        product(a + d / step * depth_stride, row_stride, depth_stride, b + d * tile_width, now / step, c, add || d > 0);
        d += now;
      } while (d < padded);
    }
  }
}

// epilogue(row, column, count, values): the sums of C[row, column .. column + count), float32, which it
// may overwrite. count <= block_columns. It is called once for every element, from several threads.
template <class Operand, class Epilogue>
void gemm(int64_t M, int64_t N, int64_t K, const Factor<Operand>& a, const Factor<Operand>& b,
          const Epilogue& epilogue) {
  if (M <= 0 || N <= 0) return;
  const int threads = max_threads();
  const BlockGrid grid(M, N, K, threads);
  // Of a few rows, other libraries take dot products, whose many partial sums are more accurate than
  // one long one. Packing takes most of the time there, so short runs are to be had for nothing.
  const int64_t run = M <= 16 ? 32 : block_depth;
  const Scratch<char> memory(threads * BlockBuffers<Operand>::total_bytes);

  parallel_tasks(grid.blocks_down * grid.blocks_across, [&](int64_t block) {
    const BlockBuffers<Operand> buffers(memory.get(), thread_index());
    const int64_t row = block % grid.blocks_down * grid.rows, column = block / grid.blocks_down * grid.columns;
    const int64_t rows = M - row < grid.rows ? M - row : grid.rows;
    const int64_t columns = N - column < grid.columns ? N - column : grid.columns;
    int64_t k = 0;
    do {  // once even for K = 0, to clear the sums
      const int64_t depth = K - k < block_depth ? K - k : block_depth;
      a.pack(a, row, rows, k, depth, buffers.left);
      b.pack(b, column, columns, k, depth, buffers.right);
      multiply_block(buffers, rows, columns, depth, run, a.depth_major, k > 0);
      k += depth;
    } while (k < K);
    for (int64_t i = 0; i < rows; ++i) epilogue(row + i, column, columns, buffers.sums + i * block_columns);
  });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
