// The two storage types of 16 bits, to floats and back.
#pragma once
#include "lanes.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

// A constant of the loops: what it is in their precision, any NaN as the plain one.
template <class C>
inline C canonical(double value) {
  return std::isnan(value) ? std::numeric_limits<C>::quiet_NaN() : static_cast<C>(value);
}

// bfloat16 is the upper half of a float; back it is rounded to nearest even. NaN is not asked for: one
// with an empty lower half stays NaN, and there is no other. What is read as bfloat16 has it empty,
// constants are canonical, and arithmetic keeps or makes such a one. The compiler's conversions between
// lanes of two widths go by halves of a vector.
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
  return reinterpret_cast<VH>(_mm512_cvtepi32_epi16(rounded));
}
#elif defined(__AVX2__)
inline VF widen(VH h, bf16) {
  const __m256i both = _mm256_broadcastsi128_si256(reinterpret_cast<__m128i>(h));
  const __m256i upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return reinterpret_cast<VF>(_mm256_shuffle_epi8(both, upper));
}
inline VH narrow(VF v, bf16) {
  const __m256i u = reinterpret_cast<__m256i>(v), high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(u, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(half, odd), 16);
  const __m128i low = _mm256_castsi256_si128(rounded);
  return reinterpret_cast<VH>(_mm_packus_epi32(low, _mm256_extracti128_si256(rounded, 1)));
}
#else
inline VF widen(VH h, bf16) {
  VU u = __builtin_convertvector(h, VU) << 16;
  return reinterpret_cast<VF>(u);
}
inline VH narrow(VF v, bf16) {
  VU u = reinterpret_cast<VU>(v);
  return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, VH);
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

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
