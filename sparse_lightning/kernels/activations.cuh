// Activations and their derivatives.

#pragma once
#include "common.cuh"

// In the order of `ACTIVATIONS` in activations.py.
enum Activation { RELU, GELU, GELU_TANH, SILU };

__device__ inline float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// The standard normal density and cumulative distribution at x: within 1e-7, by the rational
// approximation of erf in Abramowitz and Stegun, 7.1.26. (`erff` takes twice as long.)
struct Normal {
  float density, cumulative;
  __device__ explicit Normal(float x) {
    const float exponential = __expf(-0.5f * x * x);
    const float t = __fdividef(1.f, 1.f + 0.3275911f * 0.70710678f * fabsf(x));
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
