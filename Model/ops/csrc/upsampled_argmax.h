// The class of every pixel of a picture: logit maps enlarged bilinearly, and the largest of them.
// One row at a time, so that the enlarged maps, as many as there are classes, are never written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace stylegan::argmax {

/// Between which two samples of a line each sample of an enlarged line lies, and how far along.
struct Between {
  std::vector<int32_t> low, high;
  std::vector<float> share;

  /// `corners`: the outermost samples coincide; otherwise the lines' ends do.
  Between(int64_t from, int64_t to, bool corners) : low(to), high(to), share(to) {
    const float apart = corners ? (to > 1 ? float(from - 1) / float(to - 1) : 0.f)
                                : float(from) / float(to);
    for (int64_t i = 0; i < to; ++i) {
      const float at = corners ? apart * i : std::max(apart * (i + 0.5f) - 0.5f, 0.f);
      low[i] = std::min<int32_t>(static_cast<int32_t>(at), from - 1);
      high[i] = std::min<int32_t>(low[i] + 1, from - 1);
      share[i] = at - low[i];
    }
  }
};

/// Finds the classes of rows, counted over all images, of maps (N, classes, height, width).
class Rows {
 public:
  Rows(const float* maps, int64_t classes, int64_t height, int64_t width, const Between& down,
       const Between& across)
      : maps_(maps), classes_(classes), height_(height), width_(width), down_(down),
        across_(across) {}

  void find(int64_t* to, int64_t begin, int64_t end) const {
    const int64_t rows = down_.low.size(), columns = across_.low.size();
    std::vector<float> line(width_), best(columns);
    std::vector<int32_t> found(columns);
    for (int64_t row = begin; row < end; ++row) {
      const float* image = maps_ + row / rows * classes_ * height_ * width_;
      std::fill(found.begin(), found.end(), 0);
      for (int64_t c = 0; c < classes_; ++c) {
        mix(line.data(), image + c * height_ * width_, row % rows);
        contend(best.data(), found.data(), line.data(), static_cast<int32_t>(c));
      }
      std::copy(found.begin(), found.end(), to + row * columns);
    }
  }

 private:
  /// A line between two of a map.
  void mix(float* line, const float* map, int64_t row) const {
    const float* above = map + down_.low[row] * width_;
    const float* below = map + down_.high[row] * width_;
    const float share = down_.share[row];
#pragma omp simd
    for (int64_t i = 0; i < width_; ++i) line[i] = above[i] + share * (below[i] - above[i]);
  }

  /// Enlarges a class's line and takes the pixels where it exceeds all classes before.
  void contend(float* best, int32_t* found, const float* line, int32_t c) const {
    const int32_t* low = across_.low.data();
    const int32_t* high = across_.high.data();
    const float* share = across_.share.data();
    const int64_t columns = across_.low.size();
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const float left = line[low[i]], value = left + share[i] * (line[high[i]] - left);
      const bool larger = c == 0 || value > best[i];
      best[i] = larger ? value : best[i];
      found[i] = larger ? c : found[i];
    }
  }

  const float* maps_;
  int64_t classes_, height_, width_;
  const Between& down_;
  const Between& across_;
};

}  // namespace stylegan::argmax
