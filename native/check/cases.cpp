#include "cases.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>

#include "../machine.hpp"

namespace evenkeel {

// Of slice.cpp.
namespace baseline {
extern const bool has_type[4];
}
#if defined(EVENKEEL_X86)
namespace avx2 {
extern const bool has_type[4];
}
namespace avx512 {
extern const bool has_type[4];
}
#endif

namespace check {
namespace {

const bool* types_of(const std::string& instructions) {
#if defined(EVENKEEL_X86)
  if (instructions == "avx2") return avx2::has_type;
  if (instructions == "avx512") return avx512::has_type;
#endif
  return baseline::has_type;
}

constexpr Index ordinary = 6'000, large = 60'000;

// One, around the sizes of vectors, primes, and anything.
Index side(Random& random, Index most) {
  static const std::vector<Index> vectors{2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};
  static const std::vector<Index> primes{2, 3, 5, 7, 11, 13, 17, 31, 61, 127, 257, 1031, 4099};
  Index n = 1;
  switch (random.below(6)) {
    case 0: break;
    case 1:
    case 2: n = random.pick(vectors) + random.below(3) - 1; break;
    case 3: n = random.pick(primes); break;
    default: n = static_cast<Index>(std::pow(static_cast<double>(most), random.uniform()));
  }
  while (n > most) n = (n + 1) / 2;
  return std::max<Index>(n, 1);
}

void draw_shape(Case& c, Random& random) {
  const Index most = random.chance(6) ? large : ordinary;
  Index* sides[] = {&c.k1, &c.r1, &c.k2, &c.r2};
  Index left = most;
  switch (random.below(8)) {
    case 0:  // any view, its sides in any order
      for (int i = 3; i > 0; --i) std::swap(sides[i], sides[random.below(i + 1)]);
      for (Index* s : sides) left /= *s = side(random, left);
      return;
    case 1:  // a few channels of NCHW: owners are cut for threads
      c.k2 = 1 + random.below(5);
      c.r1 = side(random, std::min<Index>(left / c.k2, random.chance(2) ? 5 : left));
      c.r2 = side(random, left / c.k2 / c.r1);
      return;
    case 2:  // many channels of NCHW
      c.r2 = side(random, 200), left /= c.r2;
      c.r1 = side(random, std::min<Index>(left, 40)), left /= c.r1;
      c.k2 = side(random, left);
      return;
    case 3:  // NHWC: rows of few channels are taken together
      c.k2 = 1 + random.below(70), left /= c.k2;
      c.r1 = random.chance(3) ? side(random, left) : left - random.below(left / 4 + 1);
      return;
    case 4:  // NHWC
      c.k2 = side(random, 600);
      c.r1 = side(random, left / c.k2);
      return;
    case 5:  // per activation: few and long rows
      c.r1 = 2 + random.below(12);
      c.k2 = side(random, left / c.r1);
      if (random.chance(4)) c.k2 = left / c.r1 - random.below(50);
      return;
    case 6:  // small images of many channels: a column for each place
      c.r2 = 2 + random.below(48);
      c.k2 = 1 + (1024 + random.below(500)) / c.r2;
      c.r1 = (c.r2 + 1) / 2 + random.below(3);
      if (random.chance(4)) c.k1 = 1 + random.below(2), c.r1 += random.below(40);
      return;
    default:  // one owner
      c.r2 = side(random, left);
      c.r1 = side(random, left / c.r2);
  }
}

// A machine with more cores than a run has values: neither owners nor runs divide among them.
void draw_many_threads(Case& c, Random& random) {
  c.threads = 48 + static_cast<int>(random.below(80));
  c.k2 = c.threads + 1 + random.below(20);
  c.r2 = 20 + random.below(60);
  const Index enough = c.threads * (Index{32} << 10) / (c.k2 * c.r2 * 2 * Index(size_of(c.type)));
  c.r1 = std::min<Index>(enough + 1 + random.below(4), c.threads);
}

// Neighbours of one role are one run in every view that evenkeel/view.py makes.
void merge(Case& c) {
  if (c.r1 > 1 && c.k2 > 1) return;
  c.k2 *= std::exchange(c.k1, 1);
  c.r2 *= std::exchange(c.r1, 1);
}

void draw_values(Case& c, Random& random) {
  static const std::vector<Special> specials{
      Special::far, Special::constant,  Special::kinks,     Special::nan, Special::inf,
      Special::both_infs, Special::nan_in_dy, Special::huge, Special::tiny};
  if (random.chance(3)) c.special = random.pick(specials);
  c.mean = random.chance(2) ? 0 : random.normal() * 3;
  c.std = std::pow(10, random.uniform() * 2 - 1);
  const bool half = c.type == Type::f16;
  switch (c.special) {
    case Special::far: c.mean = half ? 40 : 1000 * c.std; break;
    case Special::huge:  // squares overflow, and with them sums of a float
      c.std = half ? 1e4 : c.type == Type::f64 ? 1e150 : 1e30;
      c.mean = 0;
      break;
    case Special::tiny: {  // nearly all are subnormal
      const Precision p = precision_of(c.type);
      c.std = static_cast<double>(p.least) * 40, c.mean = 0;
      break;
    }
    default: break;
  }
  c.eps = random.pick<double>({1e-5, 1e-5, 1e-3, 1e-10});
}

}  // namespace

Builds builds_here() {
  Builds found;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (!kernels_named(name)) continue;
    std::vector<Type> types;
    for (Type type : {Type::f32, Type::f64, Type::bf16, Type::f16})
      if (types_of(name)[static_cast<int>(type)]) types.push_back(type);
    if (types.empty()) continue;
    found.names.push_back(name);
    found.types.push_back(types);
  }
  return found;
}

Case draw(std::uint64_t seed, std::uint64_t number, const Builds& builds) {
  Random random(seed, number);
  Case c;
  c.seed = seed, c.number = number;
  const auto build = static_cast<std::size_t>(random.below(static_cast<Index>(builds.names.size())));
  c.instructions = builds.names[build];
  c.type = random.pick(builds.types[build]);
  c.act = static_cast<Act>(random.below(5));
  c.slope = c.act == Act::leaky ? random.pick<double>({0.01, 0.25, 0, 1.5, -0.5}) : 0;
  c.threads = 1 + static_cast<int>(random.below(5));
  if (random.chance(100)) {
    draw_many_threads(c, random);
  } else {
    draw_shape(c, random);
  }
  merge(c);
  draw_values(c, random);
  c.residual = random.chance(2);
  c.dresidual = c.residual && !random.chance(4);
  const bool one_bit = c.act == Act::relu || c.act == Act::leaky || c.act == Act::relu6;
  c.mask = c.residual && one_bit && random.chance(2);
  c.weight = !random.chance(3);
  c.bias = !random.chance(3);
  c.from_batch = !random.chance(4);
  c.forward = static_cast<Mode>(random.below(3));
  c.backward = static_cast<Mode>(random.below(2));
  c.stream = random.chance(2);
  const int shared = static_cast<int>(random.below(5));  // one place for all, or one for each
  for (int i = 0; i < 12; ++i)
    c.places.push_back(static_cast<Place>(shared < 4 ? shared : random.below(4)));
  return c;
}

std::string describe(const Case& c) {
  static const char* specials[] = {"none",      "far",       "constant", "kinks", "nan", "inf",
                                   "both_infs", "nan_in_dy", "huge",     "tiny"};
  static const char* modes[] = {"at once", "in turn", "given"};
  static const char* places[] = {"heap", "heap+1", "guard-behind", "guard-before"};
  std::ostringstream text;
  text << "--seed " << c.seed << " --case " << c.number << ": " << c.instructions << ' '
       << name_of(c.type) << " view (" << c.k1 << ", " << c.r1 << ", " << c.k2 << ", " << c.r2
       << "), " << name_of(c.act) << ' ' << c.slope << ", eps " << c.eps << ", values "
       << specials[static_cast<int>(c.special)] << ' ' << c.mean << " +- " << c.std
       << (c.residual ? ", residual" : "") << (c.dresidual ? ", dresidual" : "")
       << (c.mask ? ", mask" : "") << (c.weight ? ", weight" : "") << (c.bias ? ", bias" : "")
       << (c.from_batch ? "" : ", constant statistics") << ", forward "
       << modes[static_cast<int>(c.forward)] << ", backward " << modes[static_cast<int>(c.backward)]
       << ", " << c.threads << " threads" << (c.stream ? ", streaming" : "") << ", memory";
  for (Place p : c.places) text << ' ' << places[static_cast<int>(p)];
  return text.str();
}

}  // namespace check
}  // namespace evenkeel
