// What the operators compute for one element, for the C++ compiler and for nvcc alike.
//
// The CPU and the CUDA kernels differ in how they walk over memory; every number comes from here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define HOST_DEVICE inline
#define UNROLL
#endif

namespace stylegan {

/// The type sums are taken in: double for double, float for everything else.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateIn<T>::type;

// --- Bias, noise, gain and leaky ReLU -------------------------------------------------------------

/// scale * leaky_relu(value * gain + shift), where above = scale and below = scale * slope.
template <class A>
HOST_DEVICE A activate(A value, A gain, A shift, A above, A below) {
  const A sum = value * gain + shift;
  return sum * (sum > A(0) ? above : below);
}

/// Derivative of `activate` by its sum, read off its output: scale and slope keep the sign.
template <class A>
HOST_DEVICE A slope_at(A output, A above, A below) {
  return output > A(0) ? above : below;
}

/// Where the parameters of the activation are; a null pointer stands for "none".
template <class T>
struct Epilogue {
  const T* gain = nullptr;      // (N, C)
  const T* noise = nullptr;     // (N, P) with noise_per_sample, else (P,)
  const T* strength = nullptr;  // (1,); null with noise stands for 1
  const T* bias = nullptr;      // (C,)
  int64_t channels = 0;         // C
  int64_t pixels = 0;           // P
  bool noise_per_sample = false;
  double above = 1;
  double below = 1;
};

/// The activation of one value of sample n, channel c, pixel p.
template <class A, class T, class I>
HOST_DEVICE A finish(A value, const Epilogue<T>& e, I n, I c, I p) {
  A gain = 1, shift = 0;
  if (e.gain) gain = static_cast<A>(e.gain[n * static_cast<I>(e.channels) + c]);
  if (e.noise) {
    const I sample = e.noise_per_sample ? n * static_cast<I>(e.pixels) : I(0);
    const A strength = e.strength ? static_cast<A>(*e.strength) : A(1);
    shift = strength * static_cast<A>(e.noise[sample + p]);
  }
  if (e.bias) shift += static_cast<A>(e.bias[c]);
  return activate(value, gain, shift, static_cast<A>(e.above), static_cast<A>(e.below));
}

// --- Upsample, filter, downsample -----------------------------------------------------------------

/// The input samples of one axis that reach an output sample.
template <class I>
struct Span {
  I first;  // index of the first such input
  I tap;    // filter tap that it meets; the next input meets tap + up
  I count;  // how many
};

/// The span of an output sample: input i sits at position i * up of the upsampled axis, and tap t
/// of the output looks at position output * down - pad + t.
template <class I>
HOST_DEVICE Span<I> reach(I output, I size, I taps, I up, I down, I pad) {
  const I start = output * down - pad;
  I first = start > 0 ? (start + up - 1) / up : I(0);
  const I tap = first * up - start;
  I count = tap < taps ? (taps - tap + up - 1) / up : I(0);
  if (count > size - first) count = size > first ? size - first : I(0);
  return {first, tap, count};
}

/// Sum of COUNT values that lie `step` apart, times their weights.
template <int COUNT, class A, class T, class I>
HOST_DEVICE A weighted_sum(const T* values, I step, const A* weights) {
  A sum = 0;
  UNROLL
  for (int j = 0; j < COUNT; ++j) sum += weights[j] * static_cast<A>(values[j * step]);
  return sum;
}

/// Sizes of a filter operation on images (outer, height, width, inner): inner is 1 for contiguous
/// maps, each an image of its own, and the number of channels where channels come last.
struct Filter {
  int64_t outer, height, width, inner;  // input
  int64_t out_height, out_width;
  int64_t taps, up, down, pad;
};

/// One output value by the full two-dimensional sum. `image` points to element (0, 0) of the image
/// (and channel); `weights` is (taps, taps), already turned so that tap t meets position t.
/// UP, DOWN and TAPS fix those numbers at compile time; 0 leaves them to run time.
template <int UP, int DOWN, int TAPS, class A, class T, class I>
HOST_DEVICE A filter_at(const T* image, const A* weights, const Filter& f, I row, I column) {
  const I taps = TAPS ? I(TAPS) : static_cast<I>(f.taps);
  const I up = UP ? I(UP) : static_cast<I>(f.up);
  const I down = DOWN ? I(DOWN) : static_cast<I>(f.down);
  const I pad = static_cast<I>(f.pad), inner = static_cast<I>(f.inner);
  const I width = static_cast<I>(f.width);
  const Span<I> y = reach(row, static_cast<I>(f.height), taps, up, down, pad);
  const Span<I> x = reach(column, width, taps, up, down, pad);
  A sum = 0;
  for (I i = 0; i < y.count; ++i) {
    const T* line = image + ((y.first + i) * width + x.first) * inner;
    const A* tap = weights + (y.tap + i * up) * taps + x.tap;
    for (I j = 0; j < x.count; ++j) sum += tap[j * up] * static_cast<A>(line[j * inner]);
  }
  return sum;
}

}  // namespace stylegan
