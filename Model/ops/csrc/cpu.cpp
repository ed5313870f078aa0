// The operators' schemas and their CPU kernels.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "feature_distance.h"
#include "tensors.h"
#include "upsampled_argmax.h"
#include "winograd.h"

namespace stylegan {
namespace {

using Index = int64_t;

// --- Activation -----------------------------------------------------------------------------------

/// The types that `widened` and `store_narrowed` know.
template <class T>
constexpr bool kByVectors = !std::is_same_v<T, c10::Half>;

using Whole = uint32_t __attribute__((vector_size(winograd::kBytes)));
using Upper = uint16_t __attribute__((vector_size(winograd::kBytes / 2)));

/// A vector of the accumulation type, read from memory of its own type or of bfloat16, which is
/// the upper half of a float. (g++ leaves loops over c10::BFloat16 scalar.)
template <class A, class S>
winograd::Vector<A> widened(const S* from) {
  if constexpr (std::is_same_v<A, S>) {
    return winograd::load(from);
  } else {
    Upper upper;
    std::memcpy(&upper, from, sizeof(upper));
    return reinterpret_cast<winograd::Vector<A>>(__builtin_convertvector(upper, Whole) << 16);
  }
}

/// Writes it, in bfloat16 rounded to nearest, ties to even.
template <class T, class V>
void store_narrowed(T* to, V v) {
  if constexpr (sizeof(v[0]) == sizeof(T)) {
    winograd::store(to, v);
  } else {
    const Whole bits = reinterpret_cast<Whole>(v), nan = reinterpret_cast<Whole>(v != v);
    const Whole rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Upper upper = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Upper);
    std::memcpy(to, &upper, sizeof(upper));
  }
}

/// An epilogue whose parameters are converted to the accumulation type, with neutral values for
/// what is missing, so that the inner loops need no distinction.
template <class T>
struct ReadyEpilogue {
  using A = Accumulate<T>;
  std::vector<A> gain, bias;  // (N, C) and (C,)
  const T* noise;
  A strength, above, below;
  Index channels, pixels, noise_step;

  ReadyEpilogue(const Epilogue<T>& e, Index batch)
      : gain(batch * e.channels, A(1)),
        bias(e.channels, A(0)),
        noise(e.noise),
        strength(e.strength ? static_cast<A>(*e.strength) : A(1)),
        above(static_cast<A>(e.above)),
        below(static_cast<A>(e.below)),
        channels(e.channels),
        pixels(e.pixels),
        noise_step(e.noise_per_sample ? e.pixels : 0) {
    if (e.gain) std::copy_n(e.gain, gain.size(), gain.begin());
    if (e.bias) std::copy_n(e.bias, bias.size(), bias.begin());
  }

  /// Activates `count` pixels of sample n from pixel p on, all channels of a pixel side by side.
  template <class S>
  void channels_last(T* y, const S* x, Index n, Index p, Index count) const {
    const A* g = gain.data() + n * channels;
    const A* b = bias.data();
    const Index width = channels;
    const A up = above, low = below;
    for (Index i = 0; i < count; ++i, x += width, y += width) {
      const A shift = noise ? strength * static_cast<A>(noise[n * noise_step + p + i]) : A(0);
      if constexpr (kByVectors<T>) {
        if (width >= winograd::kLanes<A>) {
          one_pixel(y, x, g, b, shift);
          continue;
        }
      }
#pragma omp simd
      for (Index c = 0; c < width; ++c) {
        y[c] = static_cast<T>(activate<A>(static_cast<A>(x[c]), g[c], shift + b[c], up, low));
      }
    }
  }

  /// Activates a pixel by whole vectors. The last one may overlap the one before; it is read before
  /// anything is written, since y may be x.
  template <class S>
  void one_pixel(T* y, const S* x, const A* g, const A* b, A shift) const {
    using V = winograd::Vector<A>;
    constexpr Index lanes = winograd::kLanes<A>;
    const V zero{}, up = zero + above, low = zero + below;
    const auto at = [&](Index c) {
      const V sum = widened<A>(x + c) * winograd::load(g + c) + (shift + winograd::load(b + c));
      return sum * (sum > zero ? up : low);
    };
    const V last = at(channels - lanes);
    for (Index c = 0; c + lanes <= channels; c += lanes) store_narrowed(y + c, at(c));
    store_narrowed(y + channels - lanes, last);
  }

  /// Activates `count` pixels of one map of sample n from pixel p on.
  template <class S>
  void one_map(T* y, const S* x, Index n, Index c, Index p, Index count) const {
    const A g = gain[n * channels + c], b = bias[c], up = above, low = below, s = strength;
    if (!noise) {
#pragma omp simd
      for (Index i = 0; i < count; ++i) {
        y[i] = static_cast<T>(activate<A>(static_cast<A>(x[i]), g, b, up, low));
      }
      return;
    }
    const T* map = noise + n * noise_step + p;
#pragma omp simd
    for (Index i = 0; i < count; ++i) {
      const A shift = s * static_cast<A>(map[i]) + b;
      y[i] = static_cast<T>(activate<A>(static_cast<A>(x[i]), g, shift, up, low));
    }
  }
};

/// Work for which waking another thread pays: some 10 us, counted in values that are read, changed and
/// written, and in multiply-accumulates.
constexpr Index kValues = 65536, kProductsAtOnce = 524288;

/// Pixels per piece of work: about 16 Ki values, whatever the number of threads, so that sums over
/// pieces do not depend on it.
Index piece_of(Index values_per_pixel) { return std::max<Index>(1, 16384 / values_per_pixel); }

template <class T>
void activate_tensor(
    T* y, const T* x, const Layout& layout, const ReadyEpilogue<T>& epilogue) {
  const Index channels = layout.channels, pixels = layout.pixels;
  const bool last = layout.channels_last;
  const Index outer = last ? layout.batch : layout.batch * channels;
  const Index inner = last ? channels : 1;
  const Index piece = std::min(piece_of(inner), pixels);
  const Index pieces = (pixels + piece - 1) / piece;
  const Index grain = std::max<Index>(1, kValues / (piece * inner));
  at::parallel_for(0, outer * pieces, grain, [&](Index begin, Index end) {
    for (Index work = begin; work < end; ++work) {
      const Index image = work / pieces, p = work % pieces * piece;
      const Index count = std::min(piece, pixels - p), at = (image * pixels + p) * inner;
      if (last) {
        epilogue.channels_last(y + at, x + at, image, p, count);
      } else {
        epilogue.one_map(y + at, x + at, image / channels, image % channels, p, count);
      }
    }
  });
}

Tensor fused_leaky_relu(
    const Tensor& x, const OptionalTensor& bias, const OptionalTensor& noise,
    const OptionalTensor& strength, const OptionalTensor& gain, double slope, double scale) {
  const Layout layout = layout_of(x);
  const auto tensors = epilogue_tensors(
      x, layout.batch, layout.channels, layout.pixels, bias, noise, strength, gain, slope, scale);
  const Tensor values = x.contiguous(layout.format);
  Tensor y = empty_like(x, layout.format);
  if (y.numel() == 0) return y;
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const ReadyEpilogue<T> epilogue(tensors.pointers<T>(layout), layout.batch);
    activate_tensor(y.mutable_data_ptr<T>(), values.const_data_ptr<T>(), layout, epilogue);
  });
  return y;
}

// --- Its gradient ---------------------------------------------------------------------------------

/// One piece of the gradient, channels last: with d = grad * slope, writes d * gain and adds d and
/// d * x up by channel, d by pixel.
template <class T, class A>
void backward_channels_last(
    const T* grad, const T* y, const T* x, const A* gain, A above, A below, Index channels,
    Index count, T* result, A* sums, A* products, A* by_pixel) {
  for (Index i = 0; i < count; ++i, grad += channels, y += channels, result += channels) {
    A row = 0;
    if (x) {
#pragma omp simd reduction(+ : row)
      for (Index c = 0; c < channels; ++c) {
        const A d = static_cast<A>(grad[c]) * slope_at<A>(static_cast<A>(y[c]), above, below);
        result[c] = static_cast<T>(d * gain[c]);
        sums[c] += d;
        products[c] += d * static_cast<A>(x[c]);
        row += d;
      }
      x += channels;
    } else {
#pragma omp simd reduction(+ : row)
      for (Index c = 0; c < channels; ++c) {
        const A d = static_cast<A>(grad[c]) * slope_at<A>(static_cast<A>(y[c]), above, below);
        result[c] = static_cast<T>(d * gain[c]);
        sums[c] += d;
        row += d;
      }
    }
    by_pixel[i] = row;
  }
}

/// The same for contiguous maps, `step` elements apart.
template <class T, class A>
void backward_maps(
    const T* grad, const T* y, const T* x, const A* gain, A above, A below, Index channels,
    Index step, Index count, T* result, A* sums, A* products, A* by_pixel) {
  std::fill_n(by_pixel, count, A(0));
  for (Index c = 0; c < channels; ++c, grad += step, y += step, result += step) {
    A sum = 0, product = 0;
    const A g = gain[c];
#pragma omp simd reduction(+ : sum, product)
    for (Index i = 0; i < count; ++i) {
      const A d = static_cast<A>(grad[i]) * slope_at<A>(static_cast<A>(y[i]), above, below);
      result[i] = static_cast<T>(d * g);
      by_pixel[i] += d;
      sum += d;
      if (x) product += d * static_cast<A>(x[i]);
    }
    sums[c] = sum;
    if (x) products[c] = product, x += step;
  }
}

struct Gradient {
  Tensor input, by_channel, products, by_pixel;
};

template <class T>
void fill_gradient(
    const Tensor& grad, const Tensor& y, const OptionalTensor& x, const OptionalTensor& gain,
    const Layout& layout, double slope, double scale, Gradient& out) {
  using A = Accumulate<T>;
  const Index channels = layout.channels, pixels = layout.pixels;
  const Index piece = std::min(piece_of(channels), pixels);
  const Index pieces = (pixels + piece - 1) / piece, total = layout.batch * pieces * channels;
  std::vector<A> gains(layout.batch * channels, A(1));
  if (gain) std::copy_n(gain->const_data_ptr<T>(), gains.size(), gains.begin());
  std::vector<A> sums(total, A(0)), products(x ? total : 0, A(0));
  const A above = static_cast<A>(scale), below = static_cast<A>(scale * slope);
  const T* g = grad.const_data_ptr<T>();
  const T* values = y.const_data_ptr<T>();
  const T* inputs = x ? x->const_data_ptr<T>() : nullptr;
  T* result = out.input.mutable_data_ptr<T>();
  A* by_pixel = out.by_pixel.mutable_data_ptr<A>();
  const Index grain = std::max<Index>(1, kValues / (piece * channels));
  at::parallel_for(0, layout.batch * pieces, grain, [&](Index begin, Index end) {
    for (Index work = begin; work < end; ++work) {
      const Index n = work / pieces, p = work % pieces * piece;
      const Index count = std::min(piece, pixels - p);
      const Index at = n * channels * pixels + p * (layout.channels_last ? channels : 1);
      const T* input = inputs ? inputs + at : nullptr;
      A* sum = sums.data() + work * channels;
      A* product = inputs ? products.data() + work * channels : nullptr;
      const A* scales = gains.data() + n * channels;
      A* row = by_pixel + n * pixels + p;
      if (layout.channels_last) {
        backward_channels_last(
            g + at, values + at, input, scales, above, below, channels, count, result + at, sum,
            product, row);
      } else {
        backward_maps(
            g + at, values + at, input, scales, above, below, channels, pixels, count, result + at,
            sum, product, row);
      }
    }
  });
  // `step`: from an image's sums to the next one's, 0 where those of all images add up.
  auto add_up = [&](const std::vector<A>& parts, Tensor& whole, Index step) {
    A* to = whole.mutable_data_ptr<A>();
    for (Index n = 0; n < layout.batch; ++n, to += step) {
      const A* part = parts.data() + n * pieces * channels;
      for (Index k = 0; k < pieces; ++k, part += channels) {
        for (Index c = 0; c < channels; ++c) to[c] += part[c];
      }
    }
  };
  add_up(sums, out.by_channel, 0);
  if (x) add_up(products, out.products, channels);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_leaky_relu_backward(
    const Tensor& grad, const Tensor& y, const OptionalTensor& x, const OptionalTensor& gain,
    double slope, double scale, bool by_pixel) {
  const Layout layout = layout_of(y);
  check_gradient_inputs(y, grad, x);
  const Index n = layout.batch, c = layout.channels;
  const auto sums = y.options().dtype(accumulate_type(y)).memory_format(std::nullopt);
  auto map = y.sizes().vec();
  map[1] = 1;
  Gradient out{
      empty_like(y, layout.format), at::zeros({c}, sums), at::zeros({x ? n : 0, c}, sums),
      at::zeros(map, sums)};
  if (y.numel() > 0) {
    const Tensor g = grad.contiguous(layout.format), values = y.contiguous(layout.format);
    const OptionalTensor inputs = x ? OptionalTensor(x->contiguous(layout.format)) : x;
    const OptionalTensor gains = checked("gain", gain, y, n, c);
    with_type(y.scalar_type(), [&](auto zero) {
      fill_gradient<decltype(zero)>(g, values, inputs, gains, layout, slope, scale, out);
    });
  }
  // They come with the pass over the channels, so that they are computed in any case here.
  if (!by_pixel) map[0] = 0, out.by_pixel = at::empty(map, sums);
  return {out.input, out.by_channel, out.products, out.by_pixel};
}

// --- Upsample, filter, downsample -----------------------------------------------------------------

/// A filter turned so that tap t meets position t, and its factors if it is an outer product.
template <class A>
struct Taps {
  std::vector<A> square, column, row;  // (taps, taps), (taps,), (taps,)
  bool separable = true;

  Taps(const Tensor& kernel, bool flip) {
    const Tensor values = kernel.to(at::kDouble).contiguous();
    const double* k = values.const_data_ptr<double>();
    const Index n = kernel.size(0);
    for (Index i = 0; i < n * n; ++i) square.push_back(k[flip ? i : n * n - 1 - i]);
    // The column and the row through the largest element; separable if every other element is
    // their product up to the rounding of the filter's own type.
    const A* s = square.data();
    auto smaller = [](A a, A b) { return std::abs(a) < std::abs(b); };
    const Index at = std::max_element(s, s + n * n, smaller) - s;
    const A pivot = s[at];
    for (Index i = 0; i < n; ++i) {
      column.push_back(pivot == A(0) ? A(0) : s[i * n + at % n] / pivot);
      row.push_back(s[at / n * n + i]);
    }
    const A rounding = std::abs(pivot) * A(kernel.scalar_type() == at::kDouble ? 1e-15 : 2.4e-7);
    for (Index i = 0; i < n * n; ++i) {
      separable &= std::abs(column[i / n] * row[i % n] - s[i]) <= rounding;
    }
  }
};

/// Every `up`th tap from each start on, side by side: what one output sees of the filter.
template <class A>
std::vector<A> by_phase(const std::vector<A>& taps, Index up) {
  const Index n = taps.size(), length = (n + up - 1) / up;
  std::vector<A> phases(up * length, A(0));
  for (Index t = 0; t < n; ++t) phases[t % up * length + t / up] = taps[t];
  return phases;
}

/// to[i] = sum over j < COUNT of weights[j] * from[i + j * step], for i < n.
template <int COUNT, class A, class T>
void filter_line(A* __restrict to, const T* __restrict from, Index n, Index step, const A* weights) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) to[i] = weighted_sum<COUNT, A>(from + i, step, weights);
}

template <class A, class T>
void filter_line(A* to, const T* from, Index n, Index step, const A* weights, Index count) {
  switch (std::min<Index>(count, 4)) {
    case 0: std::fill_n(to, n, A(0)); break;
    case 1: filter_line<1>(to, from, n, step, weights); break;
    case 2: filter_line<2>(to, from, n, step, weights); break;
    case 3: filter_line<3>(to, from, n, step, weights); break;
    default: filter_line<4>(to, from, n, step, weights);
  }
  for (Index j = 4; j < count; ++j) {
    const T* line = from + j * step;
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] += weights[j] * static_cast<A>(line[i]);
  }
}

/// Memory that begins at a cache line, so that full-width vectors do not straddle two.
template <class A>
class Buffer {
 public:
  void resize(Index size) {
    if (size > size_) values_.reset(new (std::align_val_t(64)) A[size]), size_ = size;
  }
  A* data() const { return values_.get(); }

 private:
  struct Free {
    void operator()(A* values) const { ::operator delete[](values, std::align_val_t(64)); }
  };
  std::unique_ptr<A[], Free> values_;
  Index size_ = 0;
};

/// A filter operation on the CPU: by columns into a strip that stays in the cache, then by rows.
template <class T>
class FilterPlan {
  using A = Accumulate<T>;

 public:
  FilterPlan(
      const Filter& f, const Taps<A>& taps, Index channels, const ReadyEpilogue<T>* epilogue)
      : f_(f),
        taps_(taps),
        columns_(by_phase(taps.column, f.up)),
        rows_(by_phase(taps.row, f.up)),
        length_((f.taps + f.up - 1) / f.up),
        channels_(channels),
        epilogue_(epilogue) {
    // Strips of about 16 Ki input values; at least 64 pixels, so that few are read twice.
    const Index pixels = std::max<Index>(64, 16384 / std::max<Index>(f.inner, 1));
    strip_ = std::max<Index>(1, pixels * f.up / f.down);
  }

  void run(T* y, const T* x) const {
    const Index band = 32, bands = (f_.out_height + band - 1) / band;
    const Index values = std::min(band, f_.out_height) * f_.out_width * f_.inner;
    const Index grain = std::max<Index>(1, kValues / 2 / std::max<Index>(values, 1));
    at::parallel_for(0, f_.outer * bands, grain, [&](Index begin, Index end) {
      Buffer<A> strip, line, spare;
      line.resize(std::min(strip_, f_.out_width) * f_.inner);
      spare.resize(std::min(strip_, f_.out_width) * f_.inner);
      for (Index work = begin; work < end; ++work) {
        const Index image = work / bands, row = work % bands * band;
        const Index stop = std::min(row + band, f_.out_height);
        for (Index left = 0; left < f_.out_width; left += strip_) {
          const Index right = std::min(left + strip_, f_.out_width);
          filter_strip(y, x, image, row, stop, left, right, strip, line, spare);
        }
      }
    });
  }

 private:
  /// First input column that output column `column` may see (negative in the padding), and its tap.
  std::pair<Index, Index> first_of(Index column) const {
    const Index start = column * f_.down - f_.pad;
    const Index first = start > 0 ? (start + f_.up - 1) / f_.up : -(-start / f_.up);
    return {first, first * f_.up - start};
  }

  void filter_strip(
      T* y, const T* x, Index image, Index top, Index bottom, Index left, Index right,
      Buffer<A>& strip, Buffer<A>& line, Buffer<A>& spare) const {
    const Index base = first_of(left).first, end = first_of(right - 1).first + length_;
    const Index from = std::clamp<Index>(base, 0, f_.width);
    const Index to = std::clamp<Index>(end, from, f_.width), inner = f_.inner;
    const T* source = x + image * f_.height * f_.width * inner;
    strip.resize((end - base) * inner);
    std::fill_n(strip.data(), (end - base) * inner, A(0));
    for (Index row = top; row < bottom; ++row) {
      T* out = y + ((image * f_.out_height + row) * f_.out_width + left) * inner;
      // Without an epilogue the result needs no intermediate line in the same type.
      A* result = line.data();
      if constexpr (std::is_same_v<A, T>) result = epilogue_ ? result : out;
      if (taps_.separable) {
        const Span<Index> s = reach(row, f_.height, f_.taps, f_.up, f_.down, f_.pad);
        const A* weights = columns_.data() + s.tap % f_.up * length_ + s.tap / f_.up;
        const T* values = source + (s.first * f_.width + from) * inner;
        A* middle = strip.data() + (from - base) * inner;
        filter_line(middle, values, (to - from) * inner, f_.width * inner, weights, s.count);
        filter_row(result, strip.data(), base, left, right, spare.data());
      } else {
        filter_elements(result, source, row, left, right);
      }
      if (epilogue_) {
        const Index p = row * f_.out_width + left, count = right - left;
        if (inner == channels_) {
          epilogue_->channels_last(out, result, image, p, count);
        } else {
          epilogue_->one_map(out, result, image / channels_, image % channels_, p, count);
        }
      } else if constexpr (!std::is_same_v<A, T>) {
        std::copy_n(result, (right - left) * inner, out);
      }
    }
  }

  /// Filters a strip along its row. Outputs `up` apart see the same taps, `down` inputs further.
  void filter_row(
      A* out, const A* strip, Index base, Index left, Index right, A* spare) const {
    const Index inner = f_.inner, up = f_.up, down = f_.down;
    for (Index r = 0; r < std::min(up, right - left); ++r) {
      const auto [first, tap] = first_of(left + r);
      const A* weights = rows_.data() + tap * length_;
      const Index count = tap < f_.taps ? (f_.taps - tap + up - 1) / up : 0;
      const Index pixels = (right - left - r + up - 1) / up;
      const A* from = strip + (first - base) * inner;
      A* to = out + r * inner;
      if (up == 1 && down == 1) {
        filter_line(to, from, pixels * inner, inner, weights, count);
      } else if (down == 1 && inner < 16) {
        // Few values per pixel make short loops: filter them all in one, then put them in place.
        filter_line(spare, from, pixels * inner, inner, weights, count);
        for (Index m = 0; m < pixels; ++m) {
          for (Index c = 0; c < inner; ++c) to[m * up * inner + c] = spare[m * inner + c];
        }
      } else {
        for (Index m = 0; m < pixels; ++m, to += up * inner, from += down * inner) {
          filter_line(to, from, inner, inner, weights, count);
        }
      }
    }
  }

  /// Any filter, value by value.
  void filter_elements(A* out, const T* source, Index row, Index left, Index right) const {
    for (Index column = left; column < right; ++column) {
      for (Index c = 0; c < f_.inner; ++c) {
        *out++ = filter_at<0, 0, 0, A>(source + c, taps_.square.data(), f_, row, column);
      }
    }
  }

  const Filter& f_;
  const Taps<A>& taps_;
  std::vector<A> columns_, rows_;
  Index length_, channels_, strip_;
  const ReadyEpilogue<T>* epilogue_;
};

Tensor upfirdn2d(
    const Tensor& x, const Tensor& kernel, int64_t up, int64_t down, int64_t pad, int64_t height,
    int64_t width, bool flip) {
  const Layout layout = layout_of(x);
  const Filter filter = filter_of(x, layout, kernel, up, down, pad, height, width);
  const Tensor values = x.contiguous(layout.format);
  Tensor y = empty_filtered(x, height, width, layout.format);
  if (y.numel() == 0) return y;
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Taps<Accumulate<T>> taps(kernel, flip);
    const FilterPlan<T> plan(filter, taps, layout.channels, nullptr);
    plan.run(y.mutable_data_ptr<T>(), values.const_data_ptr<T>());
  });
  return y;
}

Tensor filtered_leaky_relu(
    const Tensor& x, const Tensor& kernel, int64_t pad, int64_t height, int64_t width,
    const OptionalTensor& bias, const OptionalTensor& noise, const OptionalTensor& strength,
    const OptionalTensor& gain, double slope, double scale) {
  const Layout layout = layout_of(x);
  const Filter filter = filter_of(x, layout, kernel, 1, 1, pad, height, width);
  const auto tensors = epilogue_tensors(
      x, layout.batch, layout.channels, height * width, bias, noise, strength, gain, slope, scale);
  const Tensor values = x.contiguous(layout.format);
  Tensor y = empty_filtered(x, height, width, layout.format);
  if (y.numel() == 0) return y;
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Taps<Accumulate<T>> taps(kernel, false);
    const ReadyEpilogue<T> epilogue(tensors.pointers<T>(layout_of(y)), layout.batch);
    const FilterPlan<T> plan(filter, taps, layout.channels, &epilogue);
    plan.run(y.mutable_data_ptr<T>(), values.const_data_ptr<T>());
  });
  return y;
}

// --- Convolution ----------------------------------------------------------------------------------

/// Tiles that are transformed together: few, so that they stay in the processor's own cache, but the
/// more, the larger the transformed weights are, which are read once for all of them.
Index tiles_of_chunk(Index inputs, Index outputs, Index tiles) {
  const Index most = std::max<Index>(32, inputs * outputs / (2 * (inputs + outputs)));
  const Index chunks = (tiles + most - 1) / most;
  return winograd::round_up((tiles + chunks - 1) / chunks, winograd::kRows);
}

/// The 36 matrices of a layer's weights (O, I, 3, 3).
template <class T>
Tensor transformed(const Tensor& weight) {
  using namespace winograd;
  const Index inputs = weight.size(1);
  const auto s = Sizes::of<T>(inputs, weight.size(0), 0);
  Tensor matrices = at::empty({kProducts * s.weight_matrix}, weight.options());
  T* u = matrices.mutable_data_ptr<T>();
  const T* from = weight.const_data_ptr<T>();
  at::parallel_for(0, panels<T>(s) * inputs, 64, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const Index panel = i / inputs;
      T* to = u + panel * kPanel<T> * inputs;
      pack_weights(to, s.weight_matrix, from, s, panel, i % inputs);
    }
  });
  return matrices;
}

/// The products of some panels of the weights (O, I, 3, 3), each transformed just before: all 36
/// matrices would be four times the weights, to be read once.
template <class T>
void transform_and_multiply(
    T* m, const T* v, const T* weight, const winograd::Sizes& s, Index begin, Index end) {
  using namespace winograd;
  const Index step = kPanel<T> * s.inputs + 64 / sizeof(T);
  std::vector<T> u(kProducts * step);
  for (Index panel = begin; panel < end; ++panel) {
    for (Index i = 0; i < s.inputs; ++i) pack_weights(u.data(), step, weight, s, panel, i);
    for (Index k = 0; k < kProducts; ++k) multiply(m, v, u.data(), step, s, k, panel);
  }
}

/// Whether all tiles are one chunk, so that each weight is read once.
bool at_once(const winograd::Grid& grid, Index inputs, Index outputs) {
  return grid.tiles() <= tiles_of_chunk(inputs, outputs, grid.tiles());
}

/// Convolves by transformed weights u, or those of `weight` if all tiles are one chunk and u is null.
/// Calls finish as `scatter_tile` does.
template <class T, class Finish>
void convolve(
    const T* x, const T* u, const T* weight, const T* style, const winograd::Grid& grid,
    Index inputs, Index outputs, const at::TensorOptions& options, Finish finish) {
  using namespace winograd;
  const Index tiles = grid.tiles(), chunk = tiles_of_chunk(inputs, outputs, tiles);
  const auto s = Sizes::of<T>(inputs, outputs, chunk);
  const Index n_panels = panels<T>(s);
  const std::vector<T> zeros(inputs, T(0));
  const Index grain = std::max<Index>(1, kValues / (kProducts * std::max(inputs, outputs)));
  const Index panel = chunk * inputs * kPanel<T>;
  // If there are chunks for all threads, each computes its own, and the loops inside do not start
  // threads again; else the threads share every chunk.
  const Index chunks = (tiles + chunk - 1) / chunk;
  const bool apart = chunks >= at::get_num_threads();
  at::parallel_for(0, chunks, apart ? 1 : chunks, [&](Index from, Index to) {
    const Tensor values = at::empty({kProducts * s.input_matrix}, options);
    const Tensor products = at::empty({kProducts * s.product_matrix}, options);
    T* v = values.mutable_data_ptr<T>();
    T* m = products.mutable_data_ptr<T>();
    for (Index first = from * chunk; first < std::min(to * chunk, tiles); first += chunk) {
      const Index count = std::min(chunk, tiles - first);
      at::parallel_for(0, count, grain, [&](Index begin, Index end) {
        for (Index i = begin; i < end; ++i) {
          gather_tile(v, x, style, zeros.data(), s, grid, first + i, i);
        }
      });
      if (!u) {
        at::parallel_for(0, n_panels, 1, [&](Index begin, Index end) {
          transform_and_multiply(m, v, weight, s, begin, end);
        });
      } else {
        const Index work = std::max<Index>(1, kProductsAtOnce / panel);
        at::parallel_for(0, kProducts * n_panels, work, [&](Index begin, Index end) {
          for (Index i = begin; i < end; ++i) {
            const Index at = i % n_panels;
            const T* matrices = u + at * kPanel<T> * inputs;
            multiply(m, v, matrices, s.weight_matrix, s, i / n_panels, at);
          }
        });
      }
      at::parallel_for(0, count, grain, [&](Index begin, Index end) {
        std::vector<T> made(kTile * kTile * outputs);
        for (Index i = begin; i < end; ++i) {
          scatter_tile(made.data(), m, s, grid, first + i, i, finish);
        }
      });
    }
  });
}

void check_convolution(const char* name, const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(
      x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 &&
          weight.size(3) == 3 && weight.scalar_type() == x.scalar_type(),
      name, ": expected (N, I, H, W) and (O, I, 3, 3) of one type, got ", x.sizes(), " and ",
      weight.sizes());
  TORCH_CHECK(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
      name, ": expected float or double, got ", x.scalar_type());
}

Tensor convolved(
    const Tensor& x, const Tensor& weight, const OptionalTensor& style,
    const EpilogueTensors* epilogue) {
  check_convolution("conv3x3", x, weight);
  const Tensor values = x.contiguous(at::MemoryFormat::ChannelsLast), w = weight.contiguous();
  const OptionalTensor styles = checked("style", style, x, x.size(0), x.size(1));
  Tensor y = at::empty(
      {x.size(0), weight.size(0), x.size(2), x.size(3)},
      x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (y.numel() == 0) return y;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto grid = winograd::Grid::of(x.size(0), x.size(2), x.size(3));
    const T* s = styles ? styles->const_data_ptr<T>() : nullptr;
    std::optional<ReadyEpilogue<T>> ready;
    if (epilogue) ready.emplace(epilogue->pointers<T>(layout_of(y)), x.size(0));
    T* to = y.mutable_data_ptr<T>();
    const Index outputs = weight.size(0), pixels = x.size(2) * x.size(3);
    const bool once = at_once(grid, x.size(1), outputs);
    const Tensor matrices = once ? Tensor() : transformed<T>(w);
    convolve<T>(
        values.const_data_ptr<T>(), once ? nullptr : matrices.const_data_ptr<T>(),
        w.const_data_ptr<T>(), s, grid, x.size(1), outputs, w.options(), [&](const T* line, Index n, Index p, Index width) {
          T* at = to + (n * pixels + p) * outputs;
          if (ready) {
            ready->channels_last(at, line, n, p, width);
          } else {
            std::copy_n(line, width * outputs, at);
          }
        });
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(double{});
  return y;
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (!bias) return convolved(x, weight, std::nullopt, nullptr);
  const auto none = std::nullopt;  // with a slope of one, what is left of the epilogue is the bias
  const auto epilogue = epilogue_tensors(
      x, x.size(0), weight.size(0), x.size(2) * x.size(3), bias, none, none, none, 1, 1);
  return convolved(x, weight, none, &epilogue);
}

Tensor styled_conv3x3(
    const Tensor& x, const Tensor& weight, const Tensor& style, const OptionalTensor& bias,
    const OptionalTensor& noise, const OptionalTensor& strength, const OptionalTensor& gain,
    double slope, double scale) {
  const auto epilogue = epilogue_tensors(
      x, x.size(0), weight.size(0), x.size(2) * x.size(3), bias, noise, strength, gain, slope,
      scale);
  return convolved(x, weight, style, &epilogue);
}

// --- Upsampling convolution -----------------------------------------------------------------------

/// A transposed 3 x 3 convolution with stride 2, the 4 x 4 filter of its result padded by one, and the
/// epilogue, rows by rows: what the convolution makes of some rows of the input stays in the
/// cache until the filter and the epilogue have read it.
///
/// An input pixel adds x W (its I values times an (I, 9 O) matrix, ordered by tap) to 3 x 3 pixels.
template <class T>
class Upsampling {
 public:
  /// The weights (O, I, 3, 3) as `multiply` reads them, panel by panel.
  static Tensor packed(const Tensor& weight) {
    const Index outputs = weight.size(0), inputs = weight.size(1), columns = columns_of(outputs);
    Tensor panels = at::zeros({inputs * columns}, weight.options());
    const T* values = weight.const_data_ptr<T>();
    T* packed = panels.mutable_data_ptr<T>();
    for (Index tap = 0; tap < 9; ++tap) {
      for (Index o = 0; o < outputs; ++o) {
        const Index column = tap * outputs + o, first = column / kPanel * kPanel;
        const Index panel = std::min(kPanel, columns - first);
        T* to = packed + first * inputs + column - first;
        const T* from = values + o * inputs * 9 + tap;
        for (Index i = 0; i < inputs; ++i) to[i * panel] = from[i * 9];
      }
    }
    return panels;
  }

  Upsampling(
      const T* x, const T* weight, const T* style, const Taps<T>& taps, Index height, Index width,
      Index inputs, Index outputs, const ReadyEpilogue<T>& epilogue)
      : x_(x),
        weight_(weight),
        style_(style),
        taps_(taps),
        epilogue_(epilogue),
        height_(height),
        width_(width),
        inputs_(inputs),
        outputs_(outputs),
        columns_(columns_of(outputs)),
        rows_(std::max<Index>(1, 256 / width)),
        line_((2 * width + 3) * outputs) {}

  /// Makes the output rows 2 begin to 2 end - 1 of all images, one below the other.
  void run(T* y, Index begin, Index end) const {
    Work work;
    const Index pixels = winograd::round_up(rows_ * width_, winograd::kRows);
    work.values.resize(pixels * inputs_);
    std::fill_n(work.values.data(), pixels * inputs_, T(0));
    work.products.resize(pixels * columns_);
    work.sums.resize((2 * rows_ + 5) * line_);
    work.strip.resize(line_);
    work.line.resize(line_);
    while (begin < end) {
      const Index image = begin / height_, stop = std::min(end, (image + 1) * height_);
      run_image(y, image, begin - image * height_, stop - image * height_, work);
      begin = stop;
    }
  }

 private:
  static constexpr Index kPanel = winograd::kPanel<T>;

  static Index columns_of(Index outputs) {
    return winograd::round_up(9 * outputs, winograd::kLanes<T>);
  }

  struct Work {
    Buffer<T> values, products, sums, strip, line;
  };

  /// Rows `first` to `last` - 1 of one image. `sums` holds rows of the convolution's result from
  /// `base` on, with a pixel of zeros on either side; output row p sees rows p - 1 to p + 2.
  void run_image(T* y, Index image, Index first, Index last, Work& work) const {
    const Index rows = 2 * rows_ + 5, end = std::min(last + 1, height_);
    T* sums = work.sums.data();
    std::fill_n(sums, rows * line_, T(0));
    Index base = 2 * first - 1, next = 2 * first;
    for (Index row = std::max<Index>(first - 1, 0); row < end; row += rows_) {
      const Index stop = std::min(row + rows_, end);
      multiply(image, row, stop, work);
      add(sums, base, row, stop, work.products.data());
      const Index complete = stop == height_ ? 2 * height_ + 1 : 2 * stop - 1;
      const Index made = std::max(next, std::min(2 * last, complete - 1));
      filter(y, image, next, made, sums + (next - 1 - base) * line_, work);
      next = made;
      const Index kept = 2 * stop + 1 - (made - 1), shift = made - 1 - base;
      std::copy_n(sums + shift * line_, kept * line_, sums);
      std::fill_n(sums + kept * line_, (rows - kept) * line_, T(0));
      base = made - 1;
    }
  }

  /// What the pixels of some input rows add to the result, (pixels, 9 O).
  void multiply(Index image, Index row, Index stop, Work& work) const {
    const Index pixels = (stop - row) * width_;
    const T* from = x_ + (image * height_ + row) * width_ * inputs_;
    const T* style = style_ + image * inputs_;
    T* to = work.values.data();
    for (Index p = 0; p < pixels; ++p, from += inputs_, to += inputs_) {
#pragma omp simd
      for (Index i = 0; i < inputs_; ++i) to[i] = from[i] * style[i];
    }
    for (Index c = 0; c < columns_; c += kPanel) {
      winograd::multiply_panel(
          work.products.data() + c, work.values.data(), weight_ + c * inputs_,
          std::min(kPanel, columns_ - c), pixels, inputs_, columns_);
    }
  }

  /// Adds that to the result's rows from `base` on.
  void add(T* sums, Index base, Index row, Index stop, const T* products) const {
    const Index three = 3 * outputs_;
    for (Index i = row; i < stop; ++i) {
      for (Index j = 0; j < width_; ++j, products += columns_) {
        for (Index ky = 0; ky < 3; ++ky) {
          const Index to = 2 * i + ky - base;
          if (to < 0) continue;
          T* sum = sums + to * line_ + (2 * j + 1) * outputs_;
          const T* from = products + ky * three;
#pragma omp simd
          for (Index c = 0; c < three; ++c) sum[c] += from[c];
        }
      }
    }
  }

  /// Output rows `first` to `last` - 1, each from four rows of the convolution's result, of which
  /// `sums` is the first. Pieces of rows stay in the nearest cache until the next row has read them.
  void filter(T* y, Index image, Index first, Index last, const T* sums, Work& work) const {
    const Index width = 2 * width_, most = std::max<Index>(1, 1024 / outputs_);
    for (Index left = 0; left < width; left += most) {
      const Index count = std::min(most, width - left);
      for (Index row = first; row < last; ++row) {
        const T* from = sums + (row - first) * line_ + left * outputs_;
        filter_piece(work.line.data(), from, count * outputs_, work.strip.data());
        const Index pixel = row * width + left;
        T* to = y + (image * 2 * height_ * width + pixel) * outputs_;
        epilogue_.channels_last(to, work.line.data(), image, pixel, count);
      }
    }
  }

  void filter_piece(T* line, const T* sums, Index values, T* strip) const {
    if (taps_.separable) {
      filter_line<4>(strip, sums, values + 3 * outputs_, line_, taps_.column.data());
      filter_line<4>(line, strip, values, outputs_, taps_.row.data());
      return;
    }
    std::fill_n(line, values, T(0));
    for (Index t = 0; t < 4; ++t) {
      filter_line<4>(strip, sums + t * line_, values, outputs_, taps_.square.data() + 4 * t);
      for (Index i = 0; i < values; ++i) line[i] += strip[i];
    }
  }

  const T* x_;
  const T* weight_;
  const T* style_;
  const Taps<T>& taps_;
  const ReadyEpilogue<T>& epilogue_;
  Index height_, width_, inputs_, outputs_, columns_, rows_, line_;
};

/// An upsampling layer; `packed` are the weights by `Upsampling::packed`.
template <class T>
Tensor upsampled(
    const Tensor& x, const Tensor& packed, Index outputs, const Tensor& style, const Tensor& kernel,
    const EpilogueTensors& tensors) {
  const Index n = x.size(0), height = x.size(2), width = x.size(3);
  TORCH_CHECK(
      kernel.sizes() == at::IntArrayRef({4, 4}), "styled_up_conv3x3: expected a 4 x 4 filter, got ",
      kernel.sizes());
  const Tensor values = x.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor styles = *checked("style", style, x, n, x.size(1));
  Tensor y = at::empty(
      {n, outputs, 2 * height, 2 * width},
      x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (y.numel() == 0) return y;
  const Taps<T> taps(kernel, false);
  const ReadyEpilogue<T> epilogue(tensors.pointers<T>(layout_of(y)), n);
  const Upsampling<T> upsampling(
      values.const_data_ptr<T>(), packed.const_data_ptr<T>(), styles.const_data_ptr<T>(), taps,
      height, width, x.size(1), outputs, epilogue);
  T* to = y.mutable_data_ptr<T>();
  // Two input rows more are read for every piece of work.
  const Index grain = std::max<Index>(8, kProductsAtOnce / (width * x.size(1) * outputs * 9));
  at::parallel_for(0, n * height, grain, [&](Index begin, Index end) {
    upsampling.run(to, begin, end);
  });
  return y;
}

Tensor styled_up_conv3x3(
    const Tensor& x, const Tensor& weight, const Tensor& style, const Tensor& kernel,
    const OptionalTensor& bias, const OptionalTensor& noise, const OptionalTensor& strength,
    const OptionalTensor& gain, double slope, double scale) {
  check_convolution("styled_up_conv3x3", x, weight);
  const auto epilogue = epilogue_tensors(
      x, x.size(0), weight.size(0), 4 * x.size(2) * x.size(3), bias, noise, strength, gain, slope,
      scale);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Tensor packed = Upsampling<T>::packed(weight.contiguous());
    return upsampled<T>(x, packed, weight.size(0), style, kernel, epilogue);
  };
  return x.scalar_type() == at::kFloat ? run(float{}) : run(double{});
}

// --- Inference with weights that are packed once --------------------------------------------------

/// Adds activations that were just computed to RGB maps (N, 3, H, W).
class ToRGB {
 public:
  /// Weights are (N, 3, O).
  ToRGB(Tensor& maps, const Tensor& weights, at::ArrayRef<double> bias, Index outputs)
      : maps_(maps.mutable_data_ptr<float>()),
        outputs_(outputs),
        pixels_(maps.size(2) * maps.size(3)),
        weight_(maps.size(0) * outputs) {
    const Tensor values = weights.contiguous();
    const float* from = values.const_data_ptr<float>();
    for (Index n = 0; n < maps.size(0); ++n, from += 3 * outputs) {
      for (Index c = 0; c < outputs; ++c) {
        weight_[n * outputs + c] = Colour{from[c], from[outputs + c], from[2 * outputs + c], 0};
      }
    }
    for (int k = 0; k < 3; ++k) bias_[k] = static_cast<float>(bias[k]);
  }

  /// Adds `count` pixels of image n from pixel p on.
  void add(const float* line, Index n, Index p, Index count) const {
    const Colour* weight = weight_.data() + n * outputs_;
    for (Index i = 0; i < count; ++i, line += outputs_) {
      Colour sums[4] = {bias_};
      Index c = 0;
      for (; c + 4 <= outputs_; c += 4) {
        for (int j = 0; j < 4; ++j) sums[j] += line[c + j] * weight[c + j];
      }
      for (; c < outputs_; ++c) sums[0] += line[c] * weight[c];
      const Colour sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (Index k = 0; k < 3; ++k) maps_[(3 * n + k) * pixels_ + p + i] += sum[k];
    }
  }

 private:
  typedef float Colour __attribute__((vector_size(16)));  // three, and room for a fourth

  float* maps_;
  Index outputs_, pixels_;
  std::vector<Colour> weight_;
  Colour bias_{};
};

/// Weights (O, I, 3, 3) as `packed_conv3x3` takes them, or `packed_up_conv3x3`.
Tensor packed_weights(const Tensor& weight, bool up) {
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
          weight.scalar_type() == at::kFloat,
      "packed_weights: expected (O, I, 3, 3) floats, got ", weight.sizes());
  const Tensor values = weight.contiguous();
  return up ? Upsampling<float>::packed(values) : transformed<float>(values);
}

void check_packed(const Tensor& x, const Tensor& packed, Index size) {
  TORCH_CHECK(
      x.dim() == 4 && x.scalar_type() == at::kFloat && packed.scalar_type() == at::kFloat &&
          packed.is_contiguous() && packed.numel() == size,
      "expected (N, I, H, W) floats and their packed weights, got ", x.sizes(), " and ",
      packed.sizes());
}

Tensor packed_conv3x3(
    const Tensor& x, const Tensor& packed, int64_t outputs, const Tensor& style,
    const OptionalTensor& bias, const OptionalTensor& noise, const OptionalTensor& strength,
    const OptionalTensor& gain, double slope, double scale, std::optional<Tensor> rgb,
    const OptionalTensor& rgb_weight, at::ArrayRef<double> rgb_bias, bool rgb_alone) {
  const Index inputs = x.size(1), pixels = x.size(2) * x.size(3);
  const auto sizes = winograd::Sizes::of<float>(inputs, outputs, 0);
  check_packed(x, packed, winograd::kProducts * sizes.weight_matrix);
  const auto tensors = epilogue_tensors(
      x, x.size(0), outputs, pixels, bias, noise, strength, gain, slope, scale);
  const Tensor values = x.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor styles = *checked("style", style, x, x.size(0), inputs);
  Tensor y = at::empty(
      {rgb_alone ? 0 : x.size(0), outputs, x.size(2), x.size(3)},
      x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (x.numel() == 0) return y;
  const Layout layout{x.size(0), outputs, pixels, true, at::MemoryFormat::ChannelsLast};
  const ReadyEpilogue<float> epilogue(tensors.pointers<float>(layout), x.size(0));
  std::optional<ToRGB> to_rgb;
  if (rgb) {
    TORCH_CHECK(
        rgb->sizes() == at::IntArrayRef({x.size(0), 3, x.size(2), x.size(3)}) &&
            rgb->is_contiguous() && rgb->scalar_type() == at::kFloat && rgb_bias.size() == 3 &&
            rgb_weight && rgb_weight->numel() == x.size(0) * 3 * outputs,
        "packed_conv3x3: RGB maps ", rgb->sizes(), " and ", rgb_bias.size(), " biases");
    to_rgb.emplace(*rgb, *rgb_weight, rgb_bias, outputs);
  }
  float* to = y.mutable_data_ptr<float>();
  convolve<float>(
      values.const_data_ptr<float>(), packed.const_data_ptr<float>(), nullptr,
      styles.const_data_ptr<float>(), winograd::Grid::of(x.size(0), x.size(2), x.size(3)), inputs,
      outputs, x.options().memory_format(std::nullopt),
      [&](float* line, Index n, Index p, Index width) {
        float* at = rgb_alone ? line : to + (n * pixels + p) * outputs;
        epilogue.channels_last(at, line, n, p, width);
        if (to_rgb) to_rgb->add(at, n, p, width);
      });
  return y;
}

Tensor packed_up_conv3x3(
    const Tensor& x, const Tensor& packed, int64_t outputs, const Tensor& style,
    const Tensor& kernel, const OptionalTensor& bias, const OptionalTensor& noise,
    const OptionalTensor& strength, const OptionalTensor& gain, double slope, double scale) {
  check_packed(x, packed, x.size(1) * winograd::round_up(9 * outputs, winograd::kLanes<float>));
  const auto epilogue = epilogue_tensors(
      x, x.size(0), outputs, 4 * x.size(2) * x.size(3), bias, noise, strength, gain, slope, scale);
  return upsampled<float>(x, packed, outputs, style, kernel, epilogue);
}

// --- Classes --------------------------------------------------------------------------------------

Tensor upsampled_argmax(const Tensor& logits, Index height, Index width, bool align_corners) {
  TORCH_CHECK(
      logits.dim() == 4 && logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0 &&
          logits.scalar_type() == at::kFloat,
      "upsampled_argmax: expected float32 (N, classes, h, w), got ", logits.scalar_type(), " ",
      logits.sizes());
  TORCH_CHECK(height > 0 && width > 0, "upsampled_argmax: the result would be ", height, " x ", width);
  const Tensor maps = logits.contiguous();
  Tensor found = at::empty({maps.size(0), height, width}, maps.options().dtype(at::kLong));
  const argmax::Between down(maps.size(2), height, align_corners);
  const argmax::Between across(maps.size(3), width, align_corners);
  const argmax::Rows rows(
      maps.const_data_ptr<float>(), maps.size(1), maps.size(2), maps.size(3), down, across);
  int64_t* to = found.mutable_data_ptr<int64_t>();
  at::parallel_for(0, maps.size(0) * height, 8, [&](Index begin, Index end) {
    rows.find(to, begin, end);
  });
  return found;
}

// --- Distances of features ------------------------------------------------------------------------

/// Two pictures' maps (N, C, H, W) and the channels' weights, channels last, cut into pieces.
struct FeaturePairs {
  Tensor a, b, weight;
  Index channels, pixels, piece, pieces;

  FeaturePairs(const Tensor& one, const Tensor& other, const OptionalTensor& weights)
      : channels(one.size(1)), pixels(one.size(2) * one.size(3)) {
    TORCH_CHECK(
        one.dim() == 4 && one.sizes() == other.sizes() && one.numel() > 0 &&
            one.scalar_type() == other.scalar_type() &&
            (one.scalar_type() == at::kFloat || one.scalar_type() == at::kDouble),
        "feature_distance: expected two (N, C, H, W) of floats, got ", one.sizes(), " of ",
        one.scalar_type(), " and ", other.sizes(), " of ", other.scalar_type());
    a = one.contiguous(at::MemoryFormat::ChannelsLast);
    b = other.contiguous(at::MemoryFormat::ChannelsLast);
    weight = weights ? *checked("weight", weights, one, 1, channels)
                     : at::ones({channels}, one.options().memory_format(std::nullopt));
    piece = std::min(piece_of(channels), pixels);
    pieces = (pixels + piece - 1) / piece;
  }

  /// Calls body(work, image, first value, pixels) for every piece of every image.
  template <class Body>
  void each(Body body) const {
    const Index grain = std::max<Index>(1, kValues / (piece * channels));
    at::parallel_for(0, a.size(0) * pieces, grain, [&](Index begin, Index end) {
      for (Index work = begin; work < end; ++work) {
        const Index image = work / pieces, p = work % pieces * piece;
        body(work, image, (image * pixels + p) * channels, std::min(piece, pixels - p));
      }
    });
  }

  template <class Body>
  void with_floats(Body body) const {
    a.scalar_type() == at::kFloat ? body(float{}) : body(double{});
  }
};

Tensor feature_distance(
    const Tensor& a, const Tensor& b, const OptionalTensor& weight, double eps) {
  const FeaturePairs pairs(a, b, weight);
  Tensor found = at::empty({a.size(0)}, a.options().memory_format(std::nullopt));
  std::vector<double> sums(a.size(0) * pairs.pieces);
  pairs.with_floats([&](auto zero) {
    using T = decltype(zero);
    const T *one = pairs.a.const_data_ptr<T>(), *other = pairs.b.const_data_ptr<T>();
    const T* w = pairs.weight.const_data_ptr<T>();
    pairs.each([&](Index work, Index, Index at, Index count) {
      sums[work] =
          features::distance<T>(one + at, other + at, w, pairs.channels, count, T(eps));
    });
    T* to = found.mutable_data_ptr<T>();
    for (Index n = 0; n < a.size(0); ++n) {
      const double* begin = sums.data() + n * pairs.pieces;
      to[n] = static_cast<T>(std::accumulate(begin, begin + pairs.pieces, 0.0) / pairs.pixels);
    }
  });
  return found;
}

/// Gradients by a and b; those that are not wanted have no elements.
std::tuple<Tensor, Tensor> feature_distance_backward(
    const Tensor& grad, const Tensor& a, const Tensor& b, const OptionalTensor& weight, double eps,
    bool wants_a, bool wants_b) {
  const FeaturePairs pairs(a, b, weight);
  const Tensor grads = *checked("grad", grad, a, 1, a.size(0));
  const auto made = [&](bool wanted) {
    return wanted ? at::empty_like(pairs.a) : at::empty({0}, grads.options());
  };
  Tensor by_a = made(wants_a), by_b = made(wants_b);
  pairs.with_floats([&](auto zero) {
    using T = decltype(zero);
    const T *one = pairs.a.const_data_ptr<T>(), *other = pairs.b.const_data_ptr<T>();
    const T *w = pairs.weight.const_data_ptr<T>(), *g = grads.const_data_ptr<T>();
    T* to_a = wants_a ? by_a.mutable_data_ptr<T>() : nullptr;
    T* to_b = wants_b ? by_b.mutable_data_ptr<T>() : nullptr;
    pairs.each([&](Index, Index image, Index at, Index count) {
      features::gradients<T>(
          g[image] / pairs.pixels, one + at, other + at, w, pairs.channels, count, T(eps),
          to_a ? to_a + at : nullptr, to_b ? to_b + at : nullptr);
    });
  });
  return {by_a, by_b};
}

}  // namespace
}  // namespace stylegan

TORCH_LIBRARY(stylegan, m) {
  m.def(
      "fused_leaky_relu(Tensor x, Tensor? bias, Tensor? noise, Tensor? strength, Tensor? gain, "
      "float slope, float scale) -> Tensor");
  m.def(
      "fused_leaky_relu_backward(Tensor grad, Tensor y, Tensor? x, Tensor? gain, float slope, "
      "float scale, bool by_pixel) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "upfirdn2d(Tensor x, Tensor kernel, int up, int down, int pad, SymInt height, SymInt width, "
      "bool flip) -> Tensor");
  m.def(
      "filtered_leaky_relu(Tensor x, Tensor kernel, int pad, SymInt height, SymInt width, "
      "Tensor? bias, Tensor? noise, Tensor? strength, Tensor? gain, float slope, float scale) "
      "-> Tensor");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "styled_conv3x3(Tensor x, Tensor weight, Tensor style, Tensor? bias, Tensor? noise, "
      "Tensor? strength, Tensor? gain, float slope, float scale) -> Tensor");
  m.def(
      "styled_up_conv3x3(Tensor x, Tensor weight, Tensor style, Tensor kernel, Tensor? bias, "
      "Tensor? noise, Tensor? strength, Tensor? gain, float slope, float scale) -> Tensor");
  m.def("packed_weights(Tensor weight, bool up) -> Tensor");
  m.def(
      "packed_conv3x3(Tensor x, Tensor packed, int outputs, Tensor style, Tensor? bias, "
      "Tensor? noise, Tensor? strength, Tensor? gain, float slope, float scale, "
      "Tensor(a!)? rgb, Tensor? rgb_weight, float[] rgb_bias, bool rgb_alone) -> Tensor");
  m.def(
      "packed_up_conv3x3(Tensor x, Tensor packed, int outputs, Tensor style, Tensor kernel, "
      "Tensor? bias, Tensor? noise, Tensor? strength, Tensor? gain, float slope, float scale) "
      "-> Tensor");
  m.def(
      "upsampled_argmax(Tensor logits, int height, int width, bool align_corners) -> Tensor");
  m.def("feature_distance(Tensor a, Tensor b, Tensor? weight, float eps) -> Tensor");
  m.def(
      "feature_distance_backward(Tensor grad, Tensor a, Tensor b, Tensor? weight, float eps, "
      "bool wants_a, bool wants_b) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(stylegan, CPU, m) {
  m.impl("fused_leaky_relu", &stylegan::fused_leaky_relu);
  m.impl("fused_leaky_relu_backward", &stylegan::fused_leaky_relu_backward);
  m.impl("upfirdn2d", &stylegan::upfirdn2d);
  m.impl("filtered_leaky_relu", &stylegan::filtered_leaky_relu);
  m.impl("conv3x3", &stylegan::conv3x3);
  m.impl("styled_conv3x3", &stylegan::styled_conv3x3);
  m.impl("styled_up_conv3x3", &stylegan::styled_up_conv3x3);
  m.impl("packed_weights", &stylegan::packed_weights);
  m.impl("packed_conv3x3", &stylegan::packed_conv3x3);
  m.impl("packed_up_conv3x3", &stylegan::packed_up_conv3x3);
  m.impl("upsampled_argmax", &stylegan::upsampled_argmax);
  m.impl("feature_distance", &stylegan::feature_distance);
  m.impl("feature_distance_backward", &stylegan::feature_distance_backward);
}
