// Operators for inference in bfloat16 on a processor with AMX (tiles.h).
//
// Images that they hand each other are (planes, positions, 32) bfloat16, as `tiles::Grid` says.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"
#include "tiles.h"

namespace stylegan {
namespace {

using Index = int64_t;

#ifdef STYLEGAN_TILES

using tiles::Bfloat16;
using tiles::Grid;
using tiles::kBlock;

bool tiles_available() {
  static const bool available = tiles::permitted();
  return available;
}

Bfloat16* data(Tensor& t) { return reinterpret_cast<Bfloat16*>(t.mutable_data_ptr<at::BFloat16>()); }

const Bfloat16* data(const Tensor& t) {
  return reinterpret_cast<const Bfloat16*>(t.const_data_ptr<at::BFloat16>());
}

Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, at::TensorOptions().dtype(type));
}

Tensor empty_planes(const Grid& g, Index channels) {
  return empty({tiles::blocks_of(channels), g.positions(), kBlock}, at::kBFloat16);
}

/// Rows of `channels` values, with zeros up to whole blocks.
std::vector<float> padded(const Tensor& t, Index rows, Index channels) {
  TORCH_CHECK(
      t.numel() == rows * channels && t.scalar_type() == at::kFloat, "expected ", rows, " * ",
      channels, " floats, got ", t.sizes(), " of ", t.scalar_type());
  const Tensor values = t.contiguous();
  const float* from = values.const_data_ptr<float>();
  const Index width = tiles::blocks_of(channels) * kBlock;
  std::vector<float> to(rows * width, 0.0f);
  for (Index n = 0; n < rows; ++n) {
    std::copy_n(from + n * channels, channels, to.data() + n * width);
  }
  return to;
}

Tensor tiles_pack(const Tensor& weight, at::IntArrayRef groups) {
  TORCH_CHECK(
      weight.dim() == 3 && weight.scalar_type() == at::kFloat &&
          std::accumulate(groups.begin(), groups.end(), Index(0)) == weight.size(2),
      "tiles_pack: expected (O, I, taps) floats, got ", weight.sizes(), " and groups ", groups);
  const Index outputs = weight.size(0), inputs = weight.size(1), taps = weight.size(2);
  Tensor packed = empty({tiles::packed_size(outputs, inputs, taps)}, at::kBFloat16);
  const Tensor values = weight.contiguous();
  const float* from = values.const_data_ptr<float>();
  const auto at = [&](Index o, Index i, Index tap) { return from[(o * inputs + i) * taps + tap]; };
  at::parallel_for(0, tiles::blocks_of(outputs), 1, [&](Index begin, Index end) {
    for (Index block = begin; block < end; ++block) {
      Bfloat16* to = data(packed) + tiles::weights_before(block, inputs, taps);
      Index first = 0;
      for (const Index count : groups) {
        to = tiles::pack(to, outputs, inputs, block, first, first + count, at);
        first += count;
      }
    }
  });
  return packed;
}

Tensor tiles_input(const Tensor& x, const Tensor& style) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "expected (N, C, H, W) floats");
  const Index channels = x.size(1);
  const Grid g{x.size(0), x.size(2), x.size(3)};
  const auto styles = padded(style, g.batch, channels);
  const Tensor values = x.contiguous();
  const float* from = values.const_data_ptr<float>();
  Tensor planes = empty_planes(g, channels).zero_();
  for (Index n = 0; n < g.batch; ++n) {
    for (Index c = 0; c < channels; ++c) {
      const float factor = styles[n * tiles::blocks_of(channels) * kBlock + c];
      for (Index row = 0; row < g.height; ++row) {
        const Index at = c / kBlock * g.positions() + g.line(n, row);
        Bfloat16* to = data(planes) + at * kBlock + c % kBlock;
        for (Index i = 0; i < g.width; ++i) to[i * kBlock] = tiles::rounded(factor * *from++);
      }
    }
  }
  return planes;
}

/// Rows of a layer's input that are worked on together: what they hold stays in a core's cache.
Index strip_of(const Grid& g, Index inputs, Index threads) {
  const Index bytes = g.pitch() * tiles::blocks_of(inputs) * kBlock * 2;
  const Index rows = std::min(std::max<Index>((768 << 10) / bytes, 8), g.height);
  const Index strips = (g.height + rows - 1) / rows;
  // A few strips are shared out evenly.
  const Index even = g.height >= 8 * threads && g.batch * strips < 4 * threads
                         ? (strips + threads - 1) / threads * threads
                         : strips;
  return (g.height + even - 1) / even;
}

/// Moves styles away from zero, by less than any rounding shows, so that they can be divided by.
Tensor away_from_zero(const Tensor& styles) {
  Tensor moved = styles.clone(at::MemoryFormat::Contiguous);
  float* values = moved.mutable_data_ptr<float>();
  for (Index i = 0; i < moved.numel(); ++i) {
    if (std::abs(values[i]) < 1e-12f) values[i] = 1e-12f;
  }
  return moved;
}

/// What a layer's output is multiplied by to be added to RGB maps: weights (N, 3, O) over the styles
/// that the output is scaled by.
struct ToRGB {
  float* maps;  // (N, 3, H, W)
  std::vector<Bfloat16> weight;  // packed, image by image
  std::array<double, 3> bias;

  ToRGB(
      Tensor& rgb, const Tensor& weights, at::ArrayRef<double> biases, const Grid& g,
      const std::vector<float>& styles, Index channels)
      : maps(rgb.mutable_data_ptr<float>()) {
    TORCH_CHECK(
        rgb.sizes() == at::IntArrayRef({g.batch, 3, g.height, g.width}) && rgb.is_contiguous() &&
            biases.size() == 3,
        "tiles_conv3x3: RGB maps ", rgb.sizes(), " and ", biases.size(), " biases");
    const auto values = padded(weights, 3 * g.batch, channels);
    const Index width = styles.size() / g.batch, size = tiles::packed_size(3, channels, 1);
    weight.resize(g.batch * size);
    for (Index n = 0; n < g.batch; ++n) {
      const auto at = [&](Index o, Index i, Index) {
        return values[(3 * n + o) * width + i] / styles[n * width + i];
      };
      tiles::pack(weight.data() + n * size, 3, channels, 0, 0, 1, at);
    }
    std::copy_n(biases.begin(), 3, bias.begin());
  }

  void add(const tiles::Layer& l, Index image, Index first, Index last) const {
    const Index size = weight.size() / l.out.batch, map = l.out.height * l.out.width;
    tiles::add_rgb(
        maps + 3 * image * map, l.out, l.y, l.outputs, weight.data() + image * size, bias.data(),
        image, first, last);
  }
};

/// Work for which waking another thread pays, in multiply-accumulates.
constexpr Index kProductsAtOnce = 4 << 20;

/// Runs a layer that keeps the size or doubles it, and adds what it wrote to RGB maps. Threads share
/// out strips of images, or blocks of outputs where there are few strips; no value depends on which.
void run_layer(const tiles::Layer& layer, const ToRGB* rgb) {
  const Index threads = at::get_num_threads(), height = layer.in.height;
  const Index rows = strip_of(layer.in, layer.inputs, threads);
  const Index per_image = (height + rows - 1) / rows, strips = layer.in.batch * per_image;
  const Index blocks = tiles::blocks_of(layer.outputs);
  const Index pixels = std::max<Index>(32, rows * layer.in.width);
  const Index grain = kProductsAtOnce / (pixels * layer.inputs * kBlock * 9) + 1;
  const auto rows_of = [&](Index strip) {
    const Index first = strip % per_image * rows;
    return std::pair(first, std::min(first + rows, height));
  };
  const auto run = [&](Index strip, Index begin, Index end) {
    const auto [first, last] = rows_of(strip);
    for (Index block = begin; block < end; ++block) {
      tiles::run(layer, strip / per_image, first, last, block);
    }
  };
  const auto add_rgb = [&](Index strip) {
    const auto [first, last] = rows_of(strip);
    if (rgb) rgb->add(layer, strip / per_image, first, last);
  };
  if (strips >= threads) {
    at::parallel_for(0, strips, (grain + blocks - 1) / blocks, [&](Index begin, Index end) {
      const tiles::Registers registers;
      for (Index strip = begin; strip < end; ++strip) {
        run(strip, 0, blocks);
        add_rgb(strip);  // while it is in the cache
      }
    });
    return;
  }
  at::parallel_for(0, blocks, grain, [&](Index begin, Index end) {
    const tiles::Registers registers;
    for (Index strip = 0; strip < strips; ++strip) run(strip, begin, end);
  });
  const tiles::Registers registers;
  for (Index strip = 0; strip < strips; ++strip) add_rgb(strip);
}

Tensor tiles_conv3x3(
    const Tensor& x, at::IntArrayRef size, const Tensor& weight, const Tensor& gain,
    const Tensor& bias, const OptionalTensor& noise, double strength, double slope,
    const OptionalTensor& style, at::ArrayRef<double> filter, std::optional<Tensor> rgb,
    const OptionalTensor& rgb_weight, at::ArrayRef<double> rgb_bias) {
  TORCH_CHECK(size.size() == 4 && size[0] > 0, "tiles_conv3x3: expected (N, I, H, W), got ", size);
  const Index batch = size[0], inputs = size[1], outputs = gain.numel() / batch;
  const Index up = filter.empty() ? 1 : 2;
  const Grid in{batch, size[2], size[3]}, out{batch, up * size[2], up * size[3]};
  const Index pixels = out.height * out.width;
  TORCH_CHECK(
      x.numel() == tiles::blocks_of(inputs) * in.positions() * kBlock && x.is_contiguous() &&
          weight.numel() == tiles::packed_size(outputs, inputs, filter.empty() ? 9 : 18),
      "tiles_conv3x3: images or weights are not of the sizes ", size, " and ", outputs);
  TORCH_CHECK(slope >= 0 && slope <= 1, "tiles_conv3x3: a slope of ", slope);
  TORCH_CHECK(filter.empty() || (filter.size() == 4 && !rgb), "tiles_conv3x3: upsampling without RGB");
  const auto gains = padded(gain, batch, outputs), biases = padded(bias, 1, outputs);
  const Tensor scales = style ? away_from_zero(*style) : at::ones({batch, outputs});
  const auto styles = padded(scales, batch, outputs);
  const auto maps = checked("noise", noise, gain, noise && noise->size(0) == 1 ? 1 : batch, pixels);
  Tensor y = empty_planes(out, outputs);
  const tiles::Layer layer{
      .in = in,
      .out = out,
      .inputs = inputs,
      .outputs = outputs,
      .x = data(x),
      .weight = data(weight),
      .y = data(y),
      .gain = gains.data(),
      .bias = biases.data(),
      .style = styles.data(),
      .padded = static_cast<Index>(biases.size()),
      .noise = maps ? maps->const_data_ptr<float>() : nullptr,
      .noise_step = maps && maps->size(0) != 1 ? pixels : 0,
      .strength = static_cast<float>(strength),
      .slope = static_cast<float>(slope),
      .filter = filter.empty() ? nullptr : filter.data()};
  std::optional<ToRGB> to_rgb;
  if (rgb) to_rgb.emplace(*rgb, rgb_weight.value(), rgb_bias, out, styles, outputs);
  run_layer(layer, to_rgb ? &*to_rgb : nullptr);
  return y;
}

#else

bool tiles_available() { return false; }

#endif

}  // namespace
}  // namespace stylegan

TORCH_LIBRARY_FRAGMENT(stylegan, m) {
  m.def("tiles_available() -> bool", &stylegan::tiles_available);
  m.def("tiles_pack(Tensor weight, int[] groups) -> Tensor");
  m.def("tiles_input(Tensor x, Tensor style) -> Tensor");
  m.def(
      "tiles_conv3x3(Tensor x, int[] size, Tensor weight, Tensor gain, Tensor bias, Tensor? noise, "
      "float strength, float slope, Tensor? style, float[] filter, Tensor(a!)? rgb, "
      "Tensor? rgb_weight, float[] rgb_bias) -> Tensor");
}

#ifdef STYLEGAN_TILES
TORCH_LIBRARY_IMPL(stylegan, CPU, m) {
  m.impl("tiles_pack", &stylegan::tiles_pack);
  m.impl("tiles_input", &stylegan::tiles_input);
  m.impl("tiles_conv3x3", &stylegan::tiles_conv3x3);
}
#endif
