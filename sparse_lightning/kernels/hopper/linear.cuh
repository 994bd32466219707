// The options and arguments that linear.cu and linear_narrow.cu share.

#pragma once
#include "epilogues.cuh"
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
  EPILOGUE_ARGUMENTS;
};

#define LINEAR_LAUNCH_FACTS                                                                    \
  LAUNCH_FACTS(block_linear, THREADS, sizeof(Shared), MEMBER(x), MEMBER(values), MEMBER(bias), \
               MEMBER(slots), MEMBER(y), MEMBER(out_stride), MEMBER(in_stride),                \
               MEMBER(out_blocks), MEMBER(in_blocks), MEMBER(tokens), MEMBER(token_tiles),     \
               MEMBER(output_tiles), EPILOGUE_MEMBERS)
