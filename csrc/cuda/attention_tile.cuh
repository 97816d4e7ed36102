// Tiles of the attention kernels: how they lie in shared memory, how they come and go, and their products.
//
// A block has four warps. Of a tile of scores a warp owns M fragments of 16 rows and all columns, so that a sum along
// a row stays within the four lanes that share it, and everything a warp accumulates is its own.
#pragma once

#include <type_traits>

#include "attention_arguments.h"
#include "ptx.cuh"

namespace pytransformer::cuda {

constexpr int warps = 4, threads = 32 * warps;

__device__ inline int lane() {
  return threadIdx.x % 32;
}
__device__ inline int warp() {
  return threadIdx.x / 32;
}
__device__ inline int lane_row() {
  return lane() / 4;
}  // of a fragment: this row and the one 8 below
__device__ inline int lane_column() {
  return lane() % 4 * 2;
}  // of 8 columns: this one and the next

// Rows of D 16-bit elements, from a multiple of 128 bytes on. Within a window of 8 chunks of 16 bytes (4 where 8 do not
// divide the row) the chunks of a row are permuted by an exclusive or with bits of the row, so that eight rows of one
// column of chunks, which ldmatrix reads at once, lie in different banks.
template <int D>
struct Tile {
  static constexpr int chunks = D / 8;  // of a row
  static constexpr int window = chunks % 8 == 0 ? 8 : 4;

  uint32_t base;

  __device__ uint32_t chunk(int row, int index) const {
    const int twist = window == 8 ? row & 7 : (row >> 1) & 3;
    return base + (row * chunks + (index ^ twist)) * 16;
  }

  // The address of chunk 2 * pair + i from that of chunk i of the same row, i = 0 or 1: two operations with constants,
  // which the compiler rather repeats than keeps a register for.
  __device__ static uint32_t pair_at(uint32_t chunk, int pair) {
    return (chunk ^ 2 * pair % window * 16) + 2 * pair / window * window * 16;
  }
};

template <int D>
__host__ __device__ constexpr int tile_bytes(int rows) {
  return rows * D * 2;
}

// A thread's part of copying a tile: of every row that is its own, a chunk from each window. Then all that it adds to
// its first address in shared memory is constants. Made where it is used: it costs less than the registers to keep it.
template <int D>
struct TileCopy {
  static constexpr int window = Tile<D>::window, step = threads / window;  // rows of a thread are `step` apart

  int row, chunk;
  uint32_t to;  // in a tile at address 0

  __device__ TileCopy() {
    const int thread = ptx::thread_now();
    row = thread / window;
    chunk = thread % window;
    to = Tile<D>{0}.chunk(row, chunk);
  }

  // Row `row + i * step`, of which this thread's first chunk is at `source`; zeros where it is not `there`, and from
  // column `width` on.
  __device__ void begin(Tile<D> tile, int i, const uint16_t* source, int width, bool there) const {
#pragma unroll
    for (int j = 0; j < D / 8 / window; ++j) {
      const bool valid = there && 8 * (chunk + j * window) < width;
      const uint32_t address = tile.base + to + tile_bytes<D>(i * step) + j * window * 16;
      ptx::copy_16_async(address, source + 8 * j * window, valid);
    }
  }
};

// Begins to copy ROWS rows: `row_at(r)` is where row r starts, or null for a row of zeros.
template <int ROWS, int D, class RowAt>
__device__ inline void load_tile(Tile<D> tile, int width, const RowAt& row_at) {
  const TileCopy<D> copy;
  static_assert(ROWS % copy.step == 0);
#pragma unroll
  for (int i = 0; i < ROWS / copy.step; ++i) {
    const uint16_t* source = row_at(copy.row + i * copy.step);
    copy.begin(tile, i, source + 8 * copy.chunk, width, source != nullptr);
  }
}

// The rows of one head, of which tiles of ROWS are copied.
template <int ROWS, int D>
struct HeadRows {
  const uint16_t* source;  // what this thread copies first of row 0
  int64_t stride;          // of rows
  int width;

  __device__ HeadRows(const Heads& from, int64_t head_offset) : stride(from.row), width(from.width) {
    const TileCopy<D> copy;
    source = static_cast<const uint16_t*>(from.data) + head_offset + stride * copy.row + 8 * copy.chunk;
  }

  // Begins to copy rows [first, first + ROWS), or those `offset` elements on; those from `end` on are zeros.
  __device__ void load(const TileCopy<D>& copy, Tile<D> tile, int first, int end, int64_t offset = 0) const {
    static_assert(ROWS % copy.step == 0);
    const uint16_t* from = source + stride * first + offset;
#pragma unroll
    for (int i = 0; i < ROWS / copy.step; ++i) {
      copy.begin(tile, i, from, width, first + copy.row + i * copy.step < end);
      from += stride * copy.step;
    }
  }
};

// Sets what is not finite to 0. Where `spoilt` is given (shared memory, zero before), a row r that held such a thing
// sets bit r % 32 of word r / 32. The work of `count` threads, of which this is number `thread`.
template <class T, int ROWS, class AnyTile>
__device__ inline void clean_tile(AnyTile tile, uint32_t* spoilt, int thread = threadIdx.x, int count = threads) {
  constexpr uint32_t exponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
#pragma unroll 1
  for (int at = thread; at < ROWS * tile.chunks; at += count) {
    const int row = at / tile.chunks;
    const uint32_t address = tile.chunk(row, at % tile.chunks);
    uint4 chunk = ptx::load_shared_16(address);
    const auto clean = [&](uint32_t& pair) {
      const uint32_t low = (pair & exponent) == exponent ? 0xffffu : 0u;
      const uint32_t high = (pair >> 16 & exponent) == exponent ? 0xffff0000u : 0u;
      pair &= ~(low | high);
      return low | high;
    };
    const uint32_t found = clean(chunk.x) | clean(chunk.y) | clean(chunk.z) | clean(chunk.w);
    if (found == 0) continue;
    ptx::store_shared_16(address, chunk);
    if (spoilt != nullptr) atomicOr(spoilt + row / 32, 1u << row % 32);
  }
}

// Rounds a warp's rows and writes them to rows [first, first + 16 M) of a head, by way of the rows from `row` on of a
// tile, which nobody else uses any more: memory is written in whole chunks. Rows from `end` on are left out.
template <class T, int M, class AnyTile>
__device__ inline void store_rows(const float (&x)[M][AnyTile::chunks][4], AnyTile tile, int row, const Heads& to,
                                  int64_t head_offset, int first, int end) {
  constexpr int chunks = AnyTile::chunks;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < chunks; ++n) {
      const int upper = row + 16 * m + lane_row();
      ptx::store_shared_4(tile.chunk(upper, n) + 2 * lane_column(), ptx::pack<T>(x[m][n][0], x[m][n][1]));
      ptx::store_shared_4(tile.chunk(upper + 8, n) + 2 * lane_column(), ptx::pack<T>(x[m][n][2], x[m][n][3]));
    }
  }
  __syncwarp();
  uint16_t* head = static_cast<uint16_t*>(to.data) + head_offset;
#pragma unroll 1
  for (int at = lane(); at < 16 * M * chunks; at += 32) {
    const int r = at / chunks, index = at % chunks;
    if (first + r >= end || 8 * index >= to.width) continue;
    const uint4 chunk = ptx::load_shared_16(tile.chunk(row + r, index));
    *reinterpret_cast<uint4*>(head + to.row * (first + r) + 8 * index) = chunk;
  }
}

// f(m, n, i) for every element that a lane holds of M x N / 8 fragments of results.
template <int M, int N, class F>
__device__ inline void each_element(const F& f) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
    }
  }
}

template <int M, int D>
__device__ inline bool has_nan(const float (&sum)[M][D / 8][4]) {
  bool found = false;
  each_element<M, D>([&](int m, int n, int i) { found = found || sum[m][n][i] != sum[m][n][i]; });
  return found;
}

template <int M, int D>
__device__ inline void set_zero(float (&sum)[M][D / 8][4]) {
  each_element<M, D>([&](int m, int n, int i) { sum[m][n][i] = 0; });
}

template <int M, int D>
__device__ inline void multiply_all(float (&sum)[M][D / 8][4], float factor) {
  each_element<M, D>([&](int m, int n, int i) { sum[m][n][i] *= factor; });
}

// 16 M rows of a tile, from `row` on, as the left operand of products. They are read at each use, or once.
template <int M, int D>
struct RowsInTile {
  uint32_t first;

  __device__ RowsInTile(Tile<D> tile, int row) : first(tile.chunk(row + lane() % 16, lane() / 16)) {}

  // Fragment m of columns 16 k and on.
  __device__ void get(uint32_t (&x)[4], int m, int k) const {
    ptx::load_matrices(x, Tile<D>::pair_at(first, k) + tile_bytes<D>(16 * m));
  }
};

template <int M, int D>
struct RowsInRegisters {
  uint32_t held[M][D / 16][4];

  __device__ RowsInRegisters(Tile<D> tile, int row) {
    const RowsInTile<M, D> rows(tile, row);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) rows.get(held[m][k], m, k);
    }
  }

  __device__ void get(uint32_t (&x)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = held[m][k][i];
  }
};

// sum += a b^T: all N rows of `b`.
template <class T, int M, int N, int D, template <int, int> class Rows>
__device__ inline void multiply_rows(float (&sum)[M][N / 8][4], const Rows<M, D>& a, Tile<D> b) {
  const uint32_t of_right = b.chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
#pragma unroll(D > 128 ? 4 : D / 16)  // operands that are read ahead take registers, and beyond 128 sums have them all
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) a.get(left[m], m, k);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t right[4];
      ptx::load_matrices(right, b.pair_at(of_right, k) + tile_bytes<D>(16 * n));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::multiply_add<T>(sum[m][2 * n], left[m], right[0], right[1]);
        ptx::multiply_add<T>(sum[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sum += w b: weights in registers, of N columns, rounded to T; `b` has N rows.
template <class T, int M, int N, int D>
__device__ inline void multiply_weights(float (&sum)[M][D / 8][4], const float (&w)[M][N / 8][4], Tile<D> b) {
  const uint32_t of_right = b.chunk(lane() % 16, lane() / 16);
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&group)[4] = w[m][2 * k + i / 2];
        left[m][i] = ptx::pack<T>(group[i % 2 * 2], group[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t right[4];
      ptx::load_matrices_transposed(right, b.pair_at(of_right, n) + tile_bytes<D>(16 * k));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::multiply_add<T>(sum[m][2 * n], left[m], right[0], right[1]);
        ptx::multiply_add<T>(sum[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

}  // namespace pytransformer::cuda
