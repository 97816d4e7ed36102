// The loss of a linear classifier over a large vocabulary, and its gradients, in one pass.
//
// The logits [N,V] are the largest matrix of a language model's step; torch stores them, their log-softmax and
// two gradients of that shape. Here rows are taken in chunks. The logits of a chunk are computed for a block of
// the vocabulary at a time; the epilogue of the product adds the bias, caps, takes the maximum and the sum of
// exponentials of each piece of a row while it is in cache, and stores the logits of the chunk, rounded to the
// type of the input: sums are of the rounded ones, so that the probabilities derived from them add up to 1. When the
// chunk's log-sum-exps are known, its logits become their own gradient, in place, and two more products give what the
// chunk adds to the gradients of input and weight. (Hsu et al., "Liger Kernel", 2024, sec. 3.2, whose chunks keep their
// logits, too.)
//
// That is three products where the gradient is wanted, as many as torch computes: recomputing the logits, to
// store none of them, would make it four (Wijmans et al., "Cut Your Losses", 2024). It happens here only where
// the gradient of each row's loss is not known in the forward (reduction "none").
//
// Rows with an ignored target are left out of the chunks, so that they cost nothing and NaN in them stays there.
//
// Workspace: `chunk_logits` elements for the chunk; packed blocks of `vocabulary_block` rows of the weight; where
// there are several chunks and the weight is bfloat16, as many bytes as its gradient has, for the digits that do
// not fit in there (WeightGradient).
#include "linear_cross_entropy.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "gemm.h"
#include "parallel.h"
#include "simd.h"
#include "softcap.h"
#include "tile.h"
#include "vec_math.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t vocabulary_block = 1024;
constexpr int64_t chunk_logits = int64_t(1) << 24;
constexpr int64_t least_rows = 512, most_rows = 4096;  // of a chunk: the weight is packed again for each
constexpr float infinity = std::numeric_limits<float>::infinity();
static_assert(vocabulary_block % block_columns == 0);

// Degrees of the exponentials (vec_math.h): a float32 loss is wanted of bfloat16 logits, too; their gradient is
// rounded to bfloat16.
template <class T>
constexpr int sum_degree = 6;
template <>
constexpr int sum_degree<bfloat16> = 5;
template <class T>
constexpr int gradient_degree = 6;
template <>
constexpr int gradient_degree<bfloat16> = 3;

template <class From, class To>
inline void copy_row(const From* from, int64_t count, To* to) {
  for_vectors(count, [&](int64_t c, int n) { store(to + c, load(from + c, n), n); });
}

template <class T>
inline void add_row(float* values, const T* other, int64_t count) {
  for_vectors(count, [&](int64_t c, int n) { store(values + c, load(values + c, n) + load(other + c, n), n); });
}

// A large buffer for one call. Unlike Scratch it is given back to the system, so that a training step does not
// hold it while the rest of the model needs the memory.
template <class T>
std::unique_ptr<T[]> workspace(int64_t size) {
  return std::unique_ptr<T[]>(size > 0 ? new T[size_t(size)] : nullptr);
}

// What a call works on, of either direction.
template <class T>
struct Problem {
  const T *input, *weight;
  const TensorView& bias;
  const int64_t* target;
  int64_t N, E, V;
  CrossEntropyOptions options;
  float *loss, *lse;           // null in the backward
  const float* row_grad_loss;  // null: grad_loss is the same for all rows
  float grad_loss;
  const LinearCrossEntropyGradients& grad;
};

// The rows whose target counts, cut into chunks of equal size.
class CountedRows {
 public:
  template <class T>
  CountedRows(const Problem<T>& p) : rows_(p.N) {
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.target[n] != p.options.ignore_index) rows_.get()[count_++] = n;
    }
    const int64_t fit = p.V > 0 ? chunk_logits / p.V / 256 * 256 : most_rows;
    const int64_t most = !p.grad || fit > most_rows ? most_rows : fit < least_rows ? least_rows : fit;
    chunks_ = ceil_div(count_, most);
    chunk_rows_ = chunks_ > 0 ? ceil_div(count_, chunks_) : 0;
    if (chunk_rows_ > 0) chunks_ = ceil_div(count_, chunk_rows_);
  }
  int64_t count() const { return count_; }
  int64_t chunks() const { return chunks_; }
  int64_t chunk_rows() const { return chunk_rows_; }
  const int64_t* of_chunk(int64_t chunk) const { return rows_.get() + chunk * chunk_rows_; }
  int64_t size(int64_t chunk) const {
    const int64_t left = count_ - chunk * chunk_rows_;
    return left < chunk_rows_ ? left : chunk_rows_;
  }

 private:
  Scratch<int64_t> rows_;
  int64_t count_ = 0, chunks_ = 0, chunk_rows_ = 0;
};

// ---- The logits of a chunk and their sums.

// Of a piece of a row of logits: its maximum, the sum of exp(logit - max), the sum of the logits.
struct Sums {
  float max = -infinity, exponentials = 0, logits = 0;
};

template <int Degree>
Sums sums_of(const float* logits, int64_t count, bool total) {
  Vec top = Vec::set1(-infinity), sum = Vec::zero(), plain = Vec::zero();
  for_vectors(count, [&](int64_t c, int n) {
    const Vec x = load(logits + c, n);
    top = max(n == Vec::lanes ? x : select(Mask::first(n), x, top), top);  // in this order NaN is left out
  });
  Sums found;
  found.max = top.max();
  const Vec centre = Vec::set1(found.max == -infinity ? 0.0f : found.max), scale = Vec::set1(log2_e);
  for_vectors(count, [&](int64_t c, int n) {
    const Vec x = load(logits + c, n);
    const Vec e = exp2<Degree>((x - centre) * scale);
    sum = sum + (n == Vec::lanes ? e : select(Mask::first(n), e, Vec::zero()));
    if (total) plain = plain + x;
  });
  found.exponentials = sum.sum();
  found.logits = plain.sum();
  return found;
}

// The running sums of a row over the vocabulary.
struct RowSums {
  float max = -infinity;
  double exponentials = 0, logits = 0;
  float target_logit = 0;

  void add(const Sums& piece) {
    const float top = piece.max > max ? piece.max : max;
    if (top == -infinity) {
      exponentials += piece.exponentials;  // 0, or NaN to be passed on
    } else {
      exponentials =
          exponentials * std::exp(double(max) - top) + piece.exponentials * std::exp(double(piece.max) - top);
    }
    max = top;
    logits += piece.logits;
  }
  double lse() const { return max + std::log(exponentials); }
};

// Computes the logits of the rows packed in `x` and their sums; `logits` [rows,V] is written unless it is null.
// `target` [rows] has the rows' own targets.
template <class T>
void compute_logits(const Problem<T>& p, const Packed<operand_t<T>>& x, int64_t rows, const int64_t* target, T* logits,
                    RowSums* sums) {
  using Operand = operand_t<T>;
  const Softcap cap{p.options.softcap};
  const bool total = p.options.label_smoothing > 0;
  const T* bias = p.bias.template ptr<const T>();
  const Scratch<Sums> pieces(rows * (vocabulary_block / tile_width));

  for (int64_t begin = 0; begin < p.V; begin += vocabulary_block) {
    const int64_t classes = p.V - begin < vocabulary_block ? p.V - begin : vocabulary_block;
    const Packed<Operand> weight(right_transposed<Operand>(p.weight + begin * p.E, p.E), classes, p.E);
    const BlockGrid grid(rows, classes, p.E, max_threads());  // as gemm has it: a piece is a row of one block
    const auto piece = [&](int64_t row, int64_t column, int64_t count, float* values) {
      const int64_t first = begin + column;
      if (bias) add_row(values, bias + first, count);
      if (cap) for_vectors(count, [&](int64_t c, int n) { store(values + c, cap.value(load(values + c, n)), n); });
      T unstored[block_columns];
      T* stored = logits ? logits + row * p.V + first : unstored;
      copy_row(values, count, stored);
      if (sizeof(T) != sizeof(float)) copy_row(stored, count, values);  // sums of what the gradient will see
      pieces.get()[row * grid.blocks_across + column / grid.columns] = sums_of<sum_degree<T>>(values, count, total);
      if (target[row] >= first && target[row] < first + count) sums[row].target_logit = values[target[row] - first];
    };
    gemm<Operand>(rows, classes, x, weight, by_rows(piece));
    parallel_ranges(rows, max_threads(), [&](int64_t first, int64_t last, int) {
      for (int64_t r = first; r < last; ++r) {
        for (int64_t i = 0; i < grid.blocks_across; ++i) sums[r].add(pieces.get()[r * grid.blocks_across + i]);
      }
    });
  }
}

template <class T>
void write_loss(const Problem<T>& p, int64_t n, const RowSums& sums, double lse) {
  const double e = p.options.label_smoothing;
  double loss = lse - (1 - e) * sums.target_logit + p.options.z_loss * lse * lse;
  if (e > 0) loss -= e / double(p.V) * sums.logits;
  p.lse[n] = float(lse);
  p.loss[n] = float(loss);
}

// ---- Gradients.

// Turns a piece of a row of logits, classes [begin, begin + count), into the gradient of the loss of row n:
//     grad_loss ((1 + 2 z lse) p - e / V - (1 - e) [class = target]) cap'
// Where the classifier is sure of its target, p - 1 cancels: lse is taken in two parts, of a float32 each, and the
// target's own p in double.
template <class T>
void logit_gradients(const Problem<T>& p, int64_t n, double lse, int64_t begin, int64_t count, const T* logits,
                     float* grad) {
  const double e = p.options.label_smoothing, upstream = p.row_grad_loss ? p.row_grad_loss[n] : p.grad_loss;
  const double factor = upstream * (1 + 2 * p.options.z_loss * lse), spread = upstream * e / double(p.V);
  const Vec factors = Vec::set1(float(factor)), spreads = Vec::set1(float(spread)), lowest = Vec::set1(-126.0f);
  const Vec large = Vec::set1(float(lse)), small = Vec::set1(float(lse - float(lse))), scale = Vec::set1(log2_e);
  for_vectors(count, [&](int64_t c, int m) {
    const Vec x = load(logits + c, m), z = ((x - large) - small) * scale;
    const Vec exponential = exp2_normal<gradient_degree<T>>(max(lowest, z));  // in this order NaN passes through
    store(grad + c, factors * select(z < lowest, Vec::zero(), exponential) - spreads, m);
  });
  const int64_t at = p.target[n] - begin;
  if (at >= 0 && at < count) {
    grad[at] = float(factor * std::exp(double(to_float(logits[at])) - lse) - spread - upstream * (1 - e));
  }
  const Softcap cap{p.options.softcap};
  if (!cap) return;
  for_vectors(count, [&](int64_t c, int m) { store(grad + c, load(grad + c, m) * cap.slope(load(logits + c, m)), m); });
}

// The gradient of the weight, summed over chunks. A bfloat16 one is carried from chunk to chunk as the sum of two
// bfloat16 matrices, the result itself and what rounding left over: 17 bits at half the cost of a float32 matrix.
template <class T>
class WeightGradient {
 public:
  WeightGradient(const TensorView& view, int64_t E, int64_t chunks)
      : out_(view.ptr<T>()),
        E_(E),
        chunks_(chunks),
        rest_(workspace<T>(view && two_parts(chunks) ? view.numel() : 0)) {}

  // The epilogue of the product of `chunk` for the classes from `begin` on.
  auto add(int64_t begin, int64_t chunk) const {
    return [this, begin, chunk](int64_t row, int64_t column, int64_t count, float* values) {
      const int64_t at = (begin + row) * E_ + column;
      if (chunk > 0) add_row(values, out_ + at, count);
      if (chunk > 0 && rest_) add_row(values, rest_.get() + at, count);
      copy_row(values, count, out_ + at);
      if (!rest_ || chunk + 1 == chunks_) return;
      for_vectors(count, [&](int64_t c, int n) {
        store(rest_.get() + at + c, load(values + c, n) - load(out_ + at + c, n), n);
      });
    };
  }

 private:
  static bool two_parts(int64_t chunks) { return sizeof(T) != sizeof(float) && chunks > 1; }

  T* out_;
  int64_t E_, chunks_;
  std::unique_ptr<T[]> rest_;
};

// sums (+)= the column sums of [rows, columns], by groups of rows, which keeps the rounding error small.
template <class T>
void column_sums(const T* matrix, int64_t stride, int64_t rows, int64_t columns, float* sums, bool add) {
  constexpr int64_t group = 16;
  parallel_tasks(ceil_div(columns, block_columns), [&](int64_t task) {
    const int64_t column = task * block_columns;
    const int64_t count = columns - column < block_columns ? columns - column : block_columns;
    float total[block_columns] = {};
    for (int64_t r = 0; r < rows; r += group) {
      float part[block_columns] = {};
      for (int64_t i = r; i < rows && i < r + group; ++i) add_row(part, matrix + i * stride + column, count);
      add_row(total, part, count);
    }
    if (add) add_row(total, sums + column, count);
    copy_row(total, count, sums + column);
  });
}

// One chunk's share of the gradients. `logits` are overwritten by their gradient.
template <class T>
struct ChunkGradients {
  using Operand = operand_t<T>;
  const Problem<T>& p;
  const int64_t* row_of;  // where in the input a row of the chunk lies
  const double* lse;
  int64_t rows, chunk;
  T* logits;
  float* grad_input;  // [rows,E], for sums over the vocabulary

  void add(const T* input, const WeightGradient<T>& grad_weight) const {
    const Packed<Operand> x(right<Operand>(input, p.E), p.E, p.grad.weight ? rows : 0);
    for (int64_t begin = 0; begin < p.V; begin += vocabulary_block) {
      const int64_t classes = p.V - begin < vocabulary_block ? p.V - begin : vocabulary_block;
      T* block = logits + begin;
      {
        const Packed<Operand> grad(p.grad.input ? rows : 0, classes);
        differentiate(begin, classes, grad);
        if (p.grad.input) add_to_input(begin, classes, grad);
      }
      if (p.grad.weight) {
        gemm<Operand>(classes, p.E, Packed<Operand>(left_transposed<Operand>(block, p.V), classes, rows), x,
                      by_rows(grad_weight.add(begin, chunk)));
      }
      if (p.grad.bias) column_sums(block, p.V, rows, classes, p.grad.bias.template ptr<float>() + begin, chunk > 0);
    }
  }

 private:
  // Logits to gradients: in place, and as the left operand of the product for the input.
  void differentiate(int64_t begin, int64_t classes, const Packed<Operand>& grad) const {
    parallel_ranges(rows, max_threads(), [&](int64_t first, int64_t last, int) {
      float values[vocabulary_block];
      for (int64_t r = first; r < last; ++r) {
        T* row = logits + r * p.V + begin;
        logit_gradients(p, row_of[r], lse[r], begin, classes, row, values);
        copy_row(values, classes, row);
        if (p.grad.input) grad.store_row(r, 0, classes, values);
      }
    });
  }

  void add_to_input(int64_t begin, int64_t classes, const Packed<Operand>& grad) const {
    const Packed<Operand> weight(right<Operand>(p.weight + begin * p.E, p.E), p.E, classes);
    const bool last = begin + classes == p.V;
    const auto add_to_sums = [&](int64_t row, int64_t column, int64_t count, float* values) {
      float* sums = grad_input + row * p.E + column;
      if (begin > 0) add_row(values, sums, count);
      if (last) {
        copy_row(values, count, p.grad.input.template ptr<T>() + row_of[row] * p.E + column);
      } else {
        copy_row(values, count, sums);
      }
    };
    gemm<Operand>(rows, p.E, grad, weight, by_rows(add_to_sums));
  }
};

// The results of rows that do not count, and of everything where no row does.
template <class T>
void clear_uncounted(const Problem<T>& p, const CountedRows& counted) {
  for (int64_t n = 0; n < p.N; ++n) {
    if (p.target[n] != p.options.ignore_index) continue;
    if (p.loss) p.loss[n] = p.lse[n] = 0;
    if (p.grad.input) std::memset(p.grad.input.template ptr<T>() + n * p.E, 0, size_t(p.E) * sizeof(T));
  }
  if (counted.count() > 0) return;
  if (p.grad.weight) std::memset(p.grad.weight.data, 0, size_t(p.V * p.E) * sizeof(T));
  if (p.grad.bias) std::memset(p.grad.bias.data, 0, size_t(p.V) * sizeof(float));
}

template <class T>
void run(const Problem<T>& p) {
  using Operand = operand_t<T>;
  const CountedRows counted(p);
  clear_uncounted(p, counted);
  const int64_t most = counted.chunk_rows();
  const WeightGradient<T> grad_weight(p.grad.weight, p.E, counted.chunks());
  const auto logits = workspace<T>(p.grad ? most * p.V : 0);
  const Scratch<float> grad_input(p.grad.input ? most * p.E : 0);
  const Scratch<T> input(most * p.E);
  const Scratch<int64_t> target(most);
  const Scratch<RowSums> sums(most);
  const Scratch<double> lse(most);

  for (int64_t chunk = 0; chunk < counted.chunks(); ++chunk) {
    const int64_t rows = counted.size(chunk);
    const int64_t* row_of = counted.of_chunk(chunk);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(input.get() + r * p.E, p.input + row_of[r] * p.E, size_t(p.E) * sizeof(T));
      target.get()[r] = p.target[row_of[r]];
      sums.get()[r] = RowSums{};
    }
    compute_logits(p, Packed<Operand>(left<Operand>(input.get(), p.E), rows, p.E), rows, target.get(), logits.get(),
                   sums.get());
    for (int64_t r = 0; r < rows; ++r) {
      lse.get()[r] = sums.get()[r].lse();
      if (p.loss) write_loss(p, row_of[r], sums.get()[r], lse.get()[r]);
    }
    if (p.grad) {
      const ChunkGradients<T> gradients{p, row_of, lse.get(), rows, chunk, logits.get(), grad_input.get()};
      gradients.add(input.get(), grad_weight);
    }
  }
}

template <class T>
void forward(const LinearCrossEntropyForward& a) {
  run(Problem<T>{a.input.ptr<const T>(), a.weight.ptr<const T>(), a.bias, a.target.ptr<const int64_t>(),
                 a.input.shape[0], a.input.shape[1], a.weight.shape[0], a.options, a.loss.ptr<float>(),
                 a.lse.ptr<float>(), nullptr, a.grad_loss, a.grad});
}

template <class T>
void backward(const LinearCrossEntropyBackward& a) {
  run(Problem<T>{a.input.ptr<const T>(), a.weight.ptr<const T>(), a.bias, a.target.ptr<const int64_t>(),
                 a.input.shape[0], a.input.shape[1], a.weight.shape[0], a.options, nullptr, nullptr,
                 a.grad_loss.ptr<const float>(), 1.0f, a.grad});
}

}  // namespace

void linear_cross_entropy_fwd(const LinearCrossEntropyForward& a) {
  a.input.dtype == DType::bfloat16 ? forward<bfloat16>(a) : forward<float>(a);
}

void linear_cross_entropy_bwd(const LinearCrossEntropyBackward& a) {
  a.input.dtype == DType::bfloat16 ? backward<bfloat16>(a) : backward<float>(a);
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
