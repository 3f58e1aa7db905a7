// Numbers of the driver's own: storage types by their definition, and random ones that are the same
// on every machine. Nothing here is taken from the kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "../problem.hpp"

namespace evenkeel::check {

using Real = long double;
using Reals = std::vector<Real>;

std::size_t size_of(Type type);
const char* name_of(Type type);
const char* name_of(Act act);

// The value at `index` of a tensor, exactly.
Real decode(Type type, const void* tensor, Index index);
// Rounds to the nearest value of the type, ties to even.
void encode(Type type, Real value, void* tensor, Index index);
Real rounded(Type type, Real value);

// How exact a kernel has to be; the same figures as in tests/kernels/truth.py.
struct Precision {
  Real rounding;  // of a result to the storage type, once
  Real inner;     // of the arithmetic before, relative to the size of the terms
  Real variance;
  Real unit;   // rounding of the loops' arithmetic
  Real least;  // the smallest positive value of the storage type
  Real floor;  // squares below are lost: the smallest normal value of the loops' arithmetic
  Real grain;  // a coefficient may be off by this: the smallest value of the loops' arithmetic
  Real most;   // the largest finite value of the storage type
};
Precision precision_of(Type type);

// The engine is the standard's, the distributions are not, so a seed means the same everywhere.
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t stream);
  Index below(Index n);            // 0 .. n - 1
  bool chance(int one_in);         // true once in so many times
  double uniform();                // [0, 1)
  double normal();
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[static_cast<std::size_t>(below(static_cast<Index>(from.size())))];
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace evenkeel::check
