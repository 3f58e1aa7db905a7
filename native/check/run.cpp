#include "run.hpp"

#include <cmath>
#include <cstring>
#include <memory>
#include <sstream>

#include "../machine.hpp"
#include "oracle.hpp"

namespace evenkeel::check {
namespace {

// The tensors and vectors of one run, each in a place of its own.
class Memory {
 public:
  // In each turn every tensor is in another kind of place.
  Memory(const Case& c, const Data& d, const Kernels& kernels, int turn) : c_(c), turn_(turn) {
    const auto size = static_cast<std::size_t>(c.size()), owners = static_cast<std::size_t>(c.owners());
    x = tensor(d.x), residual = tensor(d.residual), dy = tensor(d.dy);
    weight = vector(d.weight), bias = vector(d.bias);
    for (auto* output : {&y, &dx, &dresidual}) *output = fresh(size * size_of(c.type), size_of(c.type));
    for (auto* output : {&mean, &m2, &invstd, &sum_dz, &sum_dz_xhat}) *output = fresh(owners * 8, 8);
    Problem p = shape();
    p.residual = residual->data();
    mask = fresh(c.mask ? static_cast<std::size_t>(kernels.mask_bytes(p)) : 0, 1);
  }

  Problem shape() const {
    Problem p;
    p.k1 = c_.k1, p.r1 = c_.r1, p.k2 = c_.k2, p.r2 = c_.r2;
    p.type = c_.type, p.act = c_.act, p.slope = c_.slope, p.eps = c_.eps;
    p.threads = c_.threads;
    p.x = x->data();
    p.weight = c_.weight ? weight->as<double>() : nullptr;
    p.bias = c_.bias ? bias->as<double>() : nullptr;
    p.mean = mean->as<double>(), p.invstd = invstd->as<double>();
    p.mask = mask && c_.mask ? mask->as<std::uint8_t>() : nullptr;
    return p;
  }

  bool is_clean() const {
    for (const auto& buffer : all_)
      if (!buffer->is_clean()) return false;
    return true;
  }

  Buffer *x, *residual, *dy, *weight, *bias, *y, *dx, *dresidual;
  Buffer *mean, *m2, *invstd, *sum_dz, *sum_dz_xhat, *mask = nullptr;

 private:
  Buffer* fresh(std::size_t bytes, std::size_t element) {
    const Place drawn = c_.places[all_.size() % c_.places.size()];
    const auto place = static_cast<Place>((static_cast<int>(drawn) + turn_) % 4);
    all_.push_back(std::make_unique<Buffer>(bytes, element, place));
    return all_.back().get();
  }
  Buffer* tensor(const Reals& values) {
    Buffer* made = fresh(values.size() * size_of(c_.type), size_of(c_.type));
    for (std::size_t i = 0; i < values.size(); ++i)
      encode(c_.type, values[i], made->data(), static_cast<Index>(i));
    return made;
  }
  Buffer* vector(const std::vector<double>& values) {
    Buffer* made = fresh(values.size() * 8, 8);
    std::memcpy(made->data(), values.data(), values.size() * 8);
    return made;
  }

  const Case& c_;
  int turn_;
  std::vector<std::unique_ptr<Buffer>> all_;
};

void set(Buffer* vector, std::size_t at, Real value) {
  vector->as<double>()[at] = static_cast<double>(value);
}

void forward(const Case& c, const Data& d, const Kernels& kernels, const Memory& memory) {
  Problem p = memory.shape();
  p.residual = c.residual ? memory.residual->data() : nullptr;
  auto run = [&](int phases) {
    p.phases = phases;
    p.m2 = phases & reduce ? memory.m2->as<double>() : nullptr;
    p.y = phases & map ? memory.y->data() : nullptr;
    kernels.forward(p);
  };
  switch (c.forward) {
    case Mode::at_once: return run(reduce | map);
    case Mode::in_turn: return run(reduce), run(map);
    case Mode::given:
      for (std::size_t o = 0; o < d.given_mean.size(); ++o)
        set(memory.mean, o, d.given_mean[o]), set(memory.invstd, o, d.given_invstd[o]);
      return run(map);
  }
}

// By the right statistics, so that mistakes of forward are not counted twice.
void backward(const Case& c, const Wanted& w, const Kernels& kernels, const Memory& memory) {
  if (c.forward != Mode::given)
    for (std::size_t o = 0; o < w.mean.size(); ++o)
      set(memory.mean, o, w.mean[o]), set(memory.invstd, o, w.invstd[o]);
  Problem p = memory.shape();
  p.from_batch = c.from_batch;
  p.residual = c.residual && !c.mask ? memory.residual->data() : nullptr;
  p.dy = memory.dy->data();
  p.sum_dz = memory.sum_dz->as<double>(), p.sum_dz_xhat = memory.sum_dz_xhat->as<double>();
  auto run = [&](int phases) {
    p.phases = phases;
    p.dx = phases & map ? memory.dx->data() : nullptr;
    p.dresidual = phases & map && c.dresidual ? memory.dresidual->data() : nullptr;
    kernels.backward(p);
  };
  if (c.backward == Mode::at_once) return run(reduce | map);
  run(reduce), run(map);
}

void expect_vector(const char* name, const Buffer* got, const Reals& wanted, const Reals& allowed) {
  const Real most = precision_of(Type::f64).most;
  for (std::size_t o = 0; o < wanted.size(); ++o)
    expect_near(name, static_cast<Index>(o), got->as<double>()[o], wanted[o], allowed[o], most);
}

void expect_tensor(const char* name, const Case& c, const Buffer* got, const Reals& wanted,
                   const Reals& allowed) {
  const Real most = precision_of(c.type).most;
  for (Index i = 0; i < c.size(); ++i)
    expect_near(name, i, decode(c.type, got->data(), i), wanted[i], allowed[i], most);
}

void expect_statistics(const Wanted& w, const Memory& memory) {
  expect_vector("mean", memory.mean, w.mean, w.mean_allowed);
  expect_vector("m2", memory.m2, w.m2, w.m2_allowed);
  for (std::size_t o = 0; o < w.m2.size(); ++o)
    if (memory.m2->as<double>()[o] < 0) throw Failure("m2 is negative");
}

void expect_gradients(const Case& c, const Wanted& w, const Memory& memory) {
  expect_vector("sum_dz", memory.sum_dz, w.sum_dz, w.sum_dz_allowed);
  expect_vector("sum_dz_xhat", memory.sum_dz_xhat, w.sum_dz_xhat, w.sum_dz_xhat_allowed);
  expect_tensor("dx", c, memory.dx, w.dx, w.dx_allowed);
  if (c.dresidual && c.act != Act::none)  // else it is dy
    expect_tensor("dresidual", c, memory.dresidual, w.dresidual, w.dresidual_allowed);
}

// Spoils what the kernels have written, as a wrong kernel would have.
void spoil(Mistake mistake, const Case& c, const Memory& memory, int turn) {
  auto shift = [](Buffer* vector) { vector->as<double>()[0] += 1; };
  auto flip = [&](Buffer* tensor) {
    const Real last = decode(c.type, tensor->data(), c.size() - 1);
    encode(c.type, last + 1, tensor->data(), c.size() - 1);
  };
  switch (mistake) {
    case Mistake::none: return;
    case Mistake::mean: return shift(memory.mean);
    case Mistake::m2: return shift(memory.m2);
    case Mistake::y: return flip(memory.y);
    case Mistake::sum: return shift(memory.sum_dz);
    case Mistake::dx: return flip(memory.dx);
    case Mistake::dresidual: return flip(memory.dresidual);
    case Mistake::before: static_cast<volatile char*>(memory.y->data())[-1] = 0; return;
    case Mistake::behind:
      static_cast<volatile char*>(memory.y->data())[memory.y->bytes()] = 0;
      return;
    case Mistake::address:
      if (turn == 1) memory.m2->as<double>()[0] *= 1 + 0x1p-52;
      return;
  }
}

}  // namespace

void expect_near(const char* name, Index at, Real got, Real wanted, Real allowed, Real most) {
  const bool is_near = std::isnan(wanted)   ? std::isnan(got)
                       : std::isinf(wanted) ? got == wanted || (!(allowed < most) && !std::isfinite(got))
                       : std::isinf(got)    ? std::fabs(wanted) + allowed >= most &&
                                               std::signbit(got) == std::signbit(wanted)
                                            : std::fabs(got - wanted) <= allowed;
  if (is_near) return;
  std::ostringstream text;
  text.precision(12);
  text << name << '[' << at << "] is " << got << ", wanted " << wanted << ", allowed are "
       << allowed;
  throw Failure(text.str());
}

void run_case(const Case& c, Mistake mistake) {
  const Kernels& kernels = *kernels_named(c.instructions.c_str());
  const Data d = data_of(c);
  const Wanted w = wanted_of(c, d);
  set_stream_from(c.stream ? 0 : Index{1} << 62);
  std::unique_ptr<Memory> runs[2];
  for (int turn : {0, 1}) {
    auto& memory = runs[turn] = std::make_unique<Memory>(c, d, kernels, turn);
    forward(c, d, kernels, *memory);
    spoil(mistake, c, *memory, turn);
    if (c.forward != Mode::given) expect_statistics(w, *memory);
    expect_tensor("y", c, memory->y, w.y, w.y_allowed);
    backward(c, w, kernels, *memory);
    spoil(mistake, c, *memory, turn);
    expect_gradients(c, w, *memory);
    if (!memory->is_clean()) throw Failure("bytes beside a tensor were changed");
  }
  auto same = [&](const char* name, Buffer* Memory::*buffer) {
    const Buffer *one = *runs[0].*buffer, *two = *runs[1].*buffer;
    if (one->bytes() && std::memcmp(one->data(), two->data(), one->bytes()) != 0)
      throw Failure(std::string(name) + " has other bits at other addresses");
  };
  same("y", &Memory::y), same("dx", &Memory::dx), same("dresidual", &Memory::dresidual);
  same("mask", &Memory::mask), same("sum_dz", &Memory::sum_dz);
  same("sum_dz_xhat", &Memory::sum_dz_xhat), same("m2", &Memory::m2);
}

}  // namespace evenkeel::check
