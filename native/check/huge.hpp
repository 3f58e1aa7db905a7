// Tensors of more than 2^31 values, by mapping a small file many times over.
#pragma once

namespace evenkeel::check {

// Prints what it does; 0 if all is right, 1 if not.
int huge_cases();

}  // namespace evenkeel::check
