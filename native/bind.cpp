// The module evenkeel._native. Tensors come as addresses, checked in evenkeel/kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

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
                          double eps, int phases, int threads) {
  evenkeel::Problem p;
  p.k1 = k1, p.r1 = r1, p.k2 = k2, p.r2 = r2;
  p.type = static_cast<evenkeel::Type>(type);
  p.act = static_cast<evenkeel::Act>(act);
  p.slope = slope, p.eps = eps, p.phases = phases, p.threads = threads;
  return p;
}

void forward(Index k1, Index r1, Index k2, Index r2, int type, int act, double slope, double eps,
             int phases, int threads, Address x, Address residual, Address y, Address weight,
             Address bias, Address mean, Address m2, Address invstd) {
  auto p = problem(k1, r1, k2, r2, type, act, slope, eps, phases, threads);
  p.x = at<void>(x), p.residual = at<void>(residual), p.y = at<void>(y);
  p.weight = at<double>(weight), p.bias = at<double>(bias);
  p.mean = at<double>(mean), p.m2 = at<double>(m2), p.invstd = at<double>(invstd);
  nb::gil_scoped_release free;
  active->forward(p);
}

void backward(Index k1, Index r1, Index k2, Index r2, int type, int act, double slope,
              bool from_batch, int phases, int threads, Address dy, Address x, Address residual,
              Address dx, Address dresidual, Address weight, Address bias, Address mean,
              Address invstd, Address sum_dz, Address sum_dz_xhat) {
  auto p = problem(k1, r1, k2, r2, type, act, slope, 0.0, phases, threads);
  p.from_batch = from_batch;
  p.dy = at<void>(dy), p.x = at<void>(x), p.residual = at<void>(residual);
  p.dx = at<void>(dx), p.dresidual = at<void>(dresidual);
  p.weight = at<double>(weight), p.bias = at<double>(bias);
  p.mean = at<double>(mean), p.invstd = at<double>(invstd);
  p.sum_dz = at<double>(sum_dz), p.sum_dz_xhat = at<double>(sum_dz_xhat);
  nb::gil_scoped_release free;
  active->backward(p);
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
  m.def("use", &use);
  m.def("instructions", [] { return std::string(active->name); });
  m.def("pool", [] { return std::string(evenkeel::pool_name()); });
  m.def("set_stream_from", &evenkeel::set_stream_from);
}
