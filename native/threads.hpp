// Work on many threads: torch's own OpenMP pool where it can be found, else threads of our own.
#pragma once
#include <functional>

#include "problem.hpp"

namespace evenkeel {

// Calls body(0) .. body(tasks - 1), on up to `threads` threads. Which thread runs a task changes
// nothing: a task is the same work wherever it runs.
void parallel(Index tasks, int threads, const std::function<void(Index)>& body);

// The pool in use: the path of the OpenMP library, or "own threads".
const char* pool_name();

}  // namespace evenkeel
