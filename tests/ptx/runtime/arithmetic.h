// What an instruction computes from registers, one function for each operation.
//
// Everything rounds as the PTX ISA says: arithmetic of 16-bit floats is exact in double and rounded once; approximate
// functions (ex2.approx, tanh.approx, ...) return the correctly rounded value, so a kernel is judged without their
// last bits. Translated code is compiled with -ffp-contract=off: only fma fuses.
#pragma once

#include "values.h"

namespace ptx::op {

template <class T>
using Modular =
    typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::enable_if<true, T>>::type;

template <class T>
inline T add(T x, T y) {
  if constexpr (floating<T>)
    return T(Wide<T>(x) + Wide<T>(y));
  else
    return T(Modular<T>(x) + Modular<T>(y));
}
template <class T>
inline T sub(T x, T y) {
  if constexpr (floating<T>)
    return T(Wide<T>(x) - Wide<T>(y));
  else
    return T(Modular<T>(x) - Modular<T>(y));
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
  if constexpr (sizeof(T) == 2)
    return T(sum_to_odd(Wide<T>(x) * Wide<T>(y), Wide<T>(z)));
  else
    return T(std::fma(x, y, z));
}
template <class T>
inline T div(T x, T y) {
  if constexpr (floating<T>)
    return T(Wide<T>(x) / Wide<T>(y));
  else if (y == 0)
    return T(~T(0));  // what the hardware gives
  else if constexpr (std::is_signed_v<T>)
    return y == -1 ? T(0 - Modular<T>(x)) : T(x / y);
  else
    return T(x / y);
}
// x (1 / y): of the largest divisors the reciprocal is a subnormal number, which is taken for zero.
template <class T>
inline T div_approx(T x, T y) {
  return std::fabs(y) > T(0x1p126) ? T(x * std::copysign(T(0), y)) : div<T>(x, y);
}
template <class T>
inline T rem(T x, T y) {
  if (y == 0) return T(~T(0));  // what the hardware gives
  if constexpr (std::is_signed_v<T>)
    return y == T(-1) ? T(0) : T(x % y);
  else
    return T(x % y);
}
// Of a number and NaN these return the number; of -0 and +0 the ordered one.
template <class T>
inline T max(T x, T y) {
  if constexpr (floating<T>)
    return x != x ? y : y != y ? x : x == y ? (std::signbit(float(x)) ? y : x) : x > y ? x : y;
  else
    return std::max(x, y);
}
template <class T>
inline T min(T x, T y) {
  if constexpr (floating<T>)
    return x != x ? y : y != y ? x : x == y ? (std::signbit(float(x)) ? x : y) : x < y ? x : y;
  else
    return std::min(x, y);
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
  if constexpr (floating<T>)
    return T(-Wide<T>(x));
  else
    return T(0 - Modular<T>(x));
}
template <class T>
inline T abs(T x) {
  if constexpr (floating<T>)
    return T(std::fabs(Wide<T>(x)));
  else
    return x < 0 ? T(0 - Modular<T>(x)) : x;
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

template <class T>
inline T atomic_add(T old, T x) {
  return add<T>(old, x);
}
template <class T>
inline T atomic_min(T old, T x) {
  return min<T>(old, x);
}
template <class T>
inline T atomic_max(T old, T x) {
  return max<T>(old, x);
}
template <class T>
inline T atomic_exch(T, T x) {
  return x;
}
template <class T>
inline T atomic_cas(T old, T expected, T x) {
  return old == expected ? x : old;
}
template <class T>
inline T atomic_inc(T old, T x) {
  return old >= x ? T(0) : T(old + 1);
}
template <class T>
inline T atomic_dec(T old, T x) {
  return old == 0 || old > x ? x : T(old - 1);
}
template <class T>
inline T atomic_and(T old, T x) {
  if constexpr (floating<T>)
    return x;
  else
    return old & x;
}
template <class T>
inline T atomic_or(T old, T x) {
  if constexpr (floating<T>)
    return x;
  else
    return old | x;
}
template <class T>
inline T atomic_xor(T old, T x) {
  if constexpr (floating<T>)
    return x;
  else
    return old ^ x;
}

}  // namespace ptx::op
