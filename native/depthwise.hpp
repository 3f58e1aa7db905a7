// A convolution of each channel by itself, channels last, with bias and activation: what is
// left of a depthwise convolution with a norm behind it when the norm is folded away. oneDNN's
// convolution takes longer to prepare than most of these take to compute.
#pragma once
#include "activation.hpp"
#include "threads.hpp"

namespace evenkeel {
namespace EVENKEEL_ISA {

class Depthwise {
  using S = Storage<float>;
  static constexpr int L = S::L;

 public:
  explicit Depthwise(const Taps& taps) : t(taps), activation(act_of(taps)) {}

  // Output rows are dealt to threads, as many at a time as stay in a cache of the second level.
  void run() const {
    const Index rows = t.images * t.out[0], taps = t.size[0] * t.size[1];
    const Index work = rows * t.out[1] * t.channels * taps;
    const Index threads = std::max<Index>(1, std::min<Index>(t.threads, work / (32 << 10)));
    const Index bytes = (t.in[1] * t.stride[0] + t.out[1]) * t.channels * Index{sizeof(float)};
    const Index least = threads == 1 ? 1 : threads * 4;
    const Index parts = std::min(rows, std::max(least, rows * bytes / (512 << 10)));
    parallel(parts, static_cast<int>(threads), [&](Index part) {
      for (Index r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
        row(r / t.out[0], r % t.out[0]);
    });
  }

 private:
  // The taps first .. end of a window meet the image.
  struct Reach {
    Index first, end;
  };
  // Pixels of an output row, one after another, and the taps that they share.
  struct Span {
    const float *x, *weight;
    float* y;
    Reach rows, columns;
  };

  static Activation<any, float> act_of(const Taps& taps) {
    Problem p;
    p.act = taps.act, p.slope = taps.slope;
    return Activation<any, float>(p);
  }

  Index start(int axis, Index at) const { return at * t.stride[axis] - t.padding[axis]; }

  Reach reach(int axis, Index at) const {
    const Index from = start(axis, at), step = t.dilation[axis];
    const Index first = from < 0 ? (step - 1 - from) / step : 0;
    const Index left = t.in[axis] - from;
    const Index end = left <= 0 ? 0 : std::min(t.size[axis], (left + step - 1) / step);
    return {first, end};
  }

  void row(Index image, Index i) const {
    const Reach rows = reach(0, i);
    const Index last = (t.size[1] - 1) * t.dilation[1];  // of a window
    // The outputs whose windows lie in the image from side to side.
    const Index room = t.in[1] - 1 - last + t.padding[1];
    const Index begin = std::min((t.padding[1] + t.stride[1] - 1) / t.stride[1], t.out[1]);
    const Index end = room < 0 ? begin : std::clamp(room / t.stride[1] + 1, begin, t.out[1]);
    Index j = 0;
    for (; j < begin; ++j) pixels<1>(image, i, j, rows, reach(1, j));
    // Sums side by side must be enough to wait for none, where channels are left over too.
    if constexpr (EVENKEEL_BYTES == 64)
      for (; j + 8 <= end; j += 8) pixels<8>(image, i, j, rows, {0, t.size[1]});
    for (; j + 4 <= end; j += 4) pixels<4>(image, i, j, rows, {0, t.size[1]});
    for (; j < t.out[1]; ++j) pixels<1>(image, i, j, rows, reach(1, j));
  }

  template <int P>
  void pixels(Index image, Index i, Index j, const Reach& rows, const Reach& columns) const {
    const Index y = start(0, i) + rows.first * t.dilation[0];
    const Index x = start(1, j) + columns.first * t.dilation[1];
    const Index in = ((image * t.in[0] + y) * t.in[1] + x) * t.channels;
    const Index out = ((image * t.out[0] + i) * t.out[1] + j) * t.channels;
    const Index tap = (rows.first * t.size[1] + columns.first) * t.channels;
    const Span span{t.x + in, t.weight + tap, t.y + out, rows, columns};
    Index c = 0;
    constexpr int N = P == 1 ? 4 : 2;  // with eight sums nearly all of 16 registers are in use
    const auto load = [](const float* p) INLINE { return S::load(p); };
    const auto store = [](float* p, VF v) INLINE { S::store(p, v); };
    for (; c + N * L <= t.channels; c += N * L) block<P, N>(span, c, load, store);
    for (; c + L <= t.channels; c += L) block<P, 1>(span, c, load, store);
    if (c == t.channels) return;
    const Part rest = Part::first(static_cast<int>(t.channels - c));
    block<P, 1>(
        span, c, [rest](const float* p) INLINE { return S::load(p, rest); },
        [rest](float* p, VF v) INLINE { S::store(p, v, rest); });
  }

  // P pixels of N vectors of channels.
  template <int P, int N, class Load, class Store>
  INLINE void block(const Span& s, Index c, Load load, Store store) const {
    VF sums[P][N];
    for (int n = 0; n < N; ++n) {
      const VF bias = t.bias ? load(t.bias + c + n * L) : VF{};
      for (int p = 0; p < P; ++p) sums[p][n] = bias;
    }
    const Index next = t.stride[1] * t.channels;
    for (Index i = s.rows.first; i < s.rows.end; ++i) {
      const Index down = (i - s.rows.first) * t.dilation[0] * t.in[1];
      for (Index j = s.columns.first; j < s.columns.end; ++j) {
        const Index right = (j - s.columns.first) * t.dilation[1];
        const Index tap = (i - s.rows.first) * t.size[1] + j - s.columns.first;
        const float* x = s.x + (down + right) * t.channels + c;
        const float* weight = s.weight + tap * t.channels + c;
        for (int n = 0; n < N; ++n) {
          const VF w = load(weight + n * L);
          for (int p = 0; p < P; ++p) sums[p][n] += load(x + p * next + n * L) * w;
        }
      }
    }
    activation.with([&](auto act) INLINE {
      for (int p = 0; p < P; ++p)
        for (int n = 0; n < N; ++n) store(s.y + p * t.channels + c + n * L, act(sums[p][n]));
      return 0;
    });
  }

  const Taps& t;
  Activation<any, float> activation;
};

}  // namespace EVENKEEL_ISA
}  // namespace evenkeel
