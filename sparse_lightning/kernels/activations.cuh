// Activations, their derivatives, and the epilogues that apply them to the results of a product.

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

// Applies f to corresponding elements of two vectors of eight.
template <typename T, typename F>
__device__ uint4 map_elements(uint4 first, uint4 second, F f) {
  unsigned *a = reinterpret_cast<unsigned*>(&first), *b = reinterpret_cast<unsigned*>(&second);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    auto low = [](unsigned word) { return widen(T{(unsigned short)word}); };
    auto high = [](unsigned word) { return widen(T{(unsigned short)(word >> 16)}); };
    a[i] = round_to<T>(f(low(a[i]), low(b[i]))).bits |
           (unsigned)round_to<T>(f(high(a[i]), high(b[i]))).bits << 16;
  }
  return first;
}

// Calls epilogue.store_as<A>(...) for the epilogue's activation A.
template <typename Epilogue, typename T>
__device__ void dispatch_activation(const Epilogue& epilogue, T* destination, uint4 results,
                                    uint4 loaded) {
  switch (epilogue.activation) {
    case RELU:
      return epilogue.template store_as<RELU>(destination, results, loaded);
    case GELU:
      return epilogue.template store_as<GELU>(destination, results, loaded);
    case GELU_TANH:
      return epilogue.template store_as<GELU_TANH>(destination, results, loaded);
    case SILU:
      return epilogue.template store_as<SILU>(destination, results, loaded);
  }
}

// Stores the results h and, `aux_offset` elements further, their activations.
template <typename T>
struct ActivationEpilogue {
  long long aux_offset;
  int activation;
  __device__ uint4 load(const T*) const { return {}; }
  __device__ void store(T* destination, uint4 h, uint4 none) const {
    *reinterpret_cast<uint4*>(destination) = h;
    dispatch_activation(*this, destination + aux_offset, h, none);
  }
  template <int A>
  __device__ void store_as(T* destination, uint4 h, uint4) const {
    *reinterpret_cast<uint4*>(destination) =
        map_elements<T>(h, h, [](float x, float) { return activate<A>(x); });
  }
};

// Turns results, the gradient of an activation's output, into that of its input h, which is loaded
// from `aux_offset` elements further.
template <typename T>
struct ActivationGradientEpilogue {
  long long aux_offset;
  int activation;
  __device__ uint4 load(const T* destination) const {
    return *reinterpret_cast<const uint4*>(destination + aux_offset);
  }
  __device__ void store(T* destination, uint4 results, uint4 h) const {
    dispatch_activation(*this, destination, results, h);
  }
  template <int A>
  __device__ void store_as(T* destination, uint4 results, uint4 h) const {
    *reinterpret_cast<uint4*>(destination) =
        map_elements<T>(results, h, [](float dy, float x) { return dy * derivative<A>(x); });
  }
};

// Stores eight results at `destination`, with an activation's epilogue if there is `aux`: the
// tensor, laid out like y, that receives the activation (FORWARD) or holds its input.
template <bool FORWARD, typename T>
__device__ void store_activated(T* destination, uint4 results, const T* y, const T* aux,
                                int activation) {
  if (!aux) {
    *reinterpret_cast<uint4*>(destination) = results;
  } else if constexpr (FORWARD) {
    ActivationEpilogue<T>{aux - y, activation}.store(destination, results, {});
  } else {
    const ActivationGradientEpilogue<T> epilogue{aux - y, activation};
    epilogue.store(destination, results, epilogue.load(destination));
  }
}
