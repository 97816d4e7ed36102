// The linear layer: one product with a weight, its bias added while a block of it is in cache.
//
// The forward is a product of ffn.cpp's (weights.h). Tokens are taken in chunks that, packed, fit in a shared cache;
// the gradients of weight and bias are summed over chunks in float32, in order:
//     grad_input = grad_output W        grad_weight = grad_output^T input        grad_bias = column sums
// The first reads grad_output where it lies and packs W, whose rows are those of a right operand: of few tokens packing
// it as a left one took longer than the product.
#include "linear.h"

#include "weights.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

template <class T, class Product>
void forward(const LinearForward& a) {
  const int64_t N = a.input.shape[0], E = a.input.shape[1], O = a.weight.shape[0];
  const Bias bias(a.bias);
  const Chunks chunks(N, E);
  const typename Product::Weight weight(a.weight.ptr<const T>(), E, O, E);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), tokens = chunks.size(chunk, N);
    const auto input = Product::right(a.input.ptr<const T>() + begin * E, tokens, E);
    Product::multiply(tokens, weight, input, [&](const Block& block, float* sums) {
      store_output(block, sums, a.output.ptr<T>() + begin * O, O, bias.of(block));
    });
  }
}

// Tokens in rows, the weight packed: nothing is turned.
template <class T>
void forward_in_rows(const LinearForward& a) {
  using Product = TokensInRows<T>;
  const int64_t N = a.input.shape[0], E = a.input.shape[1], O = a.weight.shape[0];
  const Bias bias(a.bias);
  const typename Product::Weight weight(a.weight.ptr<const T>(), E, O, E);
  T* out = a.output.ptr<T>();
  Product::multiply(N, weight, Product::right(a.input.ptr<const T>(), N, E),
                    by_rows([&](int64_t row, int64_t column, int64_t count, float* values) {
                      bias.store_row(column, count, values, out + row * O + column);
                    }));
}

// What is turned counts, the weight or input and output, where a product takes as little time as on AMX, and where
// lines of the output are written far from one another: in float32, into more memory than a core's caches hold.
template <class T>
void forward(const LinearForward& a) {
  const int64_t N = a.input.shape[0], E = a.input.shape[1], O = a.weight.shape[0];
  if (N <= few_columns<T>) return forward<T, FewTokens<T>>(a);
  const bool counts = on_unit<operand_t<T>> || (sizeof(T) == sizeof(float) && N * O >= 1 << 20);
  if (counts && O * E < N * (E + O)) return forward_in_rows<T>(a);
  forward<T, ManyTokens<T>>(a);
}

template <class T>
void backward(const LinearBackward& a) {
  using Operand = operand_t<T>;
  const int64_t N = a.input.shape[0], E = a.input.shape[1], O = a.weight.shape[0];
  const Chunks chunks(N, E > O ? E : O);
  const WeightGradient<T> grad_weight(a.grad_weight, false, chunks.count);
  const Packed<Operand> weight(right<Operand>(a.weight.ptr<const T>(), E), a.grad_input ? E : 0, O);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), tokens = chunks.size(chunk, N);
    const T* grad_output = a.grad_output.ptr<const T>() + begin * O;
    if (a.grad_input) {
      T* out = a.grad_input.ptr<T>() + begin * E;
      gemm(E, LeftRows<Operand>(grad_output, O, tokens, O), weight,
           by_rows([&](int64_t row, int64_t column, int64_t count, float* values) {
             copy_row(values, count, out + row * E + column);
           }));
    }
    if (a.grad_weight) {
      const T* input = a.input.ptr<const T>() + begin * E;
      gemm<Operand>(O, E, Packed<Operand>(left_transposed<Operand>(grad_output, O), O, tokens),
                    Packed<Operand>(right<Operand>(input, E), E, tokens), grad_weight.add_chunk(chunk));
    }
    if (a.grad_bias) column_sums(grad_output, tokens, O, a.grad_bias.ptr<float>(), chunk > 0, O);
  }
}

}  // namespace

void linear_fwd(const LinearForward& a) {
  with_storage(a.input.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void linear_bwd(const LinearBackward& a) {
  with_storage(a.input.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
