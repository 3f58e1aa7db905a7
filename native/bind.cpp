// The module evenkeel._native. Tensors come as addresses, checked in evenkeel/kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using evenkeel::Index;
using Address = std::uintptr_t;

namespace {

const evenkeel::Kernels* active = nullptr;

template <class P>
P* at(Address a) {
  return reinterpret_cast<P*>(a);
}

evenkeel::Problem problem(Index k1, Index r1, Index k2, Index r2, int type, int act, double slope,
                          int phases, int threads) {
  evenkeel::Problem p;
  p.k1 = k1, p.r1 = r1, p.k2 = k2, p.r2 = r2;
  p.type = static_cast<evenkeel::Type>(type);
  p.act = static_cast<evenkeel::Act>(act);
  p.slope = slope, p.phases = phases, p.threads = threads;
  return p;
}

// A vector of parameters or statistics, which are single or double.
struct Vector {
  Address address;
  bool single;

  const double* doubles(Index n, std::vector<double>& scratch) const {
    if (!address || !single) return at<double>(address);
    const float* from = at<float>(address);
    scratch.assign(from, from + n);
    return scratch.data();
  }
  void set(Index i, double value) const {
    single ? void(at<float>(address)[i] = static_cast<float>(value))
           : void(at<double>(address)[i] = value);
  }
  double get(Index i) const { return single ? at<float>(address)[i] : at<double>(address)[i]; }
};

// `memory` is three rows: mean, 1 / sqrt(var + eps), var; written with the statistics.
void forward(Index k1, Index r1, Index k2, Index r2, int type, int act, double slope, int phases,
             int threads, double eps, Address x, Address residual, Address y, Address mask,
             Address weight, Address bias, bool single, Address memory, Address running_mean,
             Address running_var, bool running_single, double momentum) {
  auto p = problem(k1, r1, k2, r2, type, act, slope, phases, threads);
  const Index n = p.owners();
  std::vector<double> scratch[2];
  p.eps = eps;
  p.x = at<void>(x), p.residual = at<void>(residual), p.y = at<void>(y);
  p.mask = at<std::uint8_t>(mask);
  p.weight = Vector{weight, single}.doubles(n, scratch[0]);
  p.bias = Vector{bias, single}.doubles(n, scratch[1]);
  p.mean = at<double>(memory), p.invstd = p.mean + n, p.m2 = p.invstd + n;
  const Vector running[] = {{running_mean, running_single}, {running_var, running_single}};
  const double m = static_cast<double>(p.count());
  nb::gil_scoped_release free;
  if (!(phases & evenkeel::reduce) && running_mean) {
    for (Index i = 0; i < n; ++i) {
      p.mean[i] = running[0].get(i), p.m2[i] = running[1].get(i);
      p.invstd[i] = 1.0 / std::sqrt(p.m2[i] + eps);
    }
  }
  active->forward(p);
  if (!(phases & evenkeel::reduce)) return;
  for (Index i = 0; i < n; ++i) p.m2[i] /= m;
  if (!running_mean) return;
  for (Index i = 0; i < n; ++i) {
    running[0].set(i, running[0].get(i) * (1 - momentum) + p.mean[i] * momentum);
    const double unbiased = p.m2[i] * (m / (m - 1));
    running[1].set(i, running[1].get(i) * (1 - momentum) + unbiased * momentum);
  }
}

// dweight and dbias, if given, are the two sums in the type of the parameters.
void backward(Index k1, Index r1, Index k2, Index r2, int type, int act, double slope, int phases,
              int threads, bool from_batch, Address dy, Address x, Address residual, Address mask,
              Address dx, Address dresidual, Address weight, Address bias, bool single,
              Address mean, Address invstd, Address sums, Address dweight, Address dbias) {
  auto p = problem(k1, r1, k2, r2, type, act, slope, phases, threads);
  const Index n = p.owners();
  std::vector<double> scratch[2];
  p.from_batch = from_batch;
  p.dy = at<void>(dy), p.x = at<void>(x), p.residual = at<void>(residual);
  p.mask = at<std::uint8_t>(mask);
  p.dx = at<void>(dx), p.dresidual = at<void>(dresidual);
  p.weight = Vector{weight, single}.doubles(n, scratch[0]);
  p.bias = Vector{bias, single}.doubles(n, scratch[1]);
  p.mean = at<double>(mean), p.invstd = at<double>(invstd);
  std::vector<double> own(sums ? 0 : 2 * n);
  p.sum_dz = sums ? at<double>(sums) : own.data();
  p.sum_dz_xhat = p.sum_dz + n;
  nb::gil_scoped_release free;
  active->backward(p);
  for (Index i = 0; dweight && i < n; ++i) Vector{dweight, single}.set(i, p.sum_dz_xhat[i]);
  for (Index i = 0; dbias && i < n; ++i) Vector{dbias, single}.set(i, p.sum_dz[i]);
}

Index mask_bytes(Index k1, Index r1, Index k2, Index r2, int type) {
  return active->mask_bytes(problem(k1, r1, k2, r2, type, 0, 0.0, 0, 1));
}

using Pair = std::array<Index, 2>;

void depthwise(Index images, Index channels, Pair in, Pair out, Pair size, Pair stride, Pair padding,
               Pair dilation, int act, double slope, int threads, Address x, Address weight,
               Address bias, Address y) {
  evenkeel::Taps t;
  t.images = images, t.channels = channels;
  for (int axis = 0; axis < 2; ++axis) {
    t.in[axis] = in[axis], t.out[axis] = out[axis], t.size[axis] = size[axis];
    t.stride[axis] = stride[axis], t.padding[axis] = padding[axis];
    t.dilation[axis] = dilation[axis];
  }
  t.act = static_cast<evenkeel::Act>(act), t.slope = slope, t.threads = threads;
  t.x = at<float>(x), t.weight = at<float>(weight), t.bias = at<float>(bias);
  t.y = at<float>(y);
  nb::gil_scoped_release free;
  active->depthwise(t);
}

void use(const std::string& name) {
  const auto* found = name == "best" ? &evenkeel::best_kernels() : evenkeel::kernels_named(name.c_str());
  if (!found) throw std::invalid_argument("this processor does not run '" + name + "' kernels");
  active = found;
}

}  // namespace

NB_MODULE(_native, m) {
  use("best");
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("mask_bytes", &mask_bytes);
  m.def("depthwise", &depthwise);
  m.def("use", &use);
  m.def("instructions", [] { return std::string(active->name); });
  m.def("is_intels", &evenkeel::is_intels);
  m.def("pool", [] { return std::string(evenkeel::pool_name()); });
  m.def("set_stream_from", &evenkeel::set_stream_from);
}
