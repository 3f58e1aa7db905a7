// What is kept for each column of a slab while its rows go by, and what an owner's columns make
// together.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "arithmetic.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

// Two sums of a tile for each column, in the precision of the loops, and their totals.
template <class C>
struct ColumnSums {
  using D = Vec<double>::type;
  static constexpr int lanes = sizeof(D) / sizeof(double);
  using N = typename Vec<C>::narrow;  // as many

  std::vector<C> first, second;
  std::vector<double> firsts, seconds;

  explicit ColumnSums(Index n) : first(n), second(n), firsts(n), seconds(n) {}

  void clear() {
    std::fill(first.begin(), first.end(), C{});
    std::fill(second.begin(), second.end(), C{});
  }

  // The tile's sums to the totals of the first n columns.
  void collect(Index n) {
    for (Index b = 0; b < n; ++b) {
      firsts[b] += static_cast<double>(first[b]);
      seconds[b] += static_cast<double>(second[b]);
    }
  }

  // `Moments::add_about` for vectors of columns: the sums are those of x - pivot and its square, the
  // totals mean and m2, and the new means are the next pivots.
  void merge(double before, double now, C* pivots) {
    const double share = now / (before + now);
    for (Index b = 0; b < static_cast<Index>(first.size()); b += lanes) {
      double *mean = &firsts[b], *m2 = &seconds[b];
      const D off = __builtin_convertvector(whole<N>(&first[b]), D);
      const D squares = __builtin_convertvector(whole<N>(&second[b]), D);
      const D pivot = __builtin_convertvector(whole<N>(pivots + b), D);
      const D old = whole<D>(mean), part = off / now, delta = pivot + part - old;
      const D sum = whole<D>(m2) + (squares - off * part + delta * delta * (before * share));
      const D merged = old + delta * share, grown = sum < D{} ? D{} : sum;
      const N next = __builtin_convertvector(merged, N);
      std::memcpy(mean, &merged, sizeof merged);
      std::memcpy(m2, &grown, sizeof grown);
      std::memcpy(pivots + b, &next, sizeof next);
    }
  }

  // Of the owner whose columns, of n values each, are the run that begins at b.
  INLINE Moments moments(double n, Index b, Index run) const {
    const double *means = &firsts[b], *m2 = &seconds[b];
    if (run == 1) return {n, *means, *m2};
    const double columns = static_cast<double>(run), mean = sum(means, run) / columns;
    const double between = sum(means, run, [=](auto m) INLINE { return (m - mean) * (m - mean); });
    return {n * columns, mean, sum(m2, run) + n * between};
  }

  // Of f(value) over a run, side by side: one chain of additions would take longer than the columns.
  template <class F = std::identity>
  INLINE static double sum(const double* of, Index run, F f = {}) {
    D even{}, odd{};
    Index i = 0;
    for (; i + 2 * lanes <= run; i += 2 * lanes)
      even += f(whole<D>(of + i)), odd += f(whole<D>(of + i + lanes));
    double all = total(even + odd);
    for (; i < run; ++i) all += f(of[i]);
    return all;
  }
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
