// y = x W^T + bias (FORWARD), or dx = dy W, for a block-sparse W.
//
//   x       T [tokens, in_features]        contiguous and 16-byte aligned, like all tensors here
//   values  T [capacity, B, B]             block by slot, [out][in] within a block
//   bias    T [out_features] or null
//   offsets int [out_blocks + 1]           where each output block begins in `entries`
//   entries int2 [>= offsets[out_blocks]]  (input block, slot), by output block, inputs ascending
//   y       T [tokens, out_features]       every element is written, even without blocks
//
// An epilogue (epilogues.cuh) reads and stores further tensors laid out like y.
//
// "in" and "out" are from the product's point of view: for dx the outputs are W's columns, and
// `entries` those of W^T. Each thread block computes TM tokens x TN outputs of one output block;
// outputs vary fastest over the grid, so that inputs are reused from L2. k runs over the
// present blocks of the output block as if they were adjacent, in k-tiles of TK (several blocks
// where B < TK). The SPLITS thread blocks of a cluster have an equal share of the k-tiles each, and
// add their sums in the order of the shares: that keeps the device busy where there are few tiles.
// The order of accumulation is fixed, so results depend neither on slots nor timing.
//
// The options CONFIG_... (portable/programs.py) set the dtype, the sizes and the header with the
// arithmetic.

#include "portable/linear.cuh"
#include CONFIG_PRODUCT

constexpr int STAGES = CONFIG_STAGES;

typedef Product<T, TM, TN, TK, CONFIG_GROUPS_M, CONFIG_GROUPS_N, false, !FORWARD, CONFIG_GROUPS_K>
    BlockProduct;
typedef Tile<Acc, TM, TN> Result;

LINEAR_LAUNCH_FACTS(BlockProduct::THREADS, (pipeline_shared_bytes<STAGES, BlockProduct, Result>()));

// The rows of W's blocks for the outputs of a block from `first_out` on, adjacent along k. Forward,
// a row is an output and k runs along it; for dx, rows are numbered by k and may belong to several
// blocks.
template <bool K_ROWS>
struct WeightRows;

template <>
struct WeightRows<false> : Rows<T> {
  __device__ WeightRows(const Arguments& a, int begin, int end, int first_out, int first_k,
                        int col) {
    const int k = first_k + col, entry = begin + k / B;
    const bool exists = entry < end;
    const long long slot = exists ? a.entries[entry].y : 0;
    first = a.values + (slot * B + first_out) * B + k % B;
    stride = B, n = exists ? TN : 0;
  }
};

template <>
struct WeightRows<true> {
  const Arguments& a;
  int first_entry, end, first_row, col;
  __device__ WeightRows(const Arguments& a, int begin, int end, int first_out, int first_k, int col)
      : a(a),
        first_entry(begin + first_k / B),
        end(end),
        first_row(first_k % B),
        col(first_out + col) {}
  // A k-tile begins with a block, or lies in one.
  __device__ int entry(int row) const { return first_entry + (B < TK ? row / B : 0); }
  __device__ bool has(int row) const { return entry(row) < end; }
  __device__ const T* at(int row) const {
    if (!has(row)) return a.values;
    const long long slot = a.entries[entry(row)].y;
    return a.values + (slot * B + first_row + (B < TK ? row % B : row)) * B + col;
  }
};

// Loads the sums of a tile at N places, of all thread blocks that share it.
template <int SHARES, int N, typename At>
__device__ void load_sums(Acc (&sums)[N], At at) {
  if constexpr (SHARES > 1) {
    add_shares<SHARES>(sums, at);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = *at(i);
  }
}

extern "C" __global__ void CLUSTER __launch_bounds__(BlockProduct::THREADS)
    block_linear(const Arguments a) {
  extern __shared__ __align__(128) char shared[];
  const int share = blockIdx.x % SPLITS;
  const OutputTile tile(a, blockIdx.x / SPLITS);
  const int begin = a.offsets[tile.out_block], end = a.offsets[tile.out_block + 1];
  const int k_tiles = ((end - begin) * B + TK - 1) / TK;
  const int first_k_tile = share * k_tiles / SPLITS, end_k_tile = (share + 1) * k_tiles / SPLITS;

  const T* x = a.x + tile.first_token * a.in_features;
  const int n_tokens = (int)min((long long)TM, a.tokens - tile.first_token);
  auto input = [&](int k_tile, int col) -> Rows<T> {
    const int k = (first_k_tile + k_tile) * TK + col, entry = begin + k / B;
    if (entry >= end) return {x, 0, 0};
    return {x + a.entries[entry].x * B + k % B, a.in_features, n_tokens};
  };
  auto weight = [&](int k_tile, int col) {
    return WeightRows<!FORWARD>(a, begin, end, tile.first_out, (first_k_tile + k_tile) * TK, col);
  };
  BlockProduct product;
  run_pipeline<STAGES>(product, shared, end_k_tile - first_k_tile, input, weight);

  Result result(shared);
  product.store(result);
  if constexpr (SPLITS > 1)
    cluster_sync();
  else
    __syncthreads();
  constexpr int CHUNK = Chunk<T>::SIZE, PER_ROW = TN / CHUNK;
  for (int chunk = share * BlockProduct::THREADS + threadIdx.x; chunk < TM * PER_ROW;
       chunk += SPLITS * BlockProduct::THREADS) {
    const int row = chunk / PER_ROW, col = chunk % PER_ROW * CHUNK;
    if (row >= n_tokens) break;
    Acc sums[CHUNK] = {};
    load_sums<SPLITS>(sums, [&](int i) { return result.at(row, col + i); });
    tile.store(a, row, col, sums);
  }
  if constexpr (SPLITS > 1) cluster_sync();  // no thread block ends while others read its sums
}
