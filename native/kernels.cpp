// Forward and backward for one instruction set: how the work is divided, so that what the first
// phase of an owner has read is still in cache for the second.
#include <type_traits>

#include "columns.hpp"
#include "machine.hpp"
#include "rows.hpp"
#include "threads.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {
namespace {

// Whether whole owners, dealt to threads, keep all of them busy.
bool balanced(Index owners, Index threads) {
  return (owners + threads - 1) / threads * threads * 4 <= owners * 5;
}

Index threads_for(const Problem& p, Index bytes) {
  const Index useful = std::max<Index>(1, p.owners() * p.count() * bytes / (32 << 10));
  return std::min<Index>(p.threads, useful);
}

// Phase by phase over an owner cut into segments, or both phases owner by owner.
template <class Reduce, class Finish, class Map>
void by_rows(const Problem& p, Index bytes, Reduce reduce_part, Finish finish, Map map_part) {
  const Index threads = threads_for(p, bytes), owners = p.owners();
  const Segment all{0, p.r1, 0, p.r2};
  if (threads == 1 || balanced(owners, threads)) {
    const Index parts = std::min(owners, threads == 1 ? 1 : threads * 4);
    parallel(parts, static_cast<int>(threads), [&](Index part) {
      for (Index o = owners * part / parts; o < owners * (part + 1) / parts; ++o) {
        if (p.phases & reduce) {
          reduce_part(o, all, 0);
          finish(o, 1);
        }
        if (p.phases & map) map_part(o, all);
      }
    });
    return;
  }
  auto segment = [&](Index s) {
    if (p.r1 >= threads) return Segment{p.r1 * s / threads, p.r1 * (s + 1) / threads, 0, p.r2};
    return Segment{0, p.r1, p.r2 * s / threads, p.r2 * (s + 1) / threads};
  };
  for (Index o = 0; o < owners; ++o) {
    if (p.phases & reduce) {
      parallel(threads, static_cast<int>(threads), [&](Index s) { reduce_part(o, segment(s), s); });
      finish(o, threads);
    }
    if (p.phases & map)
      parallel(threads, static_cast<int>(threads), [&](Index s) { map_part(o, segment(s)); });
  }
}

// Rows are dealt to threads, phase by phase. Keeping a slab of columns in cache between the phases
// was measured and lost: its pieces of rows are too short for the processor to foresee.
template <class Reduce, class Finish, class Map>
void by_columns(const Problem& p, Index bytes, Reduce reduce_part, Finish finish, Map map_part) {
  const Index threads = threads_for(p, bytes), parts = std::min(threads, p.r1);
  for (Index a = 0; a < p.k1; ++a) {
    auto slab = [&](Index i) { return Slab{p.r1 * i / parts, p.r1 * (i + 1) / parts}; };
    if (p.phases & reduce) {
      parallel(parts, static_cast<int>(threads), [&](Index i) { reduce_part(a, slab(i), i); });
      finish(a, parts);
    }
    if (p.phases & map)
      parallel(parts, static_cast<int>(threads), [&](Index i) { map_part(a, slab(i)); });
  }
}

// Whether every row of a tensor begins on a boundary of a vector.
template <class T>
bool on_boundaries(const Problem& p, const void* tensor) {
  return p.k2 * sizeof(T) % 64 == 0 && reinterpret_cast<std::uintptr_t>(tensor) % 64 == 0;
}

template <class T, Act A, bool R>
void forward(const Problem& p) {
  const Index bytes = (R ? 3 : 2) * sizeof(T);
  const bool stream = p.owners() * p.count() * Index(sizeof(T)) >= stream_from();
  const Index parts = std::max(1, p.threads);
  if (p.r2 > 1 || p.k2 == 1) {
    std::vector<Moments> partial(p.owners() * parts);
    by_rows(
        p, bytes,
        [&](Index o, const Segment& s, Index i) { partial[o * parts + i] = Rows<T>(p, o).moments(s); },
        [&](Index o, Index n) {
          Moments all;
          for (Index i = 0; i < n; ++i) all.add(partial[o * parts + i]);
          set_moments(p, o, all);
        },
        [&](Index o, const Segment& s) { Rows<T>(p, o).template apply<A, R>(s, stream); });
    return;
  }
  std::vector<Moments> partial(p.k2 * parts);
  by_columns(
      p, bytes,
      [&](Index a, const Slab& s, Index i) { Columns<T>(p, a).moments(s, &partial[i * p.k2]); },
      [&](Index a, Index n) {
        for (Index b = 0; b < p.k2; ++b) {
          Moments all;
          for (Index i = 0; i < n; ++i) all.add(partial[i * p.k2 + b]);
          set_moments(p, a * p.k2 + b, all);
        }
      },
      [&](Index a, const Slab& s) {
        Columns<T>(p, a).template apply<A, R>(s, stream && on_boundaries<T>(p, p.y));
      });
}

template <class T, Act A, bool R>
void backward(const Problem& p) {
  using C = typename Storage<T>::C;
  const Index bytes = (R ? 5 : 3) * sizeof(T);
  const bool stream = p.owners() * p.count() * Index(sizeof(T)) >= stream_from();
  const Index parts = std::max(1, p.threads);
  if (p.r2 > 1 || p.k2 == 1) {
    std::vector<double> partial(2 * p.owners() * parts, 0.0);
    by_rows(
        p, bytes,
        [&](Index o, const Segment& s, Index i) {
          double* pair = &partial[2 * (o * parts + i)];
          Rows<T>(p, o).template sums<A, R>(s, pair[0], pair[1]);
        },
        [&](Index o, Index n) {
          double one = 0, two = 0;
          for (Index i = 0; i < n; ++i) {
            one += partial[2 * (o * parts + i)];
            two += partial[2 * (o * parts + i) + 1];
          }
          set_sums<C>(p, o, one, two);
        },
        [&](Index o, const Segment& s) {
          const Rows<T> rows(p, o);
          p.from_batch ? rows.template gradients<A, R, true>(s, stream)
                       : rows.template gradients<A, R, false>(s, stream);
        });
    return;
  }
  std::vector<double> one(p.k2 * parts), two(p.k2 * parts);
  by_columns(
      p, bytes,
      [&](Index a, const Slab& s, Index i) {
        Columns<T>(p, a).template sums<A, R>(s, &one[i * p.k2], &two[i * p.k2]);
      },
      [&](Index a, Index n) {
        for (Index b = 0; b < p.k2; ++b) {
          double first = 0, second = 0;
          for (Index i = 0; i < n; ++i) {
            first += one[i * p.k2 + b];
            second += two[i * p.k2 + b];
          }
          set_sums<C>(p, a * p.k2 + b, first, second);
        }
      },
      [&](Index a, const Slab& s) {
        const Columns<T> columns(p, a);
        const bool whole_lines = stream && on_boundaries<T>(p, p.dx);
        p.from_batch ? columns.template gradients<A, R, true>(s, whole_lines)
                     : columns.template gradients<A, R, false>(s, whole_lines);
      });
}

template <bool Forward, class T, Act A>
void with_residual(const Problem& p) {
  if constexpr (Forward) {
    p.residual ? forward<T, A, true>(p) : forward<T, A, false>(p);
  } else {
    p.residual ? backward<T, A, true>(p) : backward<T, A, false>(p);
  }
}

template <bool Forward, class T>
void with_activation(const Problem& p) {
  switch (p.act) {
    case Act::none: return with_residual<Forward, T, Act::none>(p);
    case Act::relu: return with_residual<Forward, T, Act::relu>(p);
    case Act::leaky: return with_residual<Forward, T, Act::leaky>(p);
    case Act::relu6: return with_residual<Forward, T, Act::relu6>(p);
    case Act::silu: return with_residual<Forward, T, Act::silu>(p);
  }
}

template <bool Forward>
void with_type(const Problem& p) {
  if (p.owners() == 0 || p.count() == 0) return;
  switch (p.type) {
    case Type::f32: return with_activation<Forward, float>(p);
    case Type::f64: return with_activation<Forward, double>(p);
    case Type::bf16: return with_activation<Forward, bf16>(p);
    case Type::f16: return with_activation<Forward, f16>(p);
  }
}

}  // namespace

#define EVENKEEL_TEXT(name) #name
#define EVENKEEL_NAME(name) EVENKEEL_TEXT(name)

extern const Kernels kernels;
const Kernels kernels{EVENKEEL_NAME(EVENKEEL_ISA), with_type<true>, with_type<false>};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
