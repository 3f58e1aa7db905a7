#include "huge.hpp"

#include <cstdio>

#if defined(__linux__)

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <system_error>

#include "../machine.hpp"
#include "oracle.hpp"
#include "run.hpp"

namespace evenkeel::check {
namespace {

// A tensor whose first pieces are all the same memory, and whose last one is another: what is
// written to the first is the same for all of them, as its statistics are, and the last one shows
// that the end was reached. Around it nothing can be accessed.
class Tiled {
 public:
  Tiled(std::size_t piece, std::size_t pieces) : piece_(piece) {
    const int file = memfd_create("evenkeel", 0);
    if (file < 0 || ftruncate(file, static_cast<off_t>(2 * piece)) != 0) fail("memfd_create");
    whole_ = 2 * guard + piece * pieces;
    void* got = mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) fail("mmap of address space");
    memory_ = static_cast<char*>(got);
    for (std::size_t i = 0; i < pieces; ++i) {
      const off_t from = i + 1 < pieces ? 0 : static_cast<off_t>(piece);
      if (mmap(data() + i * piece, piece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
               from) == MAP_FAILED)
        fail("mmap of a piece");
    }
    close(file);
    first = data(), last = data() + (pieces - 1) * piece;
    std::memset(first, 0xff, piece), std::memset(last, 0xff, piece);
  }
  ~Tiled() { munmap(memory_, whole_); }
  Tiled(const Tiled&) = delete;
  Tiled& operator=(const Tiled&) = delete;

  char* data() const { return memory_ + guard; }
  char *first, *last;

 private:
  static constexpr std::size_t guard = std::size_t{1} << 36;  // more than 32 bits of offset
  [[noreturn]] static void fail(const char* what) {
    throw std::system_error(errno, std::generic_category(), what);
  }
  std::size_t piece_, whole_ = 0;
  char* memory_ = nullptr;
};

struct Huge {
  const char* why;
  Type type;
  Act act;
  Index k2, r2;  // a run of owners, each of r2 values; r1 is what makes it huge
  bool one_run;  // one owner, one run: r2 is what makes it huge
};

const Huge cases[] = {
    {"NCHW, rows that cut vectors", Type::f32, Act::relu, 3, 127, false},
    {"NHWC, rows taken together", Type::bf16, Act::none, 3, 1, false},
    {"NHWC, whole vectors", Type::f16, Act::silu, 32, 1, false},
    {"per activation", Type::bf16, Act::leaky, 3 << 16, 1, false},
    {"all values in one", Type::bf16, Act::relu, 1, 1, true},
};

// What one of the two pieces holds; every owner has as many values in each.
struct Piece {
  Reals x, dy;
};

class Run {
 public:
  explicit Run(const Huge& h) : h_(h), p_(precision_of(h.type)) {
    row_ = h.k2 * h.r2;
    const Index page = 4096 / static_cast<Index>(size_of(h.type));
    piece_ = row_ * page;
    while (piece_ < (Index{3} << 20)) piece_ *= 2;
    while (piece_ > (Index{6} << 20) && piece_ % (2 * row_) == 0 && piece_ % (2 * page) == 0)
      piece_ /= 2;
    pieces_ = (Index{1} << 31) / piece_ + 2;
    std::printf("%s: %s, %lld values\n", h.why, name_of(h.type),
                static_cast<long long>(piece_ * pieces_));
    std::fflush(stdout);
    draw();
  }

  void check() {
    Tiled x = tensor(), dy = tensor(), y = tensor(), dx = tensor();
    for (int which : {0, 1})
      for (Index i = 0; i < piece_; ++i) {
        encode(h_.type, value_[which].x[i], which ? x.last : x.first, i);
        encode(h_.type, value_[which].dy[i], which ? dy.last : dy.first, i);
      }
    const auto owners = static_cast<std::size_t>(h_.k2);
    std::vector<double> mean(owners), m2(owners), invstd(owners), one(owners), two(owners);
    Problem p;
    p.r1 = h_.one_run ? 1 : piece_ * pieces_ / row_, p.k2 = h_.k2;
    p.r2 = h_.one_run ? piece_ * pieces_ : h_.r2;
    p.type = h_.type, p.act = h_.act, p.slope = slope, p.eps = eps, p.threads = 2;
    p.x = x.data(), p.y = y.data(), p.dy = dy.data(), p.dx = dx.data();
    p.mean = mean.data(), p.m2 = m2.data(), p.invstd = invstd.data();
    p.sum_dz = one.data(), p.sum_dz_xhat = two.data();
    best_kernels().forward(p);
    expect_forward(y, mean, m2);
    best_kernels().backward(p);
    expect_backward(dx, one, two);
  }

 private:
  static constexpr double slope = 0.25, eps = 1e-5;

  Tiled tensor() const {
    return Tiled(static_cast<std::size_t>(piece_) * size_of(h_.type),
                 static_cast<std::size_t>(pieces_));
  }
  Index owner(Index at) const { return at / h_.r2 % h_.k2; }
  Real times(int which) const { return which ? 1 : static_cast<Real>(pieces_ - 1); }
  Real count() const { return static_cast<Real>(pieces_) * static_cast<Real>(piece_ / h_.k2); }

  void draw() {
    Random random(1, 1);
    for (int which : {0, 1})
      for (Index i = 0; i < piece_; ++i) {
        const double centre = 3 + which + static_cast<double>(owner(i) % 7);
        value_[which].x.push_back(rounded(h_.type, centre + random.normal()));
        value_[which].dy.push_back(rounded(h_.type, 0.5 + random.normal()));
      }
    for (Reals* sums : {&mean_, &m2_, &dz_, &dz_xhat_}) sums->assign(h_.k2, 0);
    each([&](int which, Index i, Real x, Real) { mean_[owner(i)] += times(which) * x / count(); });
    each([&](int which, Index i, Real x, Real) {
      m2_[owner(i)] += times(which) * (x - mean_[owner(i)]) * (x - mean_[owner(i)]);
    });
    each([&](int which, Index i, Real x, Real dy) {
      const Real xhat = normal(x, owner(i)), z = xhat, d = dy * derivative(h_.act, slope, z);
      dz_[owner(i)] += times(which) * d, dz_xhat_[owner(i)] += times(which) * d * xhat;
    });
  }

  void each(const std::function<void(int, Index, Real, Real)>& f) const {
    for (int which : {0, 1})
      for (Index i = 0; i < piece_; ++i) f(which, i, value_[which].x[i], value_[which].dy[i]);
  }
  Real invstd(Index o) const { return 1 / std::sqrt(m2_[o] / count() + static_cast<Real>(eps)); }
  Real normal(Real x, Index o) const { return (x - mean_[o]) * invstd(o); }

  void expect_forward(const Tiled& y, const std::vector<double>& mean,
                      const std::vector<double>& m2) const {
    for (Index o = 0; o < h_.k2; ++o) {
      expect_near("mean", o, mean[o], mean_[o], 4 * p_.variance, 1e300L);
      expect_near("m2", o, m2[o], m2_[o], p_.variance * m2_[o], 1e300L);
    }
    each([&](int which, Index i, Real x, Real) {
      const Real z = normal(x, owner(i)), wanted = activated(h_.act, slope, z);
      const Real allowed = p_.rounding * std::fabs(wanted) + 2 * p_.inner * (1 + std::fabs(z));
      expect_near(which ? "y in its last piece" : "y", i,
                  decode(h_.type, which ? y.last : y.first, i), wanted, allowed, p_.most);
    });
  }

  void expect_backward(const Tiled& dx, const std::vector<double>& one,
                       const std::vector<double>& two) const {
    const Real m = count();
    for (Index o = 0; o < h_.k2; ++o) {
      expect_near("sum_dz", o, one[o], dz_[o], 2 * p_.inner * m, 1e300L);
      expect_near("sum_dz_xhat", o, two[o], dz_xhat_[o], 2 * p_.inner * m, 1e300L);
    }
    each([&](int which, Index i, Real x, Real dy) {
      const Index o = owner(i);
      const Real z = normal(x, o);
      if (std::fabs(z) < 1e-4L) return;  // the side of a kink is unclear
      const Real dz = dy * derivative(h_.act, slope, z);
      const Real wanted = invstd(o) * (dz - dz_[o] / m - z * dz_xhat_[o] / m);
      const Real allowed = p_.rounding * std::fabs(wanted) +
                           p_.inner * invstd(o) * (2 + std::fabs(dy) + 2 * std::fabs(z));
      expect_near(which ? "dx in its last piece" : "dx", i,
                  decode(h_.type, which ? dx.last : dx.first, i), wanted, allowed, p_.most);
    });
  }

  const Huge& h_;
  Precision p_;
  Index row_, piece_, pieces_;
  Piece value_[2];
  Reals mean_, m2_, dz_, dz_xhat_;
};

}  // namespace

int huge_cases() {
  using Clock = std::chrono::steady_clock;
  for (const Huge& h : cases) {
    const auto start = Clock::now();
    try {
      Run(h).check();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "WRONG: %s\nIN evenkeel_check --huge: %s\n", error.what(), h.why);
      return 1;
    }
    const std::chrono::duration<double> took = Clock::now() - start;
    std::printf("  right, %.1f s\n", took.count());
  }
  return 0;
}

}  // namespace evenkeel::check

#else

namespace evenkeel::check {

int huge_cases() {
  std::puts("skipped: mapping a file many times over is written for Linux");
  return 0;
}

}  // namespace evenkeel::check

#endif
