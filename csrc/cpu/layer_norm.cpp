// LayerNorm and RMSNorm with bias, dropout and residual, one pass over memory.
//
// The op is bound by memory, never by arithmetic: forward reads input and residual once and writes
// output and sum once. A row (768 float32 = 3 KB) stays in L1 between the passes over it: the first
// forms the sum and its mean, the second the variance around that mean (two passes, so that a large
// common offset cancels exactly), the third normalises.
//
// Backward, with xhat = (sum - mean) * rstd and g = grad_output * weight:
//     grad_sum = rstd * (g - mean(g) - xhat * mean(g * xhat)) + what reached sum from elsewhere
// and the column sums for weight (grad_output * xhat), bias (grad_output) and input_bias. Each thread
// takes one contiguous range of rows and sums its columns in float32 in its own row of a scratch; the
// scratch rows are then added in order, so equal inputs give equal bits at any one thread count.
#include "layer_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "parallel.h"
#include "philox.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int lanes = Vec::lanes;

// How many lanes of a vector are in use. The whole vector is a type of its own, so that the loop over a
// row compiles to plain loads and stores and only its last step to partial ones.
struct Whole {
  static constexpr bool partial = false;
};
struct Part {
  static constexpr bool partial = true;
  int count;
};

// body(column, Whole or Part) for every vector of a row; Part only at its end.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) body(c, Whole{});
  if (c < columns) body(c, Part{int(columns - c)});
}

// Sums over a row are formed in as many parts as make sixteen lanes: shorter ones round less, and wait less for each
// other.
constexpr int parts = 16 / lanes;

class RowSum {
 public:
  void add(int part, Vec x) { part_[part] = part_[part] + x; }
  void add_product(int part, Vec x, Vec y) { part_[part] = fma(x, y, part_[part]); }
  float total() const {
    Vec sum = part_[0];
    for (int i = 1; i < parts; ++i) sum = sum + part_[i];
    return sum.sum();
  }

 private:
  Vec part_[parts] = {};
};

// body(column, Whole or Part, the part of its sums that it adds to), of which each is a constant in each place here.
template <class Body>
inline __attribute__((always_inline)) void for_summed_vectors(int64_t columns, const Body& body) {
  if constexpr (parts == 1) return for_vectors(columns, [&](int64_t c, auto n) { body(c, n, 0); });
  int64_t c = 0;
  for (; c + parts * lanes <= columns; c += parts * lanes) {
    for (int part = 0; part < parts; ++part) body(c + part * lanes, Whole{}, part);
  }
  for (int part = 0; part < parts - 1; ++part) {
    if (c + lanes > columns) continue;
    body(c, Whole{}, part);
    c += lanes;
  }
  if (c < columns) body(c, Part{int(columns - c)}, parts - 1);
}

template <class T>
inline Vec load(const T* p, Whole) {
  return Vec::load(p);
}
template <class T>
inline Vec load(const T* p, Part part) {
  return Vec::load(p, part.count);
}
template <class T>
inline void store(T* p, Vec v, Whole) {
  v.store(p);
}
template <class T>
inline void store(T* p, Vec v, Part part) {
  v.store(p, part.count);
}

// A [columns] parameter as float32: itself, or a widened copy.
class Parameter {
 public:
  Parameter(const TensorView& view, int64_t columns) {
    if (!view) return;
    if (view.dtype == DType::float32) {
      data_ = view.ptr<float>();
      return;
    }
    copy_.reset(new float[columns]);
    with_storage(view.dtype, [&](auto type) { copy_row(view.ptr<const decltype(type)>(), columns, copy_.get()); });
    data_ = copy_.get();
  }
  const float* data() const { return data_; }  // null where the parameter is absent

 private:
  std::unique_ptr<float[]> copy_;
  const float* data_ = nullptr;
};

// Asks for the row after this one: input and output are streams, several at once, and by itself the
// hardware looks too short a way ahead. Asking beyond the end does no harm.
template <class T>
inline __attribute__((always_inline)) void prefetch_next(const T* p, int64_t columns) {
  __builtin_prefetch(p + columns);
}
template <class T>
inline __attribute__((always_inline)) void prefetch_next_store(const T* p, int64_t columns) {
  __builtin_prefetch(p + columns, 1);
}

// The sum of a row, into `row` and, where it is wanted, `sum`; returns its mean.
// Pointers are locals here and below: a vector store may alias anything, so what is read through a
// reference inside the loop would be read again for every vector.
template <class T>
float add_row(const T* x, const T* residual, const float* input_bias, const float* keep, int64_t columns, T* sum,
              float* row) {
  RowSum total;
  for_summed_vectors(columns, [&](int64_t c, auto n, int part) {
    prefetch_next(x + c, columns);
    Vec z = load(x + c, n);
    if (input_bias) z = z + load(input_bias + c, n);
    if (keep) z = z * load(keep + c, n);
    if (residual) {
      prefetch_next(residual + c, columns);
      z = z + load(residual + c, n);
    }
    if (sum) {
      // Backward reads the stored sum: normalise what it will see, not what was rounded away.
      store(sum + c, z, n);
      z = load(sum + c, n);
    }
    store(row + c, z, n);
    total.add(part, z);
  });
  return total.total() / float(columns);
}

// The variance of a row around its mean. `mean` comes in as a float32 sum left it, off by some ulps of a
// large common offset; the sum of the differences is small and says how far: `mean` leaves corrected.
inline float variance(const float* row, bool rms, int64_t columns, float& mean) {
  RowSum squares, differences;
  const Vec centre = Vec::set1(mean);
  for_summed_vectors(columns, [&](int64_t c, auto n, int part) {
    Vec d = load(row + c, n) - centre;
    if constexpr (n.partial) d = select(Mask::first(n.count), d, Vec::zero());
    differences.add(part, d);
    squares.add_product(part, d, d);
  });
  const float correction = rms ? 0.0f : differences.total() / float(columns);
  mean += correction;
  return squares.total() / float(columns) - correction * correction;
}

template <class T>
void normalise_row(const float* row, float mean, float rstd, const float* weight, const float* bias, int64_t columns,
                   T* out) {
  const Vec scale = Vec::set1(rstd), centre = Vec::set1(mean);
  for_vectors(columns, [&](int64_t c, auto n) {
    Vec y = (load(row + c, n) - centre) * scale;
    if (weight) y = y * load(weight + c, n);
    if (bias) y = y + load(bias + c, n);
    prefetch_next_store(out + c, columns);
    store(out + c, y, n);
  });
}

template <class T>
void forward(const LayerNormForward& a) {
  const int64_t columns = a.input.shape[1], rows = a.input.shape[0];
  const Parameter weight(a.weight, columns), bias(a.bias, columns), input_bias(a.input_bias, columns);
  const Dropout dropout = Dropout::make(a.dropout_p, {a.seed, a.offset});

  parallel_ranges(rows, threads_for(rows * columns), [&](int64_t begin, int64_t end, int) {
    std::unique_ptr<float[]> scratch(new float[2 * columns + Dropout::spare]);
    float* row = scratch.get();
    for (int64_t r = begin; r < end; ++r) {
      const auto row_of = [&](const TensorView& view) { return view ? view.ptr<T>() + r * columns : nullptr; };
      const float* keep =
          a.dropout_p > 0 ? dropout.multipliers(uint64_t(r * columns), columns, row + columns) : nullptr;
      const float average =
          add_row<T>(row_of(a.input), row_of(a.residual), input_bias.data(), keep, columns, row_of(a.sum), row);
      float mean = a.rms ? 0.0f : average;
      const float rstd = 1.0f / std::sqrt(variance(row, a.rms, columns, mean) + a.eps);
      normalise_row<T>(row, mean, rstd, weight.data(), bias.data(), columns, row_of(a.output));
      if (a.mean) a.mean.ptr<float>()[r] = mean;
      if (a.rstd) a.rstd.ptr<float>()[r] = rstd;
    }
  });
}

// The column sums of one thread: three rows of float32.
struct ColumnSums {
  float *weight, *bias, *input_bias;
};

// A running float32 sum over thousands of rows loses digits: rows are summed in groups, groups in turn.
constexpr int64_t group_rows = 32;

inline void add_and_clear(float* total, float* group, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    total[i] += group[i];
    group[i] = 0;
  }
}

template <class T>
void backward_row(const LayerNormBackward& a, int64_t r, int64_t columns, const float* weight, const float* keep,
                  const ColumnSums& sums) {
  // Rows of float32, read twice in a row, the hardware does better by itself: 0.86 to 0.91 of the time on a Zen 4.
  constexpr bool prefetches = sizeof(T) < sizeof(float);
  const T* dy = a.grad_output.ptr<T>() + r * columns;
  const T* from_sum = a.grad_sum ? a.grad_sum.ptr<T>() + r * columns : nullptr;
  const T* z = a.sum.ptr<T>() + r * columns;
  T* dz = a.grad_residual.ptr<T>() + r * columns;
  T* dx = a.grad_input ? a.grad_input.ptr<T>() + r * columns : nullptr;
  const Vec mean = Vec::set1(a.rms ? 0.0f : a.mean.ptr<float>()[r]);
  const float rstd = a.rstd.ptr<float>()[r];

  float* weight_sum = a.grad_weight ? sums.weight : nullptr;
  float* bias_sum = a.grad_bias ? sums.bias : nullptr;
  float* input_bias_sum = a.grad_input_bias ? sums.input_bias : nullptr;

  RowSum g_total, gx_total;
  for_summed_vectors(columns, [&](int64_t c, auto n, int part) {
    if constexpr (prefetches) {
      prefetch_next(dy + c, columns);
      prefetch_next(z + c, columns);
    }
    const Vec upstream = load(dy + c, n);
    const Vec xhat = (load(z + c, n) - mean) * Vec::set1(rstd);
    const Vec g = weight ? upstream * load(weight + c, n) : upstream;
    g_total.add(part, g);
    gx_total.add_product(part, g, xhat);
    if (weight_sum) store(weight_sum + c, fma(upstream, xhat, load(weight_sum + c, n)), n);
    if (bias_sum) store(bias_sum + c, load(bias_sum + c, n) + upstream, n);
  });
  const float inverse = 1.0f / float(columns);
  const Vec g_mean = Vec::set1(a.rms ? 0.0f : g_total.total() * inverse);
  const Vec gx_mean = Vec::set1(gx_total.total() * inverse);

  for_vectors(columns, [&](int64_t c, auto n) {
    const Vec upstream = load(dy + c, n);
    const Vec xhat = (load(z + c, n) - mean) * Vec::set1(rstd);
    const Vec g = weight ? upstream * load(weight + c, n) : upstream;
    Vec d = (g - g_mean - xhat * gx_mean) * Vec::set1(rstd);
    if (from_sum) d = d + load(from_sum + c, n);
    if constexpr (prefetches) prefetch_next_store(dz + c, columns);
    store(dz + c, d, n);
    if (keep) d = d * load(keep + c, n);
    if (dx) store(dx + c, d, n);
    if (input_bias_sum) store(input_bias_sum + c, load(input_bias_sum + c, n) + d, n);
  });
}

template <class T>
void backward(const LayerNormBackward& a) {
  const int64_t columns = a.sum.shape[1], rows = a.sum.shape[0];
  const Parameter weight(a.weight, columns);
  const Dropout dropout = Dropout::make(a.dropout_p, {a.seed, a.offset});
  const int threads = threads_for(rows * columns);
  const int64_t stride = 3 * columns;
  const ThreadScratch<float> sums_of_parts(threads, 2 * stride);

  parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int part) {
    float *total = sums_of_parts.of(part), *base = total + stride;
    std::fill(total, base + stride, 0.0f);
    const ColumnSums sums{base, base + columns, base + 2 * columns};
    std::unique_ptr<float[]> multipliers(new float[columns + Dropout::spare]);
    for (int64_t r = begin; r < end; ++r) {
      const float* keep =
          a.dropout_p > 0 ? dropout.multipliers(uint64_t(r * columns), columns, multipliers.get()) : nullptr;
      backward_row<T>(a, r, columns, weight.data(), keep, sums);
      if ((r + 1 - begin) % group_rows == 0 || r + 1 == end) add_and_clear(total, base, stride);
    }
  });

  const TensorView* outputs[3] = {&a.grad_weight, &a.grad_bias, &a.grad_input_bias};
  for (int which = 0; which < 3; ++which) {
    if (!*outputs[which]) continue;
    float* out = outputs[which]->ptr<float>();
    for (int64_t c = 0; c < columns; ++c) {
      float total = 0;
      for (int part = 0; part < threads; ++part) total += sums_of_parts.of(part)[which * columns + c];
      out[c] = total;
    }
  }
}

}  // namespace

void layer_norm_fwd(const LayerNormForward& a) {
  with_storage(a.input.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void layer_norm_bwd(const LayerNormBackward& a) {
  with_storage(a.sum.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
