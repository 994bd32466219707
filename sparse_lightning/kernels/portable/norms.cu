// norms = squared Frobenius norm of each block of dy^T x if armed, else zeros.
//
//   dy     T [tokens, out_features]     rows 16-byte aligned, `dy_pitch` elements apart
//   x      T [tokens, in_features]      likewise, `x_pitch` elements apart
//   armed  bool                         read on the device, so that CUDA graphs follow its changes
//   norms  float [out_features / block_size, in_features / block_size]
//
// A persistent grid of any size computes dy^T x in tiles of TM x TN, multiples of every block size.
// Each tile is reduced to sums over 16 x 16 squares, then over its blocks, in a fixed order. A
// block lies within one tile, so every norm is written once.
//
// The options CONFIG_... (portable/programs.py) set the dtype, the sizes and the header with the
// arithmetic.

#include "common.cuh"
#include CONFIG_PRODUCT

typedef CONFIG_T T;
constexpr int TM = CONFIG_TM, TN = CONFIG_TN, TK = CONFIG_TK, STAGES = CONFIG_STAGES;

struct Arguments {
  const T* dy;
  const T* x;
  const bool* armed;
  float* norms;
  long long tokens;
  int dy_pitch, x_pitch;
  int out_features;
  int in_features;
  int block_size;
};

constexpr int SQUARE = 16;  // the smallest block size
constexpr int SQUARES_M = TM / SQUARE, SQUARES_N = TN / SQUARE;
typedef Product<T, TM, TN, TK, CONFIG_GROUPS_M, CONFIG_GROUPS_N, true, true> TileProduct;
typedef Tile<float, TM, TN> Result;

LAUNCH_FACTS(block_norms, TileProduct::THREADS,
             (pipeline_shared_bytes<STAGES, TileProduct, Result>()), MEMBER(dy), MEMBER(x),
             MEMBER(armed), MEMBER(norms), MEMBER(tokens), MEMBER(dy_pitch), MEMBER(x_pitch),
             MEMBER(out_features), MEMBER(in_features), MEMBER(block_size));

// Writes the squared norms of a tile's blocks.
__device__ inline void write_norms(Result tile, const Arguments& a, int first_m, int first_n) {
  __shared__ float squares[SQUARES_M][SQUARES_N];
  // One warp per square: each lane sums every second row of a column, then the warp reduces.
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < SQUARES_M * SQUARES_N; i += TileProduct::THREADS / 32) {
    const int m = i / SQUARES_N, n = i % SQUARES_N;
    float sum = 0;
#pragma unroll
    for (int row = lane / SQUARE; row < SQUARE; row += 32 / SQUARE) {
      const float g = *tile.at(m * SQUARE + row, n * SQUARE + lane % SQUARE);
      sum += g * g;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (lane == 0) squares[m][n] = sum;
  }
  __syncthreads();
  const int per_block = a.block_size / SQUARE;  // squares along a side of a block
  const int blocks_n = TN / a.block_size, blocks = TM / a.block_size * blocks_n;
  for (int i = threadIdx.x; i < blocks; i += TileProduct::THREADS) {
    const int m = i / blocks_n, n = i % blocks_n;
    const int block_row = first_m / a.block_size + m, block_col = first_n / a.block_size + n;
    if (block_row * a.block_size >= a.out_features || block_col * a.block_size >= a.in_features)
      continue;
    float sum = 0;
    for (int row = 0; row < per_block; ++row)
      for (int col = 0; col < per_block; ++col)
        sum += squares[m * per_block + row][n * per_block + col];
    a.norms[(long long)block_row * (a.in_features / a.block_size) + block_col] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(TileProduct::THREADS) block_norms(const Arguments a) {
  extern __shared__ __align__(128) char shared[];
  if (!*a.armed) {
    const long long blocks =
        (long long)(a.out_features / a.block_size) * (a.in_features / a.block_size);
    for (long long i = blockIdx.x * TileProduct::THREADS + threadIdx.x; i < blocks;
         i += gridDim.x * TileProduct::THREADS)
      a.norms[i] = 0;
    return;
  }

  const int tiles_n = (a.in_features + TN - 1) / TN;
  const int tiles = (a.out_features + TM - 1) / TM * tiles_n;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int first_m = tile / tiles_n * TM, first_n = tile % tiles_n * TN;
    auto tokens = [&](const T* matrix, int pitch, int features, int k_tile,
                      int feature) -> Rows<T> {
      const long long token = (long long)k_tile * TK;
      if (feature >= features) return {matrix, 0, 0};
      const long long n = min(a.tokens - token, (long long)TK);
      return {matrix + token * pitch + feature, pitch, (int)n};
    };
    auto left = [&](int k_tile, int col) {
      return tokens(a.dy, a.dy_pitch, a.out_features, k_tile, first_m + col);
    };
    auto right = [&](int k_tile, int col) {
      return tokens(a.x, a.x_pitch, a.in_features, k_tile, first_n + col);
    };
    TileProduct product;
    run_pipeline<STAGES>(product, shared, (int)((a.tokens + TK - 1) / TK), left, right);

    Result result(shared);
    product.store(result);
    __syncthreads();
    write_norms(result, a, first_m, first_n);
  }
}
