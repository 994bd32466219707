// Activations and their slopes, and what becomes of results on their way out: for kernels whose
// results are passed through an activation, or are gradients that come back through one.

#pragma once
#include "hopper/sm90.cuh"

// As `activations.py` numbers them.
enum Activation { RELU, GELU, GELU_TANH, SILU };

__device__ inline float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// The normal distribution's density, and its integral up to x: within 1e-7, by the rational
// approximation of erf in Abramowitz and Stegun, 7.1.26. (`erff` takes twice as long.)
struct Normal {
  float density, below;
  __device__ explicit Normal(float x) {
    const float exponential = __expf(-0.5f * x * x);
    const float t = __fdividef(1.f, 1.f + 0.3275911f * 0.70710678f * fabsf(x));
    const float series =
        t * (0.254829592f +
             t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * series * exponential;
    density = 0.39894228f * exponential;
    below = x < 0 ? tail : 1 - tail;
  }
};

// gelu_tanh(x) = x sigmoid(2 u(x)): 1 + tanh(u) without the cancellation.
__device__ inline float twice_u(float x) { return 1.5957691f * (x + 0.044715f * x * x * x); }

template <int A>
__device__ float activation(float x) {
  if constexpr (A == RELU) return x < 0 ? 0 : x;  // a NaN stays one
  if constexpr (A == GELU) return x * Normal(x).below;
  if constexpr (A == GELU_TANH) return x * sigmoid(twice_u(x));
  if constexpr (A == SILU) return x * sigmoid(x);
}

template <int A>
__device__ float slope(float x) {
  if constexpr (A == RELU) return x > 0;
  if constexpr (A == GELU) {
    const Normal normal(x);
    return normal.below + x * normal.density;
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

// Returns f(element, element of more) of eight elements each.
template <typename T, typename F>
__device__ uint4 each_of(uint4 eight, uint4 more, F f) {
  unsigned *words = reinterpret_cast<unsigned*>(&eight),
           *others = reinterpret_cast<unsigned*>(&more);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    auto low = [](unsigned word) { return widen(T{(unsigned short)word}); };
    auto high = [](unsigned word) { return widen(T{(unsigned short)(word >> 16)}); };
    words[i] = round_to<T>(f(low(words[i]), low(others[i]))).bits |
               (unsigned)round_to<T>(f(high(words[i]), high(others[i]))).bits << 16;
  }
  return eight;
}

// Calls finish.write_as<A>(...) for the activation A that `finish` is for.
template <typename Finish, typename T>
__device__ void write_by_activation(const Finish& finish, T* to, uint4 results, uint4 read) {
  switch (finish.which) {
    case RELU:
      return finish.template write_as<RELU>(to, results, read);
    case GELU:
      return finish.template write_as<GELU>(to, results, read);
    case GELU_TANH:
      return finish.template write_as<GELU_TANH>(to, results, read);
    case SILU:
      return finish.template write_as<SILU>(to, results, read);
  }
}

// The results h are stored, and their activations at a distance.
template <typename T>
struct Activate {
  long long distance;
  int which;
  __device__ uint4 read(const T*) const { return {}; }
  __device__ void write(T* to, uint4 h, uint4 none) const {
    *reinterpret_cast<uint4*>(to) = h;
    write_by_activation(*this, to + distance, h, none);
  }
  template <int A>
  __device__ void write_as(T* to, uint4 h, uint4) const {
    *reinterpret_cast<uint4*>(to) =
        each_of<T>(h, h, [](float x, float) { return activation<A>(x); });
  }
};

// The results are the gradients of activations; those of their inputs h, which are found at a
// distance, are stored.
template <typename T>
struct GoBack {
  long long distance;
  int which;
  __device__ uint4 read(const T* to) const {
    return *reinterpret_cast<const uint4*>(to + distance);
  }
  __device__ void write(T* to, uint4 results, uint4 h) const {
    write_by_activation(*this, to, results, h);
  }
  template <int A>
  __device__ void write_as(T* to, uint4 results, uint4 h) const {
    *reinterpret_cast<uint4*>(to) =
        each_of<T>(results, h, [](float dy, float x) { return dy * slope<A>(x); });
  }
};

// What becomes of the results of a kernel: y as it is or, if CONFIG_ACTIVATED, with `other`: going
// forward the activation, to be written; going back the input of the activation.
template <bool FORWARD, typename T, typename Arguments>
__device__ auto finish(const Arguments& a) {
  if constexpr (!CONFIG_ACTIVATED)
    return AsItIs<T>();
  else if constexpr (FORWARD)
    return Activate<T>{a.other - a.y, a.activation};
  else
    return GoBack<T>{a.other - a.y, a.activation};
}
