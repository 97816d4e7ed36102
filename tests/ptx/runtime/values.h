// Values in registers: the 16-bit floats, bits as another type, roundings and conversions.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

using half = _Float16;

// To double's nearest float, but to the odd neighbour where inexact: a second rounding then cannot err.
inline float to_odd(double x) {
  float y = float(x);
  if (double(y) == x || !std::isfinite(y)) return y;
  uint32_t u;
  std::memcpy(&u, &y, 4);
  if (!(u & 1)) u += std::fabs(double(y)) < std::fabs(x) ? 1 : -1;
  std::memcpy(&y, &u, 4);
  return y;
}

// x + y, to the odd neighbour where a double cannot hold it.
inline double sum_to_odd(double x, double y) {
  const double sum = x + y, part = sum - x, lost = (x - (sum - part)) + (y - part);
  if (lost == 0 || !std::isfinite(sum)) return sum;
  uint64_t u;
  std::memcpy(&u, &sum, 8);
  if (!(u & 1)) u += (lost > 0) == (sum > 0) ? 1 : -1;
  double odd;
  std::memcpy(&odd, &u, 8);
  return odd;
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

// The smallest number of T that is not subnormal.
template <class T>
inline constexpr double smallest = std::is_same_v<T, half> ? 0x1p-14 : 0x1p-126;

template <class T>
inline T flush(T x) {
  return std::fabs(float(x)) < smallest<T> ? T(std::copysign(0.0f, float(x))) : x;
}
// function(x...) with subnormal operands and results flushed: those that were subnormal before they were rounded.
template <class T, class F, class... X>
inline T flushed(F function, X... x) {
  const double exact = function(double(x)...);
  return std::fabs(exact) < smallest<T> ? T(std::copysign(0.0, exact)) : T(function(x...));
}
// NaN and -0 become 0.
inline float saturate(float x) {
  return x > 0.0f ? std::min(x, 1.0f) : 0.0f;
}

enum class Rounding { none, rn, rz, rm, rp, rni, rzi, rmi, rpi, rna };

// function(x...) with every operation rounded the way asked for: expf and its kin round downwards to split off an
// integer. The volatile copies keep the compiler from moving the arithmetic out of between the changes of mode.
template <Rounding way, class T, class F, class... X>
inline T rounded(F function, X... x) {
  const unsigned before = _mm_getcsr();
  const unsigned mode = way == Rounding::rm ? 0x2000 : way == Rounding::rp ? 0x4000 : 0x6000;
  _mm_setcsr((before & ~0x6000u) | mode);
  const auto pinned = [](T value) {
    volatile T copy = value;
    return T(copy);
  };
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
  if (x != x && rounding == Rounding::rn) return 0x7fffe000;
  if ((u & 0x7f800000) == 0x7f800000) return u & ~0x1fffu;  // of a NaN whose upper bits are zeros, infinity
  return (u + (rounding == Rounding::rna ? half_unit : half_unit - 1 + (u >> 13 & 1))) & ~0x1fffu;
}

}  // namespace ptx
