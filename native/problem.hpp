// What a kernel is asked to do. The memory is kept, reduced, kept, reduced: (k1, r1, k2, r2).
#pragma once
#include <cstdint>

namespace evenkeel {

using Index = std::int64_t;

enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Act : int { none = 0, relu = 1, leaky = 2, relu6 = 3, silu = 4 };

// Which halves of a pass to run; together they keep what the first read in cache for the second.
enum Phase : int { reduce = 1, map = 2 };

struct Problem {
  Index k1 = 1, r1 = 1, k2 = 1, r2 = 1;
  Type type = Type::f32;
  Act act = Act::none;
  double slope = 0;
  double eps = 0;
  int phases = reduce | map;
  bool from_batch = true;  // backward: the statistics depend on x
  int threads = 1;

  // Tensors in the storage type; residual and its gradient may be null.
  const void* x = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;
  void* dresidual = nullptr;

  // Of a norm with a residual and a ReLU behind: a bit for each value, whether its gradient passes.
  // Forward writes it and backward reads it in place of the residual; null for neither.
  std::uint8_t* mask = nullptr;

  // Per owner, in memory order. weight and bias may be null, for 1 and 0.
  const double* weight = nullptr;
  const double* bias = nullptr;
  double* mean = nullptr;
  double* m2 = nullptr;      // forward: written with the statistics
  double* invstd = nullptr;  // 1 / sqrt(var + eps), var being m2 / count
  double* sum_dz = nullptr;  // backward
  double* sum_dz_xhat = nullptr;

  Index owners() const { return k1 * k2; }
  Index count() const { return r1 * r2; }
};

// A depthwise convolution of channels last images, with as many outputs as inputs, and what is behind
// it: y = act(conv(x) + bias). Pairs are of height and width.
struct Taps {
  Index images = 0, channels = 0;
  Index in[2] = {}, out[2] = {}, size[2] = {};
  Index stride[2] = {1, 1}, padding[2] = {}, dilation[2] = {1, 1};
  Act act = Act::none;
  double slope = 0;
  int threads = 1;

  const float* x = nullptr;
  const float* weight = nullptr;  // tap by tap, of each all channels
  const float* bias = nullptr;    // may be null
  float* y = nullptr;
};

// One build of the kernels for one instruction set.
struct Kernels {
  const char* name;
  void (*forward)(const Problem&);
  void (*backward)(const Problem&);
  Index (*mask_bytes)(const Problem&);
  void (*depthwise)(const Taps&);
};

}  // namespace evenkeel
