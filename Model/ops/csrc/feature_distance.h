// The distance of two pictures' features by LPIPS, and its gradient: a pixel at a time, with the
// features of a pixel side by side, so that neither unit vectors nor their differences are written.
#pragma once

#include <cmath>
#include <cstdint>

namespace stylegan::features {

/// 1 / (|x| + eps): what makes a vector's length one.
template <class T>
T to_unit(const T* x, int64_t channels, T eps) {
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < channels; ++c) squares += x[c] * x[c];
  return T(1) / (std::sqrt(squares) + eps);
}

/// The unit vectors u of a and v of b. Their difference is taken before a's length is divided by,
/// so that that of equal vectors is 0 however the compiler contracts products and sums.
template <class T>
struct Units {
  T of_a, of_b, ratio;

  Units(const T* a, const T* b, int64_t channels, T eps)
      : of_a(to_unit(a, channels, eps)), of_b(to_unit(b, channels, eps)), ratio(of_b / of_a) {}

  T difference(T a, T b) const { return (a - b * ratio) * of_a; }
};

/// Sum over pixels of  sum_c w_c (u_c - v_c)^2.
template <class T>
double distance(
    const T* a, const T* b, const T* weight, int64_t channels, int64_t pixels, T eps) {
  double total = 0;
  for (int64_t p = 0; p < pixels; ++p, a += channels, b += channels) {
    const Units<T> units(a, b, channels, eps);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < channels; ++c) {
      const T difference = units.difference(a[c], b[c]);
      sum += weight[c] * difference * difference;
    }
    total += sum;
  }
  return total;
}

/// Gradients of `grad` times the distance: with D = 2 grad w (u - v), that by a is (D - u (u D)) / m
/// and that by b is (v (v D) - D) / n, m and n the divisors. Null pointers stand for "not wanted".
template <class T>
void gradients(
    T grad, const T* a, const T* b, const T* weight, int64_t channels, int64_t pixels, T eps,
    T* by_a, T* by_b) {
  const T twice = 2 * grad;
  for (int64_t p = 0; p < pixels; ++p, a += channels, b += channels) {
    const Units<T> units(a, b, channels, eps);
    T along_a = 0, along_b = 0;  // a D and b D, then u D / m and v D / n
#pragma omp simd reduction(+ : along_a, along_b)
    for (int64_t c = 0; c < channels; ++c) {
      const T d = twice * weight[c] * units.difference(a[c], b[c]);
      along_a += a[c] * d;
      along_b += b[c] * d;
    }
    along_a *= units.of_a * units.of_a, along_b *= units.of_b * units.of_b;
    if (by_a) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const T d = twice * weight[c] * units.difference(a[c], b[c]);
        by_a[c] = (d - a[c] * along_a) * units.of_a;
      }
      by_a += channels;
    }
    if (by_b) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const T d = twice * weight[c] * units.difference(a[c], b[c]);
        by_b[c] = (b[c] * along_b - d) * units.of_b;
      }
      by_b += channels;
    }
  }
}

}  // namespace stylegan::features
