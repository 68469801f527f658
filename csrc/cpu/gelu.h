// The exact GELU, x times the normal distribution function.
#pragma once
#include "simd.h"

namespace {

// Absolute error 6e-9 and float32 rounding. The distribution function below -|x| is a polynomial in 1 / (1 + 0.28 |x|)
// times exp(-x^2 / 2), the form of Abramowitz and Stegun 7.1.26 with one term more; coefficients by weighted least
// squares, iterated to an even error. Infinities and NaN come out as from x * (1 + erf(x / sqrt 2)) / 2.
DK_INLINE vf gelu(vf x) {
  const vf distance = max_keep_nan(-x, x);
  const vf u = set1(1.0f) / fma(set1(0.28f), distance, set1(1.0f));
  constexpr float kCoefficients[] = {-0.10703724f, 0.39494509f, -0.24530911f, 0.27568244f, 0.06475829f, 0.11696051f};
  vf tail = set1(kCoefficients[0]);
  DK_UNROLL
  for (int i = 1; i < 6; i++) tail = fma(tail, u, set1(kCoefficients[i]));
  tail = tail * u * exp2_nonpositive(distance * distance * set1(-0.5f * 1.44269504f));
  return x * where_positive(x, set1(1.0f) - tail, tail);
}

}  // namespace
