// Epilogues: what a product of two-byte elements does with its results before it stores them.

#pragma once
#include "activations.cuh"

// In the order of the classes in epilogues.py, which say what each computes.
enum EpilogueKind { NONE, ACTIVATED, GATED, ACTIVATION_GRADIENT, GATED_GRADIENT, ADDED };

// The number of tensors that an epilogue reads.
__device__ constexpr int operands_of(int kind) {
  return kind == GATED_GRADIENT ? 2 : kind != NONE && kind != ACTIVATED;
}

// Members of a kernel's arguments: what an epilogue reads and stores besides y, laid out like y, or
// null.
#define EPILOGUE_ARGUMENTS \
  const T* read0;          \
  const T* read1;          \
  T* stored0;              \
  T* stored1;              \
  int activation
#define EPILOGUE_MEMBERS \
  MEMBER(read0), MEMBER(read1), MEMBER(stored0), MEMBER(stored1), MEMBER(activation)

// Applies f, which returns the elements of N results, to corresponding elements of three vectors of
// eight.
template <typename T, int N, typename F>
__device__ void map_elements(uint4 (&out)[N], const uint4& results, const uint4 (&read)[2], F f) {
  const unsigned* r = reinterpret_cast<const unsigned*>(&results);
  const unsigned* first = reinterpret_cast<const unsigned*>(&read[0]);
  const unsigned* second = reinterpret_cast<const unsigned*>(&read[1]);
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float low[N], high[N];
    auto element = [&](unsigned w, int half) { return widen(T{(unsigned short)(w >> 16 * half)}); };
    f(low, element(r[word], 0), element(first[word], 0), element(second[word], 0));
    f(high, element(r[word], 1), element(first[word], 1), element(second[word], 1));
#pragma unroll
    for (int i = 0; i < N; ++i)
      reinterpret_cast<unsigned*>(&out[i])[word] = round_pair<T>(low[i], high[i]);
  }
}

constexpr int ANY = -1;

// The epilogue of eight results at a time, with activation A, or with that of the arguments. A
// kernel loads what it reads before it waits for results.
template <int KIND, typename T, typename Arguments, int A = ANY>
struct Epilogue {
  struct Read {
    uint4 vectors[2];
  };
  static constexpr int OPERANDS = operands_of(KIND);
  static constexpr int LOADS =
      KIND == GATED || KIND == GATED_GRADIENT ? 2 : 4;  // that registers hold
  const Arguments& a;

  // Returns where an operand for these results is.
  __device__ const T* operand(int i, const T* destination) const {
    return (i == 0 ? a.read0 : a.read1) + (destination - a.y);
  }

  __device__ Read load(const T* destination) const {
    Read out = {};
#pragma unroll
    for (int i = 0; i < OPERANDS; ++i)
      out.vectors[i] = *reinterpret_cast<const uint4*>(operand(i, destination));
    return out;
  }

  // Stores only if `exists`; a branch around the call would keep the compiler from overlapping
  // calls.
  __device__ void store(T* destination, const uint4& results, const Read& read,
                        bool exists = true) const {
    if constexpr (KIND == NONE) {
      put(destination, results, exists);
    } else if constexpr (KIND == ADDED) {
      uint4 out[1];
      map_elements<T>(out, results, read.vectors,
                      [](float (&o)[1], float r, float other, float) { o[0] = r + other; });
      put(destination, out[0], exists);
    } else if constexpr (A != ANY) {
      store_as<A>(destination, results, read, exists);
    } else {
      switch (a.activation) {
        case RELU:
          return store_as<RELU>(destination, results, read, exists);
        case GELU:
          return store_as<GELU>(destination, results, read, exists);
        case GELU_TANH:
          return store_as<GELU_TANH>(destination, results, read, exists);
        case SILU:
          return store_as<SILU>(destination, results, read, exists);
      }
    }
  }

  __device__ static void put(T* destination, const uint4& vector, bool exists) {
    if (exists) *reinterpret_cast<uint4*>(destination) = vector;
  }

  template <int F>
  __device__ void store_as(T* destination, const uint4& results, const Read& read,
                           bool exists) const {
    auto put_extra = [&](T* base, const uint4& vector) {
      put(base + (destination - a.y), vector, exists && base);
    };
    if constexpr (KIND == ACTIVATED || KIND == GATED) {
      uint4 out[1];
      map_elements<T>(out, results, read.vectors, [](float (&o)[1], float r, float gate, float) {
        o[0] = KIND == ACTIVATED ? activate<F>(r) : activate<F>(gate) * r;
      });
      put(destination, results, exists);
      put_extra(a.stored0, out[0]);
    } else if constexpr (KIND == ACTIVATION_GRADIENT) {
      uint4 out[2];
      map_elements<T>(out, results, read.vectors, [](float (&o)[2], float r, float h, float) {
        o[0] = r * derivative<F>(h);
        o[1] = activate<F>(h);
      });
      put(destination, out[0], exists);
      put_extra(a.stored0, out[1]);
    } else {
      uint4 out[3];
      map_elements<T>(out, results, read.vectors, [](float (&o)[3], float r, float gate, float up) {
        const float activated = activate<F>(gate);
        o[0] = r * up * derivative<F>(gate);
        o[1] = r * activated;
        o[2] = activated * up;
      });
      put(destination, out[0], exists);
      put_extra(a.stored0, out[1]);
      put_extra(a.stored1, out[2]);
    }
  }
};
