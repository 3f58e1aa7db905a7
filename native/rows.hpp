// The schedule for memory whose fastest run is reduced (NCHW): an owner is r1 runs of r2 values.
#pragma once
#include "arithmetic.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

// A part of one owner: runs i0 .. i1, of each the values j0 .. j1.
struct Segment {
  Index i0, i1, j0, j1;
  Index length() const { return j1 - j0; }
};

// Calls full(offset, chain) for whole vectors, chain cycling through 0 .. 3, then part(offset, n).
template <int L, class Full, class Part>
INLINE inline void sweep(Index n, Full full, Part part) {
  Index at = 0;
  for (; at + 4 * L <= n; at += 4 * L) {
    full(at, 0);
    full(at + L, 1);
    full(at + 2 * L, 2);
    full(at + 3 * L, 3);
  }
  // One by one, for a chain that is not known to the compiler would live in memory.
  if (at + L <= n) full(at, 0), at += L;
  if (at + L <= n) full(at, 1), at += L;
  if (at + L <= n) full(at, 2), at += L;
  if (at < n) part(at, static_cast<int>(n - at));
}

template <class T>
struct Rows {
  using S = Storage<T>;
  using C = typename S::C;
  using V = typename S::V;
  static constexpr int L = S::L;
  static constexpr Index tile = 128 * L;  // 32 additions in each chain; 8 KiB of float

  const Problem& p;
  Index run_stride, owner;
  Index base;

  Rows(const Problem& problem, Index which) : p(problem), owner(which) {
    run_stride = p.k2 * p.r2;
    base = (owner / p.k2) * p.r1 * run_stride + (owner % p.k2) * p.r2;
  }

  const T* in(const void* tensor) const { return static_cast<const T*>(tensor) + base; }
  T* out(void* tensor) const { return static_cast<T*>(tensor) + base; }

  // Asks for a run that is read soon: short ones are too far apart for the processor to foresee.
  INLINE void foresee(const T* q, Index n) const {
    const Index bytes = n * sizeof(T);
    if (bytes > 2048) return;
    const Index runs = std::max<Index>(1, 2048 / bytes);
    const char* at = reinterpret_cast<const char*>(q + runs * run_stride);
    for (Index line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
  }

  // Calls f(first run, runs, offset in the run, length) for parts of about one tile.
  template <class F>
  void tiles(const Segment& s, F f) const {
    if (s.length() >= tile) {
      for (Index i = s.i0; i < s.i1; ++i)
        for (Index j = s.j0; j < s.j1; j += tile) f(i, Index(1), j, std::min(tile, s.j1 - j));
      return;
    }
    const Index group = std::max<Index>(1, tile / std::max<Index>(1, s.length()));
    for (Index i = s.i0; i < s.i1; i += group)
      f(i, std::min(group, s.i1 - i), s.j0, s.length());
  }

  Moments moments(const Segment& s) const {
    Moments all;
    tiles(s, [&](Index i, Index runs, Index j, Index n) { all.add(of_tile(i, runs, j, n)); });
    if (!std::isfinite(all.mean) || !std::isfinite(all.m2)) return of_scalars(s);
    return all;
  }

  Moments of_tile(Index i, Index runs, Index j, Index n) const {
    const T* x = in(p.x) + i * run_stride + j;
    V sum[4] = {};
    for (Index r = 0; r < runs; ++r) {
      const T* q = x + r * run_stride;
      sweep<L>(
          n, [&](Index at, int chain) INLINE { sum[chain] += S::load(q + at); },
          [&](Index at, int k) INLINE { sum[3] += S::load(q + at, k); });
    }
    const double count = static_cast<double>(runs * n);
    const C near = static_cast<C>(total((sum[0] + sum[1]) + (sum[2] + sum[3])) / count);
    V off[4] = {}, square[4] = {};
    const Index next = runs == 1 ? n : 0;  // while this tile is in cache, memory is idle
    for (Index r = 0; r < runs; ++r) {
      const T* q = x + r * run_stride;
      auto take = [&](V d, int chain) INLINE {
        off[chain] += d;
        square[chain] += d * d;
      };
      sweep<L>(
          n,
          [&](Index at, int chain) INLINE {
            if (next) __builtin_prefetch(q + at + next);
            take(S::load(q + at) - near, chain);
          },
          [&](Index at, int k) INLINE {
            take(lanes_below<C>(k) ? S::load(q + at, k) - near : V{}, 3);
          });
    }
    const double e = total((off[0] + off[1]) + (off[2] + off[3]));
    const double m2 = total((square[0] + square[1]) + (square[2] + square[3])) - e * e / count;
    return {count, static_cast<double>(near) + e / count, m2 < 0 ? 0 : m2};
  }

  // One by one, for infinities, NaN and what overflows a float.
  Moments of_scalars(const Segment& s) const {
    Moments m{static_cast<double>((s.i1 - s.i0) * s.length()), 0, 0};
    auto each = [&](auto f) {
      for (Index i = s.i0; i < s.i1; ++i)
        for (Index j = s.j0; j < s.j1; ++j) f(S::scalar(in(p.x) + i * run_stride + j));
    };
    each([&](double v) { m.mean += v; });
    m.mean /= m.n;
    each([&](double v) { m.m2 += (v - m.mean) * (v - m.mean); });
    return m;
  }

  template <Act A, bool R>
  void apply(const Segment& s, bool stream) const {
    const auto k = Constants<C>::of(p, owner, false);
    const C slope = static_cast<C>(p.slope);
    for (Index i = s.i0; i < s.i1; ++i) {
      const Index start = i * run_stride + s.j0;
      const T *x = in(p.x) + start, *r = R ? in(p.residual) + start : nullptr;
      T* y = out(p.y) + start;
      auto value = [&](V v, V added) INLINE {
        V z = (v - k.high) * k.scale + k.shift;
        if constexpr (R) z += added;
        return activate<A>(z, slope);
      };
      auto part = [&](Index at, int n) INLINE {
        S::store(y + at, value(S::load(x + at, n), R ? S::load(r + at, n) : V{}), n);
      };
      const Index head = stream ? to_boundary(y, s.length()) : 0;
      if (head) part(0, static_cast<int>(head));
      sweep<L>(
          s.length() - head,
          [&](Index at, int) INLINE {
            at += head;
            const V v = value(S::load(x + at), R ? S::load(r + at) : V{});
            stream ? S::stream(y + at, v) : S::store(y + at, v);
          },
          [&](Index at, int n) INLINE { part(at + head, n); });
    }
  }

  // How many values lie before the next boundary of a vector.
  static Index to_boundary(const T* y, Index length) {
    constexpr std::uintptr_t bytes = L * sizeof(T);
    const auto past = reinterpret_cast<std::uintptr_t>(y) % bytes;
    return past ? std::min<Index>((bytes - past) / sizeof(T), length) : 0;
  }

  template <Act A, bool R>
  void sums(const Segment& s, double& dz_sum, double& dz_x_sum) const {
    const auto k = Constants<C>::of(p, owner, false);
    const C slope = static_cast<C>(p.slope);
    tiles(s, [&](Index i, Index runs, Index j, Index n) {
      V one[4] = {}, two[4] = {};
      for (Index run = i; run < i + runs; ++run) {
        const Index start = run * run_stride + j;
        const T *x = in(p.x) + start, *dy = in(p.dy) + start;
        const T* r = R ? in(p.residual) + start : nullptr;
        foresee(x, n), foresee(dy, n);
        if constexpr (R) foresee(r, n);
        auto take = [&](V v, V g, V added, int chain) INLINE {
          const V d = v - k.high;
          V z = d * k.scale + k.shift;
          if constexpr (R) z += added;
          const V dz = before_activation<A>(g, z, slope);
          one[chain] += dz;
          two[chain] += dz * d;
        };
        sweep<L>(
            n,
            [&](Index at, int chain) INLINE {
              take(S::load(x + at), S::load(dy + at), R ? S::load(r + at) : V{}, chain);
            },
            [&](Index at, int m) INLINE {
              // Lanes without a value get x = high, so that they add exactly nothing.
              const V v = lanes_below<C>(m) ? S::load(x + at, m) : spread<V>(k.high);
              take(v, S::load(dy + at, m), R ? S::load(r + at, m) : V{}, 3);
            });
      }
      dz_sum += total((one[0] + one[1]) + (one[2] + one[3]));
      dz_x_sum += total((two[0] + two[1]) + (two[2] + two[3]));
    });
  }

  template <Act A, bool R, bool B>
  void gradients(const Segment& s, bool stream) const {
    const auto k = Constants<C>::of(p, owner, true);
    const C slope = static_cast<C>(p.slope);
    for (Index i = s.i0; i < s.i1; ++i) {
      const Index start = i * run_stride + s.j0;
      const T *x = in(p.x) + start, *dy = in(p.dy) + start;
      const T* r = R && A != Act::none ? in(p.residual) + start : nullptr;
      T *dx = out(p.dx) + start, *dr = R && p.dresidual ? out(p.dresidual) + start : nullptr;
      foresee(x, s.length()), foresee(dy, s.length());
      auto dz_of = [&](V v, V g, V added) INLINE {
        if constexpr (A == Act::none) return g;
        V z = (v - k.high) * k.scale + k.shift;
        if constexpr (R) z += added;
        return before_activation<A>(g, z, slope);
      };
      auto dx_of = [&](V v, V dz) INLINE {
        if constexpr (B) return k.a * dz + (k.b * (v - k.high) + k.c);
        return k.a * dz;
      };
      auto part = [&](Index at, int n) INLINE {
        const V v = S::load(x + at, n);
        const V dz = dz_of(v, S::load(dy + at, n), r ? S::load(r + at, n) : V{});
        S::store(dx + at, dx_of(v, dz), n);
        if (R && dr) S::store(dr + at, dz, n);
      };
      const Index head = stream ? to_boundary(dx, s.length()) : 0;
      if (head) part(0, static_cast<int>(head));
      sweep<L>(
          s.length() - head,
          [&](Index at, int) INLINE {
            at += head;
            const V v = S::load(x + at);
            const V dz = dz_of(v, S::load(dy + at), r ? S::load(r + at) : V{});
            stream ? S::stream(dx + at, dx_of(v, dz)) : S::store(dx + at, dx_of(v, dz));
            if (R && dr) stream ? S::stream(dr + at, dz) : S::store(dr + at, dz);
          },
          [&](Index at, int n) INLINE { part(at + head, n); });
    }
  }
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
