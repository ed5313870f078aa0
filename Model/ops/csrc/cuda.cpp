// The operators on CUDA tensors: checks, allocation and launches (schemas are in cpu.cpp).

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels.h"
#include "tensors.h"

namespace stylegan {
namespace {

Planes planes_of(const Layout& layout) {
  return {layout.batch, layout.channels, layout.pixels, layout.channels_last};
}

Tensor fused_leaky_relu(
    const Tensor& x, const OptionalTensor& bias, const OptionalTensor& noise,
    const OptionalTensor& strength, const OptionalTensor& gain, double slope, double scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Layout layout = layout_of(x);
  const auto tensors = epilogue_tensors(
      x, layout.batch, layout.channels, layout.pixels, bias, noise, strength, gain, slope, scale);
  const Tensor values = x.contiguous(layout.format);
  Tensor y = empty_like(x, layout.format);
  if (y.numel() == 0) return y;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_activation<T>(
        values.const_data_ptr<T>(), y.mutable_data_ptr<T>(), planes_of(layout),
        tensors.pointers<T>(layout), stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_leaky_relu_backward(
    const Tensor& grad, const Tensor& y, const OptionalTensor& x, const OptionalTensor& gain,
    double slope, double scale, bool by_pixel) {
  const c10::cuda::CUDAGuard guard(y.device());
  const Layout layout = layout_of(y);
  check_gradient_inputs(y, grad, x);
  const int64_t n = layout.batch, c = layout.channels, pieces = pieces_of(layout.pixels);
  const auto sums = y.options().dtype(accumulate_type(y)).memory_format(std::nullopt);
  auto map = y.sizes().vec();
  map[0] = by_pixel ? n : 0, map[1] = 1;
  // The kernels write all of them, so that nothing need be filled where there is anything to do.
  const auto make = [&](c10::IntArrayRef size) {
    return y.numel() > 0 ? at::empty(size, sums) : at::zeros(size, sums);
  };
  Tensor result = empty_like(y, layout.format), rows = make(map);
  Tensor parts = make({n, pieces, c}), products = make({x ? n : 0, pieces, c});
  if (y.numel() > 0) {
    const Tensor g = grad.contiguous(layout.format), values = y.contiguous(layout.format);
    const OptionalTensor inputs = x ? OptionalTensor(x->contiguous(layout.format)) : x;
    const OptionalTensor gains = checked("gain", gain, y, n, c);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const Planes planes = planes_of(layout);
    with_type(y.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      launch_gradient<T>(
          g.const_data_ptr<T>(), values.const_data_ptr<T>(),
          inputs ? inputs->const_data_ptr<T>() : nullptr,
          gains ? gains->const_data_ptr<T>() : nullptr, result.mutable_data_ptr<T>(),
          parts.mutable_data_ptr<A>(), x ? products.mutable_data_ptr<A>() : nullptr, planes, scale,
          scale * slope, stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      if (!by_pixel) return;  // a second pass over both tensors
      launch_by_pixel<T>(
          g.const_data_ptr<T>(), values.const_data_ptr<T>(), rows.mutable_data_ptr<A>(), planes,
          scale, scale * slope, stream);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {result, parts.sum({0, 1}), products.sum(1), rows};
}

Tensor filter(
    const Tensor& x, const Tensor& kernel, const Filter& f, const Layout& layout, bool flip,
    const EpilogueTensors* epilogue) {
  const Tensor values = x.contiguous(layout.format);
  const Tensor weights = kernel.to(accumulate_type(x)).contiguous();
  Tensor y = empty_filtered(x, f.out_height, f.out_width, layout.format);
  TORCH_CHECK(f.taps <= 64, "upfirdn2d: filters on CUDA have at most 64 x 64 taps");
  if (y.numel() == 0) return y;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Epilogue<T> pointers;
    if (epilogue) pointers = epilogue->pointers<T>(layout_of(y));
    launch_filter<T>(
        values.const_data_ptr<T>(), weights.const_data_ptr<Accumulate<T>>(), flip,
        y.mutable_data_ptr<T>(), f, epilogue ? &pointers : nullptr, stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor upfirdn2d(
    const Tensor& x, const Tensor& kernel, int64_t up, int64_t down, int64_t pad, int64_t height,
    int64_t width, bool flip) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Layout layout = layout_of(x);
  const Filter f = filter_of(x, layout, kernel, up, down, pad, height, width);
  return filter(x, kernel, f, layout, flip, nullptr);
}

Tensor filtered_leaky_relu(
    const Tensor& x, const Tensor& kernel, int64_t pad, int64_t height, int64_t width,
    const OptionalTensor& bias, const OptionalTensor& noise, const OptionalTensor& strength,
    const OptionalTensor& gain, double slope, double scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Layout layout = layout_of(x);
  const Filter f = filter_of(x, layout, kernel, 1, 1, pad, height, width);
  const auto tensors = epilogue_tensors(
      x, layout.batch, layout.channels, height * width, bias, noise, strength, gain, slope, scale);
  return filter(x, kernel, f, layout, false, &tensors);
}

}  // namespace
}  // namespace stylegan

TORCH_LIBRARY_IMPL(stylegan, CUDA, m) {
  m.impl("fused_leaky_relu", &stylegan::fused_leaky_relu);
  m.impl("fused_leaky_relu_backward", &stylegan::fused_leaky_relu_backward);
  m.impl("upfirdn2d", &stylegan::upfirdn2d);
  m.impl("filtered_leaky_relu", &stylegan::filtered_leaky_relu);
}
