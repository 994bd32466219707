// y = x W^T + bias (FORWARD), or dx = dy W, for a block-sparse W.
//
//   x       T [tokens, in_features]        contiguous and 16-byte aligned, like all tensors here
//   values  T [capacity, B, B]             block by slot, [out][in] within a block
//   bias    T [out_features] or null
//   offsets int [out_blocks + 1]           where each output block begins in `entries`
//   entries int2 [>= offsets[out_blocks]]  (input block, slot), by output block, inputs ascending
//   y       T [tokens, out_features]       every element is written, even without blocks
//
// "in" and "out" are from the product's point of view: for dx the outputs are W's columns, and
// `entries` those of W^T. Each thread block computes TM tokens x one output block; output blocks
// vary fastest over the grid, so that the inputs of its tokens are reused from L2. k runs over the
// present blocks of the output block as if they were adjacent, in k-tiles of TK (several blocks
// where B < TK). The order of accumulation is fixed, so results depend neither on slots nor timing.
//
// The options CONFIG_... (portable/programs.py) set the dtype, the sizes and the header with the
// arithmetic.

#include "common.cuh"
#include CONFIG_PRODUCT

typedef CONFIG_T T;
constexpr int B = CONFIG_B, TM = CONFIG_TM, TK = CONFIG_TK, STAGES = CONFIG_STAGES;
constexpr bool FORWARD = CONFIG_FORWARD;

struct Arguments {
  const T* x;
  const T* values;
  const T* bias;
  T* y;
  const int* offsets;
  const int2* entries;
  long long tokens;
  int in_features;
  int out_blocks;
};

static_assert(CONFIG_TN == B, "a thread block computes whole output blocks");
typedef Product<T, TM, B, TK, CONFIG_GROUPS_M, CONFIG_GROUPS_N, false, !FORWARD> BlockProduct;
typedef Accumulator<T>::type Acc;
typedef Tile<Acc, TM, B> Result;

LAUNCH_FACTS(block_linear, BlockProduct::THREADS,
             (pipeline_shared_bytes<STAGES, BlockProduct, Result>()), MEMBER(x), MEMBER(values),
             MEMBER(bias), MEMBER(y), MEMBER(offsets), MEMBER(entries), MEMBER(tokens),
             MEMBER(in_features), MEMBER(out_blocks));

// The rows of W's blocks, adjacent along k. Forward, a row is an output and k runs along it; for
// dx, rows are numbered by k and may belong to several blocks.
template <bool K_ROWS>
struct WeightRows;

template <>
struct WeightRows<false> : Rows<T> {
  __device__ WeightRows(const Arguments& a, int begin, int end, int first_k, int col) {
    const int k = first_k + col, entry = begin + k / B;
    const bool exists = entry < end;
    first = exists ? a.values + (long long)a.entries[entry].y * B * B + k % B : a.values;
    stride = B, n = exists ? B : 0;
  }
};

template <>
struct WeightRows<true> {
  const Arguments& a;
  int begin, end, first_k, col;
  __device__ WeightRows(const Arguments& a, int begin, int end, int first_k, int col)
      : a(a), begin(begin), end(end), first_k(first_k), col(col) {}
  __device__ bool has(int row) const { return begin + (first_k + row) / B < end; }
  __device__ const T* at(int row) const {
    if (!has(row)) return a.values;
    const int k = first_k + row;
    return a.values + (long long)a.entries[begin + k / B].y * B * B + k % B * B + col;
  }
};

extern "C" __global__ void __launch_bounds__(BlockProduct::THREADS)
    block_linear(const Arguments a) {
  extern __shared__ __align__(128) char shared[];
  const int out_block = blockIdx.x % a.out_blocks;
  const long long first_token = (long long)(blockIdx.x / a.out_blocks) * TM;
  const int begin = a.offsets[out_block], end = a.offsets[out_block + 1];

  const T* x = a.x + first_token * a.in_features;
  const int n_tokens = (int)min((long long)TM, a.tokens - first_token);
  auto input = [&](int k_tile, int col) -> Rows<T> {
    const int k = k_tile * TK + col, entry = begin + k / B;
    if (entry >= end) return {x, 0, 0};
    return {x + a.entries[entry].x * B + k % B, a.in_features, n_tokens};
  };
  auto weight = [&](int k_tile, int col) {
    return WeightRows<!FORWARD>(a, begin, end, k_tile * TK, col);
  };
  BlockProduct product;
  run_pipeline<STAGES>(product, shared, ((end - begin) * B + TK - 1) / TK, input, weight);

  Result result(shared);
  product.store(result);
  __syncthreads();
  constexpr int CHUNK = Chunk<T>::SIZE, PER_ROW = B / CHUNK;
  const long long out_features = (long long)a.out_blocks * B;
  for (int chunk = threadIdx.x; chunk < TM * PER_ROW; chunk += BlockProduct::THREADS) {
    const int row = chunk / PER_ROW, col = chunk % PER_ROW * CHUNK;
    if (first_token + row >= a.tokens) break;
    const int feature = out_block * B + col;
    Chunk<T> out;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const Acc bias = a.bias ? widen(a.bias[feature + i]) : 0;
      out.element[i] = round_to<T>(*result.at(row, col + i) + bias);
    }
    *reinterpret_cast<Chunk<T>*>(a.y + (first_token + row) * out_features + feature) = out;
  }
}
