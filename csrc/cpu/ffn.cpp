// The feed-forward layer: two matrix products with everything between them done while it is in cache.
//
// The arithmetic is all in gemm.h; what is fused here is what torch does in passes of their own over
// [N,F], the largest matrix of the layer. Bias, activation and dropout are applied to a block of the
// hidden layer as the first product finishes it, and the activated values go straight to the operand
// of the second product. Tokens are taken in chunks whose hidden layer fits in a shared cache, so
// an [N,F] matrix exists in memory only where the caller wants it, before the activation, for backward.
//
// Every product with a weight is computed as its transpose, weight times tokens (weights.h): the hidden layer
// comes out with tokens in lanes, a feature a row, which is how the right operand of the second product
// wants it; only what leaves for memory is turned.
//
// Backward, with h the hidden layer, m the multipliers of dropout, drawn again, and a = act(h) m, has tokens in rows:
//     grad_hidden  = (grad_output W2) act'(h) m           a and grad_hidden in one epilogue, from one h
//     grad_weight2 = grad_output^T a                      grad_bias2 = column sums of grad_output
//     grad_weight1 = (x^T grad_hidden)^T                  grad_bias1 = column sums of grad_hidden
//     grad_input   = grad_hidden W1
// Here the weights' rows are those of right operands, which are packed without turning anything, h is read as it lies,
// and a and grad_hidden are right operands of the middle two as the epilogue stores them, grad_hidden also the left one
// of the last. What is turned has one row a token and few columns, x and grad_output, but for grad_weight1.
// A gate g, computed by a product of its own before the hidden layer (and again in backward), multiplies a and
// grad_hidden, and has a gradient, (grad_output W2) act(h) m, that goes on as grad_hidden does.
// It takes chunks of tokens too; the gradients of the weights are summed over chunks in float32, in order. The
// activation is applied to the float32 sums in forward and to the stored h in backward: for bfloat16 the
// two differ by less than a rounding.
#include "ffn.h"

#include "parallel.h"
#include "philox.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"
#include "tile.h"
#include "vec_math.h"
#include "weights.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

// ---- Activations: value y and derivative dy, to the precision of T.

template <class T>
struct Relu {
  static Vec value(Vec x) { return max(Vec::zero(), x); }  // in this order NaN passes through
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    y = value(x);
    dx = select(Vec::zero() >= x, Vec::zero(), grad);
  }
};

template <class T>
struct Gelu {
  static Vec value(Vec x) { return x * normal_distribution<T>(x).cumulative; }
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    const NormalDistribution normal = normal_distribution<T>(x);
    y = x * normal.cumulative;
    dx = grad * fma(x, normal.density, normal.cumulative);
  }
};

// x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class T>
struct GeluTanh {
  static constexpr float linear = 1.5957691216057308f, cubic = 0.044715f * linear;

  static Sigmoid gate(Vec x) { return sigmoid<T>(x * fma(x * x, Vec::set1(cubic), Vec::set1(linear))); }
  static Vec value(Vec x) { return x * gate(x).value; }
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    const Sigmoid s = gate(x);
    const Vec slope = fma(x * x, Vec::set1(3 * cubic), Vec::set1(linear));
    y = x * s.value;
    dx = grad * fma(y * s.complement, slope, s.value);
  }
};

template <class T>
struct Silu {
  static Vec value(Vec x) { return x * sigmoid<T>(x).value; }
  static void both(Vec x, Vec grad, Vec& y, Vec& dx) {
    const Sigmoid s = sigmoid<T>(x);
    y = x * s.value;
    dx = grad * fma(y, s.complement, s.value);
  }
};

// body(kind), with the structure above that `activation` names.
template <class T, class Body>
inline void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::relu: return body(Relu<T>{});
    case Activation::gelu: return body(Gelu<T>{});
    case Activation::gelu_tanh: return body(GeluTanh<T>{});
    case Activation::silu: return body(Silu<T>{});
  }
}

// values = activation(values), for the rows of a strip
template <class T>
void activate(Activation activation, const Block& strip, float* values) {
  with_activation<T>(activation, [&](auto kind) {
    for (int64_t i = 0; i < strip.rows; ++i) {
      float* row = values + i * block_columns;
      for_vectors(strip.columns, [&](int64_t c, int n) { store(row + c, kind.value(load(row + c, n)), n); });
    }
  });
}

// grad *= activation'(values); values = activation(values)
template <class T>
void activate_backward(Activation activation, const Block& strip, float* values, float* grad) {
  with_activation<T>(activation, [&](auto kind) {
    for (int64_t i = 0; i < strip.rows * block_columns; i += block_columns) {
      for_vectors(strip.columns, [&](int64_t c, int n) {
        Vec y, dx;
        kind.both(load(values + i + c, n), load(grad + i + c, n), y, dx);
        store(values + i + c, y, n);
        store(grad + i + c, dx, n);
      });
    }
  });
}

// body(strip, values) for strips of a block, a vector's lanes of rows at a time: they stay in L1.
template <class Body>
void by_strips(const Block& block, float* sums, const Body& body) {
  for (int64_t r = 0; r < block.rows; r += lanes) {
    const int64_t rows = block.rows - r < lanes ? block.rows - r : lanes;
    body(Block{block.row + r, block.column, rows, block.columns}, sums + r * block_columns);
  }
}

// Dropout on a strip: bit c % 64 of word(row, c / 64) says whether column c of a row of it is kept.
template <class Word>
inline void drop_strip(const Dropout& dropout, const Block& strip, float* values, const Word& word) {
  if (dropout.dropped == 0) return;
  const Vec scale = Vec::set1(dropout.scale);
  for (int64_t i = 0; i < strip.rows; ++i) {
    float* row = values + i * block_columns;
    for_vectors(strip.columns, [&](int64_t c, int n) {
      const Mask keep = Mask::from_bits(uint32_t(word(i, c / 64) >> (c % 64)));
      store(row + c, select(keep, load(row + c, n) * scale, Vec::zero()), n);
    });
  }
}

// Dropout on the elements of [N,F], for a block of the hidden layer: features in rows, tokens in columns.
class BlockDropout {
 public:
  BlockDropout(const Dropout& dropout, int64_t features, int64_t first_token, const Block& block)
      : dropout_(dropout), first_row_(block.row) {
    if (dropout.dropped == 0) return;
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
    const int64_t first = strip.row - first_row_;
    drop_strip(dropout_, strip, values, [&](int64_t i, int64_t w) { return kept_[w][first + i]; });
  }

 private:
  static constexpr int64_t most_rows = block_rows > most_narrow_rows ? block_rows : most_narrow_rows;
  static constexpr int64_t room = (most_rows + 63) / 64;
  const Dropout& dropout_;
  int64_t first_row_;
  uint64_t kept_[block_columns / 64][64 * room];  // bit i of [c][row]: token 64 c + i of the block is kept
};

// A matrix of a chunk, written and read by blocks of a product, and a left operand in place: rows begin on a cache
// line, end on a whole vector and are no multiple of a page apart.
template <class Operand>
class BlockRows {
  static constexpr int64_t line = lanes * depth_step<Operand>;

 public:
  BlockRows(int64_t rows, int64_t columns, bool wanted = true)
      : stride_(round_up(columns, line) + line), data_(wanted ? rows * stride_ : 0) {}

  // Values beyond the last column, up to a whole vector, are zeros.
  void put(const Block& block, const float* sums) const {
    for (int64_t i = 0; i < block.rows; ++i) {
      for_vectors(block.columns,
                  [&](int64_t c, int n) { load(sums + i * block_columns + c, n).store(at(block, i) + c); });
    }
  }

  void multiply(const Block& block, float* values) const {
    for (int64_t i = 0; i < block.rows; ++i) multiply_row(values + i * block_columns, at(block, i), block.columns);
  }

  void add_to(const Block& block, float* values) const {
    for (int64_t i = 0; i < block.rows; ++i) add_row(values + i * block_columns, at(block, i), block.columns);
  }

  LeftView<Operand> as_left(int64_t columns) const { return {data_.get(), columns, stride_, 0, false}; }
  const Operand* data() const { return data_.get(); }
  int64_t stride() const { return stride_; }

 private:
  Operand* at(const Block& block, int64_t i) const { return data_.get() + (block.row + i) * stride_ + block.column; }

  int64_t stride_;
  Scratch<Operand> data_;
};

// The gate of a chunk of tokens, as Product lays it out; empty where there is none.
template <class T, class Product>
class Gate {
 public:
  template <class Parameters>
  Gate(const Parameters& a, int64_t F, int64_t E, int64_t tokens)
      : defined_(a.weight_gate),
        bias_(a.bias_gate),
        weight_(a.weight_gate.template ptr<const T>(), E, defined_ ? F : 0, E),
        values_(Product::tokens_in_rows ? tokens : F, Product::tokens_in_rows ? F : tokens, defined_) {}

  // For the tokens of `input`.
  void compute(const typename Product::Right& input, int64_t tokens) const {
    if (!defined_) return;
    Product::multiply(tokens, weight_, input, [&](const Block& block, float* sums) {
      Product::tokens_in_rows ? bias_.add_to_columns(block, sums) : bias_.add_to(block, sums);
      values_.put(block, sums);
    });
  }

  void multiply(const Block& strip, float* values) const {
    if (defined_) values_.multiply(strip, values);
  }

 private:
  bool defined_;
  Bias bias_;
  typename Product::Weight weight_;
  BlockRows<float> values_;
};

template <class T, class Product>
void forward(const FfnForward& a) {
  const int64_t N = a.input.shape[0], E = a.input.shape[1], F = a.weight1.shape[0], O = a.weight2.shape[0];
  const Bias bias1(a.bias1), bias2(a.bias2);
  const Dropout dropout = Dropout::make(a.dropout_p, {a.seed, a.offset});
  const Chunks chunks(N, F);
  const Gate<T, Product> gate(a, F, E, chunks.rows);
  const typename Product::Weight weight1(a.weight1.ptr<const T>(), E, F, E);
  const typename Product::Weight weight2(a.weight2.ptr<const T>(), F, O, F);

  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), tokens = chunks.size(chunk, N);
    const typename Product::Right activated(tokens, F);
    {
      const auto input = Product::right(a.input.ptr<const T>() + begin * E, tokens, E);
      gate.compute(input, tokens);
      Product::multiply(tokens, weight1, input, [&](const Block& block, float* sums) {
        const BlockDropout drop(dropout, F, begin, block);
        by_strips(block, sums, [&](const Block& strip, float* values) {
          bias1.add_to(strip, values);
          if (a.hidden) store_output(strip, values, a.hidden.ptr<T>() + begin * F, F);
          activate<T>(a.activation, strip, values);
          gate.multiply(strip, values);
          drop.apply(strip, values);
          activated.store_depths(strip.row, strip.rows, strip.column, strip.columns, values);
        });
      });
    }
    Product::multiply(tokens, weight2, activated, [&](const Block& block, float* sums) {
      store_output(block, sums, a.output.ptr<T>() + begin * O, O, bias2.of(block));
    });
  }
}

// Dropout on the elements of [N,F], for a strip whose rows are tokens.
class StripDropout {
 public:
  StripDropout(const Dropout& dropout, int64_t features, int64_t first_token, const Block& strip) : dropout_(dropout) {
    for (int64_t i = 0; dropout.dropped > 0 && i < strip.rows; ++i) {
      dropout.keep_bits(uint64_t((first_token + strip.row + i) * features + strip.column), strip.columns, kept_[i]);
    }
  }

  void apply(const Block& strip, float* values) const {
    drop_strip(dropout_, strip, values, [&](int64_t i, int64_t w) { return kept_[i][w]; });
  }

 private:
  const Dropout& dropout_;
  uint64_t kept_[lanes][block_columns / 64];  // bit i of [row][word]: column 64 word + i of the strip is kept
};

// The gradient of hidden or gate, of one chunk, in the forms in which it goes on: as right operand for the gradient of
// the weight, and as rows for those of input and bias.
template <class T>
class InnerGradient {
  using Operand = operand_t<T>;

 public:
  InnerGradient(const TensorView& weight, const TensorView& grad_weight, const TensorView& grad_bias, bool for_input,
                int64_t chunk_rows, int64_t chunks)
      : F_(weight ? weight.shape[0] : 0),
        E_(weight ? weight.shape[1] : 0),
        for_input_(weight && for_input),
        for_bias_(grad_bias),
        for_weight_(grad_weight),
        grad_bias_(grad_bias),
        grad_weight_(grad_weight, true, chunks),
        weight_(right<Operand>(weight.ptr<const T>(), E_), for_input_ ? E_ : 0, F_),
        rows_(chunk_rows, F_, for_input_ || for_bias_) {}

  bool wanted() const { return for_input_ || for_bias_ || for_weight_; }

  // What the strips of a chunk are put into, as right operand.
  Packed<Operand> operand(int64_t tokens) const { return {for_weight_ ? F_ : 0, tokens}; }

  void put(const Block& strip, const float* grad, const Packed<Operand>& operand) const {
    if (for_weight_) operand.store_depths(strip.row, strip.rows, strip.column, strip.columns, grad);
    if (for_input_ || for_bias_) rows_.put(strip, grad);
  }

  // The gradients of weight and bias, when all strips of the chunk are in; `input` is its left operand, turned.
  void reduce(const Packed<Operand>& input, const Packed<Operand>& operand, int64_t tokens, int64_t chunk) const {
    if (for_weight_) gemm<Operand>(E_, F_, input, operand, grad_weight_.add_chunk(chunk));
    if (for_bias_) column_sums(rows_.data(), tokens, F_, grad_bias_.template ptr<float>(), chunk > 0, rows_.stride());
  }

  // epilogue(block, sums) for blocks of grad weight, the share of the input's gradient.
  template <class Epilogue>
  void to_input(int64_t tokens, const Epilogue& epilogue) const {
    gemm<Operand>(tokens, E_, rows_.as_left(F_), weight_, epilogue);
  }

 private:
  int64_t F_, E_;
  bool for_input_, for_bias_, for_weight_;
  TensorView grad_bias_;
  WeightGradient<T> grad_weight_;
  Packed<Operand> weight_;
  BlockRows<Operand> rows_;
};

// The epilogue that takes blocks of grad_output W2 to everything between the two products.
template <class T>
struct HiddenBackward {
  using Operand = operand_t<T>;
  const FfnBackward& a;
  const Dropout& dropout;
  const Gate<T, TokensInRows<T>>& gate;
  int64_t F, begin;
  const InnerGradient<T>&grad_hidden, &grad_gate;
  const Packed<Operand>&activated, &hidden_operand, &gate_operand;

  void operator()(const Block& block, float* sums) const {
    by_strips(block, sums, [&](const Block& strip, float* grad) {
      const StripDropout drop(dropout, F, begin, strip);
      float values[lanes * block_columns], through_gate[lanes * block_columns];
      const T* hidden = a.hidden.ptr<const T>() + (begin + strip.row) * F + strip.column;
      for (int64_t i = 0; i < strip.rows; ++i) copy_row(hidden + i * F, strip.columns, values + i * block_columns);
      if (grad_gate.wanted()) copy_row(grad, strip.rows * block_columns, through_gate);
      activate_backward<T>(a.activation, strip, values, grad);
      for (int64_t i = 0; grad_gate.wanted() && i < strip.rows * block_columns; i += block_columns) {
        multiply_row(through_gate + i, values + i, strip.columns);
      }
      gate.multiply(strip, values);
      gate.multiply(strip, grad);
      drop.apply(strip, values);
      drop.apply(strip, grad);
      if (a.grad_weight2) activated.store_depths(strip.row, strip.rows, strip.column, strip.columns, values);
      grad_hidden.put(strip, grad, hidden_operand);
      if (!grad_gate.wanted()) return;
      drop.apply(strip, through_gate);
      grad_gate.put(strip, through_gate, gate_operand);
    });
  }
};

// grad_input = grad_hidden W1 + grad_gate Wg, for the tokens from `begin` on.
template <class T>
void input_gradient(const FfnBackward& a, const InnerGradient<T>& grad_hidden, const InnerGradient<T>& grad_gate,
                    int64_t begin, int64_t tokens) {
  const int64_t E = a.input.shape[1];
  const BlockRows<float> share(tokens, E, a.weight_gate.defined);
  if (a.weight_gate) {
    grad_gate.to_input(tokens, [&](const Block& block, float* sums) { share.put(block, sums); });
  }
  grad_hidden.to_input(tokens, [&](const Block& block, float* sums) {
    if (a.weight_gate) share.add_to(block, sums);
    T* out = a.grad_input.ptr<T>() + (begin + block.row) * E + block.column;
    for (int64_t i = 0; i < block.rows; ++i) copy_row(sums + i * block_columns, block.columns, out + i * E);
  });
}

template <class T>
void backward(const FfnBackward& a) {
  using Operand = operand_t<T>;
  const int64_t N = a.input.shape[0], E = a.input.shape[1], F = a.weight1.shape[0], O = a.weight2.shape[0];
  const Dropout dropout = Dropout::make(a.dropout_p, {a.seed, a.offset});
  const Chunks chunks(N, F);
  const bool for_input = a.grad_input.defined;
  const InnerGradient<T> grad_hidden(a.weight1, a.grad_weight1, a.grad_bias1, for_input, chunks.rows, chunks.count);
  const InnerGradient<T> grad_gate(a.weight_gate, a.grad_weight_gate, a.grad_bias_gate, for_input, chunks.rows,
                                   chunks.count);
  const WeightGradient<T> grad2(a.grad_weight2, false, chunks.count);
  const bool need_hidden = grad_hidden.wanted() || grad_gate.wanted() || a.grad_weight2;
  const Packed<Operand> weight2(right<Operand>(a.weight2.ptr<const T>(), F), need_hidden ? F : 0, O);
  const Gate<T, TokensInRows<T>> gate(a, F, E, chunks.rows);

  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), tokens = chunks.size(chunk, N);
    const T* input = a.input.ptr<const T>() + begin * E;
    const T* grad_output = a.grad_output.ptr<const T>() + begin * O;
    const Packed<Operand> activated(a.grad_weight2 ? F : 0, tokens);
    const Packed<Operand> hidden_operand = grad_hidden.operand(tokens), gate_operand = grad_gate.operand(tokens);
    if (need_hidden) {
      gate.compute(TokensInRows<T>::right(input, tokens, E), tokens);
      const HiddenBackward<T> hidden{a,         dropout,   gate,           F,           begin, grad_hidden,
                                     grad_gate, activated, hidden_operand, gate_operand};
      gemm(F, LeftRows<Operand>(grad_output, O, tokens, O), weight2, hidden);
    }
    if (a.grad_weight2) {
      gemm<Operand>(O, F, Packed<Operand>(left_transposed<Operand>(grad_output, O), O, tokens), activated,
                    grad2.add_chunk(chunk));
    }
    {
      const bool for_weights = a.grad_weight1 || a.grad_weight_gate;
      const Packed<Operand> turned(left_transposed<Operand>(input, E), for_weights ? E : 0, tokens);
      grad_hidden.reduce(turned, hidden_operand, tokens, chunk);
      grad_gate.reduce(turned, gate_operand, tokens, chunk);
    }
    if (for_input) input_gradient(a, grad_hidden, grad_gate, begin, tokens);
    if (a.grad_bias2) column_sums(grad_output, tokens, O, a.grad_bias2.ptr<float>(), chunk > 0, O);
  }
}

template <class T>
void forward(const FfnForward& a) {
  a.input.shape[0] <= few_columns<T> ? forward<T, FewTokens<T>>(a) : forward<T, ManyTokens<T>>(a);
}

}  // namespace

void ffn_fwd(const FfnForward& a) {
  with_storage(a.input.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void ffn_bwd(const FfnBackward& a) {
  with_storage(a.input.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
