// The arithmetic of one owner: its moments, and its constants in the precision of the loops.
#pragma once
#include <algorithm>

#include "activation.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

// Where the value that decides about a gradient comes from: x alone, x and a residual, or the bits
// that forward kept.
enum class Source { x, sum, mask };

// How many values, their mean and their sum of squared deviations.
struct Moments {
  double n = 0, mean = 0, m2 = 0;

  // Merges values of which the sums of x - pivot and (x - pivot)^2 are known. With this mean for a
  // pivot nothing cancels: with at least as many values here as there, the difference of the two
  // large terms is at least half of either. So a tile needs no pass of its own for its mean.
  void add_about(double count, double pivot, double off, double squares) {
    const double theirs = pivot + off / count, all = n + count, delta = theirs - mean;
    const double grown = m2 + (squares - off * off / count + delta * delta * (n * count / all));
    mean += delta * (count / all);
    m2 = grown < 0 ? 0 : grown;
    n = all;
  }

  // Chan, Golub and LeVeque 1979.
  void add(const Moments& other) {
    if (other.n == 0) return;
    if (n == 0) {
      *this = other;
      return;
    }
    const double all = n + other.n, delta = other.mean - mean;
    if (std::isfinite(delta)) {
      mean += delta * (other.n / all);
    } else {
      mean = (n * mean + other.n * other.mean) / all;  // infinities of one sign stay one
    }
    m2 += other.m2 + delta * delta * (n * other.n / all);
    n = all;
  }
};

// What the loops need of an owner. The mean is in two parts, so that x - mean loses nothing where
// the mean is far from zero: z = (x - high) * scale + shift, with the low part in the shift.
template <class C>
struct Constants {
  C high, scale, shift;
  C a, b, c;  // dx = a * dz + (b * (x - high) + c)

  static double low(const Problem& p, Index owner) {
    const double rest = p.mean[owner] - static_cast<double>(static_cast<C>(p.mean[owner]));
    return std::isfinite(rest) ? rest : 0;
  }

  static Constants of(const Problem& p, Index owner, bool with_gradient) {
    Constants k{};
    const double scale = p.invstd[owner] * (p.weight ? p.weight[owner] : 1.0);
    const double rest = low(p, owner);
    k.high = canonical<C>(p.mean[owner]);
    k.scale = canonical<C>(scale);
    k.shift = canonical<C>((p.bias ? p.bias[owner] : 0.0) - (rest == 0 ? 0.0 : rest * scale));
    if (!with_gradient) return k;
    k.a = canonical<C>(scale);
    if (p.from_batch) {
      const double m = static_cast<double>(p.count());
      const double slope = -scale * p.invstd[owner] * (p.sum_dz_xhat[owner] / m);
      k.b = canonical<C>(slope);
      k.c = canonical<C>(-scale * (p.sum_dz[owner] / m) - (rest == 0 ? 0.0 : rest * slope));
    }
    return k;
  }
};

inline void set_moments(const Problem& p, Index owner, const Moments& m) {
  p.mean[owner] = m.mean;
  p.m2[owner] = m.m2;
  p.invstd[owner] = 1.0 / std::sqrt(m.m2 / m.n + p.eps);
}

// The sums arrive over x - high; xhat is (x - high - low) * invstd.
template <class C>
inline void set_sums(const Problem& p, Index owner, double dz, double dz_x) {
  const double rest = Constants<C>::low(p, owner);
  p.sum_dz[owner] = dz;
  p.sum_dz_xhat[owner] = (dz_x - (rest == 0 ? 0.0 : rest * dz)) * p.invstd[owner];
}

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
