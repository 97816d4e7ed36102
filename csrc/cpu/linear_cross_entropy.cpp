// The loss of a linear classifier over a large vocabulary, and its gradients, in one pass.
//
// The logits [N,V] are the largest matrix of a language model's step; torch stores them, their log-softmax and
// two gradients of that shape. Here rows are taken in chunks. The logits of a chunk are computed for a block of
// the vocabulary at a time; the epilogue of the product adds the bias, caps, takes the maximum and the sum of
// exponentials of its block of each row while that is in cache, and stores the logits of the chunk, rounded to the
// type of the input: sums are of the rounded ones, so that the probabilities derived from them add up to 1. When the
// chunk's log-sum-exps are known, its logits become their own gradient, in place, and two more products give what the
// chunk adds to the gradients of input and weight. (Hsu et al., "Liger Kernel", 2024, sec. 3.2, whose chunks keep their
// logits, too.)
//
// That is three products where the gradient is wanted, as many as torch computes: recomputing the logits, to
// store none of them, would make it four (Wijmans et al., "Cut Your Losses", 2024). It happens here only where
// the gradient of each row's loss is not known in the forward (reduction "none").
//
// Of few rows the products are small, and threads that share each of them wait for one another more than they work.
// The vocabulary is then cut into parts, and a thread that takes one does everything for it; the gradients of the input
// that parts give are added in the end.
//
// Rows with an ignored target are left out of the chunks, so that they cost nothing and NaN in them stays there.
//
// Workspace: `chunk_logits` elements for the chunk; packed blocks of `vocabulary_block` rows of the weight; of parts,
// `part_sums` floats and a smaller block of the weight for each thread; where there are several chunks and the weight
// has 16 bits, as many bytes as its gradient has, for the digits that do not fit in there (WeightGradient).
#include "linear_cross_entropy.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "gemm.h"
#include "large_memory.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"
#include "softcap.h"
#include "tile.h"
#include "vec_math.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t vocabulary_block = 1024;
constexpr int64_t chunk_logits = int64_t(1) << 24;
constexpr int64_t least_rows = 512, most_rows = 4096;  // of a chunk: the weight is packed again for each
constexpr int64_t least_parts = 8, most_parts = 64, least_classes = 256;
constexpr int64_t part_sums = int64_t(1) << 21;     // elements of all parts' gradients of the input
constexpr int64_t part_weights = int64_t(1) << 18;  // elements of a block of the weight: of a size for L2
constexpr float infinity = std::numeric_limits<float>::infinity();
static_assert(vocabulary_block % block_columns == 0);

// The degree of the exponentials (vec_math.h) that are summed: a float32 loss is wanted of 16-bit logits, too.
template <class T>
constexpr int sum_degree = sizeof(T) == sizeof(float) ? 6 : 5;

// A large buffer for one call. Unlike Scratch no thread keeps it while the rest of the model needs the memory.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t size) : buffer_(size_t(size) * sizeof(T)) {}
  T* get() const { return static_cast<T*>(buffer_.data()); }

 private:
  LargeBuffer buffer_;
};

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

// The classes in parts, and these in blocks, one for each product. How they are cut does not depend on the number of
// threads, nor therefore on it the order of sums.
class Parts {
 public:
  Parts(int64_t rows, int64_t E, int64_t V) : V_(V) {
    constexpr int64_t whole = block_depth<bfloat16>;  // a multiple of every operand's
    int64_t count = part_sums / (rows * E > 0 ? rows * E : 1);
    for (const int64_t most : {most_parts, V / least_classes}) count = count < most ? count : most;
    if (count >= least_parts) {
      classes_ = round_up(ceil_div(V, count), whole);
      const int64_t blocks = ceil_div(classes_ * E, part_weights);
      block_ = round_up(ceil_div(classes_, blocks), whole);
    }
  }
  int64_t count() const { return ceil_div(V_, classes_); }

  // body(part), each on a thread of its own where that keeps all of them busy. Else all work on one part at a time.
  template <class Body>
  void run(const Body& body) const {
    if (!idle(count(), max_threads())) return parallel_tasks(count(), body);
    for (int64_t part = 0; part < count(); ++part) body(part);
  }

  // body(first class, classes) for the blocks of a part.
  template <class Body>
  void for_blocks(int64_t part, const Body& body) const {
    const int64_t end = (part + 1) * classes_ < V_ ? (part + 1) * classes_ : V_;
    for (int64_t begin = part * classes_; begin < end; begin += block_) {
      body(begin, end - begin < block_ ? end - begin : block_);
    }
  }

 private:
  int64_t V_, classes_ = V_, block_ = vocabulary_block;
};

// Rows of one chunk. Their logits lie turned, [V][stride], one class after the other, so that what is done to them
// is done to rows in lanes, and so that they and the weight are read where they lie by all but one product.
template <class T>
struct Chunk {
  const int64_t* row_of;  // where in the input a row of the chunk lies
  int64_t rows, stride;
  Parts parts;
  const int64_t* target;
  T* logits;  // null where no gradient is wanted
};

// ---- The logits of a chunk and their sums.

// Of some logits of a row: their maximum, the sum of exp(logit - max), the sum of the logits.
struct Sums {
  float max = -infinity, exponentials = 0, logits = 0;
};

// The sums of `classes` logits of each of `count` rows in lanes, at logits[class * block_columns + row].
template <int Degree>
void sums_of(const float* logits, int64_t classes, int count, bool total, Sums* sums) {
  Vec top = Vec::set1(-infinity), sum = Vec::zero(), plain = Vec::zero();
  for (int64_t i = 0; i < classes; ++i) top = max(Vec::load(logits + i * block_columns), top);  // leaves NaN out
  const Vec centre = select(top == Vec::set1(-infinity), Vec::zero(), top), scale = Vec::set1(log2_e);
  for (int64_t i = 0; i < classes; ++i) {
    const Vec x = Vec::load(logits + i * block_columns);
    sum = sum + exp2<Degree>((x - centre) * scale);
    if (total) plain = plain + x;
  }
  float tops[Vec::lanes], exponentials[Vec::lanes], totals[Vec::lanes];
  top.store(tops), sum.store(exponentials), plain.store(totals);
  for (int i = 0; i < count; ++i) sums[i] = {tops[i], exponentials[i], totals[i]};
}

// The running sums of a row over the vocabulary.
struct RowSums {
  float max = -infinity;
  double exponentials = 0, logits = 0;
  float target_logit = 0;

  template <class Piece>  // Sums, or those of a part
  void add(const Piece& piece) {
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

// What is done to a block of products, [classes][rows], once: bias, cap, storing, sums. The block begins at class
// `first`; `pieces` and `sums` are those of its first row.
template <class T>
void finish_logits(const Problem<T>& p, const Chunk<T>& chunk, const Block& block, int64_t first, float* values,
                   Sums* pieces, RowSums* sums) {
  const Softcap cap{p.options.softcap};
  const T* bias = p.bias.template ptr<const T>();
  for (int64_t i = 0; i < block.rows; ++i) {
    float* row = values + i * block_columns;
    const Vec addend = Vec::set1(bias ? to_float(bias[first + i]) : 0.0f);
    for_vectors(block.columns, [&](int64_t c, int n) {
      const Vec x = load(row + c, n) + addend;
      store(row + c, cap ? cap.value(x) : x, n);
    });
    T unstored[block_columns];
    T* stored = chunk.logits ? chunk.logits + (first + i) * chunk.stride + block.column : unstored;
    copy_row(row, block.columns, stored);
    if (sizeof(T) != sizeof(float)) copy_row(stored, block.columns, row);  // sums of what the gradient will see
  }
  for_vectors(block.columns, [&](int64_t c, int n) {
    sums_of<sum_degree<T>>(values + c, block.rows, n, p.options.label_smoothing > 0, pieces + c);
  });
  for (int64_t c = 0; c < block.columns; ++c) {
    const int64_t at = chunk.target[block.column + c] - first;
    if (at >= 0 && at < block.rows) sums[c].target_logit = values[at * block_columns + c];
  }
}

// Computes the logits of a block of classes, their transpose being weight x^T, and adds to the sums of the rows.
template <class T>
void compute_block(const Problem<T>& p, const Chunk<T>& chunk, const Packed<operand_t<T>>& x, int64_t begin,
                   int64_t classes, RowSums* sums) {
  using Operand = operand_t<T>;
  const int64_t rows = chunk.rows;
  const LeftRows<Operand> weight(p.weight + begin * p.E, p.E, classes, p.E);
  const BlockGrid grid(classes, rows, weight.view);  // as gemm has it
  const Scratch<Sums> pieces(grid.blocks_down * rows);
  gemm(rows, weight, x, [&](const Block& block, float* values) {
    Sums* found = pieces.get() + block.row / grid.rows * rows + block.column;
    finish_logits(p, chunk, block, begin + block.row, values, found, sums + block.column);
  });
  // A piece costs two exponentials in double, as much as some 64 elements.
  parallel_ranges(rows, threads_for(rows * grid.blocks_down * 64), [&](int64_t first, int64_t last, int) {
    for (int64_t r = first; r < last; ++r) {
      for (int64_t i = 0; i < grid.blocks_down; ++i) sums[r].add(pieces.get()[i * rows + r]);
    }
  });
}

// Computes the logits of the rows packed in `x`, and their sums.
template <class T>
void compute_logits(const Problem<T>& p, const Chunk<T>& chunk, const Packed<operand_t<T>>& x, RowSums* sums) {
  const int64_t rows = chunk.rows, parts = chunk.parts.count();
  const Scratch<RowSums> sums_of_parts(parts * rows);
  chunk.parts.run([&](int64_t part) {
    RowSums* found = sums_of_parts.get() + part * rows;
    for (int64_t r = 0; r < rows; ++r) found[r] = RowSums{};
    chunk.parts.for_blocks(part,
                           [&](int64_t begin, int64_t classes) { compute_block(p, chunk, x, begin, classes, found); });
  });
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = RowSums{};
    for (int64_t part = 0; part < parts; ++part) {
      const RowSums& found = sums_of_parts.get()[part * rows + r];
      sums[r].add(found);
      sums[r].target_logit += found.target_logit;  // 0 in all parts but the target's
    }
  }
}

template <class T>
void write_loss(const Problem<T>& p, int64_t n, const RowSums& sums) {
  const double e = p.options.label_smoothing, lse = sums.lse();
  double loss = lse - (1 - e) * sums.target_logit + p.options.z_loss * lse * lse;
  if (e > 0) loss -= e / double(p.V) * sums.logits;
  p.lse[n] = float(lse);
  p.loss[n] = float(loss);
}

// ---- Gradients.

// What makes the gradient of the logits of a chunk's rows out of the logits, row by row:
//     grad_loss ((1 + 2 z lse) p - e / V - (1 - e) [class = target]) cap'
// Where the classifier is sure of its target, p - 1 cancels: lse is taken in two parts, of a float32 each, and the
// gradient of the target's own logit is computed in double.
class LogitGradients {
 public:
  template <class T>
  LogitGradients(const Problem<T>& p, const Chunk<T>& chunk, const RowSums* sums)
      : cap_{p.options.softcap}, rows_(chunk.rows), memory_(5 * chunk.rows) {
    const double e = p.options.label_smoothing;
    for (int64_t r = 0; r < rows_; ++r) {
      const double lse = sums[r].lse(), logit = sums[r].target_logit;
      const double upstream = p.row_grad_loss ? p.row_grad_loss[chunk.row_of[r]] : p.grad_loss;
      const double factor = upstream * (1 + 2 * p.options.z_loss * lse), spread = upstream * e / double(p.V);
      const double ratio = cap_ ? logit / cap_.cap : 0;
      row(factors)[r] = float(factor);
      row(spreads)[r] = float(spread);
      row(large_lse)[r] = float(lse);
      row(small_lse)[r] = float(lse - double(float(lse)));
      row(targets)[r] = float((factor * std::exp(logit - lse) - spread - upstream * (1 - e)) * (1 - ratio * ratio));
    }
  }

  // In place, the logits of all rows for one class; of no row the target.
  template <class T>
  void differentiate(T* logits) const {
    const Vec scale = Vec::set1(log2_e), lowest = Vec::set1(-126.0f);
    for_vectors(rows_, [&](int64_t c, int n) {
      const Vec x = load(logits + c, n), z = ((x - load(row(large_lse) + c, n)) - load(row(small_lse) + c, n)) * scale;
      const Vec exponential = exp2_normal<exp_degree<T>>(max(lowest, z));  // in this order NaN passes through
      const Vec p = select(z < lowest, Vec::zero(), exponential);
      const Vec grad = load(row(factors) + c, n) * p - load(row(spreads) + c, n);
      store(logits + c, cap_ ? grad * cap_.slope(x) : grad, n);
    });
  }

  float of_target(int64_t r) const { return row(targets)[r]; }

 private:
  enum Part { factors, spreads, large_lse, small_lse, targets };
  float* row(Part part) const { return memory_.get() + part * rows_; }

  Softcap cap_;
  int64_t rows_;
  Scratch<float> memory_;
};

// The gradient of the weight, summed over chunks. One of 16 bits is carried from chunk to chunk as the sum of two
// such matrices, the result itself and what rounding left over: twice the digits at half the cost of a float32 matrix.
template <class T>
class WeightGradient {
 public:
  WeightGradient(const TensorView& view, int64_t E, int64_t chunks)
      : out_(view.ptr<T>()), E_(E), chunks_(chunks), rest_(view && two_parts(chunks) ? view.numel() : 0) {}

  // The epilogue of the product of `chunk` for the classes from `begin` on.
  auto add(int64_t begin, int64_t chunk) const {
    return [this, begin, chunk](int64_t row, int64_t column, int64_t count, float* values) {
      const int64_t at = (begin + row) * E_ + column;
      if (chunk > 0) add_row(values, out_ + at, count);
      if (chunk > 0 && rest_.get()) add_row(values, rest_.get() + at, count);
      copy_row(values, count, out_ + at);
      if (!rest_.get() || chunk + 1 == chunks_) return;
      for_vectors(count, [&](int64_t c, int n) {
        store(rest_.get() + at + c, load(values + c, n) - load(out_ + at + c, n), n);
      });
    };
  }

 private:
  static bool two_parts(int64_t chunks) { return sizeof(T) != sizeof(float) && chunks > 1; }

  T* out_;
  int64_t E_, chunks_;
  Workspace<T> rest_;
};

// One chunk's share of the gradients. Its logits are overwritten by their gradient.
template <class T>
struct ChunkGradients {
  using Operand = operand_t<T>;
  const Problem<T>& p;
  const Chunk<T>& chunk;
  int64_t number;     // of the chunk
  float* grad_input;  // [parts][rows][E], each a sum over the classes of its part

  void add(const T* input, const LogitGradients& gradients, const WeightGradient<T>& grad_weight) const {
    const int64_t rows = chunk.rows;
    const Packed<Operand> x(right<Operand>(input, p.E), p.E, p.grad.weight ? rows : 0);
    chunk.parts.run([&](int64_t part) {
      float* part_input = grad_input + part * rows * p.E;
      bool first = true;
      chunk.parts.for_blocks(part, [&](int64_t begin, int64_t classes) {
        const T* grad = chunk.logits + begin * chunk.stride;
        differentiate(gradients, begin, classes);
        if (p.grad.bias) add_to_bias(begin, classes);
        if (p.grad.input) add_to_input(grad, begin, classes, part_input, first);
        first = false;
        if (!p.grad.weight) return;
        gemm(p.E, LeftRows<Operand>(grad, chunk.stride, classes, rows), x, by_rows(grad_weight.add(begin, number)));
      });
    });
    if (p.grad.input) write_input();
  }

 private:
  void differentiate(const LogitGradients& gradients, int64_t begin, int64_t classes) const {
    parallel_ranges(classes, max_threads(), [&](int64_t first, int64_t last, int) {
      for (int64_t i = begin + first; i < begin + last; ++i) gradients.differentiate(chunk.logits + i * chunk.stride);
    });
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t target = chunk.target[r];
      if (target < begin || target >= begin + classes) continue;
      chunk.logits[target * chunk.stride + r] = from_float<T>(gradients.of_target(r));
    }
  }

  void add_to_bias(int64_t begin, int64_t classes) const {
    float* out = p.grad.bias.template ptr<float>();
    parallel_ranges(classes, max_threads(), [&](int64_t first, int64_t last, int) {
      for (int64_t i = begin + first; i < begin + last; ++i) {
        out[i] = (number > 0 ? out[i] : 0.0f) + row_sum(chunk.logits + i * chunk.stride, chunk.rows);
      }
    });
  }

  void add_to_input(const T* grad, int64_t begin, int64_t classes, float* sums, bool first) const {
    const Packed<Operand> weight(right<Operand>(p.weight + begin * p.E, p.E), p.E, classes);
    const Packed<Operand> turned(left_transposed<Operand>(grad, chunk.stride), chunk.rows, classes);
    gemm<Operand>(chunk.rows, p.E, turned, weight,
                  by_rows([&](int64_t row, int64_t column, int64_t count, float* values) {
                    float* place = sums + row * p.E + column;
                    if (!first) add_row(values, place, count);
                    copy_row(values, count, place);
                  }));
  }

  // The sum over parts, in order, to where the rows belong.
  void write_input() const {
    const int64_t rows = chunk.rows, parts = chunk.parts.count();
    parallel_ranges(rows, threads_for(parts * rows * p.E), [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        T* out = p.grad.input.template ptr<T>() + chunk.row_of[r] * p.E;
        for_vectors(p.E, [&](int64_t c, int n) {
          const float* place = grad_input + r * p.E + c;
          Vec sum = load(place, n);
          for (int64_t part = 1; part < parts; ++part) sum = sum + load(place + part * rows * p.E, n);
          store(out + c, sum, n);
        });
      }
    });
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

// The distance between the logits of two classes: whole cache lines, and not a multiple of what would let them fall
// into the same sets of a cache.
inline int64_t stride_for(int64_t rows) {
  const int64_t stride = round_up(rows, 32);
  return stride % 256 == 0 ? stride + 32 : stride;
}

template <class T>
void run(const Problem<T>& p) {
  using Operand = operand_t<T>;
  const CountedRows counted(p);
  clear_uncounted(p, counted);
  const int64_t most = counted.chunk_rows();
  const WeightGradient<T> grad_weight(p.grad.weight, p.E, counted.chunks());
  const Workspace<T> logits(p.grad ? stride_for(most) * p.V : 0);
  const Parts parts(most, p.E, p.V);
  const Scratch<float> grad_input(p.grad.input ? parts.count() * most * p.E : 0);
  const Scratch<T> input(most * p.E);
  const Scratch<int64_t> target(most);
  const Scratch<RowSums> sums(most);

  for (int64_t number = 0; number < counted.chunks(); ++number) {
    const int64_t rows = counted.size(number);
    const Chunk<T> chunk{counted.of_chunk(number), rows, stride_for(rows), parts, target.get(), logits.get()};
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(input.get() + r * p.E, p.input + chunk.row_of[r] * p.E, size_t(p.E) * sizeof(T));
      target.get()[r] = p.target[chunk.row_of[r]];
    }
    compute_logits(p, chunk, Packed<Operand>(right_transposed<Operand>(input.get(), p.E), rows, p.E), sums.get());
    for (int64_t r = 0; p.loss && r < rows; ++r) write_loss(p, chunk.row_of[r], sums.get()[r]);
    if (!p.grad) continue;
    const LogitGradients gradients(p, chunk, sums.get());
    ChunkGradients<T>{p, chunk, number, grad_input.get()}.add(input.get(), gradients, grad_weight);
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
  with_storage(a.input.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void linear_cross_entropy_bwd(const LinearCrossEntropyBackward& a) {
  with_storage(a.input.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
