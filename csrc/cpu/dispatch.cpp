// Which instruction set to use: CPUID says what the CPU has, XGETBV what the operating system saves.
#include <chrono>
#include <cstdlib>

#include "check.h"
#include "interrupt.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef _WIN32
#include <pthread.h>
#endif

namespace pytransformer {

// PYTRANSFORMER_ISAS is the list X(scalar) X(avx2) ... of what setup.py compiled, best last.
#define X(isa)                    \
  namespace isa {                 \
  extern const KernelTable table; \
  }
PYTRANSFORMER_ISAS
#undef X

namespace {

struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;
};

// Linux saves AMX's registers only of processes that have asked for them. Threads inherit the permission.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures has;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return has;
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave || !avx) return has;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool saves_ymm = (low & 0x06) == 0x06, saves_zmm = (low & 0xe6) == 0xe6, saves_tiles = (low >> 17 & 3) == 3;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return has;
  const auto leaf7 = [b](int bit) { return (b >> bit) & 1u; };
  has.avx2 = saves_ymm && fma && f16c && leaf7(5);
  has.avx512 = has.avx2 && saves_zmm && leaf7(16) && leaf7(17) && leaf7(30) && leaf7(31);  // F DQ BW VL
  const bool multiplies_tiles = saves_tiles && (d >> 22 & 1) && (d >> 24 & 1);             // AMX-BF16, AMX-TILE
  if (has.avx512 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) has.avx512_bf16 = a & (1u << 5);
  has.amx_bf16 = has.avx512_bf16 && multiplies_tiles && may_use_amx();
#endif
  return has;
}

// Emulated sets exist for tests and are used only by name.
bool emulated(const std::string& isa) {
  return isa.find("emulated") != std::string::npos;
}

bool supported(const std::string& isa) {
  static const CpuFeatures has = detect();
  if (isa == "scalar" || isa == "neon") return true;  // parts of what their architectures always have
  if (isa == "avx2") return has.avx2;
  if (isa == "avx512" || emulated(isa)) return has.avx512;
  if (isa == "avx512_bf16") return has.avx512_bf16;
  if (isa == "amx_bf16") return has.amx_bf16;
  return false;
}

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> all = {
#define X(isa) &isa::table,
      PYTRANSFORMER_ISAS
#undef X
  };
  return all;
}

const KernelTable* find(const std::string& name) {
  std::string known;
  for (const KernelTable* table : tables()) {
    if (table->isa == name) {
      PYTRANSFORMER_CHECK(supported(name), "pytransformer: this CPU does not run the instruction set '", name, "'");
      return table;
    }
    known += std::string(known.empty() ? "" : ", ") + table->isa;
  }
  fail("pytransformer: instruction set must be one of ", known, "; got '", name, "'");
}

const KernelTable* best() {
  const char* forced = std::getenv("PYTRANSFORMER_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced);
  const KernelTable* chosen = nullptr;
  for (const KernelTable* table : tables()) {
    if (supported(table->isa) && !emulated(table->isa)) chosen = table;
  }
  return chosen;
}

const KernelTable*& current() {
  static const KernelTable* table = best();
  return table;
}

using Clock = std::chrono::steady_clock;
constexpr auto patience = std::chrono::milliseconds(50);
thread_local bool (*asked)() = nullptr;
thread_local Clock::time_point next_time;

bool forked = false;
#ifndef _WIN32
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

bool in_forked_child() {
  return forked;
}

Interruptible::Interruptible(bool (*wanted)()) : outer_(asked), outer_tasks_(running_tasks) {
  asked = wanted;
  running_tasks = nullptr;
  next_time = Clock::now() + patience;
}

Interruptible::~Interruptible() {
  asked = outer_;
  running_tasks = outer_tasks_;
}

bool interruption_wanted() {
  if (asked == nullptr) return false;
  const Clock::time_point now = Clock::now();
  if (now < next_time) return false;
  next_time = now + patience;
  return asked();
}

const KernelTable& kernels() {
  return *current();
}

void set_isa(const std::string& name) {
  current() = find(name);
}

std::vector<IsaStatus> isa_status() {
  std::vector<IsaStatus> status;
  for (const KernelTable* table : tables()) status.push_back({table->isa, supported(table->isa)});
  return status;
}

}  // namespace pytransformer
