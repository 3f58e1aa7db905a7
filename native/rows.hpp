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

// How a run of n values divides into what lies before the first boundary of a vector, whole vectors
// and the rest.
template <int L>
struct Cut {
  Index n, head;
  Part before, rest;

  // Vectors lie on the boundaries that they would have in a tensor that begins on one: an access
  // across lines costs two. The place in the tensor decides, not the address, which would make the
  // last bits of a sum depend on the allocator.
  Cut(Index length, Index place) : n(length) {
    head = std::min((L - place % L) % L, n);
    before = Part::last(head, L);
    rest = Part::first((n - head) % L);
  }
};

// Calls part(0, lanes), full(offset, chain) for whole vectors, chain cycling through 0 .. 3, and
// part(offset, lanes).
template <int L, class Full, class Each>
INLINE inline void sweep(const Cut<L>& cut, Full full, Each part) {
  Index at = cut.head;
  if (at) part(0, cut.before);
  for (; at + 4 * L <= cut.n; at += 4 * L) {
    full(at, 0);
    full(at + L, 1);
    full(at + 2 * L, 2);
    full(at + 3 * L, 3);
  }
  // One by one, for a chain that is not known to the compiler would live in memory.
  if (at + L <= cut.n) full(at, 0), at += L;
  if (at + L <= cut.n) full(at, 1), at += L;
  if (at + L <= cut.n) full(at, 2), at += L;
  if (at < cut.n) part(at, cut.rest);
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

  Index place(Index run, Index j) const { return base + run * run_stride + j; }
  static const T* in(const void* tensor, Index at) { return static_cast<const T*>(tensor) + at; }
  static T* out(void* tensor, Index at) { return static_cast<T*>(tensor) + at; }

  // The mask lies owner by owner. It has whole bytes for each vector, and a vector more for each run
  // than fits into it.
  static constexpr Index bytes = L < 8 ? 1 : L / 8;
  static Index mask_stride(const Problem& p) { return ((p.r2 + L - 1) / L + 1) * bytes; }
  std::uint8_t* mask(Index run, Index j) const {
    return p.mask + (owner * p.r1 + run) * mask_stride(p) + (place(run, 0) % L + j) / L * bytes;
  }
  static unsigned read_bits(const std::uint8_t* q) {
    return bytes == 2 ? q[0] | unsigned{q[1]} << 8 : q[0];
  }
  static void write_bits(std::uint8_t* q, unsigned bits) {
    q[0] = static_cast<std::uint8_t>(bits);
    if constexpr (bytes == 2) q[1] = static_cast<std::uint8_t>(bits >> 8);
  }

  // Calls f(run, place, cut, ahead) for the values j .. j + n of some runs. Short runs are too far
  // apart for the processor to foresee, so we ask for what is `ahead` of the present run: a later
  // run, or one of the next owner.
  template <class F>
  INLINE void runs(Index i, Index end, Index j, Index n, F f) const {
    const Index size = n * sizeof(T), distance = 2048 / std::max<Index>(size, 1);
    const bool alike = run_stride % L == 0;
    Cut<L> cut(n, place(i, j));
    for (; i < end; ++i) {
      const Index start = place(i, j), ahead = distance * run_stride;
      if (!alike) cut = Cut<L>(n, start);
      f(i, start, cut, i + distance < p.r1 ? ahead : ahead - p.r1 * run_stride + p.r2);
    }
  }
  // Asked once for each line.
  INLINE static bool begins_line(int chain) {
    return chain % (cache_line / static_cast<int>(L * sizeof(T))) == 0;
  }
  INLINE static void foresee(const T* q, Index ahead, int chain) {
    if (begins_line(chain)) __builtin_prefetch(q + ahead);
  }
  // While an owner is written past the cache, memory has time to bring the next one.
  INLINE void foresee_next(const T* q, int chain) const {
    if (begins_line(chain)) __builtin_prefetch(q + p.r2, 0, 2);
  }
  INLINE static void foresee_store(T* q, Index ahead, int chain) {
    if (begins_line(chain)) __builtin_prefetch(q + ahead, 1);
  }

  // Calls f(first run, runs, offset in the run, length) for parts of about one tile.
  template <class F>
  void tiles(const Segment& s, F f) const {
    if (s.length() >= tile) {
      for (Index i = s.i0; i < s.i1; ++i)
        for (Index j = s.j0, end; j < s.j1; j = end) {
          end = std::min(j + Cut<L>(tile, place(i, j)).head + tile, s.j1);
          f(i, Index(1), j, end - j);
        }
      return;
    }
    const Index group = std::max<Index>(1, tile / std::max<Index>(1, s.length()));
    for (Index i = s.i0; i < s.i1; i += group)
      f(i, std::min(group, s.i1 - i), s.j0, s.length());
  }

  Moments moments(const Segment& s) const {
    Moments all;
    tiles(s, [&](Index i, Index runs, Index j, Index n) {
      const double count = static_cast<double>(runs * n);
      const C pivot = static_cast<C>(all.n == 0 ? start(i, runs, j, n) : all.mean);
      const auto [off, squares] = deviations(i, runs, j, n, pivot);
      all.add_about(count, pivot, off, squares);
    });
    if (!std::isfinite(all.mean) || !std::isfinite(all.m2)) return of_scalars(s);
    return all;
  }

  // The mean of an eighth of a tile. What lies around it loses at most three bits more than what
  // lies around its own mean.
  double start(Index i, Index runs, Index j, Index n) const {
    n = std::min(n, tile / 8);
    runs = std::min(runs, std::max<Index>(1, tile / 8 / n));
    V sums[4] = {};
    this->runs(i, i + runs, j, n, [&](Index, Index start, const Cut<L>& cut, Index) INLINE {
      const T* q = in(p.x, start);
      sweep(
          cut, [&](Index at, int chain) INLINE { sums[chain] += S::load(q + at); },
          [&](Index at, Part lanes) INLINE { sums[3] += S::load(q + at, lanes); });
    });
    return total((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<double>(runs * n);
  }

  struct Pair {
    double first, second;
  };

  Pair deviations(Index i, Index runs, Index j, Index n, C pivot) const {
    V off[4] = {}, square[4] = {};
    auto take = [&](V d, int chain) INLINE {
      off[chain] += d;
      square[chain] += d * d;
    };
    this->runs(i, i + runs, j, n, [&](Index, Index start, const Cut<L>& cut, Index ahead) INLINE {
      const T* q = in(p.x, start);
      sweep(
          cut,
          [&](Index at, int chain) INLINE {
            foresee(q + at, ahead, chain);
            take(S::load(q + at) - pivot, chain);
          },
          [&](Index at, Part lanes) INLINE {
            foresee(q + at, ahead, 0);
            take(only<C>(lanes, S::load(q + at, lanes) - pivot), 3);
          });
    });
    return {total((off[0] + off[1]) + (off[2] + off[3])),
            total((square[0] + square[1]) + (square[2] + square[3]))};
  }

  // One by one, for infinities, NaN and what overflows a float.
  Moments of_scalars(const Segment& s) const {
    Moments m{static_cast<double>((s.i1 - s.i0) * s.length()), 0, 0};
    auto each = [&](auto f) {
      for (Index i = s.i0; i < s.i1; ++i)
        for (Index j = s.j0; j < s.j1; ++j) f(S::scalar(in(p.x, place(i, j))));
    };
    each([&](double v) { m.mean += v; });
    m.mean /= m.n;
    each([&](double v) { m.m2 += (v - m.mean) * (v - m.mean); });
    return m;
  }

  template <Act A, bool R>
  void apply(const Segment& s, bool stream) const {
    const auto k = Constants<C>::of(p, owner, false);
    const Activation<A, C> activation(p);
    const bool keeps = R && has_mask(p.act) && p.mask;
    const auto each = [&](Index i, Index start, const Cut<L>& cut, Index ahead) INLINE {
      const T *x = in(p.x, start), *r = R ? in(p.residual, start) : nullptr;
      T* y = out(p.y, start);
      std::uint8_t* bits = keeps ? mask(i, s.j0) : nullptr;
      const Index lead = start % L;
      auto value = [&](Index at, V v, V added, int chain) INLINE {
        if constexpr (R) foresee(r + at, ahead, chain);
        if (!stream) foresee_store(y + at, ahead, chain);
        V z = (v - k.high) * k.scale + k.shift;
        if constexpr (R) z += added;
        if (R && has_mask(A) && keeps)
          write_bits(bits + (lead + at) / L * bytes, activation.passing(z));
        return activation(z);
      };
      sweep(
          cut,
          [&](Index at, int chain) INLINE {
            if (stream) foresee_next(x + at, chain);
            const V v = value(at, S::load(x + at), R ? S::load(r + at) : V{}, chain);
            stream ? S::stream(y + at, v) : S::store(y + at, v);
          },
          [&](Index at, Part lanes) INLINE {
            const V added = R ? S::load(r + at, lanes) : V{};
            S::store(y + at, value(at, S::load(x + at, lanes), added, 0), lanes);
          });
    };
    runs(s.i0, s.i1, s.j0, s.length(), each);
    if (stream) settle();
  }

  // What reaches a value before the activation: bits are those of its vector.
  template <Act A, Source R>
  INLINE V dz_of(const Constants<C>& k, V d, V g, V added, const std::uint8_t* bits, Index vector,
                 const Activation<A, C>& activation) const {
    if constexpr (A == Act::none) return g;
    if constexpr (R == Source::mask && has_mask(A))
      return activation.gradient_by(read_bits(bits + vector * bytes), g);
    V z = d * k.scale + k.shift;
    if constexpr (R == Source::sum) z += added;
    return activation.gradient(g, z);
  }

  template <Act A, Source R>
  void sums(const Segment& s, double& dz_sum, double& dz_x_sum) const {
    const auto k = Constants<C>::of(p, owner, false);
    const Activation<A, C> activation(p);
    constexpr bool adds = R == Source::sum && A != Act::none;
    tiles(s, [&](Index i, Index runs, Index j, Index n) {
      V one[4] = {}, two[4] = {};
      const auto each = [&](Index run, Index start, const Cut<L>& cut, Index ahead) INLINE {
        const T *x = in(p.x, start), *dy = in(p.dy, start);
        const T* r = adds ? in(p.residual, start) : nullptr;
        const std::uint8_t* bits = R == Source::mask ? mask(run, j) : nullptr;
        const Index lead = start % L;
        auto ask = [&](Index at, int chain) INLINE {
          foresee(x + at, ahead, chain), foresee(dy + at, ahead, chain);
          if constexpr (adds) foresee(r + at, ahead, chain);
        };
        auto take = [&](Index at, V v, V g, V added, int chain) INLINE {
          const V d = v - k.high;
          const V dz = dz_of<A, R>(k, d, g, added, bits, (lead + at) / L, activation);
          one[chain] += dz;
          two[chain] += dz * d;
        };
        sweep(
            cut,
            [&](Index at, int chain) INLINE {
              ask(at, chain);
              take(at, S::load(x + at), S::load(dy + at), adds ? S::load(r + at) : V{}, chain);
            },
            [&](Index at, Part lanes) INLINE {
              ask(at, 0);
              // Lanes without a value get dy = 0 and x = high, so that they add exactly nothing.
              const V v = k.high + only<C>(lanes, S::load(x + at, lanes) - k.high);
              take(at, v, S::load(dy + at, lanes), adds ? S::load(r + at, lanes) : V{}, 3);
            });
      };
      this->runs(i, i + runs, j, n, each);
      dz_sum += total((one[0] + one[1]) + (one[2] + one[3]));
      dz_x_sum += total((two[0] + two[1]) + (two[2] + two[3]));
    });
  }

  template <Act A, Source R>
  void gradients(const Segment& s, bool stream) const {
    const auto k = Constants<C>::of(p, owner, true);
    const Activation<A, C> activation(p);
    constexpr bool adds = R == Source::sum && A != Act::none;
    const bool writes_dr = R != Source::x && p.dresidual, from_batch = p.from_batch;
    constexpr bool waits = sizeof(T) > 2;  // for memory; of 16 bits it waits for arithmetic
    const auto each = [&](Index i, Index start, const Cut<L>& cut, Index ahead) INLINE {
      const T *x = in(p.x, start), *dy = in(p.dy, start);
      const T* r = adds ? in(p.residual, start) : nullptr;
      T *dx = out(p.dx, start), *dr = writes_dr ? out(p.dresidual, start) : nullptr;
      const std::uint8_t* bits = R == Source::mask ? mask(i, s.j0) : nullptr;
      const Index lead = start % L;
      auto both = [&](Index at, V v, V g, V added, int chain, auto write) INLINE {
        if (stream && waits) foresee_next(x + at, chain), foresee_next(dy + at, chain);
        if (!stream) foresee_store(dx + at, ahead, chain);
        if (R != Source::x && writes_dr && !stream) foresee_store(dr + at, ahead, chain);
        const V d = v - k.high;
        const V dz = dz_of<A, R>(k, d, g, added, bits, (lead + at) / L, activation);
        write(dx + at, from_batch ? k.a * dz + (k.b * d + k.c) : k.a * dz);
        if (R != Source::x && writes_dr) write(dr + at, dz);
      };
      sweep(
          cut,
          [&](Index at, int chain) INLINE {
            both(at, S::load(x + at), S::load(dy + at), adds ? S::load(r + at) : V{}, chain,
                 [&](T* q, V v) INLINE { stream ? S::stream(q, v) : S::store(q, v); });
          },
          [&](Index at, Part lanes) INLINE {
            both(at, S::load(x + at, lanes), S::load(dy + at, lanes),
                 adds ? S::load(r + at, lanes) : V{}, 0,
                 [&](T* q, V v) INLINE { S::store(q, v, lanes); });
          });
    };
    runs(s.i0, s.i1, s.j0, s.length(), each);
    if (stream) settle();
  }
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
