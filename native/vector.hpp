// How each storage type is loaded into vectors and stored from them, and what is made of a vector.
#pragma once
#include "half.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

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
