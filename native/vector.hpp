// Vectors of the instruction set that this file is compiled for, and how each storage type is
// loaded into them and stored from them. Written with the compilers' vector types, so that Arm and
// plain x86 take the same code; intrinsics only where those types are not enough.
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
  typedef double wide __attribute__((vector_size(2 * EVENKEEL_BYTES)));  // as many doubles
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(EVENKEEL_BYTES)));
  typedef std::int64_t mask __attribute__((vector_size(EVENKEEL_BYTES)));
  typedef type wide;
};

typedef Vec<float>::type VF;
typedef std::uint16_t VH __attribute__((vector_size(EVENKEEL_BYTES / 2)));
typedef std::uint32_t VU __attribute__((vector_size(EVENKEEL_BYTES)));

// The first n lanes of memory, the others zero.
template <class V, class T>
inline V partial(const T* p, int n) {
  V v{};
  std::memcpy(&v, p, sizeof(T) * n);
  return v;
}
#if defined(__AVX512F__)
template <>
inline VF partial<VF, float>(const float* p, int n) {
  return reinterpret_cast<VF>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
}
template <>
inline VH partial<VH, std::uint16_t>(const std::uint16_t* p, int n) {
  return reinterpret_cast<VH>(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
}
#endif

template <class T, class V>
inline void store_partial(T* p, const V& v, int n) {
  std::memcpy(static_cast<void*>(p), &v, sizeof(T) * n);
}
#if defined(__AVX512F__)
inline void store_partial(float* p, const VF& v, int n) {
  _mm512_mask_storeu_ps(p, (1u << n) - 1, reinterpret_cast<__m512>(v));
}
#endif

template <class V>
inline V whole(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline VF widen(VH h, bf16) {
  VU u = __builtin_convertvector(h, VU) << 16;
  return reinterpret_cast<VF>(u);
}

inline VH narrow(VF v, bf16) {
  VU u = reinterpret_cast<VU>(v);
  VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VU quiet = (u >> 16) | 0x40u;
  VU is_nan = reinterpret_cast<VU>(v != v);
  return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), VH);
}

#if defined(__AVX512F__)
inline VF widen(VH h, f16) {
  return reinterpret_cast<VF>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
}
inline VH narrow(VF v, f16) {
  return reinterpret_cast<VH>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
}
#elif defined(__AVX2__)
inline VF widen(VH h, f16) {
  return reinterpret_cast<VF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
}
inline VH narrow(VF v, f16) {
  return reinterpret_cast<VH>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
}
#else
// Half precision without hardware: by integer arithmetic, round to nearest even.
inline float half_to_float(std::uint16_t h) {
  std::uint32_t sign = (h & 0x8000u) << 16, e = (h >> 10) & 31, f = h & 0x3ffu, u;
  if (e == 31) {
    u = sign | 0x7f800000u | (f << 13);
  } else if (e) {
    u = sign | ((e + 112) << 23) | (f << 13);
  } else {
    float v = std::ldexp(static_cast<float>(f), -24);
    return sign ? -v : v;
  }
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline std::uint16_t float_to_half(float v) {
  std::uint32_t u;
  std::memcpy(&u, &v, 4);
  std::uint16_t sign = (u >> 16) & 0x8000u;
  std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;
  if (a < 0x38800000u) {  // subnormal: count units of 2^-24
    float scaled = std::ldexp(std::fabs(v), 24);
    return sign | static_cast<std::uint16_t>(std::nearbyint(scaled));
  }
  std::uint32_t rounded = a - 0x38000000u + 0xfffu + ((a >> 13) & 1u);
  return sign | static_cast<std::uint16_t>(rounded >> 13);
}
inline VF widen(VH h, f16) {
  VF v{};
  for (unsigned i = 0; i < sizeof(VH) / 2; ++i) v[i] = half_to_float(h[i]);
  return v;
}
inline VH narrow(VF v, f16) {
  VH h{};
  for (unsigned i = 0; i < sizeof(VH) / 2; ++i) h[i] = float_to_half(v[i]);
  return h;
}
#endif

// A storage type T: what it is computed in (C), and vectors of L lanes to and from memory.
template <class T>
struct Storage {
  using C = float;
  using V = VF;
  static constexpr int L = EVENKEEL_BYTES / 4;
  static V load(const T* p) { return widen(whole<VH>(p), T{}); }
  static V load(const T* p, int n) {
    return widen(partial<VH>(reinterpret_cast<const std::uint16_t*>(p), n), T{});
  }
  static void store(T* p, V v) {
    VH h = narrow(v, T{});
    std::memcpy(static_cast<void*>(p), &h, sizeof h);
  }
  static void store(T* p, V v, int n) { store_partial(p, narrow(v, T{}), n); }
  static void stream(T* p, V v) { store(p, v); }
  static double scalar(const T* p) { return static_cast<double>(load(p, 1)[0]); }
};

template <class T>
struct Plain {
  using C = T;
  using V = typename Vec<T>::type;
  static constexpr int L = EVENKEEL_BYTES / sizeof(T);
  static V load(const T* p) { return whole<V>(p); }
  static V load(const T* p, int n) { return partial<V>(p, n); }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
  static void store(T* p, V v, int n) { store_partial(p, v, n); }
  // Past the cache, for what nobody reads soon; p is on a vector's boundary.
  static void stream(T* p, V v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
    store(p, v);
#endif
  }
  static double scalar(const T* p) { return static_cast<double>(*p); }
};
template <>
struct Storage<float> : Plain<float> {};
template <>
struct Storage<double> : Plain<double> {};

template <class V>
inline V spread(decltype(V{}[0] + 0) value) {
  return V{} + value;
}

// Lanes below n.
template <class C>
inline typename Vec<C>::mask lanes_below(int n) {
  typename Vec<C>::mask iota{};
  for (unsigned i = 0; i < EVENKEEL_BYTES / sizeof(C); ++i) iota[i] = static_cast<int>(i);
  return iota < (typename Vec<C>::mask{} + n);
}

// The sum of all lanes, by halves.
template <class V>
inline double total(const V& v) {
  using C = std::decay_t<decltype(v[0])>;
  constexpr int L = sizeof(V) / sizeof(C);
  C lane[L];
  std::memcpy(lane, &v, sizeof v);
  for (int half = L / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return static_cast<double>(lane[0]);
}
#if defined(__AVX512F__)
template <>
inline double total(const VF& v) {
  return static_cast<double>(_mm512_reduce_add_ps(reinterpret_cast<__m512>(v)));
}
#endif

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
