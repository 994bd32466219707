// y = x W^T + bias (FORWARD), or dx = dy W, for a block-sparse W on sm_90a: what portable/linear.cu
// computes, for bf16 and fp16 and B = 16 or 32, with TMA and mma.sync.
//
//   x      [tokens, in_features]       values [capacity, B, B]      y [tokens, out_features]
//   bias   [out_features] or null
//   slots  int [out_blocks, in_blocks], strided: the slot of each block, -1 where absent
//
// "in" and "out" are from the product's point of view, as in portable/linear.cu. Tensors are
// 16-byte aligned; there is at least one token and one slot.
//
// Grid: persistent thread blocks, each of which computes one TM x TN tile of y at a time. k runs in
// k-tiles of TK; k-tiles without a present block are skipped.
//
// Warp roles: in the first warpgroup, PRODUCER_WARPS issue TMA loads for every PRODUCER_WARPS-th
// k-tile each, and one scheduler warp looks up which blocks are present, a window of k-tiles ahead.
// The other warps are consumers, each for 64 tokens and the present blocks of 64 outputs. A WGMMA
// with W on the left would span 64 outputs, where most narrow blocks are absent, so consumers use
// mma.sync block by block, at two thirds of the rate.
//
// Pipeline: STAGES stages of x, and a circular buffer for the present blocks of W. Accumulation is
// in order of k, so results depend neither on slots nor on timing.

#include "hopper/linear.cuh"
#include "product_mma.cuh"

constexpr int WARPS = TM / 64 * (TN / 64), THREADS = 128 + 32 * WARPS;
static_assert(TK == 64 || TK == 32, "a row of x is a line of shared memory, or half of one");

constexpr int IN_BLOCKS = TK / B, OUT_BLOCKS = TN / B;  // per k-tile
constexpr int WARP_BLOCKS = 64 / B;                     // output blocks of a consumer warp

constexpr int X_ROW_BYTES = 2 * TK, W_ROW_BYTES = 2 * B;  // in shared memory
constexpr int X_BYTES = TM * X_ROW_BYTES, BLOCK_BYTES = B * W_ROW_BYTES;

// Each lane of the scheduler warp looks up B inputs; a window is what the warp looks up at once.
constexpr int WINDOW = 32 / IN_BLOCKS, SCHEDULE_STAGES = 3;

// Consumers release all k-tiles of a window that they do not need immediately, so barriers
// outnumber stages: there is one for each k-tile that is scheduled or in the buffers.
constexpr int BARRIERS = 128;
static_assert(BARRIERS >= SCHEDULE_STAGES * WINDOW + STAGES + PRODUCER_WARPS,
              "barriers are not reused too early");
static_assert(STAGES + PRODUCER_WARPS <= 32, "one per lane");

// Boxes of x: TM x TK.
typedef LinearArguments<const T*> Arguments;

struct Schedule {
  int n_k_tiles;                  // k-tiles of the window in which the tile has any block
  int slots[32][OUT_BLOCKS + 1];  // by lane; odd row length avoids bank conflicts
};

// A k-tile to multiply; they are numbered over all tiles of the thread block.
struct alignas(16) KTile {
  u64 present;      // bit mask of its blocks: in_block * OUT_BLOCKS + out_block
  int first_block;  // numbered likewise; the buffer wraps
  int first_k;      // its first input
};
constexpr int K_TILES = BARRIERS;

template <int BLOCKS_>
struct alignas(1024) SharedOf {
  char x[STAGES][X_BYTES];
  char y[WARPS][16 * 128];  // staging for 16 tokens x 64 outputs
  char blocks[BLOCKS_][BLOCK_BYTES];
  KTile k_tiles[K_TILES];
  Schedule schedules[SCHEDULE_STAGES];
  u64 full[BARRIERS], empty[BARRIERS];
  u64 schedule_full[SCHEDULE_STAGES], schedule_empty[SCHEDULE_STAGES];
};
__device__ constexpr int floor_power_of_two(int n) {
  return n < 2 ? n : 2 * floor_power_of_two(n / 2);
}
constexpr int BLOCKS = floor_power_of_two(count_that_fits(sizeof(SharedOf<1>), BLOCK_BYTES));
typedef SharedOf<BLOCKS> Shared;
static_assert(IN_BLOCKS * OUT_BLOCKS <= 64 && IN_BLOCKS * OUT_BLOCKS <= BLOCKS,
              "a k-tile's blocks fit into its mask and the buffer");
static_assert((STAGES & STAGES - 1) == 0, "modulo is cheap");

LINEAR_LAUNCH_FACTS;

__device__ inline int n_k_tiles(const Arguments& a) { return (a.in_blocks * B + TK - 1) / TK; }

// Scheduler warp: looks up which blocks are present, ahead of the loads.
__device__ void schedule(const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, tiles = a.token_tiles * a.output_tiles;
  int window = 0, n = 0, blocks = 0;  // counts so far
  // The slots of the next window are prefetched while one is scheduled.
  int next[OUT_BLOCKS];
  auto prefetch = [&](int tile, int first) {
    const int first_out = tile % a.output_tiles * OUT_BLOCKS, in_block = first * IN_BLOCKS + lane;
    const int* slot =
        a.slots + (long long)first_out * a.out_stride + (long long)in_block * a.in_stride;
#pragma unroll
    for (int block = 0; block < OUT_BLOCKS; ++block, slot += a.out_stride) {
      const bool inside = in_block < a.in_blocks && first_out + block < a.out_blocks;
      next[block] = inside ? __ldg(slot) : -1;
    }
  };
  if (blockIdx.x < tiles) prefetch(blockIdx.x, 0);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
    for (int first = 0; first < n_k_tiles(a); first += WINDOW, ++window) {
      Schedule& out = s.schedules[wrap<SCHEDULE_STAGES>(window)];
      mbarrier_wait_replaced(s.schedule_empty, window);
      unsigned lane_present = 0;
#pragma unroll
      for (int block = 0; block < OUT_BLOCKS; ++block) {
        lane_present |= (unsigned)(next[block] >= 0) << block;
        out.slots[lane][block] = next[block];
      }
      if (first + WINDOW < n_k_tiles(a))
        prefetch(tile, first + WINDOW);
      else if (tile + gridDim.x < tiles)
        prefetch(tile + gridDim.x, 0);
      u64 present = (u64)lane_present << lane % IN_BLOCKS * OUT_BLOCKS;
#pragma unroll
      for (int distance = 1; distance < IN_BLOCKS; distance *= 2)
        present |= __shfl_xor_sync(0xffffffff, present, distance);
      const bool is_needed = lane % IN_BLOCKS == 0 && present;
      const unsigned needed = __ballot_sync(0xffffffff, is_needed);
      const int lane_blocks = is_needed ? __popcll(present) : 0;
      const int scan = inclusive_warp_scan(lane_blocks);
      if (is_needed)
        s.k_tiles[wrap<K_TILES>(n + __popc(needed & ((1u << lane) - 1)))] = {
            present, blocks + scan - lane_blocks, (first + lane / IN_BLOCKS) * TK};
      blocks += __shfl_sync(0xffffffff, scan, 31);
      n += __popc(needed);
      if (lane == 0) out.n_k_tiles = __popc(needed);
      mbarrier_arrive_item(s.schedule_full, window);
    }
}

// Calls begin(tile), visit(number of its first k-tile, schedule) for every window of the tile, and
// end(tile).
template <typename Begin, typename Visit, typename End>
__device__ void for_each_window(const Arguments& a, Shared& s, Begin begin, Visit visit, End end) {
  int window = 0, n = 0;
  for (int tile = blockIdx.x; tile < a.token_tiles * a.output_tiles; tile += gridDim.x) {
    begin(tile);
    for (int first = 0; first < n_k_tiles(a); first += WINDOW, ++window) {
      const Schedule& in = s.schedules[wrap<SCHEDULE_STAGES>(window)];
      mbarrier_wait_item(s.schedule_full, window);
      visit(n, in);
      n += in.n_k_tiles;
      mbarrier_arrive_item(s.schedule_empty, window);
    }
    end(tile);
  }
}

// Producer warp: loads every PRODUCER_WARPS-th k-tile, its x and its blocks.
__device__ void produce(const Arguments& a, Shared& s, int producer) {
  const int lane = threadIdx.x % 32;
  int token;
  for_each_window(
      a, s, [&](int tile) { token = tile / a.output_tiles * TM; },
      [&](int first, const Schedule& schedule) {
        // Each lane examines one k-tile of the window. It may be loaded once the k-tile that last
        // used its stage and all those that still hold its places in the buffer are released: find
        // the last of these.
        const KTile lane_k_tile = s.k_tiles[wrap<K_TILES>(first + lane)];
        const int end = lane_k_tile.first_block + __popcll(lane_k_tile.present);
        int lane_last = first + lane - STAGES;
#pragma unroll
        for (int i = STAGES - 1; i > 0; --i) {
          const int older = first + lane - i;
          if (older >= 0 && s.k_tiles[wrap<K_TILES>(older)].first_block < end - BLOCKS)
            lane_last = older;
        }
        for (int n = first + (producer + PRODUCER_WARPS - first % PRODUCER_WARPS) % PRODUCER_WARPS;
             n < first + schedule.n_k_tiles; n += PRODUCER_WARPS) {
          const int i = n - first;
          const u64 present = __shfl_sync(0xffffffff, lane_k_tile.present, i);
          const int first_block = __shfl_sync(0xffffffff, lane_k_tile.first_block, i);
          const int first_k = __shfl_sync(0xffffffff, lane_k_tile.first_k, i);
          const int last = __shfl_sync(0xffffffff, lane_last, i);
          u64* full = &s.full[wrap<BARRIERS>(n)];
          // K-tiles are released out of order, so wait for each, one per lane. At its previous
          // k-tile this warp has waited for all older ones.
          const int older = n - (STAGES + PRODUCER_WARPS - 1) + lane;
          if (older >= 0 && older <= last) mbarrier_wait_item(s.empty, older);
          __syncwarp();
          if (lane == 0) {
            mbarrier_arrive_expect_tx(full, X_BYTES + __popcll(present) * BLOCK_BYTES);
            tma_load_2d(s.x[wrap<STAGES>(n)], a.x, full, first_k, token);
          }
          __syncwarp();
#pragma unroll
          for (int entry = lane; entry < IN_BLOCKS * OUT_BLOCKS; entry += 32)
            if (present >> entry & 1) {
              const int slot =
                  schedule.slots[first_k / B % 32 + entry / OUT_BLOCKS][entry % OUT_BLOCKS];
              const int block = first_block + __popcll(present & ((1ull << entry) - 1));
              tma_load_1d(s.blocks[wrap<BLOCKS>(block)], a.values + (long long)slot * (B * B),
                          BLOCK_BYTES, full);
            }
        }
      },
      [](int) {});
}

// Loads a warp's fragments. With B = 32, four of the eight rows of a matrix would share banks. So
// every other pair of rows reads its two chunks in swapped order, and only two rows conflict.
struct FragmentLoader {
  int x_offset, w_offset;  // of this lane, within a stage of x and within a block
  bool is_swapped;         // whether the rows of W whose elements this lane receives are swapped

  __device__ explicit FragmentLoader(int first_token) {
    const int lane = threadIdx.x % 32, row = lane % 8, low = lane / 8 % 2, high = lane / 16;
    auto swapped = [](int row) { return B == 32 ? row / 2 % 2 : 0; };
    const int swizzle = TK == 64 ? row : row / 2;  // that of TMA
    x_offset = (first_token + low * 8 + row) * X_ROW_BYTES + (high ^ swizzle) * 16;
    w_offset = FORWARD ? (high * 8 + row) * W_ROW_BYTES + (low ^ swapped(row)) * 16
                       : (low * 8 + row) * W_ROW_BYTES + (high ^ swapped(row)) * 16;
    is_swapped = swapped(FORWARD ? lane / 4 : lane % 4 * 2);
  }
  // Loads 16 tokens, from `token` on, of 16 inputs, from k on.
  __device__ void load_x(unsigned (&words)[4], const char* x, int token, int k) const {
    ldmatrix_x4<false>(words, x + token * X_ROW_BYTES + (x_offset ^ k * 2));
  }
  // Loads 16 outputs, from `output` on, of 16 inputs, from k on.
  __device__ void load_w(unsigned (&words)[4], const char* block, int output, int k) const {
    unsigned loaded[4];
    const int offset = FORWARD ? output * W_ROW_BYTES + k * 2 : k * W_ROW_BYTES + output * 2;
    ldmatrix_x4<!FORWARD>(loaded, block + w_offset + offset);
    constexpr int SWAPPED = FORWARD ? 1 : 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = is_swapped ? loaded[i ^ SWAPPED] : loaded[i];
  }
};

// Consumer warp: multiplies its tokens by its output blocks.
__device__ void consume(const Arguments& a, Shared& s) {
  const int warp = warp_uniform(threadIdx.x / 32 - 4), lane = threadIdx.x % 32;
  constexpr int GROUPS = TN / 64;
  // Warps of one SM sub-partition get different outputs, since some outputs have more blocks.
  const int warp_token = warp / GROUPS * 64;
  const int warp_output = (warp + warp / GROUPS * (GROUPS / 2)) % GROUPS * 64;
  const FragmentLoader loader(warp_token);
  float acc[4][8][4];
  for_each_window(
      a, s,
      [&](int) {
#pragma unroll
        for (int i = 0; i < 128; ++i) acc[0][0][i] = 0;
      },
      [&](int first, const Schedule& schedule) {
        // Each lane examines one k-tile of the window: which of its blocks are this warp's and, for
        // each input block, the place of the first one in the buffer.
        const bool exists = lane < schedule.n_k_tiles;
        const KTile& lane_k_tile = s.k_tiles[wrap<K_TILES>(first + lane)];
        const u64 present = exists ? lane_k_tile.present : 0;
        unsigned lane_blocks = 0, lane_firsts = 0;
#pragma unroll
        for (int in_block = 0; in_block < IN_BLOCKS; ++in_block) {
          const int bit = in_block * OUT_BLOCKS + warp_output / B;
          lane_blocks |= (unsigned)(present >> bit & ((1u << WARP_BLOCKS) - 1))
                         << in_block * WARP_BLOCKS;
          const int block = lane_k_tile.first_block + __popcll(present & ((1ull << bit) - 1));
          lane_firsts |= (unsigned)wrap<BLOCKS>(block) << in_block * 8;
        }
        static_assert(BLOCKS <= 256 && IN_BLOCKS <= 4, "a byte each");
        if (exists && lane_blocks == 0) mbarrier_arrive_item(s.empty, first + lane);
        for (unsigned rest = __ballot_sync(0xffffffff, lane_blocks != 0); rest; rest &= rest - 1) {
          const int i = __ffs(rest) - 1, n = first + i;
          const unsigned blocks = __shfl_sync(0xffffffff, lane_blocks, i);
          const unsigned firsts = __shfl_sync(0xffffffff, lane_firsts, i);
          const char* x = s.x[wrap<STAGES>(n)];
          mbarrier_wait_item(s.full, n);
#pragma unroll
          for (int in_block = 0; in_block < IN_BLOCKS; ++in_block) {
            if ((blocks >> in_block * WARP_BLOCKS & ((1u << WARP_BLOCKS) - 1)) == 0) continue;
            unsigned x_fragments[B / 16][4][4];
#pragma unroll
            for (int k = 0; k < B; k += 16)
#pragma unroll
              for (int m = 0; m < 4; ++m)
                loader.load_x(x_fragments[k / 16][m], x, m * 16, in_block * B + k);
            int position = firsts >> in_block * 8 & 255;
#pragma unroll
            for (int out_block = 0; out_block < WARP_BLOCKS; ++out_block)
              if (blocks >> (in_block * WARP_BLOCKS + out_block) & 1) {
                const char* block = s.blocks[position];
                position = wrap<BLOCKS>(position + 1);
#pragma unroll
                for (int k = 0; k < B; k += 16)
#pragma unroll
                  for (int output = 0; output < B; output += 16) {
                    unsigned w_fragment[4];
                    loader.load_w(w_fragment, block, output, k);
#pragma unroll
                    for (int m = 0; m < 4; ++m)
#pragma unroll
                      for (int j = 0; j < 2; ++j)
                        mma_m16n8k16(acc[m][(out_block * B + output) / 8 + j],
                                     x_fragments[k / 16][m], w_fragment + 2 * j, T());
                  }
              }
          }
          __syncwarp();
          if (lane == 0) mbarrier_arrive_item(s.empty, n);
        }
      },
      [&](int tile) {
        const int out_features = a.out_blocks * B;
        const long long first_token = tile / a.output_tiles * TM + warp_token;
        const int first_output = tile % a.output_tiles * TN + warp_output;
        if (a.bias) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int output = first_output + j * 8 + lane % 4 * 2;
            if (output >= out_features) break;
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[m][j][i] += widen(a.bias[output + i % 2]);
          }
        }
#pragma unroll
        for (int m = 0; m < 4; ++m)
          store_rows<T>(
              s.y[warp], acc[m][0],
              [&](int row, int col) -> T* {
                const long long token = first_token + m * 16 + row;
                const int output = first_output + col;
                return token < a.tokens && output < out_features
                           ? a.y + token * out_features + output
                           : nullptr;
              },
              Epilogue<CONFIG_EPILOGUE, T, Arguments>{a});
      });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    block_linear(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  init_barriers(s, WARPS, PRODUCER_WARPS + WARPS);
  __syncthreads();
  // The total must not exceed what the launch allocates: 168 registers per thread, or 240.
  constexpr int CONSUMER_REGISTERS = WARPS > 4 ? 216 : 240;
  if (threadIdx.x < 128) {
    warpgroup_reg_dealloc<72>();
    const int warp = threadIdx.x / 32;
    if (warp < PRODUCER_WARPS)
      produce(a, s, warp);
    else
      schedule(a, s);
  } else {
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    consume(a, s);
  }
}
