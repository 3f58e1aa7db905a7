// What the machine is like: caches, and from which size stores go past them.
#pragma once
#include "problem.hpp"

namespace evenkeel {

// Tensors of so many bytes and more are written past the cache.
Index stream_from(bool in_order);
void set_stream_from(Index bytes);

// The best build that this processor runs, or the named one; null if it cannot run that.
const Kernels* kernels_named(const char* name);
const Kernels& best_kernels();

// Whether Intel made the processor, which libraries of Intel's ask for.
bool is_intels();

}  // namespace evenkeel
