// Entry points of the CUDA kernels: plain pointers and sizes, so that nvcc sees no PyTorch tensor.
#pragma once

#include <cuda_runtime_api.h>

#include "arithmetic.h"

namespace stylegan {

/// A (N, C, P) tensor in memory: maps one after another, or channels side by side.
struct Planes {
  int64_t batch, channels, pixels;
  bool channels_last;
};

/// y = activation of x.
template <class T>
void launch_activation(
    const T* x, T* y, const Planes& planes, const Epilogue<T>& epilogue, cudaStream_t stream);

/// Pixels that one block of the gradient adds up; the parts (N, pieces, C) are summed by the caller.
constexpr int64_t kPiece = 256;

HOST_DEVICE int64_t pieces_of(int64_t pixels) { return (pixels + kPiece - 1) / kPiece; }

/// With d = grad * slope: result = d * gain, and the sums of d and of d * x (if x is not null) over
/// each piece of pixels.
template <class T>
void launch_gradient(
    const T* grad, const T* y, const T* x, const T* gain, T* result, Accumulate<T>* sums,
    Accumulate<T>* products, const Planes& planes, double above, double below,
    cudaStream_t stream);

/// d summed over the channels of each pixel.
template <class T>
void launch_by_pixel(
    const T* grad, const T* y, Accumulate<T>* sums, const Planes& planes, double above,
    double below, cudaStream_t stream);

/// Upsample, filter, downsample; then the activation if there is one. The kernel is (taps, taps) on
/// the device, taken as it is with flip and turned without.
template <class T>
void launch_filter(
    const T* x, const Accumulate<T>* kernel, bool flip, T* y, const Filter& filter,
    const Epilogue<T>* epilogue, cudaStream_t stream);

}  // namespace stylegan
