// dW = dy^T x at the present blocks of W, with zeros in the empty slots.
//
//   dy      T [tokens, out_features]   contiguous and 16-byte aligned, like all tensors here
//   x       T [tokens, in_features]
//   offsets int [out_blocks + 1]       where each block row begins in `entries`
//   entries int2 [capacity]            (block column, slot), by block row; the empty slots last
//   dw      T [capacity, B, B]         block by slot, every element is written
//
// Each thread block computes TM rows of TN / B consecutive blocks of one block row, over one split
// of the tokens. Rows have unequal numbers of blocks, which only the device knows: the grid is
// sized for full rows, and thread blocks without work exit at once.
//
//   blockIdx.x = ((block row or, at the end, the empty slots) * groups + group) * B / TM + row tile
//   blockIdx.y = split of the tokens (split-K)
//
// With several splits, each writes its accumulators to `partial` [splits, capacity, B, B], and
// `add_partials` adds them in order, so results are bitwise deterministic.
//
// The options CONFIG_... (portable/programs.py) set the dtype, the sizes and the header with the
// arithmetic.

#include "common.cuh"
#include CONFIG_PRODUCT

typedef CONFIG_T T;
constexpr int B = CONFIG_B, TM = CONFIG_TM, TN = CONFIG_TN, TK = CONFIG_TK;
constexpr int STAGES = CONFIG_STAGES;

typedef Accumulator<T>::type Acc;

struct Arguments {
  const T* dy;
  const T* x;
  T* dw;
  Acc* partial;  // null if there is one split
  const int* offsets;
  const int2* entries;
  long long tokens;
  long long split_tokens;  // tokens of a split, a multiple of TK
  int out_blocks;
  int in_features;
  int capacity;
  int groups;  // groups of TN / B blocks in a full row
};

constexpr int GROUP = TN / B, ROW_TILES = B / TM;
typedef Product<T, TM, TN, TK, CONFIG_GROUPS_M, CONFIG_GROUPS_N, true, true> BlockProduct;
typedef Tile<Acc, TM, TN> Result;

LAUNCH_FACTS(block_linear_dw, BlockProduct::THREADS,
             (pipeline_shared_bytes<STAGES, BlockProduct, Result>()), MEMBER(dy), MEMBER(x),
             MEMBER(dw), MEMBER(partial), MEMBER(offsets), MEMBER(entries), MEMBER(tokens),
             MEMBER(split_tokens), MEMBER(out_blocks), MEMBER(in_features), MEMBER(capacity),
             MEMBER(groups));

// Writes rows `first_row` to `first_row + TM` of up to GROUP blocks.
template <typename Out>
__device__ void write_blocks(Result result, Out* blocks, const int2* entries, int n,
                             int first_row) {
  constexpr int CHUNK = Chunk<Out>::SIZE, PER_ROW = TN / CHUNK;
  for (int chunk = threadIdx.x; chunk < TM * PER_ROW; chunk += BlockProduct::THREADS) {
    const int row = chunk / PER_ROW, col = chunk % PER_ROW * CHUNK;
    if (col / B >= n) continue;
    Chunk<Out> out;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) out.element[i] = round_to<Out>(*result.at(row, col + i));
    const long long slot = entries[col / B].y;
    *reinterpret_cast<Chunk<Out>*>(blocks + (slot * B + first_row + row) * B + col % B) = out;
  }
}

extern "C" __global__ void __launch_bounds__(BlockProduct::THREADS)
    block_linear_dw(const Arguments a) {
  extern __shared__ __align__(128) char shared[];
  const int first_row = blockIdx.x % ROW_TILES * TM;
  const int group = blockIdx.x / ROW_TILES % a.groups;
  const int block_row = blockIdx.x / ROW_TILES / a.groups;
  const int begin = a.offsets[block_row] + group * GROUP;

  if (block_row == a.out_blocks) {
    if (a.partial) return;  // `add_partials` writes the zeros
    constexpr int CHUNK = Chunk<T>::SIZE, CHUNKS = TM * B / CHUNK;
    for (int entry = begin; entry < a.capacity; entry += a.groups * GROUP)
      for (int i = entry; i < min(entry + GROUP, a.capacity); ++i) {
        T* rows = a.dw + ((long long)a.entries[i].y * B + first_row) * B;
        for (int chunk = threadIdx.x; chunk < CHUNKS; chunk += BlockProduct::THREADS)
          reinterpret_cast<Chunk<T>*>(rows)[chunk] = {};
      }
    return;
  }
  const int n = min(GROUP, a.offsets[block_row + 1] - begin);
  if (n <= 0) return;

  const long long first_token = blockIdx.y * a.split_tokens;
  const long long n_tokens = min(a.split_tokens, a.tokens - first_token);
  const long long out_features = (long long)a.out_blocks * B;
  const T* left = a.dy + first_token * out_features + block_row * B + first_row;
  const T* right = a.x + first_token * a.in_features;
  const int2* entries = a.entries + begin;

  auto output_gradient = [&](int k_tile, int col) -> Rows<T> {
    const long long token = (long long)k_tile * TK;
    return {left + token * out_features + col, (int)out_features,
            (int)min(n_tokens - token, (long long)TK)};
  };
  auto input = [&](int k_tile, int col) -> Rows<T> {
    const long long token = (long long)k_tile * TK;
    if (col / B >= n) return {right, 0, 0};
    return {right + token * a.in_features + entries[col / B].x * B + col % B, a.in_features,
            (int)min(n_tokens - token, (long long)TK)};
  };
  BlockProduct product;
  run_pipeline<STAGES>(product, shared, (int)((n_tokens + TK - 1) / TK), output_gradient, input);

  Result result(shared);
  product.store(result);
  __syncthreads();
  if (a.partial)
    write_blocks(result, a.partial + (long long)blockIdx.y * a.capacity * B * B, entries, n,
                 first_row);
  else
    write_blocks(result, a.dw, entries, n, first_row);
}

namespace reduction {
struct Arguments {
  const Acc* partial;
  T* dw;
  const int2* coords;  // [capacity], (-1, -1) for an empty slot
  int capacity;
  int splits;
};
LAUNCH_FACTS(add_partials, 256, 0, MEMBER(partial), MEMBER(dw), MEMBER(coords), MEMBER(capacity),
             MEMBER(splits));
}  // namespace reduction

// Each thread block adds the splits of one slot.
extern "C" __global__ void add_partials(const reduction::Arguments a) {
  constexpr int CHUNK = Chunk<T>::SIZE;
  const long long slot = blockIdx.x, size = (long long)a.capacity * B * B;
  const bool is_empty = a.coords[slot].x < 0;
  for (int i = threadIdx.x * CHUNK; i < B * B; i += blockDim.x * CHUNK) {
    const Acc* partial = a.partial + slot * B * B + i;
    Acc acc[CHUNK] = {};
    for (int split = 0; split < a.splits && !is_empty; ++split)
#pragma unroll
      for (int e = 0; e < CHUNK; ++e) acc[e] += partial[split * size + e];
    Chunk<T> out;
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) out.element[e] = round_to<T>(acc[e]);
    *reinterpret_cast<Chunk<T>*>(a.dw + slot * B * B + i) = out;
  }
}
