// The exact GELU, x times the normal distribution function.
#pragma once
#include "simd.h"

namespace {

template <int kTerms>
DK_INLINE vf polynomial(vf x, const float (&coefficient)[kTerms]) {
  vf p = set1(coefficient[0]);
  DK_UNROLL
  for (int i = 1; i < kTerms; i++) p = fma(p, x, set1(coefficient[i]));
  return p;
}

// Float32 rounding dominates, and is no more than that of x * (1 + erf(x / sqrt 2)) / 2. Infinities and NaN come out as
// from that formula.
DK_INLINE vf gelu(vf x) {
  const vf distance = max_keep_nan(-x, x), square = distance * distance;
  // Below 1 the distribution function is a half and an odd polynomial, so that it is rounded once: error of the GELU
  // 3e-10, coefficients by weighted least squares, iterated to an even error, and rounded one after the other.
  const vf near = fma(x, polynomial(square, {-7.93389518e-06f, 1.14370414e-04f, -1.18738168e-03f, 9.97390039e-03f,
                                             -6.64905012e-02f, 3.98942292e-01f}),
                      set1(0.5f));
  // Farther out the function below -|x| is a polynomial in u = 1 / (1 + 0.28 |x|) times exp(-x^2 / 2), the form of
  // Abramowitz and Stegun 7.1.26 with one term more: error 6e-9, coefficients by weighted least squares as well.
  const vf u = set1(1.0f) / fma(set1(0.28f), distance, set1(1.0f));
  const vf tail =
      polynomial(u, {-0.10703724f, 0.39494509f, -0.24530911f, 0.27568244f, 0.06475829f, 0.11696051f}) * u *
      exp2_nonpositive(square * set1(-0.5f * 1.44269504f));
  const vf far = where_positive(x, set1(1.0f) - tail, tail);
  return x * where_positive(set1(1.0f) - distance, near, far);
}

}  // namespace
