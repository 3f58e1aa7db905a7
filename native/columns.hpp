// The schedule for memory whose fastest run is kept (NHWC, dense layers, per activation): r1 rows of
// k2 owners side by side. A slab is some of those columns.
#pragma once
#include <vector>

#include "arithmetic.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

// Columns b0 .. b1 of the rows i0 .. i1.
struct Slab {
  Index i0, i1, b0, b1;
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
  Index owner(Index column) const { return outer * p.k2 + column; }

  // Calls f(row, rows, column, vectors) with whole vectors, f(row, rows, column, -lanes) for a rest.
  template <class F>
  static void tiles(const Slab& s, F f) {
    for (Index i = s.i0; i < s.i1; i += rows) {
      const Index n = std::min<Index>(rows, s.i1 - i);
      Index b = s.b0;
      for (; b + group * L <= s.b1; b += group * L) f(i, n, b, std::integral_constant<int, group>{}, L);
      for (; b + L <= s.b1; b += L) f(i, n, b, std::integral_constant<int, 1>{}, L);
      if (b < s.b1) f(i, n, b, std::integral_constant<int, 1>{}, static_cast<int>(s.b1 - b));
    }
  }

  static V load(const T* q, int lanes) { return lanes == L ? S::load(q) : S::load(q, lanes); }
  static void store(T* q, V v, int lanes, bool stream) {
    if (lanes != L) {
      S::store(q, v, lanes);
    } else {
      stream ? S::stream(q, v) : S::store(q, v);
    }
  }

  // Moments of each column into `all`, b1 - b0 of them.
  void moments(const Slab& s, Moments* all) const {
    const Index width = s.b1 - s.b0, padded = (width + L - 1) / L * L;
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
        double *pm = mean.data() + (b - s.b0) + v * L, *p2 = m2.data() + (b - s.b0) + v * L;
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
    for (Index b = 0; b < width; ++b) {
      all[b] = {static_cast<double>(s.i1 - s.i0), mean[b], m2[b]};
      if (!std::isfinite(mean[b]) || !std::isfinite(m2[b])) all[b] = of_scalars(s, s.b0 + b);
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

  // The constants of a slab's columns, each field side by side for vector loads.
  struct Table {
    std::vector<C> high, scale, shift, a, b, c;

    Table(const Columns& of, Index b0, Index b1, bool with_gradient) {
      const Index padded = (b1 - b0 + L - 1) / L * L;
      for (auto* field : {&high, &scale, &shift}) field->resize(padded);
      if (with_gradient)
        for (auto* field : {&a, &b, &c}) field->resize(padded);
      for (Index i = 0; i < b1 - b0; ++i) {
        const auto k = Constants<C>::of(of.p, of.owner(b0 + i), with_gradient);
        high[i] = k.high, scale[i] = k.scale, shift[i] = k.shift;
        if (with_gradient) a[i] = k.a, b[i] = k.b, c[i] = k.c;
      }
    }
  };

  template <Act A, bool R>
  void apply(const Slab& s, bool stream) const {
    const Table table(*this, s.b0, s.b1, false);
    const C slope = static_cast<C>(p.slope);
    tiles(s, [&](Index i, Index n, Index b, auto g, int lanes) {
      constexpr int G = decltype(g)::value;
      V high[G], scale[G], shift[G];
      for (int v = 0; v < G; ++v) {
        const Index at = b - s.b0 + v * L;
        high[v] = whole<V>(&table.high[at]);
        scale[v] = whole<V>(&table.scale[at]);
        shift[v] = whole<V>(&table.shift[at]);
      }
      for (Index r = i; r < i + n; ++r)
        for (int v = 0; v < G; ++v) {
          const Index at = b + v * L;
          V z = (load(in(p.x, r) + at, lanes) - high[v]) * scale[v] + shift[v];
          if constexpr (R) z += load(in(p.residual, r) + at, lanes);
          store(out(p.y, r) + at, activate<A>(z, slope), lanes, stream);
        }
    });
  }

  // sum(dz) and sum(dz * (x - high)) of each column, added to b1 - b0 pairs.
  template <Act A, bool R>
  void sums(const Slab& s, double* dz_sum, double* dz_x_sum) const {
    const Table table(*this, s.b0, s.b1, false);
    const Index padded = (s.b1 - s.b0 + L - 1) / L * L;
    std::vector<double> first(padded, 0.0), second(padded, 0.0);
    const C slope = static_cast<C>(p.slope);
    tiles(s, [&](Index i, Index n, Index b, auto g, int lanes) {
      constexpr int G = decltype(g)::value;
      V high[G], scale[G], shift[G], one[G] = {}, two[G] = {};
      for (int v = 0; v < G; ++v) {
        const Index at = b - s.b0 + v * L;
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
        double *f = first.data() + (b - s.b0) + v * L, *t = second.data() + (b - s.b0) + v * L;
        const D sum = whole<D>(f) + __builtin_convertvector(one[v], D);
        const D product = whole<D>(t) + __builtin_convertvector(two[v], D);
        std::memcpy(f, &sum, sizeof sum);
        std::memcpy(t, &product, sizeof product);
      }
    });
    for (Index b = 0; b < s.b1 - s.b0; ++b) {
      dz_sum[b] += first[b];
      dz_x_sum[b] += second[b];
    }
  }

  template <Act A, bool R, bool B>
  void gradients(const Slab& s, bool stream) const {
    const Table table(*this, s.b0, s.b1, true);
    const C slope = static_cast<C>(p.slope);
    tiles(s, [&](Index i, Index n, Index b, auto g, int lanes) {
      constexpr int G = decltype(g)::value;
      V high[G], scale[G], shift[G], ka[G], kb[G], kc[G];
      for (int v = 0; v < G; ++v) {
        const Index at = b - s.b0 + v * L;
        high[v] = whole<V>(&table.high[at]);
        scale[v] = whole<V>(&table.scale[at]);
        shift[v] = whole<V>(&table.shift[at]);
        ka[v] = whole<V>(&table.a[at]);
        kb[v] = whole<V>(&table.b[at]);
        kc[v] = whole<V>(&table.c[at]);
      }
      for (Index r = i; r < i + n; ++r)
        for (int v = 0; v < G; ++v) {
          const Index at = b + v * L;
          V dz = load(in(p.dy, r) + at, lanes);
          const V d = load(in(p.x, r) + at, lanes) - high[v];
          if constexpr (A != Act::none) {
            V z = d * scale[v] + shift[v];
            if constexpr (R) z += load(in(p.residual, r) + at, lanes);
            dz = before_activation<A>(dz, z, slope);
          }
          V dx = ka[v] * dz;
          if constexpr (B) dx = ka[v] * dz + (kb[v] * d + kc[v]);
          store(out(p.dx, r) + at, dx, lanes, stream);
          if (R && p.dresidual) store(out(p.dresidual, r) + at, dz, lanes, false);
        }
    });
  }
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
