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

// bfloat16 is the upper half of a float; back it is rounded to nearest even, and NaN stays NaN. The
// compiler's conversions between lanes of two widths go by halves of a vector.
#if defined(__AVX512F__)
inline VF widen(VH h, bf16) {
  const __m512i wide = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h));
  return reinterpret_cast<VF>(_mm512_slli_epi32(wide, 16));
}
inline VH narrow(VF v, bf16) {
  const __m512i u = reinterpret_cast<__m512i>(v), high = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(half, odd), 16);
  const __m512 f = reinterpret_cast<__m512>(v);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
  return reinterpret_cast<VH>(_mm512_cvtepi32_epi16(all));
}
#elif defined(__AVX2__)
inline VF widen(VH h, bf16) {
  const __m256i both = _mm256_broadcastsi128_si256(reinterpret_cast<__m128i>(h));
  const __m256i upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return reinterpret_cast<VF>(_mm256_shuffle_epi8(both, upper));
}
inline VH narrow(VF v, bf16) {
  const __m256 f = reinterpret_cast<__m256>(v);
  const __m256i u = reinterpret_cast<__m256i>(v), high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(u, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(half, odd), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
  const __m256i all = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m128i low = _mm256_castsi256_si128(all);
  return reinterpret_cast<VH>(_mm_packus_epi32(low, _mm256_extracti128_si256(all, 1)));
}
#else
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
#endif

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
  static V load(const T* p, Part part) {
    return widen(partial<VH>(reinterpret_cast<const std::uint16_t*>(p), part), T{});
  }
  static void store(T* p, V v) {
    VH h = narrow(v, T{});
    std::memcpy(static_cast<void*>(p), &h, sizeof h);
  }
  static void store(T* p, V v, Part part) {
    store_partial(reinterpret_cast<std::uint16_t*>(p), narrow(v, T{}), part);
  }
  static void stream(T* p, V v) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(narrow(v, T{})));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrow(v, T{})));
#else
    store(p, v);
#endif
  }
  static double scalar(const T* p) {
    return static_cast<double>(load(p, Part::first(1))[0]);
  }
};

template <class T>
struct Plain {
  using C = T;
  using V = typename Vec<T>::type;
  static constexpr int L = EVENKEEL_BYTES / sizeof(T);
  static V load(const T* p) { return whole<V>(p); }
  static V load(const T* p, Part part) { return partial<V>(p, part); }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
  static void store(T* p, V v, Part part) { store_partial(p, v, part); }
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

// After the last streamed store of a thread, before others read it.
inline void settle() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
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
