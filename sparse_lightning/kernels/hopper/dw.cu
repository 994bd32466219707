// dW = dy^T x at the present blocks of W, with zeros in the empty slots, on sm_90a: what
// portable/dw.cu computes, for bf16 and fp16 and B = 64 or 128, with TMA and WGMMA.
//
//   dy      [tokens, out_features]   x [tokens, in_features]   dw [capacity, B, B]
//   entries int2 [capacity]          (block column, slot), by block row; the empty slots last
//   row_offsets int [out_blocks + 1] where each block row begins in `entries`; then the total
//   coords  int2 [capacity]          (block row, block column) of each slot
//
// Tensors are 16-byte aligned; there is at least one token. The present blocks, in the order of
// `entries`, are partitioned into groups. The blocks of a group are computed in one pass over the
// tokens, which loads the dy of each block row once. Groups of one block row and of one size are
// best: thread blocks that pass over the same tokens at the same time share reads of L2. Where that
// would take more rounds, the blocks are partitioned evenly, across the ends of rows.
//
// Grid: persistent clusters, each of which takes one group at a time. Warp roles and pipeline are
// those of gradient.cuh; a work item is a group. In a cluster, MULTICAST thread blocks share the
// blocks of the group and multicast dy; where groups are few, SPLIT_K sets of them split the tokens
// and then add their results, always in the same order.

#include "hopper/product_strips.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr int BLOCK_STRIPS = B / STRIP;  // strips of dy, and of x, per block
static_assert(DY_STRIDE == BLOCK_STRIPS, "warpgroups alternate between the strips of a block's dy");

struct Arguments {
  TensorMap dy, x;  // boxes: a strip, TK tokens
  T* dw;
  const int2* entries;
  const int* row_offsets;
  const int2* coords;
  long long tokens;
  int capacity;
  int out_blocks;
};

LAUNCH_FACTS(block_linear_dw, THREADS, sizeof(Shared<Runs>), MEMBER(dy), MEMBER(x), MEMBER(dw),
             MEMBER(entries), MEMBER(row_offsets), MEMBER(coords), MEMBER(tokens), MEMBER(capacity),
             MEMBER(out_blocks));

constexpr int MAX_BLOCKS = MULTICAST * WARPGROUPS * MAX_X / BLOCK_STRIPS / BLOCK_STRIPS;  // a group

// The partition of the blocks into groups. Whole warps must construct and query it.
struct Partition {
  const Arguments& a;
  int n_blocks, groups;
  int row_group_size = 0;   // most blocks of a group, if groups do not cross rows; else 0
  int even_group_size = 0;  // blocks of each group; 0 if sizes differ by at most one

  __device__ explicit Partition(const Arguments& a) : a(a), n_blocks(a.row_offsets[a.out_blocks]) {
    const int clusters = gridDim.x / CLUSTER;
    auto rounds = [&](int groups) { return (groups + clusters - 1) / clusters; };
    auto share = [](int size) { return (size + MULTICAST - 1) / MULTICAST; };
    // In one round: blocks of 128 as evenly as possible; blocks of 64 in groups of one size, which
    // the warpgroups halve alike.
    const int blocks = (n_blocks + clusters - 1) / clusters;
    if (BLOCK_STRIPS == 1) even_group_size = blocks;
    groups = even_group_size > 0 ? (n_blocks + even_group_size - 1) / even_group_size : clusters;
    // Cost: rounds times what a thread block loads of a group. Most groups that cross rows need the
    // dy of two.
    int least = share(blocks) + 2;
    if (n_blocks > clusters * MAX_BLOCKS) {
      // Several rounds: groups of one size, or thread blocks drift apart. With an odd number of
      // blocks of 64, one warpgroup has one more.
      least = 1 << 30;
      for (int size = 1; size <= MAX_BLOCKS; ++size) {
        const int total = (n_blocks + size - 1) / size, n = share(size);
        const int cost = rounds(total) * (n + (BLOCK_STRIPS > 1 ? 0 : n % 2) + 2);
        if (cost <= least) even_group_size = size, groups = total, least = cost;
      }
    }
    int totals[MAX_BLOCKS] = {};
    for (int row = threadIdx.x % 32; row < a.out_blocks; row += 32) {
      const int n = a.row_offsets[row + 1] - a.row_offsets[row];
#pragma unroll
      for (int i = 0; i < MAX_BLOCKS; ++i) totals[i] += (n + i) / (i + 1);
    }
    // The smallest groups within rows that one round can compute. Blocks of 128, of which one keeps
    // both warpgroups busy, may take several rounds.
#pragma unroll
    for (int i = MAX_BLOCKS - 1; i >= 0; --i) {
      const int total = __reduce_add_sync(0xffffffff, totals[i]);
      const int cost = rounds(total) * (share(i + 1) + 1);
      if (total <= clusters || BLOCK_STRIPS > 1 && SPLIT_K == 1 && cost <= least)
        row_group_size = i + 1, groups = total, least = cost;
    }
  }

  // Returns the first block of a group, and the number of its blocks.
  __device__ int2 blocks(int group) const {
    if (row_group_size == 0) {
      if (even_group_size > 0)
        return make_int2(even_group_size * group,
                         min(even_group_size, n_blocks - even_group_size * group));
      const int first = (int)((long long)n_blocks * group / groups);
      return make_int2(first, (int)((long long)n_blocks * (group + 1) / groups) - first);
    }
    for (int first_row = 0; first_row < a.out_blocks; first_row += 32) {
      const int row = min(first_row + threadIdx.x % 32, a.out_blocks);
      const int begin = a.row_offsets[row], n = a.row_offsets[min(row + 1, a.out_blocks)] - begin;
      const int row_groups = (n + row_group_size - 1) / row_group_size;
      const int scan = inclusive_warp_scan(row_groups), i = group - (scan - row_groups);
      const unsigned found = __ballot_sync(0xffffffff, 0 <= i && i < row_groups);
      if (found) {
        const int lane = __ffs(found) - 1, first = row_groups ? begin + n * i / row_groups : 0;
        const int end = row_groups ? begin + n * (i + 1) / row_groups : 0;
        const int2 range =
            make_int2(__shfl_sync(0xffffffff, first, lane), __shfl_sync(0xffffffff, end, lane));
        return make_int2(range.x, range.y - range.x);
      }
      group -= __shfl_sync(0xffffffff, scan, 31);
    }
    return make_int2(0, 0);
  }
};

// The share of the first of two thread blocks or warpgroups among n blocks.
__device__ inline int first_half(int n) { return (n + 1) / 2; }

// Scheduler warp: publishes a group of n blocks.
__device__ inline void schedule_group(const Arguments& a, Scheduler<Runs>& scheduler, int first,
                                      int n) {
  static_assert(MULTICAST <= 2 && MAX_BLOCKS <= 32, "halves, and one block per lane");
  const int lane = threadIdx.x % 32;
  if (n == 0) return;
  // Lane i has the i-th block.
  const int2 block = lane < n ? a.coords[a.entries[first + lane].y] : make_int2(-1, 0);
  const int above = __shfl_up_sync(0xffffffff, block.x, 1);
  const unsigned begins = __ballot_sync(0xffffffff, lane < n && (lane == 0 || block.x != above));
  const int row = __popc(begins & ((2u << lane) - 1)) - 1;  // index among the group's rows
  // The blocks of this thread block.
  const int most = MULTICAST > 1 ? first_half(n) : n;
  const int begin = multicast_rank() == 0 ? 0 : most, end = multicast_rank() == 0 ? most : n;
  WorkItem<Runs>& item = scheduler.acquire();
  for (int i = 0; i < BLOCK_STRIPS; ++i) {
    if (begins >> lane & 1) item.dy_features[row * BLOCK_STRIPS + i] = block.x * B + i * STRIP;
    if (begin <= lane && lane < end)
      item.x_features[(lane - begin) * BLOCK_STRIPS + i] = block.y * B + i * STRIP;
  }
  // A warpgroup takes one strip of dy of all blocks (B = 128), or half of the blocks (64).
  const int middle = begin + first_half(end - begin);
  for (int g = 0; g < WARPGROUPS; ++g) {
    const int from = BLOCK_STRIPS > 1 || g == 0 ? begin : middle;
    const int to = BLOCK_STRIPS > 1 || g == 1 ? end : middle;
    const int first_row = __shfl_sync(0xffffffff, row, from % 32);
    if (lane != 0) continue;
    item.payload.x[g] = (from - begin) * BLOCK_STRIPS;
    item.payload.dy[g] = first_row * BLOCK_STRIPS + (BLOCK_STRIPS > 1 ? g : 0);
    int runs = 1 << (to - from) * BLOCK_STRIPS;
    for (int i = from; i < to; ++i)
      if (i == from || begins >> i & 1) runs |= 1 << (i - from) * BLOCK_STRIPS;
    item.payload.runs[g] = runs;
  }
  if (lane == 0) {
    item.n_x = (end - begin) * BLOCK_STRIPS;
    item.n_dy = __popc(begins) * BLOCK_STRIPS;
    item.payload.origin = first + begin;
  }
  scheduler.publish(a.tokens, most * BLOCK_STRIPS);
}

// Stores the product of a strip of dy and strip `x_strip` of a work item's x.
__device__ inline void store_strip(const Arguments& a, int first, int x_strip, int dy_strip,
                                   const float* acc, char* staging) {
  const long long slot = a.entries[first + x_strip / BLOCK_STRIPS].y;
  const int first_row = dy_strip * STRIP + threadIdx.x / 32 % 4 * 16;
  T* destination = a.dw + (slot * B + first_row) * B + x_strip % BLOCK_STRIPS * STRIP;
  store_rows<T>(staging, acc, [&](int row, int col) { return destination + row * B + col; });
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    block_linear_dw(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared<Runs>& s = *reinterpret_cast<Shared<Runs>*>(memory);

  auto schedule = [&](Scheduler<Runs>& scheduler) {
    const Partition partition(a);
    for (int group = blockIdx.x / CLUSTER; group < partition.groups; group += gridDim.x / CLUSTER) {
      const int2 blocks = partition.blocks(group);
      schedule_group(a, scheduler, blocks.x, blocks.y);
    }
    zero_slots<B>(a.dw, a.entries, partition.n_blocks, a.capacity);
  };

  auto store = [&](const WorkItem<Runs>& item, int warpgroup, float* acc) {
    const int first = item.payload.origin, dy_strip = BLOCK_STRIPS > 1 ? warpgroup : 0;
    const int n = 31 - __clz(item.payload.runs[warpgroup]);  // strips of x
    char* staging = s.results[threadIdx.x / 32 - 4];
    if constexpr (SPLIT_K == 1) {
#pragma unroll
      for (int i = 0; i < MAX_X; ++i)
        if (i < n)
          store_strip(a, first, item.payload.x[warpgroup] + i, dy_strip, acc + 32 * i, staging);
    } else {
      const int thread = threadIdx.x % 128;
      // [warpgroup][strip][8][thread]
      float4* partial = partial_results(s) + warpgroup * MAX_X * 8 * 128 + thread;
#pragma unroll
      for (int i = 0; i < MAX_X; ++i)
        if (i < n)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            partial[(i * 8 + j) * 128] =
                make_float4(acc[32 * i + 4 * j], acc[32 * i + 4 * j + 1], acc[32 * i + 4 * j + 2],
                            acc[32 * i + 4 * j + 3]);
      cluster_sync();
      const int n_blocks = item.n_x / BLOCK_STRIPS, half = first_half(n_blocks);
      // The products of strips are distributed over the warpgroups of the cluster.
      for (int product = split_rank() + SPLIT_K * warpgroup; product < WARPGROUPS * MAX_X;
           product += SPLIT_K * WARPGROUPS) {
        const int source = product / MAX_X, i = product % MAX_X;  // a warpgroup's i-th strip of x
        if (i >= (BLOCK_STRIPS > 1 ? item.n_x : source == 0 ? half : n_blocks - half)) continue;
        float total[32] = {};
        reduce_split_k<8>(s, total, product * 8 * 128 + thread, 128);
        store_strip(a, first, i + item.payload.x[source], BLOCK_STRIPS > 1 ? source : 0, total,
                    staging);
      }
      fence_proxy_async();
      cluster_sync();
    }
  };
  run_warp_specialized(s, a.dy, a.x, schedule,
                       [&](const WorkItem<Runs>& item, PipelineState& state) {
                         dispatch_runs(s, item, state, warp_uniform(threadIdx.x / 128 - 1), store);
                       });
}
