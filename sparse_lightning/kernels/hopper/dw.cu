// dW = dy^T x at the present blocks of W, and zeros in the empty slots, on sm_90a: what
// block_linear_dw.cu computes, for bf16 and fp16 and B = 64 or 128.
//
//   dy      [tokens, out_features]   x [tokens, in_features]   dw [capacity, B, B]
//   entries int2 [capacity]          (block column, slot), by block row; the empty slots last
//   row_offsets int [out_blocks + 1] where each row begins in `entries`, and where the last ends
//   coords  int2 [capacity]          (block row, block column) of each slot
//
// The present blocks, as they follow each other in `entries`, are cut into groups. Blocks of a
// group are computed in one pass over the tokens, and the dy of each block row is read once. Groups
// should be of one row and alike: thread blocks that pass over the same tokens at the same time
// spare L2 much, what several ask for at once it reads once. Where that would take more rounds, the
// blocks are cut evenly instead, over the ends of rows.
//
// A cluster takes a group. Of its thread blocks, SHARERS compute a share of the blocks each, and
// copy what dy the group needs once for both; and each part of the tokens, of PARTS, has so many.
// Where groups are few, so all have work; the parts add up their sums, always in the same order.

#include "hopper/product_strips.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr int WIDE = B / STRIP;  // strips of dy and of x that a block takes
static_assert(DY_STRIDE == WIDE, "warpgroups take the strips of a block's dy in turn");

struct Arguments {
  TensorMap dy, x;  // boxes of a strip, STEP tokens
  T* dw;
  const int2* entries;
  const int* row_offsets;
  const int2* coords;
  long long tokens;
  int capacity;
  int out_blocks;
};

constexpr int BLOCKS = SHARERS * WARPGROUPS * MOST / WIDE / WIDE;  // of a group, at most

// How the blocks are cut; to be asked by whole warps.
struct Cut {
  const Arguments& a;
  int n_blocks, groups;
  int of_row = 0, size = 0;  // blocks of a group: at most, if groups are of one row; or of each

  __device__ explicit Cut(const Arguments& a) : a(a), n_blocks(a.row_offsets[a.out_blocks]) {
    const int clusters = gridDim.x / CLUSTER;
    auto rounds = [&](int groups) { return (groups + clusters - 1) / clusters; };
    auto share = [](int of) { return (of + SHARERS - 1) / SHARERS; };
    // One round: of wide blocks evenly, of others in groups of one size, which warpgroups halve
    // alike.
    const int blocks = (n_blocks + clusters - 1) / clusters;
    if (WIDE == 1) size = blocks;
    groups = size > 0 ? (n_blocks + size - 1) / size : clusters;
    // Rounds, times what a thread block copies of a group. Of what is cut over the ends of rows,
    // most groups need dy of two.
    int least = share(blocks) + 2;
    if (n_blocks > clusters * BLOCKS) {
      // Several rounds: with groups of one size, or thread blocks drift apart. Of an odd number of
      // narrower blocks one warpgroup has one more.
      least = 1 << 30;
      for (int of = 1; of <= BLOCKS; ++of) {
        const int total = (n_blocks + of - 1) / of, own = share(of);
        const int cost = rounds(total) * (own + (WIDE > 1 ? 0 : own % 2) + 2);
        if (cost <= least) size = of, groups = total, least = cost;
      }
    }
    int totals[BLOCKS] = {};
    for (int row = threadIdx.x % 32; row < a.out_blocks; row += 32) {
      const int n = a.row_offsets[row + 1] - a.row_offsets[row];
#pragma unroll
      for (int i = 0; i < BLOCKS; ++i) totals[i] += (n + i) / (i + 1);
    }
    // The smallest groups of one row of which there are not more than can be computed at once. Wide
    // blocks, which alone keep both warpgroups busy, may take several rounds.
#pragma unroll
    for (int i = BLOCKS - 1; i >= 0; --i) {
      const int total = __reduce_add_sync(0xffffffff, totals[i]);
      const int cost = rounds(total) * (share(i + 1) + 1);
      if (total <= clusters || WIDE > 1 && PARTS == 1 && cost <= least)
        of_row = i + 1, groups = total, least = cost;
    }
  }

  // The first block of a group, and how many there are.
  __device__ int2 blocks(int group) const {
    if (of_row == 0) {
      if (size > 0) return make_int2(size * group, min(size, n_blocks - size * group));
      const int first = (int)((long long)n_blocks * group / groups);
      return make_int2(first, (int)((long long)n_blocks * (group + 1) / groups) - first);
    }
    for (int first_row = 0; first_row < a.out_blocks; first_row += 32) {
      const int row = min(first_row + threadIdx.x % 32, a.out_blocks);
      const int begin = a.row_offsets[row], n = a.row_offsets[min(row + 1, a.out_blocks)] - begin;
      const int own = (n + of_row - 1) / of_row, upto = through(own), i = group - (upto - own);
      const unsigned has = __ballot_sync(0xffffffff, 0 <= i && i < own);
      if (has) {
        const int lane = __ffs(has) - 1, first = own ? begin + n * i / own : 0;
        const int end = own ? begin + n * (i + 1) / own : 0;
        const int2 found =
            make_int2(__shfl_sync(0xffffffff, first, lane), __shfl_sync(0xffffffff, end, lane));
        return make_int2(found.x, found.y - found.x);
      }
      group -= __shfl_sync(0xffffffff, upto, 31);
    }
    return make_int2(0, 0);
  }
};

// How many of n blocks the first of two takes: of those that share dy, or of warpgroups.
__device__ inline int half_of(int n) { return (n + 1) / 2; }

// One warp: plans a group of n blocks.
__device__ inline void plan_group(const Arguments& a, Planner<Runs>& planner, int first, int n) {
  static_assert(SHARERS <= 2 && BLOCKS <= 32, "halves, and a lane each");
  const int lane = threadIdx.x % 32;
  if (n == 0) return;
  // In lane i is the i-th block.
  const int2 block = lane < n ? a.coords[a.entries[first + lane].y] : make_int2(-1, 0);
  const int above = __shfl_up_sync(0xffffffff, block.x, 1);
  const unsigned begins = __ballot_sync(0xffffffff, lane < n && (lane == 0 || block.x != above));
  const int row = __popc(begins & ((2u << lane) - 1)) - 1;  // of the group's rows
  // Those of this thread block.
  const int most = SHARERS > 1 ? half_of(n) : n;
  const int begin = own_share() == 0 ? 0 : most, end = own_share() == 0 ? most : n;
  Job<Runs>& job = planner.begin();
  for (int i = 0; i < WIDE; ++i) {
    if (begins >> lane & 1) job.dy_features[row * WIDE + i] = block.x * B + i * STRIP;
    if (begin <= lane && lane < end)
      job.x_features[(lane - begin) * WIDE + i] = block.y * B + i * STRIP;
  }
  // One strip of dy each of all the blocks (B = 128), or half of the blocks.
  const int middle = begin + half_of(end - begin);
  for (int g = 0; g < WARPGROUPS; ++g) {
    const int from = WIDE > 1 || g == 0 ? begin : middle, to = WIDE > 1 || g == 1 ? end : middle;
    const int row_of_first = __shfl_sync(0xffffffff, row, from % 32);
    if (lane != 0) continue;
    job.work.x[g] = (from - begin) * WIDE;
    job.work.dy[g] = row_of_first * WIDE + (WIDE > 1 ? g : 0);
    int runs = 1 << (to - from) * WIDE;
    for (int i = from; i < to; ++i)
      if (i == from || begins >> i & 1) runs |= 1 << (i - from) * WIDE;
    job.work.runs[g] = runs;
  }
  if (lane == 0) {
    job.n_x = (end - begin) * WIDE;
    job.n_dy = __popc(begins) * WIDE;
    job.work.where = first + begin;
  }
  planner.commit(a.tokens, most * WIDE);
}

// Stores the sums of a strip by a strip: strip `x_strip` of x, as the job has them.
__device__ inline void store_strip(const Arguments& a, int first, int x_strip, int dy_strip,
                                   const float* sums, char* staging) {
  const long long slot = a.entries[first + x_strip / WIDE].y;
  const int first_row = dy_strip * STRIP + threadIdx.x / 32 % 4 * 16;
  T* to = a.dw + (slot * B + first_row) * B + x_strip % WIDE * STRIP;
  store_rows<T>(staging, sums, [&](int row, int col) { return to + row * B + col; });
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    block_linear_dw(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  static_assert(sizeof(Shared<Runs>) == CONFIG_SHARED_BYTES, "hopper_programs.py must count alike");
  Shared<Runs>& s = *reinterpret_cast<Shared<Runs>*>(memory);

  auto plan = [&](Planner<Runs>& planner) {
    const Cut cut(a);
    for (int group = blockIdx.x / CLUSTER; group < cut.groups; group += gridDim.x / CLUSTER) {
      const int2 blocks = cut.blocks(group);
      plan_group(a, planner, blocks.x, blocks.y);
    }
    clear_slots<B>(a.dw, a.entries, cut.n_blocks, a.capacity);
  };

  auto store = [&](const Job<Runs>& job, int warpgroup, float* sums) {
    const int first = job.work.where, dy_strip = WIDE > 1 ? warpgroup : 0;
    const int n = 31 - __clz(job.work.runs[warpgroup]);  // strips of x
    char* staging = s.results[threadIdx.x / 32 - 4];
    if constexpr (PARTS == 1) {
#pragma unroll
      for (int i = 0; i < MOST; ++i)
        if (i < n)
          store_strip(a, first, job.work.x[warpgroup] + i, dy_strip, sums + 32 * i, staging);
    } else {
      const int thread = threadIdx.x % 128;
      float4* own = sums_to_add(s) + warpgroup * MOST * 8 * 128 + thread;  // [strip][8][thread]
#pragma unroll
      for (int i = 0; i < MOST; ++i)
        if (i < n)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            own[(i * 8 + j) * 128] =
                make_float4(sums[32 * i + 4 * j], sums[32 * i + 4 * j + 1],
                            sums[32 * i + 4 * j + 2], sums[32 * i + 4 * j + 3]);
      cluster_sync();
      const int n_blocks = job.n_x / WIDE, half = half_of(n_blocks);
      // The warpgroups of the cluster take pieces, a strip by a strip, in turn.
      for (int piece = own_part() + PARTS * warpgroup; piece < WARPGROUPS * MOST;
           piece += PARTS * WARPGROUPS) {
        const int of = piece / MOST, i = piece % MOST;  // the warpgroup's i-th strip of x
        if (i >= (WIDE > 1 ? job.n_x : of == 0 ? half : n_blocks - half)) continue;
        float total[32] = {};
        add_parts<8>(s, total, piece * 8 * 128 + thread, 128);
        store_strip(a, first, i + job.work.x[of], WIDE > 1 ? of : 0, total, staging);
      }
      copies_follow();
      cluster_sync();
    }
  };
  run_jobs(s, a.dy, a.x, plan, [&](const Job<Runs>& job, Stages& stages) {
    multiply_any(s, job, stages, uniform(threadIdx.x / 128 - 1), store);
  });
}
