// Forward and backward for one instruction set: how the work is divided, so that what the first
// phase of an owner has read is still in cache for the second.
#include <type_traits>
#include <utility>

#include "columns.hpp"
#include "depthwise.hpp"
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
    if (p.mask) return s < p.r1 ? Segment{s, s + 1, 0, p.r2} : Segment{};  // no byte is shared
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

constexpr Index widest = 4096;  // columns at a time, so that what is kept for each stays in L1

// Whether the memory is taken as columns: of owners side by side, or of owners whose runs are so
// short that cutting them into vectors costs more than a sum for each column. 7x7 gains, if rows
// pay for what is kept for a column; 8x8 does not, for it leaves no part of a vector.
template <class T>
bool as_columns(const Problem& p) {
  if (p.r2 == 1) return p.k2 > 1;
  constexpr Index longest = 49, narrowest = 1024;
  return p.r2 <= std::min(longest, 2 * p.r1) && Columns<T>::row(p) >= narrowest;
}

// Calls f(columns, slab) for part i of the rows of one of the k1.
template <class T, class F>
void each_slab(const Problem& p, Index a, Index i, Index parts, F f) {
  const Index together = Columns<T>::together(p);
  auto rows = [&](const Columns<T>& of, Index i0, Index i1) {
    const Index step = widest / Columns<T>::unit(p) * Columns<T>::unit(p);
    for (Index b = 0; b < of.width; b += step)
      f(of, Slab{i0, i1, b, std::min(b + step, of.width)});
  };
  const Columns<T> most(p, a, 0, together), rest(p, a, p.r1 / together * together, 1);
  rows(most, most.count * i / parts, most.count * (i + 1) / parts);
  if (i == parts - 1 && rest.count) rows(rest, 0, rest.count);
}

// Rows are dealt to threads, phase by phase. Keeping a slab of columns in cache between the phases
// was measured and lost, its pieces of rows being too short for the processor to foresee; but
// where the rows are few and long (dense layers, per activation) the pieces are long too.
template <class T, class Reduce, class Finish, class Map>
void by_columns(const Problem& p, Index bytes, Reduce reduce_part, Finish finish, Map map_part) {
  const Index threads = threads_for(p, bytes), unit = Columns<T>::unit(p);
  const Index row = Columns<T>::row(p), wide = std::max<Index>(1, 1024 / unit) * unit;
  // Slabs for all threads, unless there is so little to do that one meeting costs more than it saves.
  const bool for_all = row >= threads * wide || p.r1 * row * bytes <= (1 << 20);
  const bool at_once = row >= wide && for_all && p.r1 * wide * bytes <= (512 << 10);
  for (Index a = 0; a < p.k1; ++a) {
    if (at_once) {
      const Columns<T> columns(p, a, 0, 1);
      parallel((row + wide - 1) / wide, static_cast<int>(threads), [&](Index i) {
        const Slab s{0, p.r1, i * wide, std::min((i + 1) * wide, row)};
        if (p.phases & reduce) {
          reduce_part(columns, s, 0);
          finish(a, s.b0 / p.r2, s.b1 / p.r2, 1);
        }
        if (p.phases & map) map_part(columns, s);
      });
      continue;
    }
    const Index parts = std::min(threads, p.r1);
    if (p.phases & reduce) {
      parallel(parts, static_cast<int>(threads), [&](Index i) {
        each_slab<T>(p, a, i, parts,
                     [&](const Columns<T>& c, const Slab& s) { reduce_part(c, s, i); });
      });
      finish(a, 0, p.k2, parts);
    }
    if (p.phases & map)
      parallel(parts, static_cast<int>(threads), [&](Index i) { each_slab<T>(p, a, i, parts, map_part); });
  }
}

// Whether what is written is too large to be found in the cache, in pieces that are mostly whole
// lines: of parts of lines, stores past the cache are slow, on older processors very slow (measured
// on Zen 3 and Zen 5).
template <class T>
bool streams(const Problem& p, bool in_order) {
  constexpr Index mostly = EVENKEEL_BYTES == cache_line ? 768 : 4096;
  const Index size = sizeof(T), run = p.r2 * size;
  return p.owners() * p.count() * size >= stream_from(in_order) &&
         (in_order || run % cache_line == 0 || run >= mostly);
}

// Whether a tensor begins on a boundary of a vector; a null one does.
template <class T>
bool on_boundary(const void* tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor) % (Storage<T>::L * sizeof(T)) == 0;
}
template <class T>
bool on_boundary(const Columns<T>& columns) {
  return columns.width % Storage<T>::L == 0 && columns.base % Storage<T>::L == 0;
}

template <class T, Act A, bool R>
void forward(const Problem& p) {
  const Index bytes = (R ? 3 : 2) * sizeof(T);
  const bool by_runs = !as_columns<T>(p);
  const bool stream = streams<T>(p, !by_runs) && on_boundary<T>(p.y);
  const Index parts = std::max(1, p.threads);
  if (by_runs) {
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
  std::vector<Moments> partial(p.k2 * (p.phases & reduce ? parts : 0));
  by_columns<T>(
      p, bytes,
      [&](const Columns<T>& c, const Slab& s, Index i) { c.moments(s, &partial[i * p.k2]); },
      [&](Index a, Index b0, Index b1, Index n) {
        for (Index b = b0; b < b1; ++b) {
          Moments all;
          for (Index i = 0; i < n; ++i) {
            all.add(partial[i * p.k2 + b]);
            partial[i * p.k2 + b] = {};
          }
          set_moments(p, a * p.k2 + b, all);
        }
      },
      [&](const Columns<T>& c, const Slab& s) {
        c.template apply<A, R>(s, stream && on_boundary(c));
      });
}

template <class T, Act A, Source R>
void backward(const Problem& p) {
  using C = typename Storage<T>::C;
  const Index bytes = (R == Source::x ? 3 : R == Source::sum ? 5 : 4) * sizeof(T);
  const bool by_runs = !as_columns<T>(p);
  const bool stream =
      streams<T>(p, !by_runs) && on_boundary<T>(p.dx) && on_boundary<T>(p.dresidual);
  const Index parts = std::max(1, p.threads);
  if (by_runs) {
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
        [&](Index o, const Segment& s) { Rows<T>(p, o).template gradients<A, R>(s, stream); });
    return;
  }
  std::vector<double> one(p.k2 * (p.phases & reduce ? parts : 0)), two(one.size());
  by_columns<T>(
      p, bytes,
      [&](const Columns<T>& c, const Slab& s, Index i) {
        c.template sums<A, R>(s, &one[i * p.k2], &two[i * p.k2]);
      },
      [&](Index a, Index b0, Index b1, Index n) {
        for (Index b = b0; b < b1; ++b) {
          double first = 0, second = 0;
          for (Index i = 0; i < n; ++i) {
            first += std::exchange(one[i * p.k2 + b], 0.0);
            second += std::exchange(two[i * p.k2 + b], 0.0);
          }
          set_sums<C>(p, a * p.k2 + b, first, second);
        }
      },
      [&](const Columns<T>& c, const Slab& s) {
        c.template gradients<A, R>(s, stream && on_boundary(c));
      });
}

template <bool Forward, class T, Act A>
void with_residual(const Problem& p) {
  if constexpr (Forward) {
    p.residual ? forward<T, A, true>(p) : forward<T, A, false>(p);
  } else {
    if constexpr (has_mask(A))
      if (p.mask && has_mask(p.act)) return backward<T, A, Source::mask>(p);
    p.residual ? backward<T, A, Source::sum>(p) : backward<T, A, Source::x>(p);
  }
}

// The activation that loops are compiled for. Those of less common pairs ask at every vector, which
// halves the time of compilation; with EVENKEEL_FEWER_LOOPS all do.
template <class T, Act A>
constexpr Act loops() {
#if defined(EVENKEEL_FEWER_LOOPS)
  return any;
#else
  constexpr bool is_half = std::is_same_v<T, f16> && (A == Act::none || A == Act::relu);
  return std::is_same_v<T, float> || std::is_same_v<T, bf16> || is_half ? A : any;
#endif
}

template <bool Forward, class T>
void with_activation(const Problem& p) {
  switch (p.act) {
    case Act::none: return with_residual<Forward, T, loops<T, Act::none>()>(p);
    case Act::relu: return with_residual<Forward, T, loops<T, Act::relu>()>(p);
    case Act::leaky: return with_residual<Forward, T, loops<T, Act::leaky>()>(p);
    case Act::relu6: return with_residual<Forward, T, loops<T, Act::relu6>()>(p);
    case Act::silu: return with_residual<Forward, T, loops<T, Act::silu>()>(p);
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

template <class T>
Index mask_bytes_of(const Problem& p) {
  if (as_columns<T>(p)) return Columns<T>::mask_size(p);
  return p.owners() * p.r1 * Rows<T>::mask_stride(p);
}

Index mask_bytes(const Problem& p) {
  switch (p.type) {
    case Type::f32: return mask_bytes_of<float>(p);
    case Type::f64: return mask_bytes_of<double>(p);
    case Type::bf16: return mask_bytes_of<bf16>(p);
    case Type::f16: return mask_bytes_of<f16>(p);
  }
  return 0;
}

}  // namespace

#define EVENKEEL_TEXT(name) #name
#define EVENKEEL_NAME(name) EVENKEEL_TEXT(name)

extern const Kernels kernels;
const Kernels kernels{EVENKEEL_NAME(EVENKEEL_ISA), with_type<true>, with_type<false>,
                      mask_bytes, [](const Taps& t) { Depthwise(t).run(); }};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
