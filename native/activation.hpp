// Activations and their derivatives. What is kept NaN and what becomes zero is torch's choice, at
// the kinks too.
#pragma once
#include "vector.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

inline VF exponential(VF x) {
  // x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by its series; ln 2 in two parts for an exact r.
  typedef Vec<float>::mask VI;
  VF n = x * 1.44269504088896341f;
  n = (n + 12582912.0f) - 12582912.0f;  // rounds to an integer
  VF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VF p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  VI is_small = x < -87.0f, is_large = x > 88.0f;
  VI bits = __builtin_convertvector(is_small | is_large ? VF{} : n, VI);
  VI scaled = (bits + 127) << 23;
  VF y = p * reinterpret_cast<VF>(scaled);
  const VF infinite = spread<VF>(std::numeric_limits<float>::infinity());
  y = is_small ? VF{} : (is_large ? infinite : y);
  return x == x ? y : x;
}

inline Vec<double>::type exponential(Vec<double>::type x) {
  for (unsigned i = 0; i < sizeof(x) / 8; ++i) x[i] = std::exp(x[i]);
  return x;
}

// In place of an activation: whichever the problem names.
constexpr Act any = Act(-1);

// Activations whose gradient one bit decides.
constexpr bool has_mask(Act a) {
  return a == Act::relu || a == Act::leaky || a == Act::relu6 || a == any;
}

template <Act A, class C>
struct Activation {
  C slope;

  explicit Activation(const Problem& p) : slope(canonical<C>(p.slope)) {}
  explicit Activation(C of_negatives) : slope(of_negatives) {}

  template <class V>
  INLINE V operator()(V z) const {
    const V zero{};
    if constexpr (A == Act::relu) return z <= zero ? zero : z;
    if constexpr (A == Act::leaky) return z > zero ? z : z * slope;
    if constexpr (A == Act::relu6) {
      const V six = zero + C(6);
      return z <= zero ? zero : (z >= six ? six : z);
    }
    if constexpr (A == Act::silu) return z / (C(1) + exponential(-z));
    return z;
  }

  // What of the gradient dy reaches z.
  template <class V>
  INLINE V gradient(V dy, V z) const {
    const V zero{};
    if constexpr (A == Act::relu) return z <= zero ? zero : dy;
    if constexpr (A == Act::leaky) return z > zero ? dy : dy * slope;
    if constexpr (A == Act::relu6) return (z <= zero) | (z >= zero + C(6)) ? zero : dy;
    if constexpr (A == Act::silu) {
      const V s = C(1) / (C(1) + exponential(-z));
      return dy * s * (C(1) + z * (C(1) - s));
    }
    return dy;
  }

  // Whether it reaches z unchanged; where not, it is zero or the slope's part.
  template <class V>
  INLINE unsigned passing(V z) const {
    const V zero{};
    if constexpr (A == Act::leaky) return bits_of<C>(z > zero);
    if constexpr (A == Act::relu6) return bits_of<C>(~((z <= zero) | (z >= zero + C(6))));
    return bits_of<C>(~(z <= zero));
  }

  // `gradient` from those bits.
  template <class V>
  INLINE V gradient_by(unsigned passes, V dy) const {
    return pick<C>(passes, dy, A == Act::leaky ? dy * slope : V{});
  }
};

// Asks at every vector which activation it is.
template <class C>
struct Activation<any, C> {
  Act act;
  C slope;

  explicit Activation(const Problem& p) : act(p.act), slope(canonical<C>(p.slope)) {}

  template <class F>
  INLINE auto with(F f) const {
    switch (act) {
      case Act::relu: return f(Activation<Act::relu, C>(slope));
      case Act::leaky: return f(Activation<Act::leaky, C>(slope));
      case Act::relu6: return f(Activation<Act::relu6, C>(slope));
      case Act::silu: return f(Activation<Act::silu, C>(slope));
      default: return f(Activation<Act::none, C>(slope));
    }
  }
  template <class V>
  INLINE V operator()(V z) const {
    return with([=](auto a) INLINE { return a(z); });
  }
  template <class V>
  INLINE V gradient(V dy, V z) const {
    return with([=](auto a) INLINE { return a.gradient(dy, z); });
  }
  template <class V>
  INLINE unsigned passing(V z) const {
    return with([=](auto a) INLINE { return a.passing(z); });
  }
  template <class V>
  INLINE V gradient_by(unsigned passes, V dy) const {
    return with([=](auto a) INLINE { return a.gradient_by(passes, dy); });
  }
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
