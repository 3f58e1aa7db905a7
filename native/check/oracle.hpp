// The right answers: the formulas of Ioffe & Szegedy 2015 as they stand, in extended precision, one
// value at a time.
#pragma once
#include "cases.hpp"

namespace evenkeel::check {

// Tensors in the order of memory, each value one that the storage type has.
struct Data {
  Reals x, residual, dy;
  std::vector<double> weight, bias;             // per owner; 1 and 0 if the case has none
  std::vector<double> given_mean, given_invstd;  // statistics from outside
};

struct Wanted {
  Reals mean, m2, invstd;   // of x
  Reals y, y_allowed;       // by those, or by the given ones
  Reals passes;             // derivative of the activation
  Reals sum_dz, sum_dz_allowed, sum_dz_xhat, sum_dz_xhat_allowed;
  Reals dx, dx_allowed, dresidual, dresidual_allowed;
  Reals mean_allowed, m2_allowed;
};

// The data of a case. Where a value before the activation is too near to a kink for the precision of
// the loops to tell its side, dy is zero.
Data data_of(const Case& c);

Wanted wanted_of(const Case& c, const Data& d);

Real activated(Act act, Real slope, Real z);
Real derivative(Act act, Real slope, Real z);

}  // namespace evenkeel::check
