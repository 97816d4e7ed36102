// The feed-forward layer: two matrix products with everything between them done while it is in cache.
//
// The arithmetic is all in gemm.h; what is fused here is what torch does in passes of their own over
// [N,F], the largest matrix of the layer. Bias, activation and dropout are applied to a block of the
// hidden layer as the first product finishes it, and the activated values go straight to the operand
// of the second product. Tokens are taken in chunks whose hidden layer fits in a shared cache, so
// an [N,F] matrix exists in memory only where the caller wants it, before the activation, for backward.
//
// Every product with a weight is computed as its transpose, weight times tokens: nn.Linear keeps a
// weight with its rows along k, which is how the left operand is read, so that forward does not pack
// the weights at all. The hidden layer then comes out with tokens in lanes, a feature a row, which is
// how the right operand of the second product wants it; only what leaves for memory is turned.
//
// Backward, with h the hidden layer, m the multipliers of dropout, drawn again, and a = act(h) m, all
// with features in rows:
//     grad_hidden  = (W2^T grad_output^T) act'(h) m       a and grad_hidden in one epilogue, from one h
//     grad_weight2 = (a grad_output)^T                    grad_bias2 = column sums of grad_output
//     grad_weight1 = grad_hidden x                        grad_bias1 = row sums of grad_hidden
//     grad_input   = (W1^T grad_hidden)^T
// The left operands of the middle two are a and grad_hidden as the epilogue stored them. It takes chunks
// of tokens too; the gradients of the weights are summed over chunks in float32, in order. The
// activation is applied to the float32 sums in forward and to the stored h in backward: for bfloat16 the
// two differ by less than a rounding.
#include "ffn.h"

#include "gemm.h"
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "tile.h"
#include "vec_math.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int lanes = Vec::lanes;

// ---- Activations: value y and derivative dy.

struct Relu {
  static Vec value(Vec x) { return max(Vec::zero(), x); }  // in this order NaN passes through
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    y = value(x);
    dx = select(Vec::zero() >= x, Vec::zero(), grad);
  }
};

struct Gelu {
  static Vec value(Vec x) { return x * normal_distribution(x).cumulative; }
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    const NormalDistribution normal = normal_distribution(x);
    y = x * normal.cumulative;
    dx = grad * fma(x, normal.density, normal.cumulative);
  }
};

// x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr float linear = 1.5957691216057308f, cubic = 0.044715f * linear;

  static Vec gate(Vec x) { return sigmoid(x * fma(x * x, Vec::set1(cubic), Vec::set1(linear))); }
  static Vec value(Vec x) { return x * gate(x); }
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    const Vec s = gate(x), slope = fma(x * x, Vec::set1(3 * cubic), Vec::set1(linear));
    y = x * s;
    dx = grad * fma(y * (Vec::set1(1.0f) - s), slope, s);
  }
};

struct Silu {
  static Vec value(Vec x) { return x * sigmoid(x); }
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    const Vec s = sigmoid(x);
    y = x * s;
    dx = grad * fma(y, Vec::set1(1.0f) - s, s);
  }
};

// body(kind), with the structure above that `activation` names.
template <class Body>
inline void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::relu: return body(Relu{});
    case Activation::gelu: return body(Gelu{});
    case Activation::gelu_tanh: return body(GeluTanh{});
    case Activation::silu: return body(Silu{});
  }
}

// values = activation(values)
void activate(Activation activation, float* values, int64_t count) {
  with_activation(activation, [&](auto kind) {
    for_vectors(count, [&](int64_t c, int n) { store(values + c, kind.value(load(values + c, n)), n); });
  });
}

// grad *= activation'(values); values = activation(values)
void activate_backward(Activation activation, float* values, float* grad, int64_t count) {
  with_activation(activation, [&](auto kind) {
    for_vectors(count, [&](int64_t c, int n) {
      Vec y, dx;
      kind.both(load(values + c, n), load(grad + c, n), y, dx);
      store(values + c, y, n);
      store(grad + c, dx, n);
    });
  });
}

// ---- Rows of at most block_columns values.

template <class From, class To>
inline void copy_row(const From* from, int64_t count, To* to) {
  for_vectors(count, [&](int64_t c, int n) { store(to + c, load(from + c, n), n); });
}

template <class T>
inline void add_row(float* values, const T* other, int64_t count) {
  for_vectors(count, [&](int64_t c, int n) { store(values + c, load(values + c, n) + load(other + c, n), n); });
}

// An optional bias as float32.
class Bias {
 public:
  explicit Bias(const TensorView& view) : copy_(view ? view.shape[0] : 0), defined_(view) {
    if (!view) return;
    if (view.dtype == DType::bfloat16) {
      copy_row(view.ptr<bfloat16>(), view.shape[0], copy_.get());
    } else {
      copy_row(view.ptr<float>(), view.shape[0], copy_.get());
    }
  }
  // To a block whose rows are features.
  void add_to(const Block& block, float* values) const {
    for (int64_t i = 0; defined_ && i < block.rows; ++i) {
      const Vec x = Vec::set1(copy_.get()[block.row + i]);
      float* row = values + i * block_columns;
      for_vectors(block.columns, [&](int64_t c, int n) { store(row + c, load(row + c, n) + x, n); });
    }
  }

 private:
  Scratch<float> copy_;
  bool defined_;
};

// body(strip, values) for strips of a block, a vector's lanes of rows at a time: they stay in L1.
template <class Body>
void by_strips(const Block& block, float* sums, const Body& body) {
  for (int64_t r = 0; r < block.rows; r += lanes) {
    const int64_t rows = block.rows - r < lanes ? block.rows - r : lanes;
    body(Block{block.row + r, block.column, rows, block.columns}, sums + r * block_columns);
  }
}

// Dropout on the elements of [N,F], for a block of the hidden layer: features in rows, tokens in columns.
class BlockDropout {
 public:
  BlockDropout(const Dropout& dropout, int64_t features, int64_t first_token, const Block& block)
      : dropout_(dropout), first_row_(block.row) {
    if (dropout.threshold == 0) return;
    for (int64_t c = 0; c < block.columns; c += 64) {
      const int64_t tokens = block.columns - c < 64 ? block.columns - c : 64;
      for (int64_t t = 0; t < tokens; ++t) {
        uint64_t words[room];
        dropout.keep_bits(uint64_t((first_token + block.column + c + t) * features + block.row), block.rows, words);
        for (int64_t w = 0; 64 * w < block.rows; ++w) kept_[c / 64][64 * w + t] = words[w];
      }
      for (int64_t w = 0; 64 * w < block.rows; ++w) transpose_bits(kept_[c / 64] + 64 * w);
    }
  }

  // To a strip of the block.
  void apply(const Block& strip, float* values) const {
    if (dropout_.threshold == 0) return;
    const Vec scale = Vec::set1(dropout_.scale);
    for (int64_t i = 0; i < strip.rows; ++i) {
      float* row = values + i * block_columns;
      for_vectors(strip.columns, [&](int64_t c, int n) {
        const Mask keep = Mask::from_bits(uint32_t(kept_[c / 64][strip.row + i - first_row_] >> (c % 64)));
        store(row + c, select(keep, load(row + c, n) * scale, Vec::zero()), n);
      });
    }
  }

 private:
  static constexpr int64_t room = (block_rows + 63) / 64;
  const Dropout& dropout_;
  int64_t first_row_;
  uint64_t kept_[block_columns / 64][64 * room];  // bit i of [c][row]: token 64 c + i of the block is kept
};

// How many tokens at a time: their hidden layer, `matrices` of it, should stay in a shared cache.
struct Chunks {
  int64_t count, rows;

  Chunks(int64_t N, int64_t F, int64_t matrices) {
    constexpr int64_t bytes = 16 << 20;
    const int64_t row_bytes = matrices * F * int64_t(sizeof(float)) + 1;
    const int64_t most = bytes / row_bytes < block_rows ? block_rows : bytes / row_bytes;
    count = N > 0 ? ceil_div(N, most) : 1;
    rows = round_up(ceil_div(N, count), tile_rows);
    if (rows > 0) count = ceil_div(N, rows);
  }
  int64_t begin(int64_t chunk) const { return chunk * rows; }
  int64_t size(int64_t chunk, int64_t N) const { return N - begin(chunk) < rows ? N - begin(chunk) : rows; }
};

// A product's transpose to its place: out[column] + block.row holds the block's column.
template <class T>
void store_output(const Block& block, float* sums, T* out, int64_t stride) {
  store_turned(sums, block.rows, block.columns, out + block.column * stride + block.row, stride);
}

template <class T>
void forward(const FfnForward& a) {
  using Operand = operand_t<T>;
  const int64_t N = a.input.shape[0], E = a.input.shape[1], F = a.weight1.shape[0], O = a.weight2.shape[0];
  const Bias bias1(a.bias1), bias2(a.bias2);
  const Dropout dropout = Dropout::make(a.dropout_p, {a.seed, a.offset});
  const Chunks chunks(N, F, 1);
  const LeftRows<Operand, T> weight1(a.weight1.ptr<const T>(), E, F, E, chunks.rows);
  const LeftRows<Operand, T> weight2(a.weight2.ptr<const T>(), F, O, F, chunks.rows);

  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), tokens = chunks.size(chunk, N);
    const Packed<Operand> activated(tokens, F, tile_width);
    {
      const Packed<Operand> input(right_transposed<Operand>(a.input.ptr<const T>() + begin * E, E), tokens, E);
      gemm<Operand>(F, tokens, weight1, input, [&](const Block& block, float* sums) {
        const BlockDropout drop(dropout, F, begin, block);
        by_strips(block, sums, [&](const Block& strip, float* values) {
          bias1.add_to(strip, values);
          if (a.hidden) store_output(strip, values, a.hidden.ptr<T>() + begin * F, F);
          for (int64_t i = 0; i < strip.rows; ++i) activate(a.activation, values + i * block_columns, strip.columns);
          drop.apply(strip, values);
          activated.store_depths(strip.row, strip.rows, strip.column, strip.columns, values, block_columns);
        });
      });
    }
    gemm<Operand>(O, tokens, weight2, activated, [&](const Block& block, float* sums) {
      bias2.add_to(block, sums);
      store_output(block, sums, a.output.ptr<T>() + begin * O, O);
    });
  }
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

// sums (+)= the column sums of [rows, columns]. Groups of 16 rows are summed, then groups of 16 groups,
// which keeps the rounding error of long sums small; a thread takes whole columns.
template <class T>
void column_sums(const T* matrix, int64_t rows, int64_t columns, float* sums, bool add) {
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
          for (int64_t t = s; t < rows && t < s + group; ++t) add_row(small, matrix + t * columns + column, count);
          add_row(large, small, count);
        }
        add_row(sums + column, large, count);
      }
    }
  });
}

// A matrix [features, tokens] of a chunk, as a left operand in place: rows end on a whole vector and are no
// multiple of a page apart.
template <class Operand>
class FeatureRows {
 public:
  FeatureRows(int64_t features, int64_t tokens)
      : stride_(round_up(tokens, lanes) + lanes), data_(features > 0 ? features * stride_ : 0) {}

  Operand* row(int64_t i) const { return data_.get() + i * stride_; }

  // Values beyond the last token, up to a whole vector, are zeros.
  void store(const Block& block, const float* sums) const {
    for (int64_t i = 0; i < block.rows; ++i) {
      for_vectors(block.columns, [&](int64_t c, int n) {
        load(sums + i * block_columns + c, n).store(row(block.row + i) + block.column + c);
      });
    }
  }

  LeftView<Operand> as_left(int64_t tokens) const { return {data_.get(), tokens, stride_, 0, false}; }

 private:
  int64_t stride_;
  Scratch<Operand> data_;
};

// What backward derives from a chunk of the hidden layer, where it is wanted.
template <class T>
struct HiddenBackward {
  using Operand = operand_t<T>;

  const FfnBackward& a;
  const Dropout& dropout;
  int64_t F, begin;
  const FeatureRows<Operand>&activated, &grad_hidden;
  const Packed<Operand>& grad_operand;  // grad_hidden again, as the right operand of grad_input's product
  float* bias_sums;                     // [tokens / tile_width][F]

  // `sums` come in as a block of W2^T grad_output^T.
  void operator()(const Block& block, float* sums) const {
    const BlockDropout drop(dropout, F, begin, block);
    by_strips(block, sums, [&](const Block& strip, float* grad) {
      float values[lanes * block_columns];
      const T* hidden = a.hidden.ptr<const T>() + (begin + strip.column) * F + strip.row;
      load_turned(hidden, F, strip.rows, strip.columns, values);
      for (int64_t i = 0; i < strip.rows; ++i) {
        float* row = values + i * block_columns;
        activate_backward(a.activation, row, grad + i * block_columns, strip.columns);
      }
      drop.apply(strip, values);
      drop.apply(strip, grad);
      if (a.grad_weight2) activated.store(strip, values);
      if (a.grad_weight1) grad_hidden.store(strip, grad);
      if (a.grad_input) {
        grad_operand.store_depths(strip.row, strip.rows, strip.column, strip.columns, grad, block_columns);
      }
      if (a.grad_bias1) sum_rows(strip, grad);
    });
  }

  // One sum for every tile_width tokens, however the blocks were cut.
  void sum_rows(const Block& strip, const float* grad) const {
    for (int64_t i = 0; i < strip.rows; ++i) {
      for (int64_t c = 0; c < strip.columns; c += tile_width) {
        const int64_t count = strip.columns - c < tile_width ? strip.columns - c : tile_width;
        Vec sum = Vec::zero();
        for_vectors(count, [&](int64_t j, int n) { sum = sum + load(grad + i * block_columns + c + j, n); });
        bias_sums[(strip.column + c) / tile_width * F + strip.row + i] = sum.sum();
      }
    }
  }
};

template <class T>
void backward(const FfnBackward& a) {
  using Operand = operand_t<T>;
  const int64_t N = a.input.shape[0], E = a.input.shape[1], F = a.weight1.shape[0], O = a.weight2.shape[0];
  const bool need_hidden = a.grad_input || a.grad_weight1 || a.grad_bias1 || a.grad_weight2;
  const Dropout dropout = Dropout::make(a.dropout_p, {a.seed, a.offset});
  const Chunks chunks(N, F, 2);
  const WeightGradient<T> grad1(a.grad_weight1, false, chunks.count), grad2(a.grad_weight2, true, chunks.count);
  const FeatureRows<Operand> activated(a.grad_weight2 ? F : 0, chunks.rows);
  const FeatureRows<Operand> grad_hidden(a.grad_weight1 ? F : 0, chunks.rows);
  const Packed<Operand> weight2(left_transposed<Operand>(a.weight2.ptr<const T>(), F), need_hidden ? F : 0, O);
  const Packed<Operand> weight1(left_transposed<Operand>(a.weight1.ptr<const T>(), E), a.grad_input ? E : 0, F);

  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), tokens = chunks.size(chunk, N);
    const T* input = a.input.ptr<const T>() + begin * E;
    const T* grad_output = a.grad_output.ptr<const T>() + begin * O;
    const Packed<Operand> grad_operand(a.grad_input ? tokens : 0, F, tile_width);
    const int64_t groups = ceil_div(tokens, tile_width);
    const Scratch<float> bias_sums(a.grad_bias1 ? groups * F : 0);
    if (need_hidden) {
      const Packed<Operand> upstream(right_transposed<Operand>(grad_output, O), tokens, O);
      const HiddenBackward<T> hidden{a, dropout, F, begin, activated, grad_hidden, grad_operand, bias_sums.get()};
      gemm<Operand>(F, tokens, weight2, upstream, hidden);
    }
    if (a.grad_weight2) {
      gemm<Operand>(F, O, activated.as_left(tokens), Packed<Operand>(right<Operand>(grad_output, O), O, tokens),
                    grad2.add_chunk(chunk));
    }
    if (a.grad_weight1) {
      gemm<Operand>(F, E, grad_hidden.as_left(tokens), Packed<Operand>(right<Operand>(input, E), E, tokens),
                    grad1.add_chunk(chunk));
    }
    if (a.grad_input) {
      gemm<Operand>(E, tokens, weight1, grad_operand, [&](const Block& block, float* sums) {
        store_output(block, sums, a.grad_input.ptr<T>() + begin * E, E);
      });
    }
    if (a.grad_bias1) column_sums(bias_sums.get(), groups, F, a.grad_bias1.ptr<float>(), chunk > 0);
    if (a.grad_bias2) column_sums(grad_output, tokens, O, a.grad_bias2.ptr<float>(), chunk > 0);
  }
}

}  // namespace

void ffn_fwd(const FfnForward& a) {
  a.input.dtype == DType::bfloat16 ? forward<bfloat16>(a) : forward<float>(a);
}

void ffn_bwd(const FfnBackward& a) {
  a.input.dtype == DType::bfloat16 ? backward<bfloat16>(a) : backward<float>(a);
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
