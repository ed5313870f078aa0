// From tensors to pointers and sizes: what the CPU and the CUDA side of the operators share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <optional>
#include <tuple>

#include "arithmetic.h"

namespace stylegan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Calls body with a value of the C++ type of a tensor's elements.
template <class Body>
void with_type(at::ScalarType type, Body body) {
  switch (type) {
    case at::kFloat: return body(float{});
    case at::kDouble: return body(double{});
    case at::kHalf: return body(c10::Half{});
    case at::kBFloat16: return body(c10::BFloat16{});
    default: TORCH_CHECK(false, "expected a floating-point tensor, got ", type);
  }
}

inline at::ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// How a (N, C, ...) tensor lies in memory.
struct Layout {
  int64_t batch, channels, pixels;
  bool channels_last;
  at::MemoryFormat format;
};

inline Layout layout_of(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 2, "expected (N, C, ...), got ", x.sizes());
  const auto format = x.dim() == 4 ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
  int64_t pixels = 1;
  for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
  const bool last = format == at::MemoryFormat::ChannelsLast || pixels == 1;
  return {x.size(0), x.size(1), pixels, last, format};
}

inline Tensor empty_like(const Tensor& x, at::MemoryFormat format) {
  return at::empty(x.sizes(), x.options().memory_format(format));
}

/// The (N, C, height, width) result of a filter operation on x.
inline Tensor empty_filtered(
    const Tensor& x, int64_t height, int64_t width, at::MemoryFormat format) {
  return at::empty({x.size(0), x.size(1), height, width}, x.options().memory_format(format));
}

/// The tensors that an `Epilogue` points into, checked, contiguous and kept alive.
struct EpilogueTensors {
  OptionalTensor bias, noise, strength, gain;
  double slope, scale;

  template <class T>
  Epilogue<T> pointers(const Layout& layout) const {
    Epilogue<T> e;
    auto at = [](const OptionalTensor& t) { return t ? t->const_data_ptr<T>() : nullptr; };
    e.bias = at(bias), e.noise = at(noise), e.strength = at(strength), e.gain = at(gain);
    e.channels = layout.channels, e.pixels = layout.pixels;
    e.noise_per_sample = noise && noise->size(0) != 1;
    e.above = scale, e.below = scale * slope;
    return e;
  }
};

inline OptionalTensor checked(
    const char* name, const OptionalTensor& t, const Tensor& x, int64_t rows, int64_t columns) {
  if (!t) return t;
  TORCH_CHECK(
      t->numel() == rows * columns && t->scalar_type() == x.scalar_type() &&
          t->device() == x.device(),
      name, " must have ", rows, " * ", columns, " elements of type ",
      x.scalar_type(), " on ", x.device(), ", got ", t->sizes(), " of ", t->scalar_type(), " on ",
      t->device());
  return t->contiguous();
}

/// What the gradient of the activation reads, element by element, beside its output y.
inline void check_gradient_inputs(const Tensor& y, const Tensor& grad, const OptionalTensor& x) {
  for (const Tensor& t : {grad, x.value_or(grad)}) {
    TORCH_CHECK(
        t.sizes() == y.sizes() && t.scalar_type() == y.scalar_type() && t.device() == y.device(),
        "fused_leaky_relu_backward: expected ", y.sizes(), " of ", y.scalar_type(), " on ",
        y.device(), ", got ", t.sizes(), " of ", t.scalar_type(), " on ", t.device());
  }
}

inline EpilogueTensors epilogue_tensors(
    const Tensor& x, int64_t batch, int64_t channels, int64_t pixels, const OptionalTensor& bias,
    const OptionalTensor& noise, const OptionalTensor& strength, const OptionalTensor& gain,
    double slope, double scale) {
  TORCH_CHECK(
      slope > 0 && scale > 0, "fused_leaky_relu: negative_slope and scale must be positive, got ",
      slope, " and ", scale);
  const int64_t maps = noise && noise->size(0) != 1 ? batch : 1;
  return {
      checked("bias", bias, x, 1, channels),      checked("noise", noise, x, maps, pixels),
      checked("noise_strength", strength, x, 1, 1), checked("gain", gain, x, batch, channels),
      slope,                                      scale};
}

inline Filter filter_of(
    const Tensor& x, const Layout& layout, const Tensor& kernel, int64_t up, int64_t down,
    int64_t pad, int64_t height, int64_t width) {
  TORCH_CHECK(x.dim() == 4, "upfirdn2d: expected (N, C, H, W), got ", x.sizes());
  TORCH_CHECK(
      kernel.dim() == 2 && kernel.size(0) == kernel.size(1) && kernel.size(0) > 0,
      "upfirdn2d: the filter must be square, got ", kernel.sizes());
  TORCH_CHECK(kernel.device() == x.device(), "upfirdn2d: filter and values on two devices");
  TORCH_CHECK(up >= 1 && down >= 1, "upfirdn2d: up and down must be at least 1");
  TORCH_CHECK(
      height >= 0 && width >= 0, "upfirdn2d: the result would be ", height, " x ", width);
  const bool last = layout.format == at::MemoryFormat::ChannelsLast;
  return {
      last ? layout.batch : layout.batch * layout.channels,
      x.size(2),
      x.size(3),
      last ? layout.channels : 1,
      height,
      width,
      kernel.size(0),
      up,
      down,
      pad};
}

}  // namespace stylegan
