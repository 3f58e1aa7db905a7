// Vectors of the instruction set that this file is compiled for: their types, parts of them to and
// from memory, comparisons. Written with the compilers' vector types, so that Arm and plain x86 take
// the same code; intrinsics only where those types are not enough.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.hpp"

#if defined(__AVX512F__)
#define EVENKEEL_BYTES 64
#elif defined(__AVX2__)
#define EVENKEEL_BYTES 32
#else
#define EVENKEEL_BYTES 16
#endif

// A vector handed to a function that is not inlined goes through memory.
#define INLINE __attribute__((always_inline))

namespace evenkeel {
namespace EVENKEEL_ISA {

constexpr int cache_line = 64;  // bytes

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

template <class C>
struct Vec;
template <>
struct Vec<float> {
  typedef float type __attribute__((vector_size(EVENKEEL_BYTES)));
  typedef std::int32_t mask __attribute__((vector_size(EVENKEEL_BYTES)));
  typedef float narrow __attribute__((vector_size(EVENKEEL_BYTES / 2)));  // as many as doubles
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(EVENKEEL_BYTES)));
  typedef std::int64_t mask __attribute__((vector_size(EVENKEEL_BYTES)));
  typedef type narrow;
};

typedef Vec<float>::type VF;
typedef std::uint16_t VH __attribute__((vector_size(EVENKEEL_BYTES / 2)));
typedef std::uint32_t VU __attribute__((vector_size(EVENKEEL_BYTES)));

// Lanes below n.
template <class C>
inline typename Vec<C>::mask lanes_below(int n) {
  typename Vec<C>::mask iota{};
  for (unsigned i = 0; i < EVENKEEL_BYTES / sizeof(C); ++i) iota[i] = static_cast<int>(i);
  return iota < (typename Vec<C>::mask{} + n);
}

// The n first or the n last lanes of a vector, for what a run has before its first boundary and
// after its last. Where memory can be accessed under a mask, the last ones stay in their places, so
// that the access does not cross a line of the cache; elsewhere both are the first.
struct Part {
  int n;
  unsigned mask;
  int before;  // lanes that the vector would have before the first of these

  static Part first(Index n) { return {static_cast<int>(n), (1u << n) - 1, 0}; }
#if defined(__AVX512F__)
  static Part last(Index n, int lanes) {
    const int before = lanes - static_cast<int>(n);
    return {static_cast<int>(n), ((1u << n) - 1) << before, before};
  }
#else
  static Part last(Index n, int) { return first(n); }
#endif
};

// Memory into the lanes of a part, zero into the others; and back.
template <class V, class T>
inline V partial(const T* p, Part part) {
  V v{};
  std::memcpy(&v, p, sizeof(T) * part.n);
  return v;
}
template <class T, class V>
inline void store_partial(T* p, const V& v, Part part) {
  std::memcpy(static_cast<void*>(p), &v, sizeof(T) * part.n);
}
#if defined(__AVX512F__)
typedef Vec<double>::type VD;
template <>
inline VF partial<VF, float>(const float* p, Part part) {
  return reinterpret_cast<VF>(_mm512_maskz_loadu_ps(part.mask, p - part.before));
}
template <>
inline VD partial<VD, double>(const double* p, Part part) {
  return reinterpret_cast<VD>(_mm512_maskz_loadu_pd(part.mask, p - part.before));
}
template <>
inline VH partial<VH, std::uint16_t>(const std::uint16_t* p, Part part) {
  return reinterpret_cast<VH>(_mm256_maskz_loadu_epi16(part.mask, p - part.before));
}
inline void store_partial(float* p, const VF& v, Part part) {
  _mm512_mask_storeu_ps(p - part.before, part.mask, reinterpret_cast<__m512>(v));
}
inline void store_partial(double* p, const VD& v, Part part) {
  _mm512_mask_storeu_pd(p - part.before, part.mask, reinterpret_cast<__m512d>(v));
}
inline void store_partial(std::uint16_t* p, const VH& v, Part part) {
  _mm256_mask_storeu_epi16(p - part.before, part.mask, reinterpret_cast<__m256i>(v));
}
#elif defined(__AVX2__)
template <>
inline VF partial<VF, float>(const float* p, Part part) {
  return reinterpret_cast<VF>(
      _mm256_maskload_ps(p, reinterpret_cast<__m256i>(lanes_below<float>(part.n))));
}
// A store under a mask takes AMD's processors 40 operations.
inline void store_partial(float* p, const VF& v, Part part) {
  __m128 rest = _mm256_castps256_ps128(reinterpret_cast<__m256>(v));
  if (part.n & 4) {
    _mm_storeu_ps(p, rest), p += 4;
    rest = _mm256_extractf128_ps(reinterpret_cast<__m256>(v), 1);
  }
  if (part.n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), rest), p += 2;
    rest = _mm_movehl_ps(rest, rest);
  }
  if (part.n & 1) _mm_store_ss(p, rest);
}
// There is no access of 16-bit lanes under a mask: pieces of four, two and one, by way of integers.
template <>
inline VH partial<VH, std::uint16_t>(const std::uint16_t* p, Part part) {
  std::uint64_t four = 0, rest = 0;
  if (part.n & 4) std::memcpy(&four, p, 8), p += 4;
  if (part.n & 1) rest = p[part.n & 2];
  if (part.n & 2) {
    std::uint32_t two;
    std::memcpy(&two, p, 4);
    rest = rest << 32 | two;
  }
  const bool is_long = part.n & 4;
  return reinterpret_cast<VH>(_mm_set_epi64x(static_cast<long long>(is_long ? rest : 0),
                                             static_cast<long long>(is_long ? four : rest)));
}
inline void store_partial(std::uint16_t* p, const VH& v, Part part) {
  const __m128i whole = reinterpret_cast<__m128i>(v);
  auto rest = static_cast<std::uint64_t>(_mm_cvtsi128_si64(whole));
  if (part.n & 4) {
    std::memcpy(p, &rest, 8), p += 4;
    rest = static_cast<std::uint64_t>(_mm_extract_epi64(whole, 1));
  }
  if (part.n & 2) {
    const auto two = static_cast<std::uint32_t>(rest);
    std::memcpy(p, &two, 4), p += 2;
    rest >>= 32;
  }
  if (part.n & 1) *p = static_cast<std::uint16_t>(rest);
}
#endif

// v in the lanes of a part, zero in the others.
template <class C, class V>
inline V only(Part part, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    return reinterpret_cast<V>(_mm512_maskz_mov_ps(part.mask, reinterpret_cast<__m512>(v)));
  } else {
    return reinterpret_cast<V>(_mm512_maskz_mov_pd(part.mask, reinterpret_cast<__m512d>(v)));
  }
#else
  return lanes_below<C>(part.n) ? v : V{};
#endif
}

// One bit for each lane of a comparison, and a choice by such bits.
template <class C>
inline unsigned bits_of(typename Vec<C>::mask m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m));
  else return _mm512_movepi64_mask(reinterpret_cast<__m512i>(m));
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) return _mm256_movemask_ps(reinterpret_cast<__m256>(m));
  else return _mm256_movemask_pd(reinterpret_cast<__m256d>(m));
#else
  unsigned bits = 0;
  for (unsigned i = 0; i < EVENKEEL_BYTES / sizeof(C); ++i) bits |= (m[i] ? 1u : 0u) << i;
  return bits;
#endif
}
template <class C, class V>
inline V pick(unsigned bits, V yes, V no) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    return reinterpret_cast<V>(_mm512_mask_blend_ps(bits, reinterpret_cast<__m512>(no),
                                                    reinterpret_cast<__m512>(yes)));
  } else {
    return reinterpret_cast<V>(_mm512_mask_blend_pd(bits, reinterpret_cast<__m512d>(no),
                                                    reinterpret_cast<__m512d>(yes)));
  }
#else
  using M = typename Vec<C>::mask;
  M lane{};
  for (unsigned i = 0; i < EVENKEEL_BYTES / sizeof(C); ++i) lane[i] = 1 << i;
  return ((M{} + static_cast<int>(bits)) & lane) != 0 ? yes : no;
#endif
}

template <class V>
inline V whole(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
