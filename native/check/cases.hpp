// What a case is, and random ones.
#pragma once
#include <string>
#include <vector>

#include "memory.hpp"
#include "numbers.hpp"

namespace evenkeel::check {

// What is unusual about the values.
enum class Special { none, far, constant, kinks, nan, inf, both_infs, nan_in_dy, huge, tiny };

// Where the statistics of forward come from: both phases in one call, in two calls, or from outside
// as in inference. Backward has the first two.
enum class Mode { at_once, in_turn, given };

struct Case {
  std::uint64_t seed = 0, number = 0;
  std::string instructions;
  Index k1 = 1, r1 = 1, k2 = 1, r2 = 1;
  Type type = Type::f32;
  Act act = Act::none;
  double slope = 0, eps = 1e-5;
  Special special = Special::none;
  double mean = 0, std = 1;
  bool residual = false, weight = false, bias = false, dresidual = false, mask = false;
  bool from_batch = true;
  Mode forward = Mode::at_once, backward = Mode::at_once;
  int threads = 1;
  bool stream = false;
  std::vector<Place> places;  // of the buffers in turn

  Index owners() const { return k1 * k2; }
  Index count() const { return r1 * r2; }
  Index size() const { return owners() * count(); }
  // The owner of the value at a place in memory.
  Index owner(Index at) const { return at / (r1 * k2 * r2) * k2 + at / r2 % k2; }
};

// Types that the build has, by instruction set; empty where this processor does not run it.
struct Builds {
  std::vector<std::string> names;
  std::vector<std::vector<Type>> types;
};
Builds builds_here();

// Case `number` of a seed: the same in every run on machines with the same instruction sets.
Case draw(std::uint64_t seed, std::uint64_t number, const Builds& builds);

std::string describe(const Case& c);

}  // namespace evenkeel::check
