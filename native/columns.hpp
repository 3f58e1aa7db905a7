// The schedule for memory whose fastest run is kept (NHWC, dense layers, per activation): rows of
// owners side by side. Of images so small that a channel's run is a few vectors (7x7), each place of
// a channel is a column of its own, and the owner's sums are those of its columns.
#pragma once
#include <numeric>
#include <vector>

#include "column_sums.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

// The rows i0 .. i1, of each the columns b0 .. b1.
struct Slab {
  Index i0, i1, b0, b1;
  Index width() const { return b1 - b0; }
};

// Rows of one of the k1. Where an owner count is no multiple of a vector, several rows are taken as
// one wide row that is, so that no vector is cut and none crosses a line of the cache.
template <class T>
struct Columns {
  using S = Storage<T>;
  using C = typename S::C;
  using V = typename S::V;
  using Sums = ColumnSums<C>;
  static constexpr int L = S::L;
  static constexpr int rows = 64;  // of a tile, within which sums are in the precision of the loops

  const Problem& p;
  Index outer;         // which of the k1
  Index count, width;  // rows, and how long they are: a multiple of all the owners'
  Index base;          // where the first begins

  Columns(const Problem& problem, Index a, Index first, Index together)
      : p(problem), outer(a), count((problem.r1 - first) / together), width(row(problem) * together) {
    base = (outer * p.r1 + first) * row(p);
  }

  static Index row(const Problem& p) { return p.k2 * p.r2; }
  // How many columns are whole owners and whole vectors.
  static Index unit(const Problem& p) { return std::lcm(p.r2, Index{L}); }
  // How many rows to take as one.
  static Index together(const Problem& p) {
    Index n = 1;
    while (n * row(p) % L != 0 || n * row(p) < 256) n *= 2;
    return p.r1 >= n * rows && n * row(p) <= 4096 ? n : 1;
  }

  static Index padded(Index n) { return (n + L - 1) / L * L; }
  Index place(Index row) const { return base + row * width; }
  const T* in(const void* tensor, Index row) const {
    return static_cast<const T*>(tensor) + place(row);
  }
  T* out(void* tensor, Index row) const { return static_cast<T*>(tensor) + place(row); }

  // The mask has whole bytes for each vector of a row.
  static constexpr Index bytes = L < 8 ? 1 : L / 8;
  static Index mask_stride(Index width) { return (width + L - 1) / L * bytes; }
  static Index mask_size(const Problem& p) { return p.k1 * p.r1 * mask_stride(row(p)); }
  // One vector of a wide row never takes more than those of its parts would, so each keeps the
  // place of its first part.
  std::uint8_t* mask(Index row) const {
    return p.mask + place(row) / Columns::row(p) * mask_stride(Columns::row(p));
  }
  static unsigned read_bits(const std::uint8_t* q) {
    return bytes == 2 ? q[0] | unsigned{q[1]} << 8 : q[0];
  }
  static void write_bits(std::uint8_t* q, unsigned bits) {
    q[0] = static_cast<std::uint8_t>(bits);
    if constexpr (bytes == 2) q[1] = static_cast<std::uint8_t>(bits >> 8);
  }

  // Calls f(column, lanes) for the vectors of a row; lanes is void where there are all.
  template <class Full, class Each>
  INLINE static void across(const Slab& s, Full full, Each part) {
    Index b = s.b0;
    for (; b + L <= s.b1; b += L) full(b);
    if (b < s.b1) part(b, Part::first(s.b1 - b));
  }

  // Calls f(row, how many): a few rows at a time, so that what is kept for a column is loaded once
  // for all of them while memory is still read in the order of its addresses.
  template <int Many, class F>
  INLINE static void few(Index i, Index end, F f) {
    for (; i + Many <= end; i += Many) f(i, std::integral_constant<int, Many>{});
    for (; i < end; ++i) f(i, std::integral_constant<int, 1>{});
  }

  // Asks for as much of what lies behind rows q .. q + Many as vector b is of them. Those rows are read
  // side by side, which the processor foresees badly; what is behind them comes in one sequence.
  template <int Many>
  INLINE void foresee(const Slab& s, const T* q, Index b) const {
    if (Many == 1 || s.width() != width) return;
    constexpr int line = cache_line / sizeof(T);
    for (int at = 0; at < Many * L; at += line)
      __builtin_prefetch(q + Many * (width + b) + at, 0, 2);
  }

  // Adds to the moments of the owners b0 .. b1, `all` being those of the first of the k2.
  void moments(const Slab& s, Moments* all) const {
    if (s.i0 == s.i1) return;
    const Index n = padded(s.width());
    std::vector<C> pivot(n);
    Sums sums(n);
    for (Index i = s.i0; i < s.i1; i += rows) {
      const Index end = std::min<Index>(i + rows, s.i1);
      if (i == s.i0) start_pivots(s, std::min(s.i0 + rows / 8, end), pivot.data());
      sums.clear();
      few<8>(i, end, [&](Index r, auto many) INLINE { deviations<many>(s, r, pivot.data(), sums); });
      sums.merge(static_cast<double>(i - s.i0), static_cast<double>(end - i), pivot.data());
    }
    each_owner(s, [&](Index owner, Index b, auto run) INLINE {
      const double n = static_cast<double>(s.i1 - s.i0);
      Moments m = sums.moments(n, b, run);
      if (!std::isfinite(m.mean) || !std::isfinite(m.m2)) m = of_scalars(s, s.b0 + b);
      all[owner].add(m);
    });
  }

  // Calls f(owner, first of its columns in the slab, how many it has); a slab has whole owners only.
  template <class F>
  INLINE void each_owner(const Slab& s, F f) const {
    auto each = [&](auto run) INLINE {
      Index owner = s.b0 / run % p.k2;
      for (Index b = 0; b < s.width(); b += run, owner = owner + 1 == p.k2 ? 0 : owner + 1)
        f(owner, b, run);
    };
    if (p.r2 == 1) each(std::integral_constant<Index, 1>{});
    else each(p.r2);
  }

  // The means of an eighth of a tile. What lies around them loses at most three bits more than what
  // lies around its own mean.
  void start_pivots(const Slab& s, Index end, C* pivot) const {
    few<8>(s.i0, end, [&](Index r, auto many) INLINE {
      const T* q = in(p.x, r);
      auto add = [&](Index b, auto load) INLINE {
        V sum = whole<V>(pivot + b - s.b0);
        for (int m = 0; m < many; ++m) sum += load(q + m * width + b);
        std::memcpy(pivot + b - s.b0, &sum, sizeof sum);
      };
      across(
          s, [&](Index b) INLINE { add(b, [](const T* a) INLINE { return S::load(a); }); },
          [&](Index b, Part k) INLINE { add(b, [k](const T* a) INLINE { return S::load(a, k); }); });
    });
    for (Index b = 0; b < s.width(); ++b) pivot[b] /= static_cast<C>(end - s.i0);
  }

  template <int Many>
  INLINE void deviations(const Slab& s, Index r, const C* pivots, Sums& sums) const {
    const T* q = in(p.x, r);
    C *first = sums.first.data(), *second = sums.second.data();
    const Index stride = width, b0 = s.b0;
    auto add = [=, this](Index b, auto load) INLINE {
      foresee<Many>(s, q, b);
      const V pivot = whole<V>(pivots + b - b0);
      V off{}, square{};  // a sum of sums: its roundings are a third of those of one after another
      for (int m = 0; m < Many; ++m) {
        const V d = load(q + m * stride + b) - pivot;
        off += d;
        square += d * d;
      }
      off += whole<V>(first + b - b0), square += whole<V>(second + b - b0);
      std::memcpy(first + b - b0, &off, sizeof off);
      std::memcpy(second + b - b0, &square, sizeof square);
    };
    across(
        s, [=](Index b) INLINE { add(b, [](const T* a) INLINE { return S::load(a); }); },
        [=](Index b, Part k) INLINE { add(b, [k](const T* a) INLINE { return S::load(a, k); }); });
  }

  // One by one, for infinities, NaN and what overflows a float.
  Moments of_scalars(const Slab& s, Index column) const {
    Moments m{static_cast<double>((s.i1 - s.i0) * p.r2), 0, 0};
    auto each = [&](auto f) {
      for (Index i = s.i0; i < s.i1; ++i)
        for (Index j = 0; j < p.r2; ++j) f(static_cast<double>(S::scalar(in(p.x, i) + column + j)));
    };
    each([&](double x) { m.mean += x; });
    m.mean /= m.n;
    each([&](double x) { m.m2 += (x - m.mean) * (x - m.mean); });
    return m;
  }

  // The constants of a slab's columns, each field side by side for vector loads.
  struct Table {
    std::vector<C> memory;
    const C *high, *scale, *shift, *a, *b, *c;

    Table(const Columns& of, const Slab& s, bool with_gradient)
        : memory(padded(s.width()) * (with_gradient ? 6 : 3)) {
      const Index n = padded(s.width());
      const int fields = with_gradient ? 6 : 3;
      C* field[6];
      for (int f = 0; f < 6; ++f) field[f] = memory.data() + (f < 3 || with_gradient ? f * n : 0);
      of.each_owner(s, [&](Index owner, Index b, auto run) INLINE {
        const auto k = Constants<C>::of(of.p, of.outer * of.p.k2 + owner, with_gradient);
        const C values[] = {k.high, k.scale, k.shift, k.a, k.b, k.c};
        for (int f = 0; f < fields; ++f) std::fill_n(field[f] + b, run, values[f]);
      });
      high = field[0], scale = field[1], shift = field[2];
      a = field[3], b = field[4], c = field[5];
    }
  };

  // Calls f(row, how many) for all rows: tiles from the last to the first, for the last ones are
  // in cache, and within a tile in the order of memory. Where a vector is less than a line, several
  // rows at a time would be more half-filled lines than the processor gathers for streaming.
  template <class F>
  INLINE void backwards(const Slab& s, bool stream, F f) const {
    constexpr bool fills_lines = EVENKEEL_BYTES == cache_line;
    for (Index end = s.i1; end > s.i0; end -= std::min<Index>(rows, end - s.i0)) {
      const Index start = std::max<Index>(s.i0, end - rows);
      if (stream && !fills_lines) few<1>(start, end, f);
      else few<4>(start, end, f);
    }
  }

  template <Act A, bool R>
  void apply(const Slab& s, bool stream) const {
    const Table table(*this, s, false);
    const Activation<A, C> activation(p);
    const bool keeps = R && has_mask(p.act) && p.mask;
    const Index stride = width, b0 = s.b0;
    backwards(s, stream, [&, this](Index i, auto many) INLINE {
      const T *x = in(p.x, i), *r = R ? in(p.residual, i) : nullptr;
      T* y = out(p.y, i);
      std::uint8_t* bits[many];
      for (int m = 0; m < many; ++m) bits[m] = keeps ? mask(i + m) : nullptr;
      auto values = [&](Index b, auto load, auto store) INLINE {
        const V high = whole<V>(table.high + b - b0), scale = whole<V>(table.scale + b - b0);
        const V shift = whole<V>(table.shift + b - b0);
        for (int m = 0; m < many; ++m) {
          const Index at = m * stride + b;
          V z = (load(x + at) - high) * scale + shift;
          if constexpr (R) z += load(r + at);
          if (R && has_mask(A) && keeps) write_bits(bits[m] + b / L * bytes, activation.passing(z));
          store(y + at, activation(z));
        }
      };
      across(
          s,
          [&](Index b) INLINE {
            values(b, [](const T* q) INLINE { return S::load(q); },
                   [&](T* q, V v) INLINE { stream ? S::stream(q, v) : S::store(q, v); });
          },
          [&](Index b, Part k) INLINE {
            values(b, [k](const T* q) INLINE { return S::load(q, k); },
                   [k](T* q, V v) INLINE { S::store(q, v, k); });
          });
    });
    if (stream) settle();
  }

  template <Act A, Source R>
  INLINE static V dz_of(V d, V scale, V shift, V g, V added, const std::uint8_t* bits, Index vector,
                        const Activation<A, C>& activation) {
    if constexpr (A == Act::none) return g;
    if constexpr (R == Source::mask && has_mask(A))
      return activation.gradient_by(read_bits(bits + vector * bytes), g);
    V z = d * scale + shift;
    if constexpr (R == Source::sum) z += added;
    return activation.gradient(g, z);
  }

  // Adds sum(dz) and sum(dz * (x - high)) of each column to those of the owners.
  template <Act A, Source R>
  void sums(const Slab& s, double* dz_sum, double* dz_x_sum) const {
    const Table table(*this, s, false);
    Sums sums(padded(s.width()));
    const Activation<A, C> activation(p);
    constexpr bool adds = R == Source::sum && A != Act::none;
    const Index stride = width, b0 = s.b0;
    C *first = sums.first.data(), *second = sums.second.data();
    for (Index i = s.i0; i < s.i1; i += rows) {
      sums.clear();
      few<4>(i, std::min<Index>(i + rows, s.i1), [&, this](Index row, auto many) INLINE {
        const T *x = in(p.x, row), *dy = in(p.dy, row), *r = adds ? in(p.residual, row) : nullptr;
        const std::uint8_t* bits[many];
        for (int m = 0; m < many; ++m) bits[m] = R == Source::mask ? mask(row + m) : nullptr;
        auto add = [&](Index b, auto load) INLINE {
          const V high = whole<V>(table.high + b - b0), scale = whole<V>(table.scale + b - b0);
          const V shift = whole<V>(table.shift + b - b0);
          foresee<many>(s, x, b), foresee<many>(s, dy, b);
          if constexpr (adds) foresee<many>(s, r, b);
          V one = whole<V>(first + b - b0), two = whole<V>(second + b - b0);
          for (int m = 0; m < many; ++m) {
            const Index at = m * stride + b;
            const V d = load(x + at) - high;
            const V dz = dz_of<A, R>(d, scale, shift, load(dy + at), adds ? load(r + at) : V{},
                                     bits[m], b / L, activation);
            one += dz;
            two += dz * d;
          }
          std::memcpy(first + b - b0, &one, sizeof one);
          std::memcpy(second + b - b0, &two, sizeof two);
        };
        across(
            s, [&](Index b) INLINE { add(b, [](const T* q) INLINE { return S::load(q); }); },
            [&](Index b, Part k) INLINE {
              add(b, [k](const T* q) INLINE { return S::load(q, k); });
            });
      });
      sums.collect(s.width());
    }
    each_owner(s, [&](Index owner, Index b, auto run) INLINE {
      dz_sum[owner] += Sums::sum(&sums.firsts[b], run);
      dz_x_sum[owner] += Sums::sum(&sums.seconds[b], run);
    });
  }

  template <Act A, Source R>
  void gradients(const Slab& s, bool stream) const {
    const Table table(*this, s, true);
    const Activation<A, C> activation(p);
    constexpr bool adds = R == Source::sum && A != Act::none;
    const bool writes_dr = R != Source::x && p.dresidual, from_batch = p.from_batch;
    const Index stride = width, b0 = s.b0;
    backwards(s, stream, [&, this](Index i, auto many) INLINE {
      const T *x = in(p.x, i), *dy = in(p.dy, i), *r = adds ? in(p.residual, i) : nullptr;
      T *dx = out(p.dx, i), *dr = writes_dr ? out(p.dresidual, i) : nullptr;
      const std::uint8_t* bits[many];
      for (int m = 0; m < many; ++m) bits[m] = R == Source::mask ? mask(i + m) : nullptr;
      auto values = [&](Index b, auto load, auto store) INLINE {
        const V high = whole<V>(table.high + b - b0), scale = whole<V>(table.scale + b - b0);
        const V shift = whole<V>(table.shift + b - b0), ka = whole<V>(table.a + b - b0);
        const V kb = whole<V>(table.b + b - b0), kc = whole<V>(table.c + b - b0);
        for (int m = 0; m < many; ++m) {
          const Index at = m * stride + b;
          const V d = load(x + at) - high;
          const V dz = dz_of<A, R>(d, scale, shift, load(dy + at), adds ? load(r + at) : V{},
                                   bits[m], b / L, activation);
          store(dx + at, from_batch ? ka * dz + (kb * d + kc) : ka * dz);
          if (R != Source::x && writes_dr) store(dr + at, dz);
        }
      };
      across(
          s,
          [&](Index b) INLINE {
            values(b, [](const T* q) INLINE { return S::load(q); },
                   [&](T* q, V v) INLINE { stream ? S::stream(q, v) : S::store(q, v); });
          },
          [&](Index b, Part k) INLINE {
            values(b, [k](const T* q) INLINE { return S::load(q, k); },
                   [k](T* q, V v) INLINE { S::store(q, v, k); });
          });
    });
    if (stream) settle();
  }
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
