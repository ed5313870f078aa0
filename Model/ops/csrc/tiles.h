// StyleGAN2's 3 x 3 layers in bfloat16 on the tiles of AMX (Intel, "Architecture Instruction Set
// Extensions Programming Reference", chapter 3): eight registers of 16 rows of 64 bytes, of which
// one instruction adds to a 16 x 16 matrix of floats a 16 x 32 matrix times a 32 x 16 matrix of
// bfloat16. Plain pointers; who calls it shares out the work.
//
// Images lie in planes of 32 channels, of which a pixel fills a cache line, so that 16 pixels are a
// tile. Each line of pixels ends with a zero, and lines of zeros separate the images. Thus a plane is
// one long row of pixels in which the neighbours of a pixel are at the same distances everywhere,
// and tiles need not end where lines do: what they compute at the zeros is thrown away.
#pragma once

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define STYLEGAN_TILES

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace stylegan::tiles {

using Index = int64_t;
using Bfloat16 = uint16_t;

constexpr Index kTile = 16;   // rows of a tile: pixels, or pairs of channels
constexpr Index kBlock = 32;  // channels of a plane, and most outputs that are computed together
constexpr Index kTileValues = kTile * kBlock;
constexpr Index kSums = 1024;  // four tiles of sums: 32 pixels x 32 outputs, or 64 x 16

constexpr Index blocks_of(Index channels) { return (channels + kBlock - 1) / kBlock; }

/// Asks Linux for the use of tile registers, which are no part of a process's state until then.
inline bool permitted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

/// All tile registers at their full size, for a thread, as long as this lives.
class Registers {
 public:
  Registers() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Registers() { _tile_release(); }
  Registers(const Registers&) = delete;
};

/// How images lie in a plane. Position 0 is a pixel's own, lines are `pitch` apart.
struct Grid {
  Index batch, height, width;

  Index pitch() const { return width + 1; }
  /// The first pixel of a line; lines -1 and `height` of an image are zeros, and one more line can
  /// be read before the first image, though not used.
  Index line(Index image, Index row) const {
    return (image * (height + 1) + row + 2) * pitch() + 1;
  }
  /// Pixels of a plane, with those that the last tiles read beyond the images.
  Index positions() const { return line(batch - 1, height + 1) + 5 * kTile; }
};

/// Zeros around image `image` of a plane.
inline void clear_borders(Bfloat16* plane, const Grid& g, Index image) {
  const Index below = g.line(image, g.height);
  std::memset(plane + below * kBlock, 0, g.pitch() * 64);
  if (image == 0) std::memset(plane + (g.line(0, -1) - 1) * kBlock, 0, (g.pitch() + 1) * 64);
}

inline Bfloat16 rounded(float value) {
  const __m128bh half = _mm_cvtneps_pbh(_mm_set_ss(value));
  return reinterpret_cast<const __m128i&>(half)[0] & 0xffff;
}

// --- Weights --------------------------------------------------------------------------------------

/// Tiles of outputs that are computed together, from output 32 `block` on.
inline Index width_of(Index outputs, Index block) {
  return outputs - block * kBlock > kTile ? 2 : 1;
}

/// Values of packed weights before those of output 32 `block`.
inline Index weights_before(Index block, Index inputs, Index taps) {
  return block * 2 * taps * blocks_of(inputs) * kTileValues;
}

inline Index packed_size(Index outputs, Index inputs, Index taps) {
  return (outputs + kTile - 1) / kTile * taps * blocks_of(inputs) * kTileValues;
}

/// Packs the weights of one block of outputs and of taps `first` to `last` - 1, which are added up
/// together: by block of inputs, tap, and tile of outputs, a tile having pairs of inputs as its rows.
/// Returns the end of what is written.
template <class Weight>
Bfloat16* pack(
    Bfloat16* to, Index outputs, Index inputs, Index block, Index first, Index last, Weight weight) {
  for (Index k = 0; k < blocks_of(inputs); ++k) {
    for (Index tap = first; tap < last; ++tap) {
      for (Index tile = 0; tile < width_of(outputs, block); ++tile) {
        for (Index at = 0; at < kTileValues; ++at, ++to) {
          const Index i = k * kBlock + at / kBlock * 2 + at % 2;
          const Index o = block * kBlock + tile * kTile + at % kBlock / 2;
          *to = i < inputs && o < outputs ? rounded(weight(o, i, tap)) : 0;
        }
      }
    }
  }
  return to;
}

// --- Products -------------------------------------------------------------------------------------

/// What pixels are multiplied by: `count` weights for neighbours at distances `taps`, in every plane.
struct Factors {
  Index plane, planes;  // from one plane of the images to the next, and their number
  int count;
  const Index* taps;
};

/// Zeros in the four tiles of sums.
inline void clear_sums() {
  asm volatile("" ::: "memory");  // which the intrinsics to come do not say that they read
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

/// to (32, 32) = 32 pixels from x on times packed weights of 32 outputs.
inline void multiply_32x32(float* to, const Bfloat16* x, const Factors& f, const Bfloat16* w) {
  clear_sums();
  for (Index k = 0; k < f.planes; ++k, x += f.plane) {
    for (int t = 0; t < f.count; ++t, w += 2 * kTileValues) {
      const Bfloat16* pixels = x + f.taps[t] * kBlock;
      _tile_loadd(6, w, 64);
      _tile_loadd(4, pixels, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + kTileValues, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, pixels + kTileValues, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, 128);
  _tile_stored(1, to + 16, 128);
  _tile_stored(2, to + 512, 128);
  _tile_stored(3, to + 528, 128);
}

/// to (64, 16) = 64 pixels from x on times packed weights of 16 outputs.
inline void multiply_64x16(float* to, const Bfloat16* x, const Factors& f, const Bfloat16* w) {
  clear_sums();
  for (Index k = 0; k < f.planes; ++k, x += f.plane) {
    for (int t = 0; t < f.count; ++t, w += kTileValues) {
      const Bfloat16* pixels = x + f.taps[t] * kBlock;
      _tile_loadd(7, w, 64);
      _tile_loadd(4, pixels, 64);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(5, pixels + kTileValues, 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, pixels + 2 * kTileValues, 64);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(4, pixels + 3 * kTileValues, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, to, 64);
  _tile_stored(1, to + 256, 64);
  _tile_stored(2, to + 512, 64);
  _tile_stored(3, to + 768, 64);
}

/// Pixels that are multiplied at once by N tiles of outputs.
template <Index N>
constexpr Index kPixels = kSums / (N * kTile);

template <Index N>
void multiply(float* to, const Bfloat16* x, const Factors& f, const Bfloat16* w) {
  N == 2 ? multiply_32x32(to, x, f, w) : multiply_64x16(to, x, f, w);
}

// --- A layer --------------------------------------------------------------------------------------

/// A styled 3 x 3 layer: y = style * leaky_relu(gain * convolution(x) + strength * noise + bias), where
/// x is scaled by this layer's style already, and y by the next one's.
struct Layer {
  Grid in, out;
  Index inputs, outputs;
  const Bfloat16* x;
  const Bfloat16* weight;
  Bfloat16* y;
  const float *gain, *bias, *style;  // (N, padded), (padded), (N, padded)
  Index padded;  // outputs, and zeros up to whole blocks
  const float* noise;  // (1 or N, pixels), or null
  Index noise_step;
  float strength, slope;
  const double* filter;  // four taps by row of an upsampling layer's blur, or null

  Bfloat16* plane(Index block) const { return y + block * out.positions() * kBlock; }
};

/// What follows the convolution, for 16 N outputs of an image.
template <Index N>
class Activation {
 public:
  Activation(const Layer& l, Index image, Index block) : slope_(_mm512_set1_ps(l.slope)) {
    for (Index j = 0; j < N; ++j) {
      const Index at = block * kBlock + j * kTile;
      gain_[j] = _mm512_loadu_ps(l.gain + image * l.padded + at);
      bias_[j] = _mm512_loadu_ps(l.bias + at);
      style_[j] = _mm512_loadu_ps(l.style + image * l.padded + at);
    }
  }

  /// Activates one pixel, and zeros where fewer than 32 channels are computed.
  void operator()(Bfloat16* to, const __m512* sums, float shift) const {
    __m512 v[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (Index j = 0; j < N; ++j) {
      const __m512 offset = _mm512_add_ps(bias_[j], _mm512_set1_ps(shift));
      const __m512 x = _mm512_fmadd_ps(sums[j], gain_[j], offset);
      v[j] = _mm512_mul_ps(_mm512_max_ps(x, _mm512_mul_ps(x, slope_)), style_[j]);
    }
    const __m512bh halves = _mm512_cvtne2ps_pbh(v[1], v[0]);
    std::memcpy(to, &halves, 64);
  }

 private:
  __m512 gain_[N], bias_[N], style_[N], slope_;
};

/// Rows `first` to `last` - 1 of one image and block of outputs of a convolution that keeps the size.
template <Index N>
void convolve(const Layer& l, Index image, Index first, Index last, Index block) {
  const Grid& g = l.in;
  const Index pitch = g.pitch(), begin = g.line(image, first), end = g.line(image, last);
  Index taps[9];
  for (Index t = 0; t < 9; ++t) taps[t] = (t / 3 - 1) * pitch + t % 3 - 1;
  const Factors factors{g.positions() * kBlock, blocks_of(l.inputs), 9, taps};
  const Bfloat16* weight = l.weight + weights_before(block, l.inputs, 9);
  const Activation<N> activate(l, image, block);
  const float* noise = l.noise ? l.noise + image * l.noise_step + first * g.width : nullptr;
  alignas(64) float sums[kSums];
  Index column = 0;
  for (Index at = begin; at < end; at += kPixels<N>) {
    multiply<N>(sums, l.x + at * kBlock, factors, weight);
    Bfloat16* to = l.plane(block) + at * kBlock;
    const auto* from = reinterpret_cast<const __m512*>(sums);
    for (Index i = 0; i < std::min(kPixels<N>, end - at); ++i, to += kBlock, from += N) {
      if (column == g.width) {
        std::memset(to, 0, 64);
        column = 0;
      } else {
        activate(to, from, noise ? l.strength * *noise++ : 0.0f);
        ++column;
      }
    }
  }
}

/// One output row of an upsampling layer: blurs the even and odd columns of the transposed convolution,
/// which come in turn, by row and activates what results.
template <Index N>
class Blur {
 public:
  explicit Blur(const double* filter) {
    for (int t = 0; t < 4; ++t) filter_[t] = _mm512_set1_ps(filter[t]);
  }

  /// Takes the first two columns of a row.
  void start(const __m512* even, const __m512* odd) {
    for (Index j = 0; j < N; ++j) {
      before_[j] = _mm512_setzero_ps(), even_[j] = even[j], odd_[j] = odd[j];
    }
  }

  /// Takes the next two columns and gives the two pixels between the ones before.
  void next(const __m512* even, const __m512* odd, __m512* left, __m512* right) {
    for (Index j = 0; j < N; ++j) {
      left[j] = weighted(before_[j], even_[j], odd_[j], even[j]);
      right[j] = weighted(even_[j], odd_[j], even[j], odd[j]);
      before_[j] = odd_[j], even_[j] = even[j], odd_[j] = odd[j];
    }
  }

 private:
  __m512 weighted(__m512 a, __m512 b, __m512 c, __m512 d) const {
    const __m512 sum = _mm512_fmadd_ps(filter_[1], b, _mm512_mul_ps(filter_[0], a));
    return _mm512_fmadd_ps(filter_[3], d, _mm512_fmadd_ps(filter_[2], c, sum));
  }

  __m512 filter_[4], before_[N], even_[N], odd_[N];
};

/// Blurs what was computed for `count` positions from `column` on, and activates it into rows `row`,
/// `row` + 2, ... of the output.
template <Index N>
void blur(
    const Layer& l, Index image, Index block, Index row, Index column, Index count,
    const float (*sums)[kSums], Blur<N>& state, const Activation<N>& activate) {
  const auto* even = reinterpret_cast<const __m512*>(sums[0]);
  const auto* odd = reinterpret_cast<const __m512*>(sums[1]);
  const Index width = l.in.width;
  while (count > 0) {
    const Index stop = std::min(column + count, width + 1);
    Bfloat16* to = l.plane(block) + l.out.line(image, row) * kBlock;
    const float* noise = l.noise ? l.noise + image * l.noise_step + 2 * row * width : nullptr;
    count -= stop - column;
    if (column == 0) state.start(even, odd), ++column, even += N, odd += N;
    for (; column < stop; ++column, even += N, odd += N) {
      __m512 left[N], right[N];
      state.next(even, odd, left, right);
      const Index at = 2 * (column - 1);
      activate(to + at * kBlock, left, noise ? l.strength * noise[at] : 0.0f);
      activate(to + (at + 1) * kBlock, right, noise ? l.strength * noise[at + 1] : 0.0f);
    }
    if (column > width) {
      std::memset(to + 2 * width * kBlock, 0, 64);
      column = 0, row += 2;
    }
  }
}

/// Rows 2 `first` to 2 `last` - 1 of one image and block of outputs of an upsampling layer. Its weights
/// are those of the transposed convolution, blurred by column: of even and odd rows, and of these of
/// even and odd columns.
template <Index N>
void upsample(const Layer& l, Index image, Index first, Index last, Index block) {
  const Grid& g = l.in;
  const Index pitch = g.pitch(), end = g.line(image, last), planes = blocks_of(l.inputs);
  const Index of_even[6] = {-pitch, -pitch - 1, 0, -1, pitch, pitch - 1};
  const Index of_odd[3] = {-pitch, 0, pitch};
  const Factors factors[2] = {
      {g.positions() * kBlock, planes, 6, of_even}, {g.positions() * kBlock, planes, 3, of_odd}};
  const Activation<N> activate(l, image, block);
  Blur<N> blurs[2] = {Blur<N>(l.filter), Blur<N>(l.filter)};
  alignas(64) float sums[4][kSums];
  Index row = first, column = 0;
  for (Index at = g.line(image, first); at < end; at += kPixels<N>) {
    const Bfloat16* weight = l.weight + weights_before(block, l.inputs, 18);
    for (int part = 0; part < 4; ++part) {
      multiply<N>(sums[part], l.x + at * kBlock, factors[part % 2], weight);
      weight += factors[part % 2].count * planes * N * kTileValues;
    }
    const Index count = std::min(kPixels<N>, end - at);
    for (int odd = 0; odd < 2; ++odd) {
      blur<N>(l, image, block, 2 * row + odd, column, count, sums + 2 * odd, blurs[odd], activate);
    }
    row += (column + count) / pitch;
    column = (column + count) % pitch;
  }
}

/// Rows of the input from `first` to `last` - 1 and one block of outputs of a layer.
inline void run(const Layer& l, Index image, Index first, Index last, Index block) {
  if (last == l.in.height) clear_borders(l.plane(block), l.out, image);
  const bool wide = width_of(l.outputs, block) == 2;
  const auto work = l.filter ? (wide ? upsample<2> : upsample<1>) : (wide ? convolve<2> : convolve<1>);
  work(l, image, first, last, block);
}

/// Adds rows `first` to `last` - 1 of an image in RGB to three maps: x times packed weights, plus bias.
inline void add_rgb(
    float* rgb, const Grid& g, const Bfloat16* x, Index inputs, const Bfloat16* weight,
    const double* bias, Index image, Index first, Index last) {
  const Index pixel = 0, map = g.height * g.width, end = g.line(image, last);
  const Factors factors{g.positions() * kBlock, blocks_of(inputs), 1, &pixel};
  alignas(64) float sums[kSums];
  float* to = rgb + first * g.width;
  Index column = 0;
  for (Index at = g.line(image, first); at < end; at += kPixels<1>) {
    multiply_64x16(sums, x + at * kBlock, factors, weight);
    for (Index i = 0; i < std::min(kPixels<1>, end - at); ++i) {
      if (column++ == g.width) {
        column = 0;
        continue;
      }
      for (Index c = 0; c < 3; ++c) to[c * map] += sums[i * kTile + c] + static_cast<float>(bias[c]);
      ++to;
    }
  }
}

}  // namespace stylegan::tiles

#endif
