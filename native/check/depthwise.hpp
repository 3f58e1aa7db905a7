// Random depthwise convolutions.
#pragma once
#include "cases.hpp"

namespace evenkeel::check {

// Runs case `number` of a seed on every build; throws Failure where one is wrong.
void depthwise_case(std::uint64_t seed, std::uint64_t number, const Builds& builds);

}  // namespace evenkeel::check
