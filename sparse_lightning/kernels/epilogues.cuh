// Epilogues: what a product of two-byte elements does with its results before it stores them.

#pragma once
#include "activations.cuh"

// In the order of the classes in epilogues.py, which say what each computes.
enum EpilogueKind { NONE, ACTIVATED, GATED, ACTIVATION_GRADIENT, GATED_GRADIENT, ADDED };

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
    unsigned halves[N][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto element = [&](unsigned w) { return widen(T{(unsigned short)(w >> 16 * half)}); };
      float stored[N];
      f(stored, element(r[word]), element(first[word]), element(second[word]));
#pragma unroll
      for (int i = 0; i < N; ++i) halves[i][half] = round_to<T>(stored[i]).bits;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      reinterpret_cast<unsigned*>(&out[i])[word] = halves[i][0] | halves[i][1] << 16;
  }
}

// The epilogue of eight results at a time. A kernel loads what it reads before it waits for
// results.
template <int KIND, typename T, typename Arguments>
struct Epilogue {
  struct Read {
    uint4 vectors[2];
  };
  static constexpr int LOADS = KIND < GATED_GRADIENT ? 4 : 2;  // more do not fit into registers
  const Arguments& a;

  __device__ Read load(const T* destination) const {
    Read out = {};
    auto get = [&](const T* base) {
      return *reinterpret_cast<const uint4*>(base + (destination - a.y));
    };
    if constexpr (KIND != NONE && KIND != ACTIVATED) out.vectors[0] = get(a.read0);
    if constexpr (KIND == GATED_GRADIENT) out.vectors[1] = get(a.read1);
    return out;
  }

  __device__ void store(T* destination, const uint4& results, const Read& read) const {
    if constexpr (KIND == NONE) {
      *reinterpret_cast<uint4*>(destination) = results;
    } else if constexpr (KIND == ADDED) {
      uint4 out[1];
      map_elements<T>(out, results, read.vectors,
                      [](float (&o)[1], float r, float other, float) { o[0] = r + other; });
      *reinterpret_cast<uint4*>(destination) = out[0];
    } else {
      switch (a.activation) {
        case RELU:
          return store_as<RELU>(destination, results, read);
        case GELU:
          return store_as<GELU>(destination, results, read);
        case GELU_TANH:
          return store_as<GELU_TANH>(destination, results, read);
        case SILU:
          return store_as<SILU>(destination, results, read);
      }
    }
  }

  template <int A>
  __device__ void store_as(T* destination, const uint4& results, const Read& read) const {
    const long long offset = destination - a.y;
    auto put = [&](T* base, const uint4& vector) {
      if (base) *reinterpret_cast<uint4*>(base + offset) = vector;
    };
    if constexpr (KIND == ACTIVATED || KIND == GATED) {
      uint4 out[1];
      map_elements<T>(out, results, read.vectors, [](float (&o)[1], float r, float gate, float) {
        o[0] = KIND == ACTIVATED ? activate<A>(r) : activate<A>(gate) * r;
      });
      *reinterpret_cast<uint4*>(destination) = results;
      put(a.stored0, out[0]);
    } else if constexpr (KIND == ACTIVATION_GRADIENT) {
      uint4 out[2];
      map_elements<T>(out, results, read.vectors, [](float (&o)[2], float r, float h, float) {
        o[0] = r * derivative<A>(h);
        o[1] = activate<A>(h);
      });
      *reinterpret_cast<uint4*>(destination) = out[0];
      put(a.stored0, out[1]);
    } else {
      uint4 out[3];
      map_elements<T>(out, results, read.vectors, [](float (&o)[3], float r, float gate, float up) {
        const float activated = activate<A>(gate);
        o[0] = r * up * derivative<A>(gate);
        o[1] = r * activated;
        o[2] = activated * up;
      });
      *reinterpret_cast<uint4*>(destination) = out[0];
      put(a.stored0, out[1]);
      put(a.stored1, out[2]);
    }
  }
};
