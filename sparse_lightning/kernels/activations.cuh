// Activations and their derivatives.

#pragma once
#include "common.cuh"

// In the order of `ACTIVATIONS` in activations.py.
enum Activation { RELU, GELU, GELU_TANH, SILU };

// e^x and 1 / x within 1e-7. Subnormal numbers are flushed to zero; `__expf` and `__fdividef`,
// which keep them, need several more instructions each.
__device__ inline float fast_exp(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(1.44269504f * x));
  return out;
}
__device__ inline float fast_reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ inline float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp(-x)); }

// The standard normal density and cumulative distribution at x: within 1e-7, by the rational
// approximation of erf in Abramowitz and Stegun, 7.1.26. (`erff` takes twice as long.)
struct Normal {
  float density, cumulative;
  __device__ explicit Normal(float x) {
    const float exponential = fast_exp(-0.5f * x * x);
    const float t = fast_reciprocal(1.f + 0.3275911f * 0.70710678f * fabsf(x));
    const float series =
        t * (0.254829592f +
             t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * series * exponential;
    density = 0.39894228f * exponential;
    cumulative = x < 0 ? tail : 1 - tail;
  }
};

// gelu_tanh(x) = x sigmoid(2 u(x)): 1 + tanh(u) without the cancellation.
__device__ inline float twice_u(float x) { return 1.5957691f * (x + 0.044715f * x * x * x); }

template <int A>
__device__ float activate(float x) {
  if constexpr (A == RELU) return x < 0 ? 0 : x;  // propagates NaN
  if constexpr (A == GELU) return x * Normal(x).cumulative;
  if constexpr (A == GELU_TANH) return x * sigmoid(twice_u(x));
  if constexpr (A == SILU) return x * sigmoid(x);
}

template <int A>
__device__ float derivative(float x) {
  if constexpr (A == RELU) return x > 0;
  if constexpr (A == GELU) {
    const Normal normal(x);
    return normal.cumulative + x * normal.density;
  }
  if constexpr (A == GELU_TANH) {
    const float s = sigmoid(twice_u(x));
    return s + x * s * (1 - s) * 1.5957691f * (1 + 3 * 0.044715f * x * x);
  }
  if constexpr (A == SILU) {
    const float s = sigmoid(x);
    return s * (1 + x * (1 - s));
  }
}
