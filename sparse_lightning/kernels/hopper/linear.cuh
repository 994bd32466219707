// The options and arguments that linear.cu and linear_narrow.cu share.

#pragma once
#include "activations.cuh"
#include "hopper/sm90.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr bool FORWARD = CONFIG_FORWARD;
constexpr int TM = CONFIG_TM, TN = CONFIG_TN, TK = CONFIG_TK;  // tokens, outputs, inputs
constexpr int STAGES = CONFIG_STAGES;                          // most k-tiles in flight
constexpr int PRODUCER_WARPS = 3;

template <typename Values>
struct LinearArguments {
  TensorMap x;
  Values values;
  const T* bias;
  const int* slots;
  T* y;
  int out_stride, in_stride;
  int out_blocks, in_blocks;
  long long tokens;
  int token_tiles, output_tiles;  // of TM tokens in each thread block of a cluster; of TN outputs
  T* aux;                         // see `make_epilogue`
  int activation;                 // likewise
};

#define LINEAR_LAUNCH_FACTS                                                                    \
  LAUNCH_FACTS(block_linear, THREADS, sizeof(Shared), MEMBER(x), MEMBER(values), MEMBER(bias), \
               MEMBER(slots), MEMBER(y), MEMBER(out_stride), MEMBER(in_stride),                \
               MEMBER(out_blocks), MEMBER(in_blocks), MEMBER(tokens), MEMBER(token_tiles),     \
               MEMBER(output_tiles), MEMBER(aux), MEMBER(activation))

// Returns the epilogue of a kernel. With CONFIG_FUSED_ACTIVATION, the argument `aux` receives the
// activation (FORWARD) or holds the activation's input (backward), laid out like y.
template <bool FORWARD, typename T, typename Arguments>
__device__ auto make_epilogue(const Arguments& a) {
  if constexpr (!CONFIG_FUSED_ACTIVATION)
    return StoreEpilogue<T>();
  else if constexpr (FORWARD)
    return ActivationEpilogue<T>{a.aux - a.y, a.activation};
  else
    return ActivationGradientEpilogue<T>{a.aux - a.y, a.activation};
}
