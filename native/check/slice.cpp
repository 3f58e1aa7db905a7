// kernels.cpp for some of the storage types, in a fraction of the time: with sanitizers, one set of
// kernels takes a minute to compile. Types are left out by EVENKEEL_WITHOUT_<type>.
#include <cstdlib>

#include "../vector.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {
namespace {

// Declared here as in kernels.cpp, so that what is left out is never instantiated there.
template <bool Forward, class T>
void with_activation(const Problem& p);

#define EVENKEEL_LEAVE_OUT(T)                                                                \
  template <>                                                                                \
  [[maybe_unused]] void with_activation<true, T>(const Problem&) {                           \
    std::abort();                                                                            \
  }                                                                                          \
  template <>                                                                                \
  [[maybe_unused]] void with_activation<false, T>(const Problem&) {                          \
    std::abort();                                                                            \
  }

#if defined(EVENKEEL_WITHOUT_f32)
EVENKEEL_LEAVE_OUT(float)
constexpr bool has_f32 = false;
#else
constexpr bool has_f32 = true;
#endif
#if defined(EVENKEEL_WITHOUT_f64)
EVENKEEL_LEAVE_OUT(double)
constexpr bool has_f64 = false;
#else
constexpr bool has_f64 = true;
#endif
#if defined(EVENKEEL_WITHOUT_bf16)
EVENKEEL_LEAVE_OUT(bf16)
constexpr bool has_bf16 = false;
#else
constexpr bool has_bf16 = true;
#endif
#if defined(EVENKEEL_WITHOUT_f16)
EVENKEEL_LEAVE_OUT(f16)
constexpr bool has_f16 = false;
#else
constexpr bool has_f16 = true;
#endif

}  // namespace

// In the order of Type.
extern const bool has_type[4];
const bool has_type[4] = {has_f32, has_f64, has_bf16, has_f16};
}  // namespace EVENKEEL_ISA
}  // namespace evenkeel

#include "../kernels.cpp"
