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

// The distribution function at x, from the one below -|x|: a polynomial in u = 1 / (1 + 0.28 |x|) times the exponential
// of -x^2 / 2, which the caller gives; the form of Abramowitz and Stegun 7.1.26 with one term more. Error 6e-9;
// coefficients by weighted least squares, iterated to an even error.
DK_INLINE vf distribution(vf x, vf distance, vf exponential) {
  const vf u = set1(1.0f) / fma(set1(0.28f), distance, set1(1.0f));
  const vf tail =
      polynomial(u, {-0.10703724f, 0.39494509f, -0.24530911f, 0.27568244f, 0.06475829f, 0.11696051f}) * u * exponential;
  return where_positive(x, set1(1.0f) - tail, tail);
}

constexpr float kExponent = -0.5f * 1.44269504f;

// Float32 rounding dominates, and is no more than that of x * (1 + erf(x / sqrt 2)) / 2. Infinities and NaN come out as
// from that formula.
DK_INLINE vf gelu(vf x) {
  const vf distance = max_keep_nan(-x, x), square = distance * distance;
  // Below 1 the function is a half and an odd polynomial, so that it is rounded once: error of the GELU 3e-10,
  // coefficients as above, and rounded one after the other.
  const vf near = fma(x,
                      polynomial(square, {-7.93389518e-06f, 1.14370414e-04f, -1.18738168e-03f, 9.97390039e-03f,
                                          -6.64905012e-02f, 3.98942292e-01f}),
                      set1(0.5f));
  const vf far = distribution(x, distance, exp2_nonpositive(square * set1(kExponent)));
  return x * where_positive(set1(1.0f) - distance, near, far);
}

// For what is rounded to bfloat16 next: errors of a thousandth of its step.
DK_INLINE vf gelu_for_bfloat16(vf x) {
  const vf distance = max_keep_nan(-x, x);
  return x * distribution(x, distance, exp2_for_bfloat16(distance * distance * set1(kExponent)));
}

}  // namespace
