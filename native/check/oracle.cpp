#include "oracle.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace evenkeel::check {
namespace {

void fill_statistics(const Case& c, const Data& d, Wanted& w) {
  const auto owners = static_cast<std::size_t>(c.owners());
  const Precision p = precision_of(c.type);
  const Real m = static_cast<Real>(c.count());
  Reals absolute(owners);
  w.mean.assign(owners, 0), w.m2.assign(owners, 0), w.invstd.assign(owners, 0);
  w.mean_allowed.assign(owners, 0), w.m2_allowed.assign(owners, 0);
  for (Index i = 0; i < c.size(); ++i) {
    w.mean[c.owner(i)] += d.x[i];
    absolute[c.owner(i)] += std::fabs(d.x[i]) / m;
  }
  for (Real& mean : w.mean) mean /= m;
  Reals rest(owners);  // what the roundings of that sum have cost
  for (Index i = 0; i < c.size(); ++i) rest[c.owner(i)] += (d.x[i] - w.mean[c.owner(i)]) / m;
  for (std::size_t o = 0; o < owners; ++o)
    if (std::isfinite(rest[o])) w.mean[o] += rest[o];
  for (Index i = 0; i < c.size(); ++i) {
    const Real off = d.x[i] - w.mean[c.owner(i)];
    w.m2[c.owner(i)] += off * off;
  }
  for (std::size_t o = 0; o < owners; ++o) {
    const Real std = std::sqrt(w.m2[o] / m);
    w.invstd[o] = 1 / std::sqrt(w.m2[o] / m + static_cast<Real>(c.eps));
    // The pivot that deviations are taken from is off by a rounding of a sum of 40 terms at most.
    const Real pivot = 40 * p.unit * absolute[o];
    w.mean_allowed[o] = p.variance * std + 64 * p.unit * pivot +
                        std::ldexp(Real{4}, -53) * absolute[o] + 64 * p.grain;
    // Means of parts are rounded to double precision before they are compared.
    const Real blur = std::ldexp(absolute[o], -51);
    w.m2_allowed[o] =
        p.variance * w.m2[o] + m * (64 * p.unit * pivot * pivot + blur * (blur + std) + 4 * p.floor);
  }
}

// What a pass computes with, and how exact that is.
struct Statistics {
  Real mean, invstd, mean_off, scale_off;
};

// Forward takes its own statistics, unless they are given.
Statistics in_forward(const Case& c, const Data& d, const Wanted& w, Index owner) {
  if (c.forward == Mode::given) return {d.given_mean[owner], d.given_invstd[owner], 0, 0};
  const Real var_off = w.m2_allowed[owner] / static_cast<Real>(c.count());
  return {w.mean[owner], w.invstd[owner], w.mean_allowed[owner],
          var_off * w.invstd[owner] * w.invstd[owner] / 2};
}

// Backward gets them, as numbers in double precision.
Statistics in_backward(const Case& c, const Data& d, const Wanted& w, Index owner) {
  if (c.forward == Mode::given) return in_forward(c, d, w, owner);
  return {static_cast<double>(w.mean[owner]), static_cast<double>(w.invstd[owner]), 0, 0};
}

void fill_forward(const Case& c, const Data& d, Wanted& w) {
  const Precision p = precision_of(c.type);
  w.y.resize(d.x.size()), w.y_allowed.resize(d.x.size());
  for (Index i = 0; i < c.size(); ++i) {
    const Index o = c.owner(i);
    const Statistics s = in_forward(c, d, w, o);
    const Real weight = d.weight[o], bias = d.bias[o], off = d.x[i] - s.mean;
    const Real normal = off * s.invstd * weight, z = normal + bias + d.residual[i];
    const Real steep = std::max<Real>(Real{1.1L}, std::fabs(static_cast<Real>(c.slope)));
    w.y[i] = activated(c.act, c.slope, z);
    w.y_allowed[i] =
        p.rounding * std::fabs(w.y[i]) + 2 * p.least +
        steep * (p.inner * (std::fabs(normal) + std::fabs(bias) + std::fabs(d.residual[i])) +
                 s.scale_off * std::fabs(normal) + std::fabs(weight) * s.invstd * s.mean_off +
                 4 * p.floor);
    if (!std::isfinite(z)) w.y_allowed[i] = 0;  // what is wanted is exact, and terms have no size
  }
}

// dz / dx is scale; the statistics add what their own derivatives are.
void fill_backward(const Case& c, const Data& d, Wanted& w) {
  const Precision p = precision_of(c.type);
  const auto owners = static_cast<std::size_t>(c.owners()), size = d.x.size();
  const Real m = static_cast<Real>(c.count());
  const bool cuts = c.act == Act::relu || c.act == Act::relu6;  // a gradient of NaN, too
  Reals dz(size), dy(size), xhat(size), all_dy(owners), all_product(owners);
  for (Reals* sum : {&w.sum_dz, &w.sum_dz_xhat}) sum->assign(owners, 0);
  for (Index i = 0; i < c.size(); ++i) {
    const Index o = c.owner(i);
    const Statistics s = in_backward(c, d, w, o);
    xhat[i] = (d.x[i] - s.mean) * s.invstd;
    const Real slope = derivative(c.act, c.slope, xhat[i] * d.weight[o] + d.bias[o] + d.residual[i]);
    dz[i] = slope == 0 && cuts ? 0 : d.dy[i] * slope;
    w.sum_dz[o] += dz[i], w.sum_dz_xhat[o] += dz[i] * xhat[i];
    dy[i] = dz[i] == 0 && cuts ? 0 : std::fabs(d.dy[i]);
    all_dy[o] += dy[i], all_product[o] += dy[i] * std::fabs(xhat[i]);
  }
  const Real steep = std::max<Real>(Real{1.1L}, std::fabs(static_cast<Real>(c.slope)));
  w.sum_dz_allowed.resize(owners), w.sum_dz_xhat_allowed.resize(owners);
  for (std::size_t o = 0; o < owners; ++o) {
    w.sum_dz_allowed[o] = steep * p.inner * all_dy[o] + m * p.floor;
    w.sum_dz_xhat_allowed[o] = steep * p.inner * (all_product[o] + all_dy[o]) + m * p.floor;
  }
  w.dx.resize(size), w.dx_allowed.resize(size);
  w.dresidual.resize(size), w.dresidual_allowed.resize(size);
  for (Index i = 0; i < c.size(); ++i) {
    const Index o = c.owner(i);
    const Statistics s = in_backward(c, d, w, o);
    const Real scale = d.weight[o] * s.invstd;
    Real inside = dz[i], size_of_terms = dy[i];
    if (c.from_batch) {
      inside -= w.sum_dz[o] / m + xhat[i] * w.sum_dz_xhat[o] / m;
      size_of_terms += all_dy[o] / m + std::fabs(xhat[i]) * (all_product[o] + all_dy[o]) / m;
    }
    w.dx[i] = scale * inside;
    w.dx_allowed[i] = p.rounding * std::fabs(w.dx[i]) + 2 * p.least + 8 * p.floor +
                      (c.from_batch ? p.grain * std::fabs(d.x[i] - s.mean) : 0) +
                      steep * p.inner * std::fabs(scale) * size_of_terms;
    w.dresidual[i] = dz[i];
    w.dresidual_allowed[i] =
        p.rounding * std::fabs(dz[i]) + 2 * p.least + steep * p.inner * dy[i];
  }
}

void make_special(const Case& c, Random& random, Data& d) {
  const Real none = std::numeric_limits<Real>::quiet_NaN();
  const Real infinity = std::numeric_limits<Real>::infinity();
  auto any = [&](Reals& values) -> Real& { return values[static_cast<std::size_t>(random.below(c.size()))]; };
  switch (c.special) {
    case Special::constant: {
      Reals value(static_cast<std::size_t>(c.owners()));
      for (Real& v : value) v = rounded(c.type, random.normal() * c.std + c.mean);
      for (Index i = 0; i < c.size(); ++i)
        if (c.owner(i) % 3 == 0) d.x[i] = value[c.owner(i)];
      break;
    }
    case Special::kinks:  // x is its mean, so z is the bias and the residual: often on a kink
      for (Real& x : d.x) x = 2;
      for (double& b : d.bias) b = c.bias ? random.pick<double>({0, 6, 1, -1, 7}) : 0;
      for (Real& r : d.residual) r = c.residual ? random.pick<double>({0, 0, -1, 6}) : 0;
      break;
    case Special::nan: any(d.x) = none; break;
    case Special::inf: any(d.x) = infinity; break;
    case Special::both_infs: any(d.x) = infinity, any(d.x) = -infinity; break;
    case Special::nan_in_dy: any(d.dy) = none; break;
    default: break;
  }
}

// Of a kink nothing but its place matters: dy is zero where its side is unclear.
void clear_kinks(const Case& c, Data& d) {
  const bool has_kink = c.act == Act::relu || c.act == Act::leaky || c.act == Act::relu6;
  if (!has_kink || c.special == Special::kinks) return;
  const Precision p = precision_of(c.type);
  Wanted w;
  fill_statistics(c, d, w);
  for (Index i = 0; i < c.size(); ++i) {
    const Index o = c.owner(i);
    const Statistics s = in_forward(c, d, w, o);
    const Real normal = (d.x[i] - s.mean) * s.invstd * d.weight[o];
    const Real z = normal + d.bias[o] + d.residual[i];
    const Real terms = std::fabs(normal) + std::fabs(d.bias[o]) + std::fabs(d.residual[i]);
    const Real unclear = 2 * (p.inner * terms + s.scale_off * std::fabs(normal) +
                              std::fabs(d.weight[o]) * s.invstd * s.mean_off + p.floor);
    const bool near_six = c.act == Act::relu6 && std::fabs(z - 6) <= unclear;
    if (std::fabs(z) <= unclear || near_six) d.dy[i] = 0;
  }
}

}  // namespace

Real activated(Act act, Real slope, Real z) {
  switch (act) {
    case Act::none: return z;
    case Act::relu: return z <= 0 ? 0 : z;
    case Act::leaky: return z > 0 ? z : slope * z;
    case Act::relu6: return z <= 0 ? 0 : z >= 6 ? 6 : z;
    case Act::silu: return z / (1 + std::exp(-z));
  }
  return z;
}

// At a kink and for NaN, what torch takes it to be.
Real derivative(Act act, Real slope, Real z) {
  switch (act) {
    case Act::none: return 1;
    case Act::relu: return z <= 0 ? 0 : 1;
    case Act::leaky: return z > 0 ? 1 : slope;
    case Act::relu6: return z <= 0 || z >= 6 ? 0 : 1;
    case Act::silu: {
      const Real s = 1 / (1 + std::exp(-z));
      return s + z * s * (1 - s);
    }
  }
  return 1;
}

Data data_of(const Case& c) {
  Random random(c.seed, ~c.number);
  const auto size = static_cast<std::size_t>(c.size()), owners = static_cast<std::size_t>(c.owners());
  Data d;
  Reals centre(owners);
  for (Real& v : centre) v = c.mean * (1 + random.uniform());
  d.x.resize(size), d.residual.resize(size), d.dy.resize(size);
  const double steep = c.special == Special::none && random.chance(4) ? 1e-4 : 1;
  for (Index i = 0; i < c.size(); ++i) {
    d.x[i] = rounded(c.type, centre[c.owner(i)] + c.std * random.normal());
    d.residual[i] = c.residual ? rounded(c.type, random.normal()) : 0;
    d.dy[i] = rounded(c.type, steep * random.normal());
  }
  for (std::size_t o = 0; o < owners; ++o) {
    d.weight.push_back(c.weight ? random.normal() + 1 : 1);
    d.bias.push_back(c.bias ? random.normal() : 0);
    d.given_mean.push_back(static_cast<double>(centre[o]) + 0.1 * c.std * random.normal());
    d.given_invstd.push_back((0.5 + random.uniform()) / std::sqrt(c.std * c.std + c.eps));
  }
  make_special(c, random, d);
  clear_kinks(c, d);
  return d;
}

Wanted wanted_of(const Case& c, const Data& d) {
  Wanted w;
  fill_statistics(c, d, w);
  fill_forward(c, d, w);
  fill_backward(c, d, w);
  return w;
}

}  // namespace evenkeel::check
