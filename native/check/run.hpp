// A case through the kernels and compared with the right answers.
#pragma once
#include <stdexcept>

#include "cases.hpp"

namespace evenkeel::check {

// A kernel gave a wrong answer.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws unless got is within `allowed` of wanted. NaN is near NaN; an infinity near itself, near
// what is too large for the type, and where the terms of a gradient are infinite, near NaN.
void expect_near(const char* name, Index at, Real got, Real wanted, Real allowed, Real most);

// Mistakes to make on purpose, which must be seen.
enum class Mistake { none, mean, m2, y, sum, dx, dresidual, before, behind, address };

// Runs a case twice, in different memory: the answers must be right and the bits the same.
void run_case(const Case& c, Mistake mistake);

}  // namespace evenkeel::check
