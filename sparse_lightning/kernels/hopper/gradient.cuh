// The warp-specialised pipeline of the kernels that multiply dy^T x on sm_90a. A kernel supplies
// the scheduler and the consumers.
//
// A thread block processes work items: strips of dy, 64 features wide, and strips of x, X_WIDTH
// wide, over a range of k-tiles of TK tokens. In the first warpgroup, PRODUCER_WARPS issue TMA
// loads for every PRODUCER_WARPS-th k-tile each, and one scheduler warp publishes work items; the
// other warps are consumers. A pipeline stage holds the strips of one k-tile, those of dy first.

#pragma once
#include "hopper/sm90.cuh"

constexpr int TK = CONFIG_TK, X_WIDTH = CONFIG_X_WIDTH;
constexpr int DY_STRIPS = CONFIG_DY_STRIPS, X_STRIPS = CONFIG_X_STRIPS;  // most per work item
constexpr int WARPS = CONFIG_CONSUMER_WARPS, PRODUCER_WARPS = 3, THREADS = 128 + 32 * WARPS;
constexpr int STRIP = 64, ROW_BYTES = 2 * STRIP, DY_STRIP_BYTES = TK * ROW_BYTES;
constexpr int X_ROW_BYTES = 2 * X_WIDTH, X_STRIP_BYTES = TK * X_ROW_BYTES;
constexpr int X_PER_DY = STRIP / X_WIDTH;  // strips of x with the size of one of dy
constexpr int MAX_STAGES = 8;
// Twice as many barriers as stages, so that a warp that is ahead or behind cannot mistake the phase
// of one k-tile for that of another.
constexpr int BARRIERS = 2 * MAX_STAGES;
// Thread blocks that run in lockstep relieve L2, which serves simultaneous requests for the same
// lines with one read. So keep no more strips in flight than needed to hide latency, but at least
// MIN_STAGES stages; IN_FLIGHT_STRIPS = 0 means no limit.
constexpr int IN_FLIGHT_STRIPS = CONFIG_IN_FLIGHT_STRIPS, MIN_STAGES = CONFIG_MIN_STAGES;
constexpr int SCHEDULE_STAGES = 2;  // work items in flight

// A cluster has MULTICAST thread blocks, which multicast dy to each other, for each of SPLIT_K
// splits of the tokens.
constexpr int SPLIT_K = CONFIG_SPLIT_K, MULTICAST = CONFIG_MULTICAST;
constexpr int CLUSTER = SPLIT_K * MULTICAST;
__device__ inline int rank() { return CLUSTER > 1 ? cluster_rank() : 0; }
__device__ inline int split_rank() { return rank() / MULTICAST; }
__device__ inline int multicast_rank() { return rank() % MULTICAST; }

// Payload: what a kernel's consumers need to know.
template <typename Payload>
struct WorkItem {
  int is_end;  // set when no work items remain
  int first_k_tile, end_k_tile;
  int n_dy, n_x;      // strips; those of dy for all thread blocks that multicast them
  int stage_strips;   // size of a stage, in strips of x
  int loaded_strips;  // most that a thread block loads itself per stage, in strips of x
  int dy_features[DY_STRIPS], x_features[X_STRIPS];  // where strips begin
  Payload payload;
};

template <typename Payload, int STRIPS>
struct alignas(1024) SharedOf {
  char operands[STRIPS][X_STRIP_BYTES];  // all stages
  char results[WARPS][16 * 128];
  WorkItem<Payload> work_items[SCHEDULE_STAGES];
  u64 full[BARRIERS], empty[BARRIERS];
  u64 schedule_full[SCHEDULE_STAGES], schedule_empty[SCHEDULE_STAGES];
};
// The strips of x that fit; Payload::EXTRA_BYTES is what the kernel appends to `Shared`.
template <typename Payload>
constexpr int OPERAND_STRIPS =
    count_that_fits(sizeof(SharedOf<Payload, 1>) + Payload::EXTRA_BYTES, X_STRIP_BYTES);
template <typename Payload>
using Shared = SharedOf<Payload, OPERAND_STRIPS<Payload>>;

// With split-K, the thread blocks of a cluster synchronise twice after each work item: when all
// partial results are in shared memory, and when they have been reduced.
__device__ inline void sync_split_k_reduction() {
  if (SPLIT_K > 1) {
    cluster_sync();
    cluster_sync();
  }
}

// The scheduler warp's end of the queue of work items.
template <typename Payload>
struct Scheduler {
  Shared<Payload>& s;
  int count = 0;
  // Returns the next work item, for all lanes to fill.
  __device__ WorkItem<Payload>& acquire() {
    mbarrier_wait_replaced(s.schedule_empty, count);
    return s.work_items[wrap<SCHEDULE_STAGES>(count)];
  }
  // Publishes it, for this thread block's split of the tokens. `max_x` is the most strips of x of
  // any thread block of the multicast, and must be the same in all of them.
  __device__ void publish(long long tokens, int max_x) {
    if (threadIdx.x % 32 == 0) {
      WorkItem<Payload>& item = s.work_items[wrap<SCHEDULE_STAGES>(count)];
      const long long k_tiles = (tokens + TK - 1) / TK;
      const int split = split_rank();
      item.stage_strips = item.n_dy * X_PER_DY + max_x;
      item.loaded_strips = (item.n_dy * X_PER_DY + MULTICAST - 1) / MULTICAST + max_x;
      item.is_end = false;
      item.first_k_tile = (int)(k_tiles * split / SPLIT_K);
      item.end_k_tile = (int)(k_tiles * (split + 1) / SPLIT_K);
    }
    __syncwarp();
    mbarrier_arrive_item(s.schedule_full, count++);
    sync_split_k_reduction();
  }
  __device__ void publish_end() {
    acquire().is_end = true;
    mbarrier_arrive_item(s.schedule_full, count);
  }
};

template <typename Payload, typename Visit>
__device__ void for_each_work_item(Shared<Payload>& s, Visit visit) {
  for (int count = 0;; ++count) {
    const WorkItem<Payload>& item = s.work_items[wrap<SCHEDULE_STAGES>(count)];
    mbarrier_wait_item(s.schedule_full, count);
    if (item.is_end) return;
    visit(item);
    mbarrier_arrive_item(s.schedule_empty, count);
  }
}

// Writes zeros to the empty slots of dW, those in `entries` from `first` on. Called by one warp of
// each thread block.
template <int B, typename T>
__device__ void zero_slots(T* dw, const int2* entries, int first, int capacity) {
  for (int entry = first + blockIdx.x; entry < capacity; entry += gridDim.x) {
    uint4* block = reinterpret_cast<uint4*>(dw + (long long)entries[entry].y * B * B);
    for (int i = threadIdx.x % 32; i < B * B / 8; i += 32) block[i] = make_uint4(0, 0, 0, 0);
  }
}

// The state of the pipeline, which each warp tracks for itself. Stages continue from one work item
// to the next unless their number changes.
struct PipelineState {
  int stages = 0, stage_strips, stage = 0;  // size of a stage in strips of x; current stage
  int k_tile = 0, first_k_tile = 0;         // number over all work items; first with these stages
  template <typename Payload>
  __device__ void configure(const WorkItem<Payload>& item) {
    constexpr int limit = IN_FLIGHT_STRIPS > 0 ? IN_FLIGHT_STRIPS : OPERAND_STRIPS<Payload>;
    const int wanted = max(limit / item.loaded_strips, MIN_STAGES);
    const int fit = min(wanted, min(OPERAND_STRIPS<Payload> / item.stage_strips, MAX_STAGES));
    if (fit != stages)
      stages = fit, stage_strips = OPERAND_STRIPS<Payload> / fit, stage = 0, first_k_tile = k_tile;
  }
  // The last k-tile that must be released before the current one may be loaded; -1 if none.
  __device__ int blocking_k_tile() const { return max(k_tile - stages, first_k_tile - 1); }
  __device__ void advance() {
    ++k_tile;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
};

// Consumer warp: releases a k-tile, in all thread blocks that load into its stage.
template <typename Payload>
__device__ void release(Shared<Payload>& s, int k_tile) {
  u64* empty = &s.empty[wrap<BARRIERS>(k_tile)];
  const int lane = threadIdx.x % 32;
  if (MULTICAST == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else if (lane < MULTICAST) {
    mbarrier_arrive_remote(empty, split_rank() * MULTICAST + lane);
  }
}

// Returns where a thread block of a split-K cluster puts its partial results: over the operands.
// All consumers must call this after their last k-tile.
template <typename Payload>
__device__ float4* partial_results(Shared<Payload>& s) {
  named_barrier_sync<32 * WARPS>();
  return reinterpret_cast<float4*>(s.operands);
}

// Adds N float4, `stride` apart from `first` on, of the partial results of all splits, in order.
template <int N, typename Payload>
__device__ void reduce_split_k(Shared<Payload>& s, float* total, int first, int stride) {
#pragma unroll 2
  for (int split = 0; split < SPLIT_K; ++split) {
    const unsigned remote =
        remote_shared_address(s.operands, split * MULTICAST + multicast_rank()) + first * 16;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float4 partial = load_remote_shared(remote + i * stride * 16);
      total[4 * i] += partial.x, total[4 * i + 1] += partial.y;
      total[4 * i + 2] += partial.z, total[4 * i + 3] += partial.w;
    }
  }
}

// Producer warp: loads every PRODUCER_WARPS-th k-tile; each lane loads a strip of x and one of dy.
template <typename Payload>
__device__ void produce(Shared<Payload>& s, const TensorMap& dy, const TensorMap& x,
                        const WorkItem<Payload>& item, PipelineState& state) {
  static_assert(DY_STRIPS <= 32 && X_STRIPS <= 32, "one per lane");
  const int lane = threadIdx.x % 32;
  state.configure(item);
  const int n_dy = item.n_dy, n_x = item.n_x, end_k_tile = item.end_k_tile;
  const int dy_feature = lane < n_dy ? item.dy_features[lane] : 0;
  const int x_feature = lane < n_x ? item.x_features[lane] : 0;
  const int bytes = (n_dy * X_PER_DY + n_x) * X_STRIP_BYTES;
  const bool loads_dy = lane < n_dy && lane % MULTICAST == multicast_rank();
  const unsigned short mask = (1 << MULTICAST) - 1 << split_rank() * MULTICAST;
  int skip = threadIdx.x / 32;  // k-tiles of other producer warps
  for (int k_tile = item.first_k_tile; k_tile < end_k_tile; ++k_tile, state.advance()) {
    if (skip-- > 0) continue;
    skip = PRODUCER_WARPS - 1;
    u64* full = &s.full[wrap<BARRIERS>(state.k_tile)];
    char (*stage)[X_STRIP_BYTES] = s.operands + state.stage * state.stage_strips;
    const int older = state.blocking_k_tile();
    if (older >= 0) mbarrier_wait_item(s.empty, older);
    if (lane == 0) mbarrier_arrive_expect_tx(full, bytes);
    __syncwarp();
    if (loads_dy) {
      void* destination = stage[lane * X_PER_DY];
      if (MULTICAST == 1)
        tma_load_2d(destination, dy, full, dy_feature, k_tile * TK);
      else
        tma_load_2d_multicast(destination, dy, full, dy_feature, k_tile * TK, mask);
    }
    if (lane < n_x) tma_load_2d(stage[n_dy * X_PER_DY + lane], x, full, x_feature, k_tile * TK);
    __syncwarp();
  }
}

// Registers of a thread after reallocation. The total must not exceed what the launch allocates:
// 168 or 96 per thread.
constexpr int PRODUCER_REGISTERS = WARPS == 8 ? 72 : 64,
              CONSUMER_REGISTERS = WARPS == 8 ? 216 : 104;

// Runs the whole kernel. One warp calls schedule(scheduler). Each consumer calls consume(item,
// state) for every work item, which must synchronise the cluster like `sync_split_k_reduction`.
template <typename Payload, typename Schedule, typename Consume>
__device__ void run_warp_specialized(Shared<Payload>& s, const TensorMap& dy, const TensorMap& x,
                                     Schedule schedule, Consume consume) {
  init_barriers(s, WARPS * MULTICAST, PRODUCER_WARPS + WARPS);
  __syncthreads();
  if (MULTICAST > 1) cluster_sync();
  PipelineState state;
  if (threadIdx.x >= 128) {
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    for_each_work_item(s, [&](const WorkItem<Payload>& item) {
      state.configure(item);
      consume(item, state);
    });
  } else {
    warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
    if (threadIdx.x / 32 < PRODUCER_WARPS) {
      for_each_work_item(s, [&](const WorkItem<Payload>& item) {
        produce(s, dy, x, item, state);
        sync_split_k_reduction();
      });
    } else {
      Scheduler<Payload> scheduler{s};
      schedule(scheduler);
      scheduler.publish_end();
    }
  }
  if (MULTICAST > 1) cluster_sync();  // no thread block may exit while others access its memory
}
