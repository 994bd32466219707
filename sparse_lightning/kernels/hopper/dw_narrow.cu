// dW = dy^T x at the present blocks of W, with zeros in the empty slots, on sm_90a: what
// portable/dw.cu computes, for bf16 and fp16 and B = 16 or 32, with TMA and mma.sync.
//
//   dy      [tokens, out_features]      x [tokens, in_features]      dw [capacity, B, B]
//   slots   int [out_blocks, in_blocks] the slot of each block, -1 where absent
//   entries int2 [capacity]             (block column, slot), by block row; the empty slots last
//   row_offsets int [out_blocks + 1]    where each block row begins in `entries`; then the total
//   coords  int2 [capacity]             (block row, block column) of each slot
//
// Tensors are 16-byte aligned; there is at least one token. Consecutive block rows form a band. The
// present blocks, ordered by band, column and row, are partitioned into groups of equal cost, where
// loading the dy of a band costs `band_cost` blocks. A group is one work item, or several if it
// exceeds the limits of one. It loads the dy of its bands and those strips of x in which it has a
// block, and multiplies only present blocks, by mma.sync.
//
// Grid: persistent clusters of SPLIT_K thread blocks, each of which takes one group at a time. Warp
// roles and pipeline are those of gradient.cuh. The thread blocks of a cluster split the tokens, so
// that fewer thread blocks load the same x and dy, and then add their results in a fixed order.

#include "hopper/gradient.cuh"
#include "product_mma.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr int WARP_BLOCKS = CONFIG_WARP_BLOCKS;  // most blocks per consumer warp
constexpr int MAX_BLOCKS = WARP_BLOCKS * WARPS;  // per work item
constexpr int LOOKUP_COLUMNS = 1024;             // columns that the scheduler looks up at a time

struct Blocks {
  static constexpr int EXTRA_BYTES = LOOKUP_COLUMNS * sizeof(unsigned);
  int n;
  // Where the dy (low half) and x (high half) of each block begin, in units of 16 bytes.
  int offsets[MAX_BLOCKS];
};

struct SharedWithLookup : Shared<Blocks> {
  unsigned columns[LOOKUP_COLUMNS];  // bit masks of the rows of a band
};

constexpr int MAX_STRIPS = OPERAND_STRIPS<Blocks> / PRODUCER_WARPS;  // per stage
static_assert(X_WIDTH >= B, "a block is in one strip");
static_assert(DY_STRIPS / 2 * X_PER_DY < MAX_STRIPS && MAX_BLOCKS >= 32, "a band's column fits");

struct Arguments {
  TensorMap dy, x;  // boxes: a strip, TK tokens
  T* dw;
  const int* slots;
  const int2* entries;
  const int* row_offsets;
  const int2* coords;
  long long tokens;
  int capacity;
  int out_blocks, in_blocks;
  int band_rows;  // at most 32
  int band_cost;  // cost of loading the dy of a band, in blocks
  int groups;
};

LAUNCH_FACTS(block_linear_dw, THREADS, sizeof(SharedWithLookup), MEMBER(dy), MEMBER(x), MEMBER(dw),
             MEMBER(slots), MEMBER(entries), MEMBER(row_offsets), MEMBER(coords), MEMBER(tokens),
             MEMBER(capacity), MEMBER(out_blocks), MEMBER(in_blocks), MEMBER(band_rows),
             MEMBER(band_cost), MEMBER(groups));

// The bands, and the partition of blocks into groups. Whole warps must query it.
struct Bands {
  const Arguments& a;
  int n;
  __device__ explicit Bands(const Arguments& a)
      : a(a), n((a.out_blocks + a.band_rows - 1) / a.band_rows) {}
  // Returns the first block of a band.
  __device__ int begin(int band) const {
    return a.row_offsets[min(band * a.band_rows, a.out_blocks)];
  }
  // Returns the band at a position, if each band counts `cost` in addition to its blocks.
  __device__ int find(int position, int cost) const {
    const int lane = threadIdx.x % 32;
    for (int band = 0;; band += 32) {
      const int next = band + lane + 1;
      const unsigned later =
          __ballot_sync(0xffffffff, next >= n || begin(next) + next * cost > position);
      if (later) return min(band + __ffs(later) - 1, n - 1);
    }
  }
  // Returns the first block of a group.
  __device__ int group_begin(int group) const {
    const int cost = a.band_cost;
    const long long total = begin(n) + n * cost;
    const int position = (int)(total * group / a.groups), band = find(position, cost);
    return max(begin(band), min(begin(band + 1), position - (band + 1) * cost));
  }
};

// Scheduler warp: finds, for each of LOOKUP_COLUMNS columns, which rows of a band have a block
// there. The band's entries are [begin, end).
__device__ inline void look_up_columns(const Arguments& a, SharedWithLookup& s, int begin, int end,
                                       int first_row, int first_column) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for (int i = lane; i < LOOKUP_COLUMNS; i += 32) s.columns[i] = 0;
  __syncwarp();
  constexpr int BATCH = 8;  // loads in flight
  for (int i = begin + lane; i - lane < end; i += 32 * BATCH) {
    int2 entries[BATCH];
    int rows[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      entries[j] = i + 32 * j < end ? __ldg(a.entries + i + 32 * j) : make_int2(-1, -1);
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      rows[j] = entries[j].y >= 0 ? __ldg(a.coords + entries[j].y).x - first_row : 0;
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const int column = entries[j].x - first_column;
      if (entries[j].y >= 0 && 0 <= column && column < LOOKUP_COLUMNS)
        atomicOr(&s.columns[column], 1u << rows[j]);
    }
  }
  __syncwarp();
}

// Scheduler warp: publishes blocks [first, end) in the order of band, column and row.
__device__ inline void schedule_group(const Arguments& a, SharedWithLookup& s,
                                      Scheduler<Blocks>& scheduler, int first, int end) {
  const int lane = threadIdx.x % 32;
  if (first >= end) return;
  const Bands bands(a);
  int band = bands.find(first, 0);
  WorkItem<Blocks>* item = nullptr;
  int n = 0, n_dy = 0, n_x = 0;  // counts of the work item so far
  auto publish = [&] {
    if (lane == 0) {
      item->n_dy = n_dy;
      item->n_x = n_x;
      item->payload.n = n;
    }
    scheduler.publish(a.tokens, n_x);
    item = nullptr;
  };
  for (; band < bands.n && bands.begin(band) < end; ++band) {
    const int first_row = band * a.band_rows, rows = min(a.band_rows, a.out_blocks - first_row);
    const int dy_strips = (rows * B + STRIP - 1) / STRIP;
    int first_dy = -1;
    int visited = bands.begin(band);  // blocks up to the current columns
    const int band_end = bands.begin(band + 1), needed_end = min(end, band_end);
    for (int column = lane; visited < needed_end; column += 32) {
      if (column % LOOKUP_COLUMNS < 32)
        look_up_columns(a, s, bands.begin(band), band_end, first_row, column - lane);
      unsigned present = s.columns[column % LOOKUP_COLUMNS];
      const int count = __popc(present), total = __reduce_add_sync(0xffffffff, count);
      visited += total;
      if (visited <= first || total == 0) continue;
      const int column_end = visited - total + inclusive_warp_scan(count);
      const int column_begin = column_end - count;
      // Remove the lowest and highest blocks of the column that are outside the group.
      for (int i = column_begin; i < min(column_end, first); ++i) present &= present - 1;
      for (int i = max(column_begin, end); i < column_end; ++i)
        present &= ~(1u << 31 - __clz(present));
      // Add as many columns as fit into the work item, then the rest to the next ones.
      while (__ballot_sync(0xffffffff, present != 0)) {
        if (item && first_dy < 0 && n_dy + dy_strips > DY_STRIPS) publish();
        if (item == nullptr) {
          item = &scheduler.acquire();
          n = n_dy = n_x = 0;
          first_dy = -1;
        }
        const int blocks_scan = inclusive_warp_scan(__popc(present));
        constexpr int COLUMNS = X_WIDTH / B;  // per strip
        const unsigned nonempty = __ballot_sync(0xffffffff, present != 0);
        const unsigned in_strip = (nonempty >> lane / COLUMNS * COLUMNS) & ((1u << COLUMNS) - 1);
        const bool is_leader = in_strip && lane % COLUMNS == __ffs(in_strip) - 1;
        const unsigned leaders = __ballot_sync(0xffffffff, is_leader);
        const int strips_scan = __popc(leaders & (2u << lane) - 1);
        const int more_dy = first_dy < 0 ? dy_strips : 0;
        const bool fits = n + blocks_scan <= MAX_BLOCKS && n_x + strips_scan <= X_STRIPS &&
                          (n_dy + more_dy) * X_PER_DY + n_x + strips_scan <= MAX_STRIPS;
        const unsigned fitting = __ballot_sync(0xffffffff, fits);
        if (fitting == 0) {
          publish();
          continue;
        }
        if (first_dy < 0) {
          first_dy = n_dy;
          if (lane < dy_strips) item->dy_features[n_dy + lane] = first_row * B + lane * STRIP;
          n_dy += dy_strips;
        }
        if (fits) {
          const int strip = n_x + strips_scan - 1;
          if (is_leader) item->x_features[strip] = column * B / X_WIDTH * X_WIDTH;
          int i = n + blocks_scan - __popc(present);
          for (; present; present &= present - 1, ++i) {
            const int row = __ffs(present) - 1;
            const int dy = (first_dy + row * B / STRIP) * DY_STRIP_BYTES + row * B % STRIP * 2;
            const int x = strip * X_STRIP_BYTES + column * B % X_WIDTH * 2;
            item->payload.offsets[i] = dy >> 4 | x >> 4 << 16;
          }
        }
        const int last = 31 - __clz(fitting);  // the lanes that fit are the first ones
        n += __shfl_sync(0xffffffff, blocks_scan, last);
        n_x += __shfl_sync(0xffffffff, strips_scan, last);
        if (__ballot_sync(0xffffffff, present != 0)) publish();
      }
    }
  }
  if (item) publish();
}

// Returns the slot of a block of a work item.
__device__ inline int slot_of(const Arguments& a, const WorkItem<Blocks>& item, int block) {
  constexpr int DY = DY_STRIP_BYTES / 16, X = X_STRIP_BYTES / 16;
  const int offsets = item.payload.offsets[block];
  const int dy = offsets & 0xffff, x = (unsigned)offsets >> 16;
  const int row = (item.dy_features[dy / DY] + dy % DY * 8) / B;
  const int column = (item.x_features[x / X] + x % X * 8) / B;
  return __ldg(a.slots + (long long)row * a.in_blocks + column);
}

typedef float Acc[B / 16][B / 8][4];  // accumulators of a block, in fragments of mma.sync

// Stores the accumulators of a warp's block through shared memory, by whole lines.
__device__ inline void store_block(const Acc& acc, char* staging, T* destination) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < B / 16; ++m)
#pragma unroll
    for (int j = 0; j < B / 8; j += 2) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = acc[m][j + i / 2] + i % 2 * 2;
        words[i] = round_to<T>(pair[0]).bits | (unsigned)round_to<T>(pair[1]).bits << 16;
      }
      stmatrix_x4(staging + ((m * 16 + lane % 16) * B + (j + lane / 16) * 8) * 2, words);
    }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < B * B / 8; i += 32)
    reinterpret_cast<uint4*>(destination)[i + lane] =
        reinterpret_cast<const uint4*>(staging)[i + lane];
  __syncwarp();
}

// Returns a lane's offset for a transposing ldmatrix_x4 of 16 tokens x 16 features, in rows of
// BYTES that each hold one token. The second 8 x 8 matrix has the next tokens (`tokens_first`) or
// the next features.
template <int BYTES>
__device__ int ldmatrix_offset(bool tokens_first) {
  const int lane = threadIdx.x % 32, low = lane / 8 % 2, high = lane / 16;
  const int row = (tokens_first ? low : high) * 8 + lane % 8, chunk = tokens_first ? high : low;
  const int swizzle = BYTES == 128 ? row % 8 : row / 2 % 4;  // that of TMA
  return row * BYTES + (chunk ^ swizzle) * 16;
}

// Consumer warp: multiplies an equal share of the work item's blocks.
__device__ inline void consume(const Arguments& a, Shared<Blocks>& s, const WorkItem<Blocks>& item,
                               PipelineState& state) {
  const int warp = warp_uniform(threadIdx.x / 32 - 4), lane = threadIdx.x % 32;
  const int n_blocks = item.payload.n;
  const int first = n_blocks * warp / WARPS, n = n_blocks * (warp + 1) / WARPS - first;
  const int x_begin = item.n_dy * DY_STRIP_BYTES;
  int blocks[WARP_BLOCKS];
  unsigned new_x = 0;  // bit mask of blocks whose column differs from that of the previous one
#pragma unroll
  for (int i = 0; i < WARP_BLOCKS; ++i) {
    blocks[i] = i < n ? warp_uniform(item.payload.offsets[first + i]) : 0;
    new_x |= (unsigned)(i == 0 || blocks[i] >> 16 != blocks[i - 1] >> 16) << i;
  }
  const int dy_lane = ldmatrix_offset<128>(false), x_lane = ldmatrix_offset<X_ROW_BYTES>(true);
  Acc acc[WARP_BLOCKS];
#pragma unroll
  for (int i = 0; i < WARP_BLOCKS * B * B / 32; ++i) acc[0][0][0][i] = 0;
  for (int k_tile = item.first_k_tile; k_tile < item.end_k_tile; ++k_tile, state.advance()) {
    const int current = state.k_tile;
    mbarrier_wait_item(s.full, current);
    const char* dy = s.operands[state.stage * state.stage_strips];
    const char* x = dy + x_begin;
    unsigned x_fragments[TK / 16][B / 16][4];
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; ++i)
      if (i < n) {
        unsigned dy_fragments[TK / 16][B / 16][4];
        const int dy_offset = (blocks[i] & 0xffff) << 4 ^ dy_lane;
#pragma unroll
        for (int k = 0; k < TK / 16; ++k)
#pragma unroll
          for (int m = 0; m < B / 16; ++m)
            ldmatrix_x4<true>(dy_fragments[k][m], dy + (dy_offset ^ m * 32) + k * 16 * 128);
        if (new_x >> i & 1) {
          const int x_offset = (unsigned)blocks[i] >> 16 << 4 ^ x_lane;
#pragma unroll
          for (int k = 0; k < TK / 16; ++k)
#pragma unroll
            for (int j = 0; j < B / 16; ++j)
              ldmatrix_x4<true>(x_fragments[k][j], x + (x_offset ^ j * 32) + k * 16 * X_ROW_BYTES);
        }
#pragma unroll
        for (int k = 0; k < TK / 16; ++k)
#pragma unroll
          for (int m = 0; m < B / 16; ++m)
#pragma unroll
            for (int j = 0; j < B / 8; ++j)
              mma_m16n8k16(acc[i][m][j], dy_fragments[k][m], x_fragments[k][j / 2] + j % 2 * 2,
                           T());
      }
    __syncwarp();
    release(s, current);
  }
  char* staging = s.results[warp];
  if constexpr (SPLIT_K == 1) {
    static_assert(WARP_BLOCKS <= 32, "one per lane");
    const int slots = lane < n ? slot_of(a, item, first + lane) : 0;
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; ++i)
      if (i < n) {
        const long long slot = __shfl_sync(0xffffffff, slots, i);
        store_block(acc[i], staging, a.dw + slot * (B * B));
      }
  } else {
    constexpr int QUADS = B * B / 128;  // float4 of a lane for a block
    static_assert(MAX_BLOCKS * B * B * 4 <= sizeof(s.operands), "the partial results fit");
    float4* partial = partial_results(s) + lane;  // [block][QUADS][lane]
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; ++i)
      if (i < n)
#pragma unroll
        for (int j = 0; j < QUADS; ++j) {
          const float* quad = acc[i][0][0] + 4 * j;
          partial[((first + i) * QUADS + j) * 32] = make_float4(quad[0], quad[1], quad[2], quad[3]);
        }
    cluster_sync();
    for (int block = split_rank() + SPLIT_K * warp; block < n_blocks; block += SPLIT_K * WARPS) {
      const long long slot = slot_of(a, item, block);
      Acc total = {};
      reduce_split_k<QUADS>(s, total[0][0], block * QUADS * 32 + lane, 32);
      store_block(total, staging, a.dw + slot * (B * B));
    }
    fence_proxy_async();
    cluster_sync();
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    block_linear_dw(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  SharedWithLookup& s = *reinterpret_cast<SharedWithLookup*>(memory);
  auto schedule = [&](Scheduler<Blocks>& scheduler) {
    const int n_blocks = a.row_offsets[a.out_blocks];
    const Bands bands(a);
    for (int group = blockIdx.x / CLUSTER; group < a.groups; group += gridDim.x / CLUSTER)
      schedule_group(a, s, scheduler, bands.group_begin(group), bands.group_begin(group + 1));
    zero_slots<B>(a.dw, a.entries, n_blocks, a.capacity);
  };
  run_warp_specialized(
      s, a.dy, a.x, schedule,
      [&](const WorkItem<Blocks>& item, PipelineState& state) { consume(a, s, item, state); });
}
