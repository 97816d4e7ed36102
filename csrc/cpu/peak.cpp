// The rate of multiply-adds that this machine sustains: the limit that the benchmarks hold kernels against.
//
// As many independent chains as the micro-tile has accumulators, so that latency is hidden, and no memory
// traffic at all. AMX multiplies numbers of many different bits, which take more power than equal ones do. Each thread
// runs for the given time and counts what it did; what clocks, threads and neighbours leave of the data sheet's figure
// is what any kernel can have.
#include <chrono>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int chains = tile_rows * tile_vecs;
constexpr int64_t steps = 4096;  // between two looks at the clock
volatile float sink;             // the compiler must believe that the results are wanted

// How often a second body() runs.
template <class Body>
double rate_of(double seconds, const Body& body) {
  using Clock = std::chrono::steady_clock;
  int64_t done = 0;
  double elapsed = 0;
  const auto start = Clock::now();
  while (elapsed < seconds) {
    for (int64_t k = 0; k < steps; ++k) body();
    done += steps;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return double(done) / elapsed;
}

// `step` advances one chain. Returns the steps a second of one chain.
template <class Step>
double chain_rate(double seconds, const Step& step) {
  Vec acc[chains];
  for (int i = 0; i < chains; ++i) acc[i] = Vec::set1(float(i));
  const double rate = rate_of(seconds, [&] {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) acc[i] = step(acc[i]);
  });
  for (const Vec& v : acc) sink = v.sum();
  return rate;
}

double multiply_add_rate(double seconds) {
  const Vec half = Vec::set1(0.5f);
  return 2 * chains * Vec::lanes * chain_rate(seconds, [half](Vec x) { return fma(x, half, half); });
}

#if defined(PYTRANSFORMER_AMX)
double paired_dot_rate(double seconds) {
  constexpr int64_t width = 2 * unit_pairs;
  alignas(64) bfloat16 numbers[unit_rows * width];
  uint32_t bits = 1;
  for (bfloat16& x : numbers) {
    bits = bits * 1664525u + 1013904223u;
    x = from_float<bfloat16>(float(bits >> 8) * 0x1p-23f - 1.0f);
  }
  const MatrixUnit unit;
  MatrixUnit::shape(unit_rows, 0);
  load_register<4>(numbers, sizeof(bfloat16) * width);
  load_register<5>(numbers, sizeof(bfloat16) * width);
  return 4 * 2.0 * unit_rows * width * unit_rows * rate_of(seconds, [] {
           multiply_registers<0, 4, 5>();
           multiply_registers<1, 4, 5>();
           multiply_registers<2, 4, 5>();
           multiply_registers<3, 4, 5>();
         });
}
#elif defined(PYTRANSFORMER_BF16_DOT)
double paired_dot_rate(double seconds) {
  const bfloat16 ones[2] = {{0x3f80}, {0x3f80}}, opposite[2] = {{0x3f80}, {0xbf80}};  // the sums stay where they are
  const PairVec x = PairVec::broadcast(ones), y = PairVec::broadcast(opposite);
  return 4 * chains * Vec::lanes * chain_rate(seconds, [x, y](Vec acc) { return dot(x, y, acc); });
}
#endif

}  // namespace

double peak_rate(bool paired, double seconds) {
  double total = 0;
#pragma omp parallel reduction(+ : total) if (max_threads() > 1)
  {
#ifdef PYTRANSFORMER_BF16_DOT
    total += paired ? paired_dot_rate(seconds) : multiply_add_rate(seconds);
#else
    total += paired ? 0.0 : multiply_add_rate(seconds);
#endif
  }
  return total;
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
