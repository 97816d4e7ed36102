// Rows of a matrix, a vector at a time: the loop over one, and what is done to whole rows.
#pragma once

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

// body(index, count) for every vector of [0, size); count < lanes only at its end.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::lanes <= size; i += Vec::lanes) body(i, Vec::lanes);
  if (i < size) body(i, int(size - i));
}

template <class T>
inline __attribute__((always_inline)) Vec load(const T* p, int count) {
  return count == Vec::lanes ? Vec::load(p) : Vec::load(p, count);
}

template <class T>
inline __attribute__((always_inline)) void store(T* p, Vec v, int count) {
  if (count == Vec::lanes) {
    v.store(p);
  } else {
    v.store(p, count);
  }
}

// Asks for a row that is wanted soon, of a matrix whose rows may lie a page or more apart, where the hardware does not
// look ahead. Asking beyond the end of the matrix does no harm. Locality 3 is L1, 2 is L2.
template <class T, int Locality = 3>
inline void prefetch_row(const T* row, int64_t count) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(p + i, 0, Locality);
}

template <class From, class To>
inline void copy_row(const From* from, int64_t count, To* to) {
  for_vectors(count, [&](int64_t c, int n) { store(to + c, load(from + c, n), n); });
}

inline void multiply_row(float* values, const float* by, int64_t count) {
  for_vectors(count, [&](int64_t c, int n) { store(values + c, load(values + c, n) * load(by + c, n), n); });
}

template <class T>
inline void add_row(float* values, const T* other, int64_t count) {
  for_vectors(count, [&](int64_t c, int n) { store(values + c, load(values + c, n) + load(other + c, n), n); });
}

template <class T>
inline float row_sum(const T* row, int64_t count) {
  Vec sum = Vec::zero();
  for_vectors(count, [&](int64_t c, int n) { sum = sum + load(row + c, n); });
  return sum.sum();
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
