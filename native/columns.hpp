// The schedule for memory whose fastest run is kept (NHWC, dense layers, per activation): r1 rows of
// k2 owners side by side.
#pragma once
#include <vector>

#include "arithmetic.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

// The rows i0 .. i1.
struct Slab {
  Index i0, i1;
};

template <class T>
struct Columns {
  using S = Storage<T>;
  using C = typename S::C;
  using V = typename S::V;
  using D = typename Vec<C>::wide;
  static constexpr int L = S::L;
  static constexpr int rows = 64;                             // of a tile
  static constexpr int group = EVENKEEL_BYTES == 64 ? 4 : 2;  // vectors side by side, in registers

  const Problem& p;
  Index outer;  // which of the k1

  Columns(const Problem& problem, Index a) : p(problem), outer(a) {}

  const T* in(const void* tensor, Index row) const {
    return static_cast<const T*>(tensor) + (outer * p.r1 + row) * p.k2;
  }
  T* out(void* tensor, Index row) const {
    return static_cast<T*>(tensor) + (outer * p.r1 + row) * p.k2;
  }

  // Calls f(first row, rows, column, vectors side by side, lanes of a vector).
  template <class F>
  void tiles(const Slab& s, F f) const {
    for (Index i = s.i0; i < s.i1; i += rows) {
      const Index n = std::min<Index>(rows, s.i1 - i);
      Index b = 0;
      for (; b + group * L <= p.k2; b += group * L) f(i, n, b, std::integral_constant<int, group>{}, L);
      for (; b + L <= p.k2; b += L) f(i, n, b, std::integral_constant<int, 1>{}, L);
      if (b < p.k2) f(i, n, b, std::integral_constant<int, 1>{}, static_cast<int>(p.k2 - b));
    }
  }

  // Calls f(row) for each: tiles from the last to the first, for the last ones are in cache, and
  // within a tile in the order of memory.
  template <class F>
  INLINE void each_row(const Slab& s, F f) const {
    for (Index end = s.i1; end > s.i0; end -= std::min<Index>(rows, end - s.i0))
      for (Index i = std::max<Index>(s.i0, end - rows); i < end; ++i) f(i);
  }

  static V load(const T* q, int lanes) { return lanes == L ? S::load(q) : S::load(q, lanes); }
  // Moments of each column into `all`.
  void moments(const Slab& s, Moments* all) const {
    const Index padded = (p.k2 + L - 1) / L * L;
    std::vector<double> mean(padded, 0.0), m2(padded, 0.0);
    tiles(s, [&](Index i, Index n, Index b, auto g, int lanes) {
      constexpr int G = decltype(g)::value;
      // Even and odd rows apart: shorter chains of additions, and two at a time.
      V near[G], even[G] = {}, odd[G] = {};
      auto sum = [&](const T* q, V* into) INLINE {
        for (int v = 0; v < G; ++v) into[v] += load(q + v * L, lanes);
      };
      const T* q = in(p.x, i) + b;
      Index r = 0;
      for (; r + 2 <= n; r += 2) sum(q + r * p.k2, even), sum(q + (r + 1) * p.k2, odd);
      if (r < n) sum(q + r * p.k2, even);
      for (int v = 0; v < G; ++v) near[v] = (even[v] + odd[v]) / static_cast<C>(n);
      V off[G] = {}, even_square[G] = {}, odd_square[G] = {};
      auto deviations = [&](const T* at, V* square) INLINE {
        for (int v = 0; v < G; ++v) {
          const V d = load(at + v * L, lanes) - near[v];
          off[v] += d;
          square[v] += d * d;
        }
      };
      for (r = 0; r + 2 <= n; r += 2)
        deviations(q + r * p.k2, even_square), deviations(q + (r + 1) * p.k2, odd_square);
      if (r < n) deviations(q + r * p.k2, even_square);
      const double before = static_cast<double>(i - s.i0), now = static_cast<double>(n);
      const double share = now / (before + now);
      for (int v = 0; v < G; ++v) {
        double *pm = mean.data() + b + v * L, *p2 = m2.data() + b + v * L;
        const D e = __builtin_convertvector(off[v], D);
        const D raw = __builtin_convertvector(even_square[v] + odd_square[v], D);
        const D squares = raw - e * e / now;
        const D mine = __builtin_convertvector(near[v], D) + e / now;
        const D old = whole<D>(pm), delta = mine - old, sums = whole<D>(p2);
        const D merged = old + delta * share;
        const D grown = sums + (squares < D{} ? D{} : squares) + delta * delta * (before * share);
        std::memcpy(pm, &merged, sizeof merged);
        std::memcpy(p2, &grown, sizeof grown);
      }
    });
    for (Index b = 0; b < p.k2; ++b) {
      all[b] = {static_cast<double>(s.i1 - s.i0), mean[b], m2[b]};
      if (!std::isfinite(mean[b]) || !std::isfinite(m2[b])) all[b] = of_scalars(s, b);
    }
  }

  // One by one, for infinities, NaN and what overflows a float.
  Moments of_scalars(const Slab& s, Index column) const {
    Moments m{static_cast<double>(s.i1 - s.i0), 0, 0};
    for (Index i = s.i0; i < s.i1; ++i) m.mean += S::scalar(in(p.x, i) + column);
    m.mean /= m.n;
    for (Index i = s.i0; i < s.i1; ++i) {
      const double d = S::scalar(in(p.x, i) + column) - m.mean;
      m.m2 += d * d;
    }
    return m;
  }

  // The constants of the columns, each field side by side for vector loads.
  struct Table {
    std::vector<C> high, scale, shift, a, b, c;

    Table(const Columns& of, bool with_gradient) {
      const Index padded = (of.p.k2 + L - 1) / L * L;
      for (auto* field : {&high, &scale, &shift}) field->resize(padded);
      if (with_gradient)
        for (auto* field : {&a, &b, &c}) field->resize(padded);
      for (Index i = 0; i < of.p.k2; ++i) {
        const auto k = Constants<C>::of(of.p, of.outer * of.p.k2 + i, with_gradient);
        high[i] = k.high, scale[i] = k.scale, shift[i] = k.shift;
        if (with_gradient) a[i] = k.a, b[i] = k.b, c[i] = k.c;
      }
    }
  };

  template <Act A, bool R>
  void apply(const Slab& s, bool stream) const {
    const Table table(*this, false);
    const C slope = static_cast<C>(p.slope);
    const C *high = table.high.data(), *scale = table.scale.data(), *shift = table.shift.data();
    const Index k2 = p.k2;
    each_row(s, [=, this](Index i) INLINE {
      const T *x = in(p.x, i), *r = R ? in(p.residual, i) : nullptr;
      T* y = out(p.y, i);
      auto value = [=](Index b, V v, V added) INLINE {
        V z = (v - whole<V>(high + b)) * whole<V>(scale + b) + whole<V>(shift + b);
        if constexpr (R) z += added;
        return activate<A>(z, slope);
      };
      Index b = 0;
      for (; b + L <= k2; b += L) {
        const V z = value(b, S::load(x + b), R ? S::load(r + b) : V{});
        stream ? S::stream(y + b, z) : S::store(y + b, z);
      }
      if (b < k2) {
        const int n = static_cast<int>(k2 - b);
        S::store(y + b, value(b, S::load(x + b, n), R ? S::load(r + b, n) : V{}), n);
      }
    });
  }

  // sum(dz) and sum(dz * (x - high)) of each column.
  template <Act A, bool R>
  void sums(const Slab& s, double* dz_sum, double* dz_x_sum) const {
    const Table table(*this, false);
    const Index padded = (p.k2 + L - 1) / L * L;
    std::vector<double> first(padded, 0.0), second(padded, 0.0);
    const C slope = static_cast<C>(p.slope);
    tiles(s, [&](Index i, Index n, Index b, auto g, int lanes) {
      constexpr int G = decltype(g)::value;
      V high[G], scale[G], shift[G], one[G] = {}, two[G] = {};
      for (int v = 0; v < G; ++v) {
        const Index at = b + v * L;
        high[v] = whole<V>(&table.high[at]);
        scale[v] = whole<V>(&table.scale[at]);
        shift[v] = whole<V>(&table.shift[at]);
      }
      for (Index r = i; r < i + n; ++r)
        for (int v = 0; v < G; ++v) {
          const Index at = b + v * L;
          const V d = load(in(p.x, r) + at, lanes) - high[v];
          V z = d * scale[v] + shift[v];
          if constexpr (R && A != Act::none) z += load(in(p.residual, r) + at, lanes);
          const V dz = before_activation<A>(load(in(p.dy, r) + at, lanes), z, slope);
          one[v] += dz;
          two[v] += dz * d;
        }
      for (int v = 0; v < G; ++v) {
        double *f = first.data() + b + v * L, *t = second.data() + b + v * L;
        const D sum = whole<D>(f) + __builtin_convertvector(one[v], D);
        const D product = whole<D>(t) + __builtin_convertvector(two[v], D);
        std::memcpy(f, &sum, sizeof sum);
        std::memcpy(t, &product, sizeof product);
      }
    });
    std::copy_n(first.data(), p.k2, dz_sum);
    std::copy_n(second.data(), p.k2, dz_x_sum);
  }

  template <Act A, bool R, bool B>
  void gradients(const Slab& s, bool stream) const {
    const Table table(*this, true);
    const C slope = static_cast<C>(p.slope);
    const C *high = table.high.data(), *scale = table.scale.data(), *shift = table.shift.data();
    const C *ka = table.a.data(), *kb = table.b.data(), *kc = table.c.data();
    const Index k2 = p.k2;
    each_row(s, [=, this](Index i) INLINE {
      const T *x = in(p.x, i), *dy = in(p.dy, i), *r = R ? in(p.residual, i) : nullptr;
      T *dx = out(p.dx, i), *dr = R && p.dresidual ? out(p.dresidual, i) : nullptr;
      auto dz_of = [=](Index b, V d, V g, V added) INLINE {
        if constexpr (A == Act::none) return g;
        V z = d * whole<V>(scale + b) + whole<V>(shift + b);
        if constexpr (R) z += added;
        return before_activation<A>(g, z, slope);
      };
      auto dx_of = [=](Index b, V d, V dz) INLINE {
        if constexpr (B) return whole<V>(ka + b) * dz + (whole<V>(kb + b) * d + whole<V>(kc + b));
        return whole<V>(ka + b) * dz;
      };
      Index b = 0;
      for (; b + L <= k2; b += L) {
        const V d = S::load(x + b) - whole<V>(high + b);
        const V dz = dz_of(b, d, S::load(dy + b), R ? S::load(r + b) : V{});
        const V gradient = dx_of(b, d, dz);
        stream ? S::stream(dx + b, gradient) : S::store(dx + b, gradient);
        if (R && dr) stream ? S::stream(dr + b, dz) : S::store(dr + b, dz);
      }
      if (b < k2) {
        const int n = static_cast<int>(k2 - b);
        const V d = S::load(x + b, n) - whole<V>(high + b);
        const V dz = dz_of(b, d, S::load(dy + b, n), R ? S::load(r + b, n) : V{});
        S::store(dx + b, dx_of(b, d, dz), n);
        if (R && dr) S::store(dr + b, dz, n);
      }
    });
  }
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
