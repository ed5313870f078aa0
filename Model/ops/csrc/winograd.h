// 3 x 3 convolution by minimal filtering F(4 x 4, 3 x 3) (Winograd 1980; Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016): 36 products for 16 outputs instead of
// 144. Plain pointers and vectors of the processor's width; who calls it shares out the work.
//
// A 4 x 4 tile of outputs sees 6 x 6 inputs. Both directions interpolate at 0, +-3/4, +-3/2 and
// infinity: these points lose half as many digits as the usual 0, +-1, +-2.
#pragma once

#include <cstdint>
#include <cstring>

namespace stylegan::winograd {

using Index = int64_t;

constexpr int kTile = 4, kSpan = 6, kProducts = kSpan * kSpan;

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8, kColumns = 3;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 6, kColumns = 2;  // 12 of 16
#else
constexpr int kBytes = 16, kRows = 8, kColumns = 2;  // 16 of 32 (NEON); SSE2 spills some
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr Index kLanes = kBytes / sizeof(T);

constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

template <class T>
Vector<T> load(const T* from, Index count = kLanes<T>) {
  Vector<T> v{};
  if (count >= kLanes<T>) {
    std::memcpy(&v, from, kBytes);
  } else {
    std::memcpy(&v, from, count * sizeof(T));
  }
  return v;
}

template <class T>
void store(T* to, Vector<T> v, Index count = kLanes<T>) {
  if (count >= kLanes<T>) {
    std::memcpy(to, &v, kBytes);
  } else {
    std::memcpy(to, &v, count * sizeof(T));
  }
}

/// Calls block(first channel) for blocks of whole vectors; the last may overlap the one before, which
/// spares loops over what is left. Fewer channels than a vector has are one block.
template <class T, class Block>
void by_vectors(Index channels, Block block) {
  for (Index c = 0; c < channels; c += kLanes<T>) {
    block(channels < kLanes<T> ? 0 : (c < channels - kLanes<T> ? c : channels - kLanes<T>));
  }
}

// The points +-a and +-b, and what the transforms need of them.
template <class T>
struct Points {
  static constexpr T a = T(0.75), b = T(1.5), p = a * a, q = b * b;
};

/// Six inputs of a line to six values to multiply.
template <class T, class V>
void transform_input(const V* d, V* out, int step) {
  using P = Points<T>;
  const V even_a = d[4] - P::q * d[2], odd_a = P::a * (d[3] - P::q * d[1]);
  const V even_b = d[4] - P::p * d[2], odd_b = P::b * (d[3] - P::p * d[1]);
  out[0] = P::p * P::q * d[0] - (P::p + P::q) * d[2] + d[4];
  out[step] = even_a + odd_a;
  out[2 * step] = even_a - odd_a;
  out[3 * step] = even_b + odd_b;
  out[4 * step] = even_b - odd_b;
  out[5 * step] = P::p * P::q * d[1] - (P::p + P::q) * d[3] + d[5];
}

/// Three weights of a line to six values to multiply.
template <class T, class V>
void transform_weight(const V* g, int from_step, V* out, int step) {
  using P = Points<T>;
  constexpr T of_zero = 1 / (P::p * P::q);
  constexpr T of_a = 1 / (2 * P::p * (P::p - P::q)), of_b = 1 / (2 * P::q * (P::q - P::p));
  const V g0 = g[0], g1 = g[from_step], g2 = g[2 * from_step];
  const V even_a = of_a * (g0 + P::p * g2), odd_a = of_a * P::a * g1;
  const V even_b = of_b * (g0 + P::q * g2), odd_b = of_b * P::b * g1;
  out[0] = of_zero * g0;
  out[step] = even_a + odd_a;
  out[2 * step] = even_a - odd_a;
  out[3 * step] = even_b + odd_b;
  out[4 * step] = even_b - odd_b;
  out[5 * step] = g2;
}

/// Six products of a line to four outputs.
template <class T, class V>
void transform_output(const V* m, int from_step, V* out, int step) {
  using P = Points<T>;
  const V m1 = m[from_step], m2 = m[2 * from_step], m3 = m[3 * from_step], m4 = m[4 * from_step];
  const V even_a = m1 + m2, odd_a = P::a * (m1 - m2), even_b = m3 + m4, odd_b = P::b * (m3 - m4);
  out[0] = m[0] + even_a + even_b;
  out[step] = odd_a + odd_b;
  out[2 * step] = P::p * even_a + P::q * even_b;
  out[3 * step] = P::p * odd_a + P::q * odd_b + m[5 * from_step];
}

/// Inputs, weights and products of a layer, each as 36 matrices, one after another. Something is put
/// between these: at multiples of a power of two, their rows would compete for the same cache lines.
struct Sizes {
  Index inputs, outputs, tiles;  // channels, channels, tiles in a chunk
  Index output_step;  // outputs rounded up to whole vectors
  Index weight_matrix, input_matrix, product_matrix;  // from one matrix to the next

  template <class T>
  static Sizes of(Index inputs, Index outputs, Index tiles) {
    const Index step = round_up(outputs, kLanes<T>), gap = 64 / sizeof(T);
    return {
        inputs, outputs, tiles, step, inputs * step + gap, round_up(tiles * inputs, gap) + gap,
        tiles * step + gap};
  }
};

/// Channels-last images and how tiles cover them.
struct Grid {
  Index batch, height, width, rows, columns;

  static Grid of(Index batch, Index height, Index width) {
    return {
        batch, height, width, (height + kTile - 1) / kTile, (width + kTile - 1) / kTile};
  }
  Index tiles() const { return batch * rows * columns; }
};

/// Columns of the weights' matrices that a block of products takes at once.
template <class T>
constexpr Index kPanel = kColumns * kLanes<T>;

template <class T>
Index panels(const Sizes& s) {
  return (s.output_step + kPanel<T> - 1) / kPanel<T>;
}

/// Columns of a panel; the last may have fewer than the others.
template <class T>
Index columns_of(const Sizes& s, Index panel) {
  const Index left = s.output_step - panel * kPanel<T>;
  return left < kPanel<T> ? left : kPanel<T>;
}

/// Transforms the weights (O, I, 3, 3) of one panel and input channel. The panel's 36 matrices begin
/// at u, `step` from one to the next.
template <class T>
void pack_weights(T* u, Index step, const T* weight, const Sizes& s, Index panel, Index input) {
  constexpr Index lanes = kLanes<T>;
  const Index columns = columns_of<T>(s, panel);
  for (Index c = 0; c < columns; c += lanes) {
    const Index first = panel * kPanel<T> + c;
    T gathered[9][lanes] = {};
    for (Index j = 0; j < lanes && first + j < s.outputs; ++j) {
      const T* g = weight + ((first + j) * s.inputs + input) * 9;
      for (int i = 0; i < 9; ++i) gathered[i][j] = g[i];
    }
    Vector<T> weights[9], lines[kSpan * 3], values[kProducts];
    for (int i = 0; i < 9; ++i) weights[i] = load(gathered[i]);
    for (int x = 0; x < 3; ++x) transform_weight<T>(weights + x, 3, lines + x, 3);
    for (int y = 0; y < kSpan; ++y) transform_weight<T>(lines + 3 * y, 1, values + kSpan * y, 1);
    for (int k = 0; k < kProducts; ++k) {
      store(u + k * step + input * columns + c, values[k]);
    }
  }
}

/// Transforms the inputs of one tile, scaled by `style` (I,) if there is one, into row `row` of the
/// matrices v. `zeros` stands for pixels outside the image.
template <class T>
void gather_tile(
    T* v, const T* x, const T* style, const T* zeros, const Sizes& s, const Grid& g, Index tile,
    Index row) {
  const Index image = tile / (g.rows * g.columns), place = tile % (g.rows * g.columns);
  const Index top = place / g.columns * kTile - 1, left = place % g.columns * kTile - 1;
  const T* pixels[kProducts];
  for (int i = 0; i < kProducts; ++i) {
    const Index py = top + i / kSpan, px = left + i % kSpan;
    const bool inside = py >= 0 && py < g.height && px >= 0 && px < g.width;
    pixels[i] = inside ? x + ((image * g.height + py) * g.width + px) * s.inputs : zeros;
  }
  const T* styles = style ? style + image * s.inputs : nullptr;
  by_vectors<T>(s.inputs, [&](Index c) {
    Vector<T> lines[kProducts], column[kSpan], values[kSpan];
    const Vector<T> factor = styles ? load(styles + c, s.inputs) : Vector<T>{} + T(1);
    for (int px = 0; px < kSpan; ++px) {
      for (int py = 0; py < kSpan; ++py) {
        column[py] = factor * load(pixels[py * kSpan + px] + c, s.inputs);
      }
      transform_input<T>(column, lines + px, kSpan);
    }
    for (int py = 0; py < kSpan; ++py) {
      transform_input<T>(lines + py * kSpan, values, 1);
      T* to = v + py * kSpan * s.input_matrix + row * s.inputs + c;
      for (int px = 0; px < kSpan; ++px, to += s.input_matrix) store(to, values[px], s.inputs);
    }
  });
}

/// kRows rows of one panel of one product: c = a b, with a's rows `a_step` apart, c's `c_step`.
/// Sums of many terms are made of sums of 128, which halves their rounding errors.
template <int COLUMNS, class T>
void multiply_block(T* c, const T* a, const T* b, Index depth, Index a_step, Index c_step) {
  constexpr Index lanes = kLanes<T>;
  for (Index first = 0; first < depth; first += 128) {
    const Index stop = depth - first < 128 ? depth : first + 128;
    Vector<T> sums[kRows][COLUMNS] = {};
    for (Index k = first; k < stop; ++k, b += COLUMNS * lanes) {
      Vector<T> line[COLUMNS];
      for (int j = 0; j < COLUMNS; ++j) line[j] = load(b + j * lanes);
      for (int i = 0; i < kRows; ++i) {
        const T factor = a[i * a_step + k];
        for (int j = 0; j < COLUMNS; ++j) sums[i][j] += factor * line[j];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < COLUMNS; ++j) {
        T* to = c + i * c_step + j * lanes;
        store(to, first ? load(to) + sums[i][j] : sums[i][j]);
      }
    }
  }
}

/// All rows of one panel of a product (rounded up to kRows): its columns are whole vectors.
template <class T>
void multiply_panel(
    T* c, const T* a, const T* b, Index columns, Index rows, Index depth, Index c_step) {
  for (Index row = 0; row < rows; row += kRows, a += kRows * depth, c += kRows * c_step) {
    switch (columns / kLanes<T>) {
      case 1: multiply_block<1>(c, a, b, depth, depth, c_step); break;
      case 2: multiply_block<2>(c, a, b, depth, depth, c_step); break;
      default: multiply_block<kColumns>(c, a, b, depth, depth, c_step);
    }
  }
}

/// One panel of one of the 36 matrix products m = v u, for all tiles of the chunk; u and `step` as of
/// `pack_weights`.
template <class T>
void multiply(
    T* m, const T* v, const T* u, Index step, const Sizes& s, Index product, Index panel) {
  T* to = m + product * s.product_matrix + panel * kPanel<T>;
  const T* from = v + product * s.input_matrix;
  multiply_panel(
      to, from, u + product * step, columns_of<T>(s, panel), s.tiles, s.inputs, s.output_step);
}

/// Transforms row `row` of the products back into the outputs (4, 4, O) of a tile, and calls
/// finish(pixels, image, first pixel, count) for each of its lines that is in the image.
template <class T, class Finish>
void scatter_tile(
    T* outputs, const T* m, const Sizes& s, const Grid& g, Index tile, Index row, Finish finish) {
  const T* from = m + row * s.output_step;
  by_vectors<T>(s.outputs, [&](Index c) {
    Vector<T> column[kSpan], lines[kTile * kSpan], values[kTile];
    for (int px = 0; px < kSpan; ++px) {
      for (int py = 0; py < kSpan; ++py) {
        column[py] = load(from + (py * kSpan + px) * s.product_matrix + c);
      }
      transform_output<T>(column, 1, lines + px, kSpan);
    }
    T* pixel = outputs + c;
    for (int py = 0; py < kTile; ++py) {
      transform_output<T>(lines + py * kSpan, 1, values, 1);
      for (int px = 0; px < kTile; ++px, pixel += s.outputs) store(pixel, values[px], s.outputs);
    }
  });
  const Index image = tile / (g.rows * g.columns), place = tile % (g.rows * g.columns);
  const Index top = place / g.columns * kTile, left = place % g.columns * kTile;
  const Index height = g.height - top < kTile ? g.height - top : kTile;
  const Index width = g.width - left < kTile ? g.width - left : kTile;
  for (Index py = 0; py < height; ++py) {
    finish(outputs + py * kTile * s.outputs, image, (top + py) * g.width + left, width);
  }
}

}  // namespace stylegan::winograd
