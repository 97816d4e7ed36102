// Products with weights in nn.Linear's layout, [features][k], and tokens in rows, [N][k].
//
// Every one is computed as its transpose, weight times tokens: a weight's rows lie along k, which is how the left
// operand is read, so that no weight is packed. The product comes out with tokens in lanes, a feature a row; what
// leaves for memory is turned on its way.
#pragma once

#include "gemm.h"
#include "narrow.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"
#include "tensor_view.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int lanes = Vec::lanes;

// An optional bias as float32.
class Bias {
 public:
  explicit Bias(const TensorView& view) : copy_(view ? view.shape[0] : 0), defined_(view) {
    if (!view) return;
    with_storage(view.dtype,
                 [&](auto type) { copy_row(view.ptr<const decltype(type)>(), view.shape[0], copy_.get()); });
  }
  // To a block whose rows are features.
  void add_to(const Block& block, float* values) const {
    for (int64_t i = 0; defined_ && i < block.rows; ++i) {
      const Vec x = Vec::set1(copy_.get()[block.row + i]);
      float* row = values + i * block_columns;
      for_vectors(block.columns, [&](int64_t c, int n) { store(row + c, load(row + c, n) + x, n); });
    }
  }
  // To a block whose columns are.
  void add_to_columns(const Block& block, float* values) const {
    for (int64_t i = 0; defined_ && i < block.rows; ++i) {
      add_row(values + i * block_columns, copy_.get() + block.column, block.columns);
    }
  }
  // to = values + bias, for `count` of a row, from feature `first` on.
  template <class T>
  void store_row(int64_t first, int64_t count, const float* values, T* to) const {
    if (!defined_) return copy_row(values, count, to);
    const float* bias = copy_.get() + first;
    for_vectors(count, [&](int64_t c, int n) { store(to + c, load(values + c, n) + load(bias + c, n), n); });
  }
  // For the rows of a block; null where there is none.
  const float* of(const Block& block) const { return defined_ ? copy_.get() + block.row : nullptr; }

 private:
  Scratch<float> copy_;
  bool defined_;
};

// How many tokens at a time: their hidden layer, or each matrix of its size that backward needs, should stay in a
// shared cache.
struct Chunks {
  int64_t count, rows;

  Chunks(int64_t N, int64_t F) {
    constexpr int64_t bytes = 16 << 20;
    const int64_t row_bytes = F * int64_t(sizeof(float)) + 1;
    const int64_t most = bytes / row_bytes < block_columns ? block_columns : bytes / row_bytes;
    count = N > 0 ? ceil_div(N, most) : 1;
    rows = round_up(ceil_div(N, count), tile_width);
    if (rows > 0) count = ceil_div(N, rows);
  }
  int64_t begin(int64_t chunk) const { return chunk * rows; }
  int64_t size(int64_t chunk, int64_t N) const { return N - begin(chunk) < rows ? N - begin(chunk) : rows; }
};

// The products with weights, weight times tokens, for many tokens: tokens in lanes.
template <class T>
struct ManyTokens {
  static constexpr bool tokens_in_rows = false;
  using Operand = operand_t<T>;
  using Weight = LeftRows<Operand>;
  using Right = Packed<Operand>;

  static Right right(const T* rows, int64_t tokens, int64_t K) {
    return {right_transposed<Operand>(rows, K), tokens, K};
  }
  template <class Epilogue>
  static void multiply(int64_t tokens, const Weight& weight, const Right& right, const Epilogue& epilogue) {
    gemm(tokens, weight, right, epilogue);
  }
};

// The same for a few: k in lanes.
template <class T>
struct FewTokens {
  static constexpr bool tokens_in_rows = false;
  struct Weight {
    const T* data;
    int64_t stride, features;
    Weight(const T* data, int64_t stride, int64_t features, int64_t) : data(data), stride(stride), features(features) {}
  };
  using Right = NarrowRight<operand_t<T>>;

  static Right right(const T* rows, int64_t tokens, int64_t K) { return {rows, K, tokens, K}; }
  template <class Epilogue>
  static void multiply(int64_t tokens, const Weight& weight, const Right& right, const Epilogue& epilogue) {
    narrow_gemm(weight.features, tokens, weight.data, weight.stride, right, epilogue);
  }
};

// The product itself, tokens times weight: tokens in rows, a feature in lanes. It is the weight that is packed.
template <class T>
struct TokensInRows {
  static constexpr bool tokens_in_rows = true;
  using Operand = operand_t<T>;
  using Right = LeftRows<Operand>;  // the tokens, which are the left operand here
  struct Weight {
    int64_t features;
    Packed<Operand> packed;
    Weight(const T* data, int64_t stride, int64_t features, int64_t K)
        : features(features), packed(right_transposed<Operand>(data, stride), features, K) {}
  };

  static Right right(const T* rows, int64_t tokens, int64_t K) { return {rows, K, tokens, K}; }
  template <class Epilogue>
  static void multiply(int64_t, const Weight& weight, const Right& tokens, const Epilogue& epilogue) {
    gemm(weight.features, tokens, weight.packed, epilogue);
  }
};

// A product's transpose to its place, with a bias of its rows or none: out[column] + block.row holds the block's
// column.
template <class T>
void store_output(const Block& block, const float* sums, T* out, int64_t stride, const float* bias = nullptr) {
  store_turned(sums, block.rows, block.columns, bias, out + block.column * stride + block.row, stride);
}

// The gradient of a weight, summed over chunks of tokens as its product comes out, [rows, columns], in
// float32. `turned`: the product is the gradient's transpose. The last chunk's sums are stored.
template <class T>
class WeightGradient {
 public:
  WeightGradient(const TensorView& view, bool turned, int64_t chunks)
      : out_(view.ptr<T>()),
        stride_(view ? view.shape[1] : 0),
        columns_(view ? view.shape[turned ? 0 : 1] : 0),
        turned_(turned),
        chunks_(chunks),
        sums_(view && chunks > 1 ? view.shape[0] * view.shape[1] : 0) {}

  // The epilogue of chunk `chunk`'s product.
  auto add_chunk(int64_t chunk) const {
    return [this, chunk](const Block& block, float* values) {
      for (int64_t i = 0; i < block.rows && chunks_ > 1; ++i) {
        float *row = values + i * block_columns, *sum = sums_.get() + (block.row + i) * columns_ + block.column;
        if (chunk > 0) add_row(row, sum, block.columns);
        if (chunk + 1 < chunks_) copy_row(row, block.columns, sum);
      }
      if (chunk + 1 < chunks_) return;
      if (turned_) return store_output(block, values, out_, stride_);
      for (int64_t i = 0; i < block.rows; ++i) {
        copy_row(values + i * block_columns, block.columns, out_ + (block.row + i) * stride_ + block.column);
      }
    };
  }

 private:
  T* out_;
  int64_t stride_, columns_;
  bool turned_;
  int64_t chunks_;
  Scratch<float> sums_;
};

// sums (+)= the column sums of [rows, columns], rows `stride` apart. Groups of 16 rows are summed, then groups of 16
// groups, which keeps the rounding error of long sums small; a thread takes whole columns.
template <class T>
inline void column_sums(const T* matrix, int64_t rows, int64_t columns, float* sums, bool add, int64_t stride) {
  constexpr int64_t group = 16;
  const int64_t vectors = ceil_div(columns, lanes);
  if (!add) {
    for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
  }
  parallel_ranges(vectors, max_threads(), [&](int64_t first, int64_t last, int) {
    const int64_t begin = first * lanes, end = last * lanes < columns ? last * lanes : columns;
    for (int64_t column = begin; column < end; column += block_columns) {
      const int64_t count = end - column < block_columns ? end - column : block_columns;
      for (int64_t r = 0; r < rows; r += group * group) {
        float large[block_columns] = {};
        for (int64_t s = r; s < rows && s < r + group * group; s += group) {
          float small[block_columns] = {};
          for (int64_t t = s; t < rows && t < s + group; ++t) add_row(small, matrix + t * stride + column, count);
          add_row(large, small, count);
        }
        add_row(sums + column, large, count);
      }
    }
  });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
