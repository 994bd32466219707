// norms = squared Frobenius norm of each block of dy^T x, if armed, else zeros, on sm_90a: what
// block_norms.cu computes, for bf16 and fp16.
//
//   dy     [tokens, out_features]   x [tokens, in_features]
//   armed  bool                     read on the device, so that a CUDA graph sees it change
//   norms  float [out_features / block_size, in_features / block_size]
//
// dy^T x is computed in tiles of 128 x 256, multiples of every block size, and never stored. Thread
// blocks, the workers, take tiles in turn; each is reduced to sums over 16 x 16 squares, then to
// the sums of its blocks, always in one order. A block lies in one tile, so every norm is written
// once.

#include "hopper/product_strips.cuh"

constexpr int SQUARE = 16;  // the smallest block size
constexpr int TM = WARPGROUPS * STRIP, TN = MOST * STRIP;

struct Arguments {
  TensorMap dy, x;  // boxes of a strip, STEP tokens
  const bool* armed;
  float* norms;
  long long tokens;
  int out_features, in_features;
  int block_size;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    block_norms(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  static_assert(sizeof(Shared<Runs>) == CONFIG_SHARED_BYTES, "hopper_programs.py must count alike");
  Shared<Runs>& s = *reinterpret_cast<Shared<Runs>*>(memory);
  if (!*a.armed) {
    const long long blocks =
        (long long)(a.out_features / a.block_size) * (a.in_features / a.block_size);
    for (long long i = blockIdx.x * THREADS + threadIdx.x; i < blocks; i += gridDim.x * THREADS)
      a.norms[i] = 0;
    return;
  }

  const int tiles_n = (a.in_features + TN - 1) / TN;
  auto plan = [&](Planner<Runs>& planner) {
    const int lane = threadIdx.x % 32;
    const int tiles = (a.out_features + TM - 1) / TM * tiles_n;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      Job<Runs>& job = planner.begin();
      const int row = tile / tiles_n * TM, col = tile % tiles_n * TN;
      if (lane < MOST) job.x_features[lane] = col + lane * STRIP;
      if (lane < WARPGROUPS) {  // each has a strip of dy and all of x
        job.dy_features[lane] = row + lane * STRIP;
        job.work.x[lane] = 0;
        job.work.dy[lane] = lane;
        job.work.runs[lane] = 1 << MOST | 1;
      }
      if (lane == 0) {
        job.n_x = MOST;
        job.n_dy = WARPGROUPS;
        job.work.where = tile;
      }
      planner.commit(a.tokens, MOST);
    }
  };

  typedef float Squares[TM / SQUARE][TN / SQUARE];
  Squares& squares = *reinterpret_cast<Squares*>(s.results);
  static_assert(sizeof(Squares) <= sizeof(s.results), "they lie where results do elsewhere");
  auto store = [&](const Job<Runs>& job, int, const float* sums) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x - 128;
    // A warp has 16 rows: one row of squares. An element of the sums is 8 columns wide, each four.
#pragma unroll
    for (int square = 0; square < TN / SQUARE; ++square) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += sums[square * 8 + i] * sums[square * 8 + i];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
      if (lane == 0) squares[thread / 32][square] = sum;
    }
    warps_sync<32 * WARPS>();
    const int per_block = a.block_size / SQUARE;  // squares a block has each way
    const int blocks_n = TN / a.block_size, blocks = TM / a.block_size * blocks_n;
    if (thread < blocks) {
      const int m = thread / blocks_n, n = thread % blocks_n;
      const int row = job.work.where / tiles_n * TM / a.block_size + m;
      const int col = job.work.where % tiles_n * TN / a.block_size + n;
      if (row * a.block_size < a.out_features && col * a.block_size < a.in_features) {
        float sum = 0;
        for (int i = 0; i < per_block; ++i)
          for (int j = 0; j < per_block; ++j) sum += squares[m * per_block + i][n * per_block + j];
        a.norms[(long long)row * (a.in_features / a.block_size) + col] = sum;
      }
    }
    warps_sync<32 * WARPS>();
  };
  run_jobs(s, a.dy, a.x, plan, [&](const Job<Runs>& job, Stages& stages) {
    multiply_any(s, job, stages, uniform(threadIdx.x / 128 - 1), store);
  });
}
