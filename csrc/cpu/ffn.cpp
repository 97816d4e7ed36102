// The feed-forward layer: two matrix products with everything between them done while it is in cache.
//
// The arithmetic is all in gemm.h; what is fused here is what torch does in passes of their own over
// [N,F], the largest matrix of the layer. Bias, activation and dropout are applied to a block of the
// hidden layer as the first product finishes it, and the activated values go straight to the operand
// type of the second product. Tokens are taken in chunks whose hidden layer fits in a shared cache, so
// an [N,F] matrix exists in memory only where the caller wants it, before the activation, for backward.
//
// Backward, with h the hidden layer, m the multipliers of dropout, drawn again, and a = act(h) m:
//     grad_hidden  = (grad_output W2) act'(h) m      a and grad_hidden in one epilogue, from one h
//     grad_weight2 = grad_output^T a                 grad_bias2 = column sums of grad_output
//     grad_input   = grad_hidden W1
//     grad_weight1 = grad_hidden^T x                 grad_bias1 = column sums of grad_hidden
// It takes chunks of tokens too; the gradients of the weights are summed over chunks in float32, in
// order. The activation is applied to the float32 sums in forward and to the stored h in backward: for
// bfloat16 the two differ by less than a rounding.
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

// values = activation(hidden); grad *= activation'(hidden)
template <class T>
void activate_backward(Activation activation, const T* hidden, float* values, float* grad, int64_t count) {
  with_activation(activation, [&](auto kind) {
    for_vectors(count, [&](int64_t c, int n) {
      Vec y, dx;
      kind.both(load(hidden + c, n), load(grad + c, n), y, dx);
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

inline void multiply_row(float* values, const float* by, int64_t count) {
  for_vectors(count, [&](int64_t c, int n) { store(values + c, load(values + c, n) * load(by + c, n), n); });
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
  void add_to(float* values, int64_t column, int64_t count) const {
    if (defined_) add_row(values, copy_.get() + column, count);
  }

 private:
  Scratch<float> copy_;
  bool defined_;
};

// Dropout on the elements of [N,F], by row and column.
struct HiddenDropout {
  Dropout dropout;
  int64_t columns;
  bool active;

  template <class Parameters>
  HiddenDropout(const Parameters& a, int64_t columns)
      : dropout(Dropout::make(a.dropout_p, {a.seed, a.offset})), columns(columns), active(a.dropout_p > 0) {}

  void apply(int64_t row, int64_t column, int64_t count, float* values, float* more = nullptr) const {
    if (!active) return;
    float room[block_columns + Dropout::spare];
    const float* multipliers = dropout.multipliers(uint64_t(row * columns + column), count, room);
    multiply_row(values, multipliers, count);
    if (more) multiply_row(more, multipliers, count);
  }
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

template <class T>
void forward(const FfnForward& a) {
  using Operand = operand_t<T>;
  const int64_t N = a.input.shape[0], E = a.input.shape[1], F = a.weight1.shape[0], O = a.weight2.shape[0];
  const Bias bias1(a.bias1), bias2(a.bias2);
  const HiddenDropout dropout(a, F);
  const Chunks chunks(N, F, 1);

  const Packed<Operand> weight1(right_transposed<Operand>(a.weight1.ptr<const T>(), E), F, E);
  const Packed<Operand> weight2(right_transposed<Operand>(a.weight2.ptr<const T>(), F), O, F);

  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), rows = chunks.size(chunk, N);
    const Packed<Operand> activated(rows, F);
    {
      const Packed<Operand> input(left<Operand>(a.input.ptr<const T>() + begin * E, E), rows, E);
      gemm(rows, F, input, weight1, [&](int64_t row, int64_t column, int64_t count, float* values) {
        bias1.add_to(values, column, count);
        if (a.hidden) copy_row(values, count, a.hidden.ptr<T>() + (begin + row) * F + column);
        activate(a.activation, values, count);
        dropout.apply(begin + row, column, count, values);
        activated.store_row(row, column, count, values);
      });
    }
    gemm(rows, O, activated, weight2, [&](int64_t row, int64_t column, int64_t count, float* values) {
      bias2.add_to(values, column, count);
      copy_row(values, count, a.output.ptr<T>() + (begin + row) * O + column);
    });
  }
}

// The gradient of a weight, summed over chunks of tokens: in place where it is float32, else in a
// float32 matrix of its own, rounded once with the last chunk.
template <class T>
class WeightGradient {
 public:
  WeightGradient(const TensorView& view, int64_t chunks)
      : out_(view.ptr<T>()),
        columns_(view ? view.shape[1] : 0),
        chunks_(chunks),
        own_(view && needs_own(chunks) ? view.shape[0] * view.shape[1] : 0) {
    if constexpr (sizeof(T) == sizeof(float)) sums_ = out_;
    if (needs_own(chunks)) sums_ = own_.get();
  }

  // The epilogue of chunk `chunk`'s product.
  auto add_chunk(int64_t chunk) const {
    return [this, chunk](int64_t row, int64_t column, int64_t count, float* values) {
      const int64_t at = row * columns_ + column;
      if (chunk > 0) add_row(values, sums_ + at, count);
      if (chunk + 1 == chunks_) {
        copy_row(values, count, out_ + at);
      } else {
        copy_row(values, count, sums_ + at);
      }
    };
  }

 private:
  static bool needs_own(int64_t chunks) { return sizeof(T) != sizeof(float) && chunks > 1; }

  T* out_;
  int64_t columns_, chunks_;
  Scratch<float> own_;
  float* sums_ = nullptr;
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

// What backward derives from a chunk of the hidden layer: its gradient and, for weight2, its activated
// values. `grad` comes in as (grad_output W2)[row, column ...] and is overwritten.
template <class T>
struct HiddenBackward {
  using Operand = operand_t<T>;
  const FfnBackward& a;
  const HiddenDropout& dropout;
  int64_t F, begin;
  Operand *grad_hidden, *activated;  // of the chunk; null where not needed

  void operator()(int64_t row, int64_t column, int64_t count, float* grad) const {
    float values[block_columns];
    const int64_t at = row * F + column;
    activate_backward(a.activation, a.hidden.ptr<const T>() + begin * F + at, values, grad, count);
    dropout.apply(begin + row, column, count, values, grad);
    if (grad_hidden) copy_row(grad, count, grad_hidden + at);
    if (activated) copy_row(values, count, activated + at);
  }
};

// Without the product before it, for where only grad_weight2 is wanted.
template <class T>
void activate_only(const HiddenBackward<T>& hidden, int64_t rows) {
  parallel_ranges(rows, max_threads(), [&](int64_t first, int64_t last, int) {
    float unused[block_columns] = {};
    for (int64_t r = first; r < last; ++r) {
      for (int64_t c = 0; c < hidden.F; c += block_columns) {
        hidden(r, c, hidden.F - c < block_columns ? hidden.F - c : block_columns, unused);
      }
    }
  });
}

template <class T>
void backward(const FfnBackward& a) {
  using Operand = operand_t<T>;
  const int64_t N = a.input.shape[0], E = a.input.shape[1], F = a.weight1.shape[0], O = a.weight2.shape[0];
  const bool need_hidden = a.grad_input || a.grad_weight1 || a.grad_bias1, need_activated = a.grad_weight2.defined;
  const HiddenDropout dropout(a, F);
  const Chunks chunks(N, F, 2);
  const Scratch<Operand> grad_hidden(need_hidden ? chunks.rows * F : 0);
  const Scratch<Operand> activated(need_activated ? chunks.rows * F : 0);
  const WeightGradient<T> grad1(a.grad_weight1, chunks.count), grad2(a.grad_weight2, chunks.count);
  const Packed<Operand> weight2(right<Operand>(a.weight2.ptr<const T>(), F), F, need_hidden ? O : 0);
  const Packed<Operand> weight1(right<Operand>(a.weight1.ptr<const T>(), E), E, a.grad_input ? F : 0);

  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), rows = chunks.size(chunk, N);
    const T* input = a.input.ptr<const T>() + begin * E;
    const T* grad_output = a.grad_output.ptr<const T>() + begin * O;
    const HiddenBackward<T> hidden{
        a, dropout, F, begin, need_hidden ? grad_hidden.get() : nullptr, need_activated ? activated.get() : nullptr};
    if (need_hidden) {
      gemm(rows, F, Packed<Operand>(left<Operand>(grad_output, O), rows, O), weight2, hidden);
    } else if (need_activated) {
      activate_only(hidden, rows);
    }
    if (a.grad_weight2) {
      gemm(O, F, Packed<Operand>(left_transposed<Operand>(grad_output, O), O, rows),
           Packed<Operand>(right<Operand>(activated.get(), F), F, rows), grad2.add_chunk(chunk));
    }
    if (a.grad_weight1) {
      gemm(F, E, Packed<Operand>(left_transposed<Operand>(grad_hidden.get(), F), F, rows),
           Packed<Operand>(right<Operand>(input, E), E, rows), grad1.add_chunk(chunk));
    }
    if (a.grad_input) {
      gemm(rows, E, Packed<Operand>(left<Operand>(grad_hidden.get(), F), rows, F), weight1,
           [&](int64_t row, int64_t column, int64_t count, float* values) {
             copy_row(values, count, a.grad_input.ptr<T>() + (begin + row) * E + column);
           });
    }
    if (a.grad_bias1) column_sums(grad_hidden.get(), rows, F, a.grad_bias1.ptr<float>(), chunk > 0);
    if (a.grad_bias2) column_sums(grad_output, rows, O, a.grad_bias2.ptr<float>(), chunk > 0);
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
