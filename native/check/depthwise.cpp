#include "depthwise.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "../machine.hpp"
#include "run.hpp"

namespace evenkeel::check {
namespace {

// A tensor of random numbers, between memory that cannot be accessed or bytes that are compared.
struct Numbers {
  Buffer memory;

  Numbers(Random& random, Index count)
      : memory(static_cast<std::size_t>(count) * sizeof(float), sizeof(float),
               random.pick<Place>({Place::heap, Place::heap_shifted, Place::before_guard,
                                   Place::after_guard})) {
    for (Index i = 0; i < count; ++i) at(i) = static_cast<float>(random.normal());
  }
  float& at(Index i) const { return memory.as<float>()[i]; }
};

Taps draw_taps(Random& random) {
  Taps t;
  t.images = 1 + random.below(3), t.channels = 1 + random.below(70);
  for (int axis = 0; axis < 2; ++axis) {
    t.in[axis] = 1 + random.below(13), t.size[axis] = 1 + random.below(5);
    t.stride[axis] = 1 + random.below(3), t.dilation[axis] = 1 + random.below(2);
    t.padding[axis] = random.below(5);
    const Index window = (t.size[axis] - 1) * t.dilation[axis] + 1;
    t.padding[axis] = std::max(t.padding[axis], (window - t.in[axis] + 1) / 2);
    t.out[axis] = (t.in[axis] + 2 * t.padding[axis] - window) / t.stride[axis] + 1;
  }
  t.act = random.pick<Act>({Act::none, Act::relu, Act::leaky, Act::relu6});
  t.slope = 0.25, t.threads = static_cast<int>(1 + random.below(3));
  return t;
}

Real activated(const Taps& t, Real z) {
  if (t.act == Act::none || (z > 0 && t.act != Act::relu6)) return z;
  if (t.act == Act::leaky) return z * static_cast<Real>(t.slope);
  return t.act == Act::relu6 ? std::clamp<Real>(z, 0, 6) : 0;
}

void compare(const Taps& t, const std::string& where) {
  const auto [height, width] = std::pair(t.out[0], t.out[1]);
  for (Index at = 0; at < t.images * height * width * t.channels; ++at) {
    const Index c = at % t.channels, x = at / t.channels % width;
    const Index y = at / t.channels / width % height, image = at / t.channels / width / height;
    Real sum = t.bias ? t.bias[c] : 0, size = std::abs(sum);
    for (Index i = 0; i < t.size[0]; ++i)
      for (Index j = 0; j < t.size[1]; ++j) {
        const Index row = y * t.stride[0] - t.padding[0] + i * t.dilation[0];
        const Index column = x * t.stride[1] - t.padding[1] + j * t.dilation[1];
        if (row < 0 || row >= t.in[0] || column < 0 || column >= t.in[1]) continue;
        const Index from = ((image * t.in[0] + row) * t.in[1] + column) * t.channels + c;
        const Real term = Real{t.x[from]} * t.weight[(i * t.size[1] + j) * t.channels + c];
        sum += term, size += std::abs(term);
      }
    const Real off = std::abs(t.y[at] - activated(t, sum));
    if (!(off <= size * 1e-6L)) throw Failure(where + ": y[" + std::to_string(at) + "] is wrong");
  }
}

}  // namespace

void depthwise_case(std::uint64_t seed, std::uint64_t number, const Builds& builds) {
  Random random(seed, ~number);
  Taps t = draw_taps(random);
  const Index taps = t.size[0] * t.size[1];
  const Numbers x(random, t.images * t.in[0] * t.in[1] * t.channels);
  const Numbers weight(random, taps * t.channels), bias(random, t.channels);
  const Numbers y(random, t.images * t.out[0] * t.out[1] * t.channels);
  t.x = &x.at(0), t.weight = &weight.at(0), t.y = &y.at(0);
  t.bias = random.chance(3) ? nullptr : &bias.at(0);
  for (const std::string& name : builds.names) {
    kernels_named(name.c_str())->depthwise(t);
    const std::string where = "depthwise on " + name;
    compare(t, where);
    for (const Numbers* each : {&x, &weight, &bias, &y})
      if (!each->memory.is_clean()) throw Failure(where + ": bytes beside a tensor have changed");
  }
}

}  // namespace evenkeel::check
