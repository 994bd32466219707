// norms = squared Frobenius norm of each block of dy^T x if armed, else zeros, on sm_90a: what
// portable/norms.cu computes, for bf16 and fp16, with TMA and WGMMA.
//
//   dy     [tokens, out_features]   x [tokens, in_features], rows strided and 16-byte aligned
//   armed  bool                     read on the device, so that CUDA graphs follow its changes
//   norms  float [out_features / block_size, in_features / block_size]
//
// Persistent thread blocks compute dy^T x in tiles of 128 x 256, multiples of every block size,
// without storing it. Warp roles and pipeline are those of gradient.cuh; a work item is a tile.
// Each tile is reduced to sums over 16 x 16 squares, then over its blocks, in a fixed order. A
// block lies within one tile, so every norm is written once.

#include "hopper/product_strips.cuh"

constexpr int SQUARE = 16;  // the smallest block size
constexpr int TM = WARPGROUPS * STRIP, TN = MAX_X * STRIP;

struct Arguments {
  TensorMap dy, x;  // boxes: a strip, TK tokens
  const bool* armed;
  float* norms;
  long long tokens;
  int out_features, in_features;
  int block_size;
};

LAUNCH_FACTS(block_norms, THREADS, sizeof(Shared<Runs>), MEMBER(dy), MEMBER(x), MEMBER(armed),
             MEMBER(norms), MEMBER(tokens), MEMBER(out_features), MEMBER(in_features),
             MEMBER(block_size));

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    block_norms(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared<Runs>& s = *reinterpret_cast<Shared<Runs>*>(memory);
  if (!*a.armed) {
    const long long blocks =
        (long long)(a.out_features / a.block_size) * (a.in_features / a.block_size);
    for (long long i = blockIdx.x * THREADS + threadIdx.x; i < blocks; i += gridDim.x * THREADS)
      a.norms[i] = 0;
    return;
  }

  const int tiles_n = (a.in_features + TN - 1) / TN;
  auto schedule = [&](Scheduler<Runs>& scheduler) {
    const int lane = threadIdx.x % 32;
    const int tiles = (a.out_features + TM - 1) / TM * tiles_n;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      WorkItem<Runs>& item = scheduler.acquire();
      const int row = tile / tiles_n * TM, col = tile % tiles_n * TN;
      if (lane < MAX_X) item.x_features[lane] = col + lane * STRIP;
      if (lane < WARPGROUPS) {  // each has one strip of dy and all of x
        item.dy_features[lane] = row + lane * STRIP;
        item.payload.x[lane] = 0;
        item.payload.dy[lane] = lane;
        item.payload.runs[lane] = 1 << MAX_X | 1;
      }
      if (lane == 0) {
        item.n_x = MAX_X;
        item.n_dy = WARPGROUPS;
        item.payload.origin = tile;
      }
      scheduler.publish(a.tokens, MAX_X);
    }
  };

  typedef float Squares[TM / SQUARE][TN / SQUARE];
  Squares& squares = *reinterpret_cast<Squares*>(s.results);
  static_assert(sizeof(Squares) <= sizeof(s.results), "squares reuse the staging for results");
  auto store = [&](const WorkItem<Runs>& item, int, const float* acc) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x - 128;
    // A warp has 16 rows, one row of squares, and each lane 8 accumulators of a square.
#pragma unroll
    for (int square = 0; square < TN / SQUARE; ++square) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += acc[square * 8 + i] * acc[square * 8 + i];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
      if (lane == 0) squares[thread / 32][square] = sum;
    }
    named_barrier_sync<32 * WARPS>();
    const int per_block = a.block_size / SQUARE;  // squares along a side of a block
    const int blocks_n = TN / a.block_size, blocks = TM / a.block_size * blocks_n;
    if (thread < blocks) {
      const int m = thread / blocks_n, n = thread % blocks_n;
      const int row = item.payload.origin / tiles_n * TM / a.block_size + m;
      const int col = item.payload.origin % tiles_n * TN / a.block_size + n;
      if (row * a.block_size < a.out_features && col * a.block_size < a.in_features) {
        float sum = 0;
        for (int i = 0; i < per_block; ++i)
          for (int j = 0; j < per_block; ++j) sum += squares[m * per_block + i][n * per_block + j];
        a.norms[(long long)row * (a.in_features / a.block_size) + col] = sum;
      }
    }
    named_barrier_sync<32 * WARPS>();
  };
  run_warp_specialized(s, a.dy, a.x, schedule,
                       [&](const WorkItem<Runs>& item, PipelineState& state) {
                         dispatch_runs(s, item, state, warp_uniform(threadIdx.x / 128 - 1), store);
                       });
}
