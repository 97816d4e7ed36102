// Every CPU kernel, without Python: each instruction set against the first (scalar) on the same random inputs.
//
// For machines and builds that the Python tests do not reach: other architectures under an emulator, and
// sanitizers. Outputs start as NaN. Prints one line a case; exits with 1 if any set differs from the first by more
// than its rounding explains. The scalar set is what the Python tests judge against the float64 oracle.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "embedding.h"
#include "ffn.h"
#include "kernels.h"
#include "layer_norm.h"
#include "linear.h"
#include "linear_cross_entropy.h"

#define PYTRANSFORMER_ISA harness
#include "storage.h"

using namespace pytransformer;
using harness::from_float;
using harness::to_float;

namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// A contiguous tensor that owns its memory.
class Tensor {
 public:
  Tensor(DType dtype, std::vector<int64_t> shape) {
    view_.dtype = dtype;
    view_.ndim = int(shape.size());
    view_.defined = true;
    int64_t stride = 1;
    for (int i = view_.ndim - 1; i >= 0; --i) {
      view_.shape[i] = shape[size_t(i)];
      view_.stride[i] = stride;
      stride *= shape[size_t(i)];
    }
    // Exactly as many bytes as there are, so that AddressSanitizer sees a step beyond them.
    memory_.reset(static_cast<char*>(::operator new(size_t(stride * size_of(dtype)))),
                  [](char* p) { ::operator delete(p); });
    view_.data = memory_.get();
  }
  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }

  void set(int64_t i, float x) const {
    if (view_.dtype == DType::float32) view_.ptr<float>()[i] = x;
    if (view_.dtype == DType::float16) view_.ptr<float16>()[i] = from_float<float16>(x);
    if (view_.dtype == DType::bfloat16) view_.ptr<bfloat16>()[i] = from_float<bfloat16>(x);
    if (view_.dtype == DType::int64) view_.ptr<int64_t>()[i] = int64_t(x);
    if (view_.dtype == DType::int32) view_.ptr<int32_t>()[i] = int32_t(x);
    if (view_.dtype == DType::boolean) view_.ptr<bool>()[i] = x != 0;
  }
  float get(int64_t i) const {
    if (view_.dtype == DType::float16) return to_float(view_.ptr<float16>()[i]);
    if (view_.dtype == DType::bfloat16) return to_float(view_.ptr<bfloat16>()[i]);
    return view_.ptr<float>()[i];
  }
  const Tensor& fill(float x) const {
    for (int64_t i = 0; i < view_.numel(); ++i) set(i, x);
    return *this;
  }

 private:
  TensorView view_;
  std::shared_ptr<char> memory_;
};

uint64_t random_state = 1;
float uniform() {  // in [0, 1)
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return float(random_state >> 40) / 16777216.0f;
}

Tensor random(DType dtype, std::vector<int64_t> shape, float scale = 1) {
  Tensor x(dtype, std::move(shape));
  for (int64_t i = 0; i < x.view().numel(); ++i) x.set(i, scale * 3.4f * (uniform() - 0.5f));
  return x;
}

Tensor indices(int64_t count, int64_t below) {
  Tensor x(DType::int64, {count});
  for (int64_t i = 0; i < count; ++i) x.set(i, std::floor(uniform() * float(below)));
  return x;
}

Tensor output(DType dtype, std::vector<int64_t> shape) {
  return Tensor(dtype, std::move(shape)).fill(nan);
}

// A case calls kernels() and returns its outputs.
using Case = std::function<std::vector<Tensor>()>;

// `dtype` is that of the case's first result: sets that multiply pairs of bfloat16 round to it on the way to others,
// too.
bool close(const Tensor& actual, const Tensor& wanted, DType dtype, std::string& why) {
  const int64_t count = wanted.view().numel();
  double square = 0, worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double a = actual.get(i), b = wanted.get(i);
    if (a == b) {
      if (std::isfinite(b)) square += b * b;
      continue;
    }
    if (!(std::fabs(a - b) < 1e30)) {
      why = "element " + std::to_string(i) + " is " + std::to_string(a) + ", wanted " + std::to_string(b);
      return false;
    }
    square += b * b;
    worst = std::fmax(worst, std::fabs(a - b) / (1 + std::fabs(b)));
  }
  const double size = std::sqrt(square / double(count ? count : 1));
  const double relative = dtype == DType::bfloat16 ? 2e-2 : dtype == DType::float16 ? 2e-3 : 2e-5;
  const double allowed = relative * std::fmax(size, 1e-3) + 1e-6;
  why = "error " + std::to_string(worst) + ", allowed " + std::to_string(allowed);
  return worst <= allowed;
}

bool run(const std::string& name, const Case& body) {
  bool good = true;
  std::vector<Tensor> wanted;
  for (const IsaStatus& isa : isa_status()) {
    if (!isa.supported) continue;
    set_isa(isa.name);
    const std::vector<Tensor> found = body();
    if (wanted.empty()) wanted = found;
    for (size_t i = 0; i < found.size(); ++i) {
      std::string why;
      if (close(found[i], wanted[i], wanted[0].view().dtype, why)) continue;
      std::printf("FAIL %s, %s, result %zu: %s\n", name.c_str(), isa.name.c_str(), i, why.c_str());
      good = false;
    }
  }
  std::printf("%s %s\n", good ? "ok  " : "FAIL", name.c_str());
  return good;
}

Case layer_norm(DType T, int64_t N, int64_t E, bool rms) {
  const Tensor x = random(T, {N, E}), r = random(T, {N, E}), w = random(T, {E}), b = random(T, {E});
  const Tensor input_bias = random(T, {E}), dy = random(T, {N, E});
  return [=] {
    const Tensor y = output(T, {N, E}), sum = output(T, {N, E}), dr = output(T, {N, E}), dx = output(T, {N, E});
    const Tensor mean = output(DType::float32, {N}).fill(0), rstd = output(DType::float32, {N});
    const Tensor dw = output(DType::float32, {E}), db = output(DType::float32, {E}), di = output(DType::float32, {E});
    kernels().layer_norm_fwd({x, w, b, r, input_bias, y, sum, mean, rstd, 7, 3, 0.2f, 1e-5f, rms});
    kernels().layer_norm_bwd({dy, dy, sum, w, mean, rstd, dr, dx, dw, db, di, 7, 3, 0.2f, rms});
    return std::vector<Tensor>{y, sum, mean, rstd, dr, dx, dw, db, di};
  };
}

Case ffn(DType T, int64_t N, int64_t E, int64_t F, Activation activation, bool gated = false) {
  const Tensor x = random(T, {N, E}), w1 = random(T, {F, E}, 1 / std::sqrt(float(E))), b1 = random(T, {F});
  const Tensor w2 = random(T, {E, F}, 1 / std::sqrt(float(F))), b2 = random(T, {E}), dy = random(T, {N, E});
  const Tensor wg = random(T, {F, E}, 1 / std::sqrt(float(E))), bg = random(T, {F});
  const TensorView gate = gated ? wg.view() : TensorView{}, gate_bias = gated ? bg.view() : TensorView{};
  return [=] {
    const auto keep = wg, keep_bias = bg;  // `gate` borrows from them
    const Tensor y = output(T, {N, E}), h = output(T, {N, F}), dx = output(T, {N, E});
    const Tensor dw1 = output(T, {F, E}), dw2 = output(T, {E, F});
    const Tensor db1 = output(DType::float32, {F}), db2 = output(DType::float32, {E});
    const Tensor dwg = output(T, {F, E}).fill(0), dbg = output(DType::float32, {F}).fill(0);
    const TensorView dgate = gated ? dwg.view() : TensorView{}, dgate_bias = gated ? dbg.view() : TensorView{};
    kernels().ffn_fwd({x, w1, b1, w2, b2, gate, gate_bias, y, h, activation, 7, 3, 0.1f});
    kernels().ffn_bwd(
        {dy, x, w1, w2, gate, gate_bias, h, dx, dw1, db1, dw2, db2, dgate, dgate_bias, activation, 7, 3, 0.1f});
    return std::vector<Tensor>{y, h, dx, dw1, db1, dw2, db2, dwg, dbg};
  };
}

Case linear(DType T, int64_t N, int64_t E, int64_t O) {
  const Tensor x = random(T, {N, E}), w = random(T, {O, E}, 1 / std::sqrt(float(E))), b = random(T, {O});
  const Tensor dy = random(T, {N, O});
  return [=] {
    const Tensor y = output(T, {N, O}), dx = output(T, {N, E}), dw = output(T, {O, E});
    const Tensor db = output(DType::float32, {O});
    kernels().linear_fwd({x, w, b, y});
    kernels().linear_bwd({dy, x, w, dx, dw, db});
    return std::vector<Tensor>{y, dx, dw, db};
  };
}

Case linear_cross_entropy(DType T, int64_t N, int64_t E, int64_t V) {
  const Tensor x = random(T, {N, E}), w = random(T, {V, E}, 1 / std::sqrt(float(E))), b = random(T, {V});
  const Tensor target = indices(N, V), dloss = random(DType::float32, {N});
  target.set(0, -100);
  return [=] {
    std::vector<Tensor> found;
    const Tensor loss = output(DType::float32, {N}), lse = output(DType::float32, {N});
    for (const bool forward : {true, false}) {
      const Tensor dx = output(T, {N, E}), dw = output(T, {V, E}), db = output(DType::float32, {V});
      const CrossEntropyOptions options{-100, 0.1f, 1e-2f, 8.0f};
      if (forward) {
        kernels().linear_cross_entropy_fwd({x, w, b, target, loss, lse, {dx, dw, db}, 0.5f, options});
      } else {
        kernels().linear_cross_entropy_bwd({dloss, x, w, b, target, {dx, dw, db}, options});
      }
      for (const Tensor& t : {dx, dw, db}) found.push_back(t);
    }
    found.push_back(loss);
    found.push_back(lse);
    return found;
  };
}

Case embedding(DType T, int64_t N, int64_t E, int64_t V) {
  const Tensor w = random(T, {V, E}), positions = random(T, {7, E}), types = random(T, {2, E}), dy = random(T, {N, E});
  const Tensor tokens = indices(N, V), segments = indices(N, 2);
  return [=] {
    const Tensor y = output(T, {N, E}), dw = output(T, {V, E}), dp = output(T, {7, E}), dt = output(T, {2, E});
    kernels().embedding_fwd({{w, tokens, 2}, {positions, {}, 1}, {types, segments, 1}, y, 7, 3, 0.1f});
    kernels().embedding_bwd({dy, {dw, tokens, 2}, {dp, {}, 1}, {dt, segments, 1}, 7, 3, 0.1f});
    return std::vector<Tensor>{y, dw, dp, dt};
  };
}

Case attention(DType T, int64_t S, int64_t D, bool causal, bool masked) {
  constexpr int64_t B = 2, H = 2;
  const Tensor q = random(T, {B, H, S, D}), k = random(T, {B, 1, S, D}), v = random(T, {B, 1, S, D});
  const Tensor dout = random(T, {B, H, S, D}), bias = random(DType::float32, {B, H, S, S});
  const Tensor mask(DType::boolean, {B, H, S, S}), lengths(DType::int64, {B});
  for (int64_t i = 0; i < mask.view().numel(); ++i) mask.set(i, uniform() < 0.7f);
  lengths.set(0, float(S)), lengths.set(1, float(S / 2));
  return [=] {
    AttentionForward a;
    a.query = q, a.key = k, a.value = v;
    a.scale = 1 / std::sqrt(float(D)), a.dropout_p = 0.1f, a.seed = 7, a.offset = 3;
    if (causal) a.band_upper = 0;
    if (masked) a.mask = mask, a.bias = bias, a.key_lengths = lengths, a.softcap = 5;
    const Tensor out = output(T, {B, H, S, D}), lse = output(DType::float32, {B, H, S});
    a.out = out, a.lse = lse;
    kernels().attention_fwd(a);
    const Tensor dq = output(T, {B, H, S, D}), dk = output(T, {B, 1, S, D}), dv = output(T, {B, 1, S, D});
    const Tensor dbias = Tensor(DType::float32, {B, H, S, S}).fill(0);
    AttentionBackward b;
    static_cast<AttentionProblem&>(b) = a;
    b.out = out, b.lse = lse, b.grad_out = dout, b.grad_query = dq, b.grad_key = dk, b.grad_value = dv;
    if (masked) b.grad_bias = dbias;
    kernels().attention_bwd(b);
    return std::vector<Tensor>{out, lse, dq, dk, dv, dbias};
  };
}

// Two sequences of a shared pool; what the table says beyond their ends is no page's number.
Case attention_in_pages(DType T, int64_t page, int64_t D, int64_t queries, int64_t window) {
  constexpr int64_t B = 2, H = 4, G = 2, P = 9;
  const Tensor q = random(T, {B, H, queries, D}), k = random(T, {B * P, G, page, D}),
               v = random(T, {B * P, G, page, D});
  const Tensor table(DType::int32, {B, P}), lengths(DType::int64, {B});
  lengths.set(0, float(P * page)), lengths.set(1, float(2 * page + queries));
  for (int64_t i = 0; i < B * P; ++i) table.set(i, i < P + 3 + queries / page ? float(B * P - 1 - i) : -1e9f);
  return [=] {
    AttentionForward a;
    a.query = q, a.key = k, a.value = v, a.key_lengths = lengths, a.block_table = table;
    a.scale = 1 / std::sqrt(float(D)), a.band_upper = 0, a.at_end = true;
    if (window > 0) a.band_lower = -window;
    const Tensor out = output(T, {B, H, queries, D}), lse = output(DType::float32, {B, H, queries});
    a.out = out, a.lse = lse;
    kernels().attention_fwd(a);
    return std::vector<Tensor>{out, lse};
  };
}

// Tensors of all sequences as the kernels take them: every sequence at the first row, `longest` rows of it.
TensorView end_to_end(const Tensor& x, int64_t sequences, int64_t longest) {
  TensorView view = x;
  view.shape[0] = sequences, view.shape[2] = longest, view.stride[0] = 0;
  return view;
}

// Sequences of `queries` queries and keys, of one of either, and of none with 5 keys.
Case attention_end_to_end(DType T, int64_t queries, int64_t D, bool at_end) {
  constexpr int64_t N = 3, H = 4, G = 2;
  const int64_t total = queries + 1, keys = queries + 6;
  const Tensor q = random(T, {1, H, total, D}), k = random(T, {1, G, keys, D}), v = random(T, {1, G, keys, D});
  const Tensor dout = random(T, {1, H, total, D}), cu_q(DType::int32, {N + 1}), cu_k(DType::int32, {N + 1});
  const int64_t begins_q[] = {0, queries, total, total}, begins_k[] = {0, queries, total, keys};
  for (int64_t n = 0; n <= N; ++n) cu_q.set(n, float(begins_q[n])), cu_k.set(n, float(begins_k[n]));
  return [=] {
    const auto rows = [=](const Tensor& x) { return end_to_end(x, N, queries); };
    const auto key_rows = [=](const Tensor& x) { return end_to_end(x, N, queries > 5 ? queries : 5); };
    AttentionForward a;
    a.query = rows(q), a.key = key_rows(k), a.value = key_rows(v), a.cu_seq_q = cu_q, a.cu_seq_k = cu_k,
    a.at_end = at_end;
    a.scale = 1 / std::sqrt(float(D)), a.band_upper = 0, a.dropout_p = at_end ? 0 : 0.1f, a.seed = 7, a.offset = 3;
    const Tensor out = output(T, {1, H, total, D}), lse = output(DType::float32, {1, H, total});
    a.out = rows(out), a.lse = rows(lse);
    kernels().attention_fwd(a);
    const Tensor dq = output(T, {1, H, total, D}), dk = output(T, {1, G, keys, D}), dv = output(T, {1, G, keys, D});
    AttentionBackward b;
    static_cast<AttentionProblem&>(b) = a;
    b.out = a.out, b.lse = a.lse, b.grad_out = rows(dout);
    b.grad_query = rows(dq), b.grad_key = key_rows(dk), b.grad_value = key_rows(dv);
    kernels().attention_bwd(b);
    return std::vector<Tensor>{out, lse, dq, dk, dv};
  };
}

}  // namespace

int main() {
  int failed = 0;
  for (const DType T : {DType::float32, DType::float16, DType::bfloat16}) {
    const std::string type = std::string(" ") + name_of(T);
    const auto check = [&](const std::string& name, const Case& body) { failed += !run(name + type, body); };
    check("layer_norm", layer_norm(T, 37, 67, false));
    check("rms_norm", layer_norm(T, 600, 33, true));
    for (const auto a : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu}) {
      check("ffn", ffn(T, 61, 35, 77, a));
    }
    check("ffn, gated", ffn(T, 61, 35, 77, Activation::silu, true));
    check("ffn, few tokens", ffn(T, 9, 35, 277, Activation::gelu, true));
    check("linear_cross_entropy", linear_cross_entropy(T, 61, 35, 277));
    check("linear_cross_entropy, two blocks", linear_cross_entropy(T, 13, 9, 1100));
    check("linear_cross_entropy, two chunks", linear_cross_entropy(T, 4200, 3, 5));
    check("embedding", embedding(T, 350, 67, 50));
    check("embedding, one row", embedding(T, 350, 600, 1));
    check("attention", attention(T, 70, 24, false, false));
    check("attention, causal", attention(T, 131, 33, true, false));
    check("attention, masked", attention(T, 67, 16, false, true));
  }
  for (const DType T : {DType::float32, DType::float16, DType::bfloat16}) {
    const std::string type = std::string(" ") + name_of(T);
    failed += !run("attention, pages" + type, attention_in_pages(T, 16, 33, 1, 0));
    failed += !run("attention, odd pages" + type, attention_in_pages(T, 5, 24, 3, 7));
    failed += !run("attention, large pages" + type, attention_in_pages(T, 200, 16, 2, 0));
    failed += !run("attention, end to end" + type, attention_end_to_end(T, 70, 24, false));
    failed += !run("attention, end to end, few queries" + type, attention_end_to_end(T, 4, 16, true));
    failed += !run("linear_cross_entropy, parts" + type, linear_cross_entropy(T, 13, 9, 2300));
  }
  for (const DType T : {DType::float32, DType::float16, DType::bfloat16}) {
    const std::string type = std::string(" ") + name_of(T);
    failed += !run("linear" + type, linear(T, 61, 35, 77));
    failed += !run("linear, few tokens" + type, linear(T, 9, 35, 277));
    failed += !run("linear, one token" + type, linear(T, 1, 300, 50));
    failed += !run("linear, two tokens" + type, linear(T, 2, 37, 77));
    failed += !run("linear, an output that no cache holds" + type, linear(T, 1100, 9, 970));
  }
  failed += !run("attention, heads larger than a cache", attention(DType::float32, 420, 160, true, false));
  std::printf(failed ? "%d cases FAILED\n" : "all cases ok\n", failed);
  return failed ? 1 : 0;
}
