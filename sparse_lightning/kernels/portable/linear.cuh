// The options, arguments and epilogue that linear.cu and linear_skinny.cu share.

#pragma once
#include "clusters.cuh"
#include "epilogues.cuh"

typedef CONFIG_T T;
typedef Accumulator<T>::type Acc;
constexpr int B = CONFIG_B, TM = CONFIG_TM, TN = CONFIG_TN, TK = CONFIG_TK;  // tokens, outputs, k
constexpr bool FORWARD = CONFIG_FORWARD;
constexpr int SPLITS = CONFIG_SPLITS;  // thread blocks of a cluster that share a tile
#if CONFIG_SPLITS > 1
#define CLUSTER __cluster_dims__(CONFIG_SPLITS)
#else
#define CLUSTER
#endif
static_assert(B % TN == 0, "a tile lies within an output block");

struct Arguments {
  const T* x;
  const T* values;
  const T* bias;
  T* y;
  const int* offsets;
  const int2* entries;
  const unsigned char* positions;  // of the weights that 2:4 sparse blocks keep, else null
  long long tokens;
  int in_features;
  int out_blocks;
  EPILOGUE_ARGUMENTS;
};

#define LINEAR_LAUNCH_FACTS(THREADS, SHARED_BYTES)                                             \
  LAUNCH_FACTS(block_linear, THREADS, SHARED_BYTES, MEMBER(x), MEMBER(values), MEMBER(bias),   \
               MEMBER(y), MEMBER(offsets), MEMBER(entries), MEMBER(positions), MEMBER(tokens), \
               MEMBER(in_features), MEMBER(out_blocks), EPILOGUE_MEMBERS)

// Stores 16 bytes of results, with an epilogue for two-byte dtypes only.
template <typename T>
__device__ void store_chunk(const Arguments& a, T* destination, const Chunk<T>& out) {
  if constexpr (sizeof(T) == 2) {
    const Epilogue<CONFIG_EPILOGUE, T, Arguments> epilogue{a};
    epilogue.store(destination, reinterpret_cast<const uint4&>(out), epilogue.load(destination));
  } else {
    *reinterpret_cast<Chunk<T>*>(destination) = out;
  }
}

// The TM x TN tile of y that a thread block or a cluster computes.
struct OutputTile {
  int out_block, first_out;  // `first_out` within the block
  long long first_token;

  __device__ OutputTile(const Arguments& a, unsigned index) {
    constexpr int SLICES = B / TN;
    first_out = index % SLICES * TN;
    out_block = index / SLICES % a.out_blocks;
    first_token = (long long)(index / SLICES / a.out_blocks) * TM;
  }
  // Stores 16 bytes of a row of the tile, from column `col` on.
  __device__ void store(const Arguments& a, int row, int col,
                        const Acc (&sums)[Chunk<T>::SIZE]) const {
    const int output = out_block * B + first_out + col;
    Chunk<T> out;
#pragma unroll
    for (int i = 0; i < Chunk<T>::SIZE; ++i)
      out.element[i] = round_to<T>(sums[i] + (a.bias ? widen(a.bias[output + i]) : 0));
    const long long out_features = (long long)a.out_blocks * B;
    store_chunk(a, a.y + (first_token + row) * out_features + output, out);
  }
};
