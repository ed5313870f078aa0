// The CUDA kernels. They find out which element a thread computes; what it computes is in
// arithmetic.h, which the CPU kernels share.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>

#include "kernels.h"

namespace stylegan {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kRows = kThreads / kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int64_t kMostBlocks = 1 << 20;  // threads stride over what is left
constexpr int64_t kMostSamples = 65535;   // of a grid's z; blocks stride over what is left
// 32-bit indices are much faster to divide; the bound leaves room for a stride beyond the end.
constexpr int64_t kMostIndexed32 = std::numeric_limits<int32_t>::max() - kThreads * kMostBlocks;

/// Blocks for one thread per element, bounded.
int blocks_for(int64_t elements) {
  return static_cast<int>(std::min((elements + kThreads - 1) / kThreads, kMostBlocks));
}

bool fits_32_bits(int64_t elements) { return elements <= kMostIndexed32; }

/// Sample, channel and pixel of element i.
template <class I>
struct Place {
  I n, c, p;
};

template <class I>
__device__ __forceinline__ Place<I> place_of(I i, const Planes& planes) {
  const I channels = static_cast<I>(planes.channels), pixels = static_cast<I>(planes.pixels);
  if (planes.channels_last) {
    const I pixel = i / channels;
    return {pixel / pixels, i - pixel * channels, pixel % pixels};
  }
  const I map = i / pixels;
  return {map / channels, map % channels, i - map * pixels};
}

// --- Activation -----------------------------------------------------------------------------------

template <class T, class I>
__global__ void __launch_bounds__(kThreads) activation_kernel(
    const T* __restrict__ x, T* __restrict__ y, Planes planes, Epilogue<T> epilogue, I elements) {
  using A = Accumulate<T>;
  const I step = static_cast<I>(gridDim.x) * kThreads;
  for (I i = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += step) {
    const Place<I> at = place_of(i, planes);
    y[i] = static_cast<T>(finish<A>(static_cast<A>(x[i]), epilogue, at.n, at.c, at.p));
  }
}

/// Block (32, 8) of the gradient. Lanes run along what is contiguous: channels if they come last
/// (then the rows of threads take pixels), pixels if not (then the rows take channels).
/// Grid: x = pieces of pixels, times groups of channels; z = samples.
template <class T, bool LAST>
__global__ void __launch_bounds__(kThreads) gradient_kernel(
    const T* __restrict__ grad, const T* __restrict__ y, const T* __restrict__ x,
    const T* __restrict__ gain, T* __restrict__ result, Accumulate<T>* __restrict__ sums,
    Accumulate<T>* __restrict__ products, Planes planes, Accumulate<T> above,
    Accumulate<T> below) {
  using A = Accumulate<T>;
  const int64_t channels = planes.channels, pixels = planes.pixels;
  const int lane = threadIdx.x, row = threadIdx.y;
  const int64_t pieces = pieces_of(pixels);
  const int64_t piece = blockIdx.x % pieces, group = blockIdx.x / pieces;
  const int64_t channel = LAST ? group * kLanes + lane : group * kRows + row;
  const int64_t begin = piece * kPiece;
  const int64_t end = begin + kPiece < pixels ? begin + kPiece : pixels;
  for (int64_t n = blockIdx.z; n < planes.batch; n += gridDim.z) {
    A sum = 0, product = 0;
    if (channel < channels) {
      const A factor = gain ? static_cast<A>(gain[n * channels + channel]) : A(1);
      for (int64_t p = begin + (LAST ? row : lane); p < end; p += LAST ? kRows : kLanes) {
        const int64_t i = LAST ? (n * pixels + p) * channels + channel
                               : (n * channels + channel) * pixels + p;
        // d = grad * f'(sum); dx = d * gain.
        const A d = static_cast<A>(grad[i]) * slope_at<A>(static_cast<A>(y[i]), above, below);
        result[i] = static_cast<T>(d * factor);
        sum += d;
        if (x) product += d * static_cast<A>(x[i]);
      }
    }
    // Sum of d, and of d * x, over the piece: by rows of threads through shared memory, or by lanes.
    bool writes = lane == 0;
    if constexpr (LAST) {
      __shared__ A parts[2][kRows][kLanes];
      __syncthreads();  // until the sample before is read
      parts[0][row][lane] = sum, parts[1][row][lane] = product;
      __syncthreads();
      writes = row == 0;
      for (int k = 1; writes && k < kRows; ++k) {
        sum += parts[0][k][lane], product += parts[1][k][lane];
      }
    } else {
      for (int k = kLanes / 2; k > 0; k /= 2) {
        sum += __shfl_down_sync(kAllLanes, sum, k);
        product += __shfl_down_sync(kAllLanes, product, k);
      }
    }
    if (writes && channel < channels) {
      const int64_t at = (n * pieces + piece) * channels + channel;
      sums[at] = sum;
      if (x) products[at] = product;
    }
  }
}

/// Sum of d over the channels of a pixel: by one warp if channels come last, else by one thread.
template <class T, bool LAST>
__global__ void __launch_bounds__(kThreads) by_pixel_kernel(
    const T* __restrict__ grad, const T* __restrict__ y, Accumulate<T>* __restrict__ sums,
    Planes planes, Accumulate<T> above, Accumulate<T> below) {
  using A = Accumulate<T>;
  const int64_t channels = planes.channels, pixels = planes.pixels;
  const int64_t width = LAST ? kLanes : 1, lane = LAST ? threadIdx.x % kLanes : 0;
  const int64_t step = int64_t{gridDim.x} * kThreads / width;
  int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / width;
  for (; i < planes.batch * pixels; i += step) {
    const int64_t first = LAST ? i * channels : i / pixels * channels * pixels + i % pixels;
    A sum = 0;
    for (int64_t c = lane; c < channels; c += width) {
      const int64_t at = first + (LAST ? c : c * pixels);
      sum += static_cast<A>(grad[at]) * slope_at<A>(static_cast<A>(y[at]), above, below);
    }
    if constexpr (LAST) {
      for (int k = kLanes / 2; k > 0; k /= 2) sum += __shfl_down_sync(kAllLanes, sum, k);
    }
    if (lane == 0) sums[i] = sum;
  }
}

// --- Upsample, filter, downsample -----------------------------------------------------------------

/// One thread per output value; the warp's inputs overlap and come from the cache.
template <class T, class I, int UP, int DOWN, int TAPS, bool ACTIVATE>
__global__ void __launch_bounds__(kThreads) filter_kernel(
    const T* __restrict__ x, const Accumulate<T>* __restrict__ kernel, bool flip,
    T* __restrict__ y, Filter f, Epilogue<T> epilogue, I elements) {
  using A = Accumulate<T>;
  extern __shared__ unsigned char shared[];
  A* weights = reinterpret_cast<A*>(shared);
  const int count = static_cast<int>(f.taps * f.taps);
  // A true convolution meets the filter turned: weight t is tap count - 1 - t.
  for (int i = threadIdx.x; i < count; i += kThreads) {
    weights[i] = kernel[flip ? i : count - 1 - i];
  }
  __syncthreads();
  const I inner = static_cast<I>(f.inner), width = static_cast<I>(f.out_width);
  const I height = static_cast<I>(f.out_height);
  const I area = static_cast<I>(f.height) * static_cast<I>(f.width) * inner;
  const I step = static_cast<I>(gridDim.x) * kThreads;
  for (I i = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += step) {
    const I pixel = i / inner, c = i - pixel * inner;
    const I line = pixel / width, column = pixel - line * width;
    const I image = line / height, row = line - image * height;
    // y(row, column) = sum over (i, j) of weight(i, j) * upsampled(row * down - pad + i, ...).
    A value = filter_at<UP, DOWN, TAPS, A>(x + image * area + c, weights, f, row, column);
    if constexpr (ACTIVATE) {
      // Contiguous maps are images of their own, inner is 1 and c is 0.
      const I channels = static_cast<I>(epilogue.channels), p = row * width + column;
      const bool last = inner == channels;
      const I n = last ? image : image / channels, channel = last ? c : image % channels;
      value = finish<A>(value, epilogue, n, channel, p);
    }
    y[i] = static_cast<T>(value);
  }
}

template <class T, class I, int UP, int DOWN, int TAPS>
void start_filter(
    const T* x, const Accumulate<T>* kernel, bool flip, T* y, const Filter& f,
    const Epilogue<T>* epilogue, int64_t elements, cudaStream_t stream) {
  const int blocks = blocks_for(elements);
  const size_t shared = f.taps * f.taps * sizeof(Accumulate<T>);
  const I count = static_cast<I>(elements);
  if (epilogue) {
    filter_kernel<T, I, UP, DOWN, TAPS, true>
        <<<blocks, kThreads, shared, stream>>>(x, kernel, flip, y, f, *epilogue, count);
  } else {
    filter_kernel<T, I, UP, DOWN, TAPS, false>
        <<<blocks, kThreads, shared, stream>>>(x, kernel, flip, y, f, {}, count);
  }
}

}  // namespace

template <class T>
void launch_activation(
    const T* x, T* y, const Planes& planes, const Epilogue<T>& epilogue, cudaStream_t stream) {
  const int64_t elements = planes.batch * planes.channels * planes.pixels;
  const int blocks = blocks_for(elements);
  if (fits_32_bits(elements)) {
    activation_kernel<T, int32_t>
        <<<blocks, kThreads, 0, stream>>>(x, y, planes, epilogue, static_cast<int32_t>(elements));
  } else {
    activation_kernel<T, int64_t>
        <<<blocks, kThreads, 0, stream>>>(x, y, planes, epilogue, elements);
  }
}

template <class T>
void launch_gradient(
    const T* grad, const T* y, const T* x, const T* gain, T* result, Accumulate<T>* sums,
    Accumulate<T>* products, const Planes& planes, double above, double below,
    cudaStream_t stream) {
  using A = Accumulate<T>;
  const int64_t group = planes.channels_last ? kLanes : kRows;
  const int64_t groups = (planes.channels + group - 1) / group;
  const dim3 grid(
      static_cast<unsigned>(pieces_of(planes.pixels) * groups), 1,
      static_cast<unsigned>(std::min(planes.batch, kMostSamples)));
  const dim3 block(kLanes, kRows);
  auto kernel = planes.channels_last ? gradient_kernel<T, true> : gradient_kernel<T, false>;
  kernel<<<grid, block, 0, stream>>>(
      grad, y, x, gain, result, sums, products, planes, static_cast<A>(above),
      static_cast<A>(below));
}

template <class T>
void launch_by_pixel(
    const T* grad, const T* y, Accumulate<T>* sums, const Planes& planes, double above,
    double below, cudaStream_t stream) {
  using A = Accumulate<T>;
  const int64_t threads = planes.batch * planes.pixels * (planes.channels_last ? kLanes : 1);
  auto kernel = planes.channels_last ? by_pixel_kernel<T, true> : by_pixel_kernel<T, false>;
  kernel<<<blocks_for(threads), kThreads, 0, stream>>>(
      grad, y, sums, planes, static_cast<A>(above), static_cast<A>(below));
}

template <class T>
void launch_filter(
    const T* x, const Accumulate<T>* kernel, bool flip, T* y, const Filter& f,
    const Epilogue<T>* epilogue, cudaStream_t stream) {
  const int64_t elements = f.outer * f.out_height * f.out_width * f.inner;
  const int64_t inputs = f.outer * f.height * f.width * f.inner;
  auto start = [&](auto run) { run(x, kernel, flip, y, f, epilogue, elements, stream); };
  if (!fits_32_bits(std::max(elements, inputs))) {
    start(start_filter<T, int64_t, 0, 0, 0>);
  } else if (f.taps == 4 && f.up == 1 && f.down == 1) {
    start(start_filter<T, int32_t, 1, 1, 4>);
  } else if (f.taps == 4 && f.up == 2 && f.down == 1) {
    start(start_filter<T, int32_t, 2, 1, 4>);
  } else if (f.taps == 4 && f.up == 1 && f.down == 2) {
    start(start_filter<T, int32_t, 1, 2, 4>);
  } else {
    start(start_filter<T, int32_t, 0, 0, 0>);
  }
}

#define INSTANTIATE(T)                                                                            \
  template void launch_activation<T>(                                                             \
      const T*, T*, const Planes&, const Epilogue<T>&, cudaStream_t);                             \
  template void launch_gradient<T>(                                                               \
      const T*, const T*, const T*, const T*, T*, Accumulate<T>*, Accumulate<T>*, const Planes&,  \
      double, double, cudaStream_t);                                                              \
  template void launch_by_pixel<T>(                                                               \
      const T*, const T*, Accumulate<T>*, const Planes&, double, double, cudaStream_t);           \
  template void launch_filter<T>(                                                                 \
      const T*, const Accumulate<T>*, bool, T*, const Filter&, const Epilogue<T>*, cudaStream_t);

INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)

}  // namespace stylegan
