#include "numbers.hpp"

#include <cmath>
#include <cstring>
#include <limits>

namespace evenkeel::check {
namespace {

// A binary format of 16 bits: sign, exponent, fraction.
struct Format {
  int exponent_bits, fraction_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int least_exponent() const { return 1 - bias(); }
};

constexpr Format brain{8, 7}, half{5, 10};

Real decode16(std::uint16_t bits, Format f) {
  const int fraction = bits & ((1 << f.fraction_bits) - 1);
  const int exponent = (bits >> f.fraction_bits) & ((1 << f.exponent_bits) - 1);
  const Real sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << f.exponent_bits) - 1)
    return fraction ? std::numeric_limits<Real>::quiet_NaN()
                    : sign * std::numeric_limits<Real>::infinity();
  const int whole = exponent ? fraction + (1 << f.fraction_bits) : fraction;
  const int power = exponent ? exponent - f.bias() : f.least_exponent();
  return sign * std::ldexp(static_cast<Real>(whole), power - f.fraction_bits);
}

std::uint16_t encode16(Real value, Format f) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const auto top = static_cast<std::uint16_t>(((1 << f.exponent_bits) - 1) << f.fraction_bits);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | top | 1 << (f.fraction_bits - 1));
  if (value == 0) return sign;
  int power = 0;
  if (std::isinf(value)) return sign | top;
  std::frexp(value, &power);
  power = std::max(power - 1, f.least_exponent());
  const Real whole = std::nearbyint(std::ldexp(std::fabs(value), f.fraction_bits - power));
  // One more than the largest fraction carries into the exponent, up to infinity: the bits of all
  // positive values of a format are in their order.
  const Real one = 1 << f.fraction_bits;
  const Real bits = whole + (power - f.least_exponent()) * one;
  return sign | (bits >= top ? top : static_cast<std::uint16_t>(bits));
}

template <class T>
T load(const void* tensor, Index index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(tensor) + index * Index(sizeof(T)), sizeof value);
  return value;
}
template <class T>
void store(T value, void* tensor, Index index) {
  std::memcpy(static_cast<char*>(tensor) + index * Index(sizeof(T)), &value, sizeof value);
}

}  // namespace

std::size_t size_of(Type type) {
  return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

const char* name_of(Type type) {
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(type)];
}

const char* name_of(Act act) {
  const char* names[] = {"none", "relu", "leaky", "relu6", "silu"};
  return names[static_cast<int>(act)];
}

Real decode(Type type, const void* tensor, Index index) {
  switch (type) {
    case Type::f32: return load<float>(tensor, index);
    case Type::f64: return load<double>(tensor, index);
    case Type::bf16: return decode16(load<std::uint16_t>(tensor, index), brain);
    case Type::f16: return decode16(load<std::uint16_t>(tensor, index), half);
  }
  return 0;
}

void encode(Type type, Real value, void* tensor, Index index) {
  switch (type) {
    case Type::f32: return store(static_cast<float>(value), tensor, index);
    case Type::f64: return store(static_cast<double>(value), tensor, index);
    case Type::bf16: return store(encode16(value, brain), tensor, index);
    case Type::f16: return store(encode16(value, half), tensor, index);
  }
}

Real rounded(Type type, Real value) {
  char memory[8];
  encode(type, value, memory, 0);
  return decode(type, memory, 0);
}

Precision precision_of(Type type) {
  const Real one = 1;
  auto power = [one](int n) { return std::ldexp(one, n); };
  const Precision single{power(-24), 2e-6L, 1e-6L, power(-24), power(-149), power(-126), power(-149),
                         std::numeric_limits<float>::max()};
  Precision p = single;
  switch (type) {
    case Type::f32: break;
    case Type::f64:
      return {power(-53), 1e-13L, 1e-13L, power(-53), power(-1074), power(-1022), power(-1074),
              std::numeric_limits<double>::max()};
    case Type::bf16:
      p.rounding = power(-8), p.least = power(-133), p.most = decode16(0x7f7f, brain);
      break;
    case Type::f16:
      p.rounding = power(-11), p.least = power(-24), p.most = decode16(0x7bff, half);
      break;
  }
  return p;
}

Random::Random(std::uint64_t seed, std::uint64_t stream) {
  std::seed_seq both{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                     static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
  engine_.seed(both);
}
Index Random::below(Index n) { return static_cast<Index>(engine_() % static_cast<std::uint64_t>(n)); }
bool Random::chance(int one_in) { return below(one_in) == 0; }
double Random::uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
double Random::normal() {
  const double pi = 3.14159265358979323846;
  return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(2 * pi * uniform());
}

}  // namespace evenkeel::check
