// What an instruction computes from registers, and the typed accesses to memory: all that translated code includes.
//
// Everything rounds as the PTX ISA says: arithmetic of 16-bit floats is exact in double and rounded once; approximate
// functions (ex2.approx, tanh.approx, ...) return the correctly rounded value, so a kernel is judged without their
// last bits. The translation unit is compiled with -ffp-contract=off: only fma fuses.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {

using half = _Float16;

// To double's nearest float, but to the odd neighbour where inexact: a second rounding then cannot err.
inline float to_odd(double x) {
  float y = float(x);
  if (double(y) == x || !std::isfinite(y)) return y;
  uint32_t u;
  std::memcpy(&u, &y, 4);
  if (!(u & 1)) u += (double(y) < x) == (y > 0) ? 1 : -1;
  std::memcpy(&y, &u, 4);
  return y;
}

struct bfloat16 {
  uint16_t word;
  bfloat16() = default;
  explicit bfloat16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    word = x != x ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit bfloat16(double x) : bfloat16(to_odd(x)) {}
  explicit bfloat16(int x) : bfloat16(float(x)) {}
  operator float() const {
    const uint32_t u = uint32_t(word) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};

struct Bits128 {
  uint64_t low, high;
};

template <class T, int n>
struct Vector {
  T x[n];
};

template <class T>
inline constexpr bool floating = std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat16>;
// What arithmetic of T is done in.
template <class T>
using Wide = std::conditional_t<sizeof(T) == 2 && floating<T>, double, T>;

// A value's bits as another type; a wider one is filled with the sign of a signed integer, else with zeros.
template <class T, class S>
inline T bits(S source) {
  if constexpr (std::is_same_v<T, S>) {
    return source;
  } else if constexpr (sizeof(T) > sizeof(S) && std::is_integral_v<S> && std::is_integral_v<T>) {
    return static_cast<T>(source);
  } else {
    T target{};
    std::memcpy(&target, &source, std::min(sizeof target, sizeof source));
    return target;
  }
}

template <class T, class S>
inline T slice(S whole, int n) {
  T part;
  std::memcpy(&part, reinterpret_cast<const char*>(&whole) + n * sizeof(T), sizeof part);
  return part;
}

template <class T, class... S>
inline T joined(S... parts) {
  T whole;
  char* to = reinterpret_cast<char*>(&whole);
  ((std::memcpy(to, &parts, sizeof parts), to += sizeof parts), ...);
  return whole;
}

// A function of T applied to both halves of 32 bits.
template <class T, class F, class... S>
inline uint32_t pairwise(F function, S... pairs) {
  const T low = function(bits<T>(slice<uint16_t>(pairs, 0))...), high = function(bits<T>(slice<uint16_t>(pairs, 1))...);
  return joined<uint32_t>(low, high);
}

inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
inline float saturate(float x) { return x != x ? 0.0f : std::min(std::max(x, 0.0f), 1.0f); }

enum class Rounding { none, rn, rz, rm, rp, rni, rzi, rmi, rpi, rna };

// function(x...) with every operation rounded the way asked for: expf and its kin round downwards to split off an
// integer. The volatile copies keep the compiler from moving the arithmetic out of between the changes of mode.
template <Rounding way, class T, class F, class... X>
inline T rounded(F function, X... x) {
  const unsigned before = _mm_getcsr();
  const unsigned mode = way == Rounding::rm ? 0x2000 : way == Rounding::rp ? 0x4000 : 0x6000;
  _mm_setcsr((before & ~0x6000u) | mode);
  const auto pinned = [](T value) { volatile T copy = value; return T(copy); };
  volatile T result = function(pinned(x)...);
  _mm_setcsr(before);
  return result;
}

// Of an integer type, or the nearest value of a float that does not leave D; NaN becomes 0.
template <class D, class S>
inline D clamped(S x) {
  constexpr D low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
  if constexpr (floating<S>) {
    if (x != x) return 0;
    return double(x) <= double(low) ? low : double(x) >= double(high) ? high : D(x);
  } else {
    const __int128 wide = x;
    return wide < low ? low : wide > high ? high : D(wide);
  }
}

template <class D, Rounding rounding, class S>
inline D convert(S x) {
  constexpr bool integral = rounding >= Rounding::rni && rounding <= Rounding::rpi;
  if constexpr (integral || (floating<S> && !floating<D>)) {
    const double wide = double(x);
    const double whole = rounding == Rounding::rni || rounding == Rounding::rn ? std::nearbyint(wide)
                         : rounding == Rounding::rmi                           ? std::floor(wide)
                         : rounding == Rounding::rpi                           ? std::ceil(wide)
                                                                               : std::trunc(wide);
    if constexpr (floating<D>) {
      return D(whole);
    } else {
      return clamped<D>(whole);
    }
  } else if constexpr (std::is_same_v<D, bfloat16> && std::is_integral_v<S>) {
    return D(double(x));
  } else if constexpr (std::is_same_v<D, S>) {
    return x;
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    return D(float(x));
  } else {
    static_assert(!floating<D> || rounding == Rounding::none || rounding == Rounding::rn, "a rounding not known here");
    return D(x);
  }
}

template <class D>
inline D towards_zero(float x) {
  D y(x);
  if (std::fabs(float(y)) > std::fabs(x) && x == x) {
    uint16_t u = bits<uint16_t>(y);
    y = bits<D>(uint16_t(u - 1));
  }
  return y;
}

template <Rounding rounding>
inline uint32_t tf32(float x) {
  static_assert(rounding == Rounding::rna || rounding == Rounding::rn, "a rounding of tf32 not known here");
  const uint32_t u = bits<uint32_t>(x), half_unit = 1u << 12;
  if ((u & 0x7f800000) == 0x7f800000) return u;
  return (u + (rounding == Rounding::rna ? half_unit : half_unit - 1 + (u >> 13 & 1))) & ~0x1fffu;
}

namespace op {

template <class T>
using Modular = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::enable_if<true, T>>::type;

template <class T>
inline T add(T x, T y) {
  if constexpr (floating<T>) return T(Wide<T>(x) + Wide<T>(y));
  else return T(Modular<T>(x) + Modular<T>(y));
}
template <class T>
inline T sub(T x, T y) {
  if constexpr (floating<T>) return T(Wide<T>(x) - Wide<T>(y));
  else return T(Modular<T>(x) - Modular<T>(y));
}
template <class T>
inline T mul(T x, T y) {
  return T(Wide<T>(x) * Wide<T>(y));
}
template <class T>
inline T mul_lo(T x, T y) {
  return T(uint64_t(x) * uint64_t(y));
}
template <class T>
inline T mul_hi(T x, T y) {
  using Product = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T((Product(x) * Product(y)) >> (8 * sizeof(T)));
}
template <class T>
inline T mad_lo(T x, T y, T z) {
  return add<T>(mul_lo<T>(x, y), z);
}
template <class T>
inline T mad_hi(T x, T y, T z) {
  return add<T>(mul_hi<T>(x, y), z);
}
template <class T>
inline T fma(T x, T y, T z) {
  return T(std::fma(Wide<T>(x), Wide<T>(y), Wide<T>(z)));
}
template <class T>
inline T div(T x, T y) {
  if constexpr (floating<T>) return T(Wide<T>(x) / Wide<T>(y));
  else if (y == 0) return T(~T(0));  // what the hardware gives
  else if constexpr (std::is_signed_v<T>) return y == -1 ? T(0 - Modular<T>(x)) : T(x / y);
  else return T(x / y);
}
template <class T>
inline T rem(T x, T y) {
  if (y == 0) return x;
  if constexpr (std::is_signed_v<T>) return y == T(-1) ? T(0) : T(x % y);
  else return T(x % y);
}
// Of a number and NaN these return the number; of -0 and +0 the ordered one.
template <class T>
inline T max(T x, T y) {
  if constexpr (floating<T>) return x != x ? y : y != y ? x : x == y ? (std::signbit(float(x)) ? y : x) : x > y ? x : y;
  else return std::max(x, y);
}
template <class T>
inline T min(T x, T y) {
  if constexpr (floating<T>) return x != x ? y : y != y ? x : x == y ? (std::signbit(float(x)) ? x : y) : x < y ? x : y;
  else return std::min(x, y);
}
template <class T>
inline T max_nan(T x, T y) {
  return x != x ? x : y != y ? y : max<T>(x, y);
}
template <class T>
inline T min_nan(T x, T y) {
  return x != x ? x : y != y ? y : min<T>(x, y);
}
template <class T>
inline T neg(T x) {
  if constexpr (floating<T>) return T(-Wide<T>(x));
  else return T(0 - Modular<T>(x));
}
template <class T>
inline T abs(T x) {
  if constexpr (floating<T>) return T(std::fabs(Wide<T>(x)));
  else return x < 0 ? T(0 - Modular<T>(x)) : x;
}
template <class T>
inline T complement(T x) {
  return T(~x);
}
template <class T>
inline T cnot(T x) {
  return T(x == 0);
}
template <class T>
inline T sad(T x, T y, T z) {
  return add<T>(z, x < y ? sub<T>(y, x) : sub<T>(x, y));
}
template <class T>
inline T copysign(T sign, T x) {
  return T(std::copysign(Wide<T>(x), Wide<T>(sign)));
}

#define PTX_OF_FLOATS(name, expression)      \
  template <class T>                         \
  inline T name(T value) {                   \
    const double x = double(Wide<T>(value)); \
    return T(Wide<T>(expression));           \
  }
PTX_OF_FLOATS(ex2, std::exp2(x))
PTX_OF_FLOATS(lg2, std::log2(x))
PTX_OF_FLOATS(rcp, 1.0 / x)
PTX_OF_FLOATS(sqrt, std::sqrt(x))
PTX_OF_FLOATS(rsqrt, 1.0 / std::sqrt(x))
PTX_OF_FLOATS(tanh, std::tanh(x))
PTX_OF_FLOATS(sin, std::sin(x))
PTX_OF_FLOATS(cos, std::cos(x))
#undef PTX_OF_FLOATS

template <class T>
inline uint32_t popc(T x) {
  return __builtin_popcountll(x);
}
template <class T>
inline uint32_t clz(T x) {
  return x == 0 ? 8 * sizeof(T) : __builtin_clzll(x) - (64 - 8 * sizeof(T));
}
template <class T>
inline T brev(T x) {
  T y = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) y = T(y << 1 | (x >> i & 1));
  return y;
}
template <class T>
inline uint32_t bfind(T x) {
  using U = std::make_unsigned_t<T>;
  const U u = x < 0 ? U(~x) : U(x);
  return u == 0 ? ~0u : 8 * sizeof(T) - 1 - clz<U>(u);
}
template <class T>
inline uint32_t bfind_shift(T x) {
  const uint32_t position = bfind<T>(x);
  return position == ~0u ? position : 8 * sizeof(T) - 1 - position;
}
template <class T>
inline T shift_left(T x, uint32_t by) {
  return by >= 8 * sizeof(T) ? T(0) : T(std::make_unsigned_t<T>(x) << by);
}
template <class T>
inline T shift_right(T x, uint32_t by) {
  if (by >= 8 * sizeof(T)) return x < 0 ? T(-1) : T(0);
  return T(x >> by);
}
template <bool clamp>
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) {
  by = clamp ? std::min(by, 32u) : by & 31;
  return uint32_t((uint64_t(high) << 32 | low) << by >> 32);
}
template <bool clamp>
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {
  by = clamp ? std::min(by, 32u) : by & 31;
  return uint32_t((uint64_t(high) << 32 | low) >> by);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t all = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i), byte = all >> (8 * (choice & 7)) & 255;
    result |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}
template <class T>
inline T bfe(T x, uint32_t start, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  start &= 255, length &= 255;
  if (length == 0) return 0;
  const uint32_t last = std::min(start + length - 1, width - 1);
  const U filled = std::is_signed_v<T> && (U(x) >> last & 1) ? ~U(0) : U(0);
  if (start >= width) return T(filled);
  const uint32_t kept = std::min(length, width - start);
  const U mask = kept >= width ? ~U(0) : (U(1) << kept) - 1;
  return T((U(x) >> start & mask) | (filled & ~mask));
}
template <class T>
inline T bfi(T inserted, T into, uint32_t start, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  start &= 255, length &= 255;
  if (length == 0 || start >= width) return into;
  const T mask = T((length >= width ? ~T(0) : (T(1) << length) - 1) << start);
  return T((into & ~mask) | (T(inserted << start) & mask));
}

template <class T> inline T atomic_add(T old, T x) { return add<T>(old, x); }
template <class T> inline T atomic_min(T old, T x) { return min<T>(old, x); }
template <class T> inline T atomic_max(T old, T x) { return max<T>(old, x); }
template <class T> inline T atomic_exch(T, T x) { return x; }
template <class T> inline T atomic_cas(T old, T expected, T x) { return old == expected ? x : old; }
template <class T> inline T atomic_inc(T old, T x) { return old >= x ? T(0) : T(old + 1); }
template <class T> inline T atomic_dec(T old, T x) { return old == 0 || old > x ? x : T(old - 1); }
template <class T> inline T atomic_and(T old, T x) { if constexpr (floating<T>) return x; else return old & x; }
template <class T> inline T atomic_or(T old, T x) { if constexpr (floating<T>) return x; else return old | x; }
template <class T> inline T atomic_xor(T old, T x) { if constexpr (floating<T>) return x; else return old ^ x; }

}  // namespace op

// Each place in the code remembers which tensor it touched last.
#define HINT ([]() -> uint32_t& { static uint32_t hint = 0; return hint; }())

template <class T>
inline T taken(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
inline T load_param(const uint8_t* at) { return taken<T>(at); }
template <class T>
inline T load_private(uint64_t address, Access, Line) { return taken<T>(reinterpret_cast<uint8_t*>(address)); }
template <class T>
inline void store_private(uint64_t address, T value, Access, Line) {
  std::memcpy(reinterpret_cast<uint8_t*>(address), &value, sizeof value);
}
template <class T>
inline T load_shared(uint32_t address, Access kind, Line line) {
  return taken<T>(at_shared(address, sizeof(T), false, kind, line));
}
template <class T>
inline T load_global(uint64_t address, Access kind, Line line, uint32_t& hint) {
  return taken<T>(at_global(address, sizeof(T), false, kind, line, hint));
}
template <class T>
inline T load_generic(uint64_t address, Access kind, Line line, uint32_t& hint) {
  return taken<T>(at_generic(address, sizeof(T), false, kind, line, hint));
}

// Lanes of one warp may store one value at one place: `changes` tells the detectors that apart.
bool would_change_shared(uint32_t address, const void* value, uint32_t bytes);
bool would_change_global(uint64_t address, const void* value, uint32_t bytes);
template <class T>
inline void store_shared(uint32_t address, T value, Access kind, Line line) {
  const bool changes = !options.races || would_change_shared(address, &value, sizeof value);
  std::memcpy(at_shared(address, sizeof(T), true, kind, line, changes), &value, sizeof value);
}
template <class T>
inline void store_global(uint64_t address, T value, Access kind, Line line, uint32_t& hint) {
  const bool changes = !options.races || would_change_global(address, &value, sizeof value);
  std::memcpy(at_global(address, sizeof(T), true, kind, line, hint, changes), &value, sizeof value);
}
template <class T>
inline void store_generic(uint64_t address, T value, Access kind, Line line, uint32_t& hint) {
  const bool changes = !options.races || is_shared(address) || would_change_global(address, &value, sizeof value);
  std::memcpy(at_generic(address, sizeof(T), true, kind, line, hint, changes), &value, sizeof value);
}

template <class T, class F, class... X>
inline T exchanged(uint8_t* at, F function, X... operands) {
  const T old = taken<T>(at), next = T(function(old, operands...));
  std::memcpy(at, &next, sizeof next);
  return old;
}
template <class T, class F, class... X>
inline T atomic_shared(uint32_t address, Line line, F function, X... operands) {
  return exchanged<T>(at_shared(address, sizeof(T), true, Access::atomic, line), function, bits<T>(operands)...);
}
template <class T, class F, class... X>
inline T atomic_global(uint64_t address, Line line, uint32_t& hint, F function, X... operands) {
  return exchanged<T>(at_generic(address, sizeof(T), true, Access::atomic, line, hint), function, bits<T>(operands)...);
}

}  // namespace ptx
