// dW = dy^T x at the present blocks of W, and zeros in the empty slots, on sm_90a: what
// block_linear_dw.cu computes, for bf16 and fp16 and B = 16 or 32.
//
//   dy      [tokens, out_features]      x [tokens, in_features]      dw [capacity, B, B]
//   slots   int [out_blocks, in_blocks] the slot of each block, -1 where there is none
//   entries int2 [capacity]             (block column, slot), by block row; the empty slots last
//   n_blocks int                        present blocks: the last of the rows' offsets
//
// A product has 64 features of dy at least, which narrow blocks share: a band of ROWS block rows.
// Of a band those columns are computed in which any of its blocks is present, whole, and of the
// results the present blocks are stored. Each band's columns are cut evenly into `slices`, which
// thread blocks take in turn; a job is as many columns of one as the registers hold.

#include "gradient_hopper.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B, ROWS = STRIP / B;
static_assert(B == X_WIDTH && DY_STRIDE == 1, "a strip of x is a block column");

struct Arguments {
  TensorMap dy, x;  // boxes of a strip, STEP tokens
  T* dw;
  const int* slots;
  const int2* entries;
  const int* n_blocks;
  long long tokens;
  int capacity;
  int out_blocks, in_blocks;
  int slices;
};

constexpr int WINDOW = 32 * 32;  // block columns that a warp looks at at once

// One warp: which of 1024 columns of a band it needs; lane i has a bit each for 32 of them.
__device__ inline unsigned needed(const Arguments& a, int band, int window) {
  const int lane = threadIdx.x % 32;
  unsigned own = 0;
#pragma unroll 4
  for (int i = 0; i < 32; ++i) {
    const int first = window + i * 32;
    if (first >= a.in_blocks) break;
    bool any = false;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int out_block = band * ROWS + row, in_block = first + lane;
      if (out_block < a.out_blocks && in_block < a.in_blocks)
        any |= __ldg(a.slots + (long long)out_block * a.in_blocks + in_block) >= 0;
    }
    const unsigned columns = __ballot_sync(0xffffffff, any);
    if (lane == i) own = columns;
  }
  return own;
}

// One warp: plans the jobs of a slice.
__device__ inline void plan_slice(const Arguments& a, Planner& planner, int band, int slice) {
  const int lane = threadIdx.x % 32;
  int n = 0;  // columns of the band
  for (int window = 0; window < a.in_blocks; window += WINDOW)
    n += __shfl_sync(0xffffffff, through(__popc(needed(a, band, window))), 31);
  const int end = (int)((long long)n * (slice + 1) / a.slices);
  for (int first = (int)((long long)n * slice / a.slices); first < end; first += X_STRIPS) {
    const int columns = min(X_STRIPS, end - first), half = (columns + 1) / 2;
    planner.add([&](Job& job) {
      int before = -first;  // columns, from the first of the job
      for (int window = 0; window < a.in_blocks; window += WINDOW) {
        unsigned own = needed(a, band, window);
        const int upto = before + through(__popc(own));
        for (int i = upto - __popc(own); own; own &= own - 1, ++i)
          if (i >= 0 && i < columns) job.x_features[i] = (window + lane * 32 + __ffs(own) - 1) * B;
        before = __shfl_sync(0xffffffff, upto, 31);
      }
      if (lane < WARPGROUPS) {
        const int own = lane == 0 ? half : columns - half;
        job.dy[lane] = 0;
        job.x[lane] = lane == 0 ? 0 : half;
        job.runs[lane] = 1 << (own + PER_STRIP - 1) / PER_STRIP | 1;
      }
      if (lane == 0) {
        job.end = false;
        job.first_step = 0;
        job.end_step = (int)((a.tokens + STEP - 1) / STEP);
        job.dy_features[0] = band * STRIP;
        job.n_dy = 1;
        job.n_x = columns;
        job.where = band;
      }
    });
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    block_linear_dw(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);

  auto plan = [&](Planner& planner) {
    clear_slots<B>(a.dw, a.entries, *a.n_blocks, a.capacity);
    const int bands = (a.out_blocks + ROWS - 1) / ROWS;
    for (int i = blockIdx.x; i < bands * a.slices; i += gridDim.x)
      plan_slice(a, planner, i / a.slices, i % a.slices);
  };

  auto store = [&](const Job& job, int warpgroup, const float* sums) {
    // A warp has 16 rows of all the columns, of one block row.
    const int first = threadIdx.x / 32 % 4 * 16, out_block = job.where * ROWS + first / B;
    const int half = job.x[1], columns = warpgroup == 0 ? half : job.n_x - half;
    const int* of_row = a.slots + (long long)out_block * a.in_blocks;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      if (i * PER_STRIP >= columns) break;
      // Of 64 features, this lane's eight are in one block.
      const int column = i * PER_STRIP + threadIdx.x % 8 * 8 / B;
      const bool inside = column < columns && out_block < a.out_blocks;
      const int slot = inside ? of_row[job.x_features[job.x[warpgroup] + column] / B] : -1;
      T* to = a.dw + ((long long)slot * B + first % B) * B;
      store_rows<T>(s.results[threadIdx.x / 32 - 4], sums + 32 * i,
                    [&](int row, int col) { return slot < 0 ? nullptr : to + row * B + col % B; });
    }
  };
  run_jobs(s, a.dy, a.x, plan, store, [](bool) {});
}
