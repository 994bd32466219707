// y = x W^T + bias (FORWARD), or dx = dy W, for a block-sparse W on sm_90a: what portable/linear.cu
// computes, for bf16 and fp16 and B = 64 or 128, with TMA and WGMMA.
//
//   x      [tokens, in_features]       values [capacity, B, B]      y [tokens, out_features]
//   bias   [out_features] or null
//   slots  int [out_blocks, in_blocks], strided: the slot of each block, -1 where absent
//
// "in" and "out" are from the product's point of view, as in portable/linear.cu. Tensors are
// 16-byte aligned; there is at least one token and one slot.
//
// Grid: persistent clusters of CLUSTER thread blocks, each of which computes one TM x TN tile of y
// at a time. The thread blocks of a cluster have the same outputs and different tokens, so W is
// multicast. k runs in k-tiles of TK; k-tiles without a present block are skipped.
//
// Warp roles: in the first warpgroup, PRODUCER_WARPS issue TMA loads for every PRODUCER_WARPS-th
// k-tile each, and one scheduler warp looks up which blocks are present, a window of k-tiles ahead.
// The consumer warpgroups issue WGMMA, each for its share of the outputs. They store the results
// themselves, unless there is an epilogue: it takes as long as the product, so a warpgroup of its
// own computes it, from results in shared memory, while the consumers multiply the next tile.
//
// Pipeline: stages vary in size. The operands are in a circular buffer of units. A k-tile takes
// X_UNITS for x, [TM][TK], and one per present output block: a block of 64 or half a block of 128.
// Accumulation is in order of k, so results depend neither on slots nor on timing.

#include "hopper/linear.cuh"

constexpr int CLUSTER = CONFIG_CLUSTER;
constexpr int WARPGROUPS = CONFIG_CONSUMER_WARPGROUPS, WARPS = 4 * WARPGROUPS;
constexpr bool HAS_EPILOGUE = CONFIG_EPILOGUE != NONE;
constexpr int OPERANDS = operands_of(CONFIG_EPILOGUE);
constexpr int EPILOGUE_WARPS = 4, EPILOGUE_RING = 4;  // steps of the epilogue in flight
constexpr int THREADS = 128 + 32 * (WARPS + (HAS_EPILOGUE ? EPILOGUE_WARPS : 0));
static_assert(TK == 64 && B % TK == 0, "a row of an operand is 128 bytes, within one block");
static_assert(TM % 64 == 0 && TN % (B * WARPGROUPS) == 0,
              "TM must be a multiple of 64, and TN of whole blocks for each consumer warpgroup");

constexpr int TILE_BLOCKS = TN / B;  // output blocks of a tile
constexpr int ROW_BYTES = 2 * TK;    // in shared memory
constexpr int X_BYTES = TM * ROW_BYTES, X_SUBTILE_BYTES = 64 * ROW_BYTES;  // subtile: M of a WGMMA
constexpr int UNIT_BYTES = B * ROW_BYTES, X_UNITS = X_BYTES < UNIT_BYTES ? 1 : X_BYTES / UNIT_BYTES;

// Boxes: of x, B tokens, or TM if that is less, by 64 inputs; of values, 64 x 64.
typedef LinearArguments<TensorMap> Arguments;

constexpr int WINDOW = 32;  // k-tiles that the scheduler warp looks up at once, one per lane
constexpr int SCHEDULE_STAGES = 4;

struct Schedule {
  int n_k_tiles;  // k-tiles of the window in which the tile has any block
  int slots[WINDOW][TILE_BLOCKS];
};

// A k-tile to multiply; they are numbered over all tiles of the thread block.
struct alignas(16) KTile {
  unsigned present;  // bit mask of its output blocks
  int first_unit;    // numbered likewise; the buffer wraps
  int first_k;       // its first input
};
constexpr int K_TILES = 256;  // more than can be scheduled ahead or in flight

template <int UNITS_>
struct alignas(1024) SharedOf {
  char units[UNITS_][UNIT_BYTES];
  // Results before they are stored: 16 tokens x 64 outputs for each consumer warp or, for the
  // epilogue, the tile. A row has 64 outputs; its 16-byte chunks are swizzled.
  char results[HAS_EPILOGUE ? TN / 64 * TM : 16 * WARPS][128];
  // What the epilogue reads, for each of its warps a ring of steps. Aligned to lines, since
  // cp.async fetches twice what crosses one.
  alignas(128) uint4 operands[OPERANDS ? EPILOGUE_WARPS * EPILOGUE_RING * OPERANDS : 1][32];
  u64 results_full[1], results_empty[1];  // for the epilogue
  KTile k_tiles[K_TILES];
  Schedule schedules[SCHEDULE_STAGES];
  u64 full[STAGES], empty[STAGES];
  u64 schedule_full[SCHEDULE_STAGES], schedule_empty[SCHEDULE_STAGES];
};
constexpr int UNITS = count_that_fits(sizeof(SharedOf<1>), UNIT_BYTES);
typedef SharedOf<UNITS> Shared;
// A k-tile is held until the next one has arrived, and one producer may be ahead of the others.
static_assert(2 * (X_UNITS + TILE_BLOCKS) <= UNITS, "two k-tiles fit");
static_assert(UNITS / (X_UNITS + 1) + PRODUCER_WARPS <= STAGES,
              "barriers are not reused too early");

LINEAR_LAUNCH_FACTS;

__device__ inline int units_of(unsigned present) { return X_UNITS + __popc(present); }

// Scheduler warp: looks up which blocks are present, ahead of the loads.
__device__ void schedule(const Arguments& a, Shared& s, int clusters) {
  const int lane = threadIdx.x % 32, all_k_tiles = a.in_blocks * B / TK;
  int window = 0, n = 0, units = 0;  // counts so far
  for (int tile = blockIdx.x / CLUSTER; tile < a.token_tiles * a.output_tiles; tile += clusters) {
    const int first_out = tile % a.output_tiles * TILE_BLOCKS;
    for (int first = 0; first < all_k_tiles; first += WINDOW, ++window) {
      Schedule& out = s.schedules[wrap<SCHEDULE_STAGES>(window)];
      const int first_k = (first + lane) * TK, in_block = first_k / B;
      const int* slots = a.slots + (long long)in_block * a.in_stride;
      mbarrier_wait_replaced(s.schedule_empty, window);
      unsigned present = 0;
#pragma unroll
      for (int block = 0; block < TILE_BLOCKS; ++block) {
        const int out_block = first_out + block;
        const bool inside = in_block < a.in_blocks && out_block < a.out_blocks;
        const int slot = inside ? __ldg(slots + (long long)out_block * a.out_stride) : -1;
        present |= (unsigned)(slot >= 0) << block;
        out.slots[lane][block] = slot;
      }
      const unsigned needed = __ballot_sync(0xffffffff, present);
      const int lane_units = present ? units_of(present) : 0;
      const int scan = inclusive_warp_scan(lane_units);
      if (present)
        s.k_tiles[wrap<K_TILES>(n + __popc(needed & ((1u << lane) - 1)))] = {
            present, units + scan - lane_units, first_k};
      units += __shfl_sync(0xffffffff, scan, 31);
      n += __popc(needed);
      if (lane == 0) out.n_k_tiles = __popc(needed);
      mbarrier_arrive_item(s.schedule_full, window);
    }
  }
}

// Calls begin(tile), visit(k-tile's number, schedule) for every k-tile of the tile, and end(tile).
template <typename Begin, typename Visit, typename End>
__device__ void for_each_k_tile(const Arguments& a, Shared& s, int clusters, Begin begin,
                                Visit visit, End end) {
  const int all_k_tiles = a.in_blocks * B / TK;
  int window = 0, n = 0;
  for (int tile = blockIdx.x / CLUSTER; tile < a.token_tiles * a.output_tiles; tile += clusters) {
    begin(tile);
    for (int first = 0; first < all_k_tiles; first += WINDOW, ++window) {
      const Schedule& in = s.schedules[wrap<SCHEDULE_STAGES>(window)];
      mbarrier_wait_item(s.schedule_full, window);
      for (const int end_of_window = n + in.n_k_tiles; n < end_of_window; ++n) visit(n, in);
      mbarrier_arrive_item(s.schedule_empty, window);
    }
    end(tile);
  }
}

// Producer warp: loads every PRODUCER_WARPS-th k-tile, its x and this thread block's share of its
// W.
__device__ void produce(const Arguments& a, Shared& s, int rank, int producer, int clusters) {
  const int lane = threadIdx.x % 32;
  int token;
  for_each_k_tile(
      a, s, clusters, [&](int tile) { token = (tile / a.output_tiles * CLUSTER + rank) * TM; },
      [&](int n, const Schedule& schedule) {
        if (n % PRODUCER_WARPS != producer) return;
        const KTile k_tile = s.k_tiles[wrap<K_TILES>(n)];
        // Wait for the k-tile that last used these barriers and for any that still holds these
        // units.
        const int end = k_tile.first_unit + units_of(k_tile.present), older = n - STAGES + lane;
        const bool blocks_load =
            lane < STAGES &&
            (lane == 0 || older < 0 || s.k_tiles[wrap<K_TILES>(older)].first_unit < end - UNITS);
        const int last = n - STAGES + __popc(__ballot_sync(0xffffffff, blocks_load)) - 1;
        if (last >= 0) mbarrier_wait_item(s.empty, last);

        u64* full = &s.full[wrap<STAGES>(n)];
        if (lane == 0) {
          mbarrier_arrive_expect_tx(full, X_BYTES + __popc(k_tile.present) * UNIT_BYTES);
#pragma unroll
          for (int i = 0; i < X_UNITS; ++i)
            tma_load_2d(s.units[wrap<UNITS>(k_tile.first_unit + i)], a.x, full, k_tile.first_k,
                        token + i * B);
        }
        if (lane < TILE_BLOCKS && k_tile.present >> lane & 1 && lane % CLUSTER == rank) {
          const int unit = X_UNITS + __popc(k_tile.present & ((1u << lane) - 1));
          const int slot = schedule.slots[k_tile.first_k / TK % WINDOW][lane];
          const int half = k_tile.first_k % B;  // offset of the half of a block wider than TK
          char* destination = s.units[wrap<UNITS>(k_tile.first_unit + unit)];
#pragma unroll
          for (int row = 0; row < B; row += TK)
            tma_load_3d_multicast(destination + row * ROW_BYTES, a.values, full,
                                  FORWARD ? half : row, FORWARD ? row : half, slot,
                                  (1 << CLUSTER) - 1);
        }
        __syncwarp();
      },
      [](int) {});
}

// Consumer warpgroup: multiplies the tokens by its share of the output blocks.
__device__ void consume(const Arguments& a, Shared& s, int rank, int clusters) {
  constexpr int SHARE = TILE_BLOCKS / WARPGROUPS, SUBTILES = TM / 64;
  constexpr int ACCS = SHARE * B / 2;  // accumulators of a thread for one subtile
  const int warpgroup = warp_uniform(threadIdx.x / 128 - 1), lane = threadIdx.x % 32;
  const unsigned a_base = warp_uniform(descriptor_low(s.units));
  const unsigned b_base = warp_uniform(descriptor_low(s.units, FORWARD ? 16 : X_SUBTILE_BYTES));
  int previous = -1;  // the previous k-tile, whose WGMMAs may still be in flight
  int n_tiles = 0;
  float acc[SUBTILES * ACCS];
  auto release_previous = [&] {
    if (previous >= 0 && lane < CLUSTER)
      mbarrier_arrive_remote(&s.empty[wrap<STAGES>(previous)], lane);
  };
  for_each_k_tile(
      a, s, clusters,
      [&](int) {
#pragma unroll
        for (int i = 0; i < SUBTILES * ACCS; ++i) acc[i] = 0;
      },
      [&](int n, const Schedule&) {
        // Known to be uniform, so that the compiler keeps descriptors in uniform registers.
        const KTile& k_tile = s.k_tiles[wrap<K_TILES>(n)];
        const unsigned all = warp_uniform(k_tile.present);
        const int first_unit = warp_uniform(wrap<UNITS>(k_tile.first_unit));
        const unsigned present = all >> warpgroup * SHARE;
        int w_unit = X_UNITS + __popc(all & ((1u << warpgroup * SHARE) - 1));
        auto unit_descriptor = [&](unsigned base, int i) {
          const int unit = first_unit + i;
          return advance_descriptor(base, (unit < UNITS ? unit : unit - UNITS) * UNIT_BYTES);
        };
        unsigned a_desc[SUBTILES];
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i)
          a_desc[i] = advance_descriptor(unit_descriptor(a_base, i * X_SUBTILE_BYTES / UNIT_BYTES),
                                         i * X_SUBTILE_BYTES % UNIT_BYTES);
        mbarrier_wait_item(s.full, n);
        int groups = 0;
#pragma unroll
        for (int block = 0; block < SHARE; ++block)
          if (present >> block & 1) {
            // Forward, W is K-major; for dx it is N-major, and a block wider than TK is in two
            // halves.
            const unsigned b_desc = unit_descriptor(b_base, w_unit++);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TK; k += 16)
#pragma unroll
              for (int i = 0; i < SUBTILES; ++i)
                wgmma_m64k16<B, false, ROW_BYTES, !FORWARD>(
                    acc + i * ACCS + block * B / 2, advance_descriptor(a_desc[i], k * 2),
                    advance_descriptor(b_desc, k * (FORWARD ? 2 : ROW_BYTES)));
            wgmma_commit();
            ++groups;
          }
        wgmma_wait_dynamic<SHARE>(groups);  // only this k-tile's stay in flight
        release_previous();
        previous = n;
      },
      [&](int tile) {
        wgmma_wait<0>();
        release_previous();
        previous = -1;

        constexpr int OUTPUTS = TN / WARPGROUPS;
        const int warp = threadIdx.x / 32 % 4, out_features = a.out_blocks * B;
        const int first_output = tile % a.output_tiles * TN + warpgroup * OUTPUTS;
        const long long first_token =
            (long long)(tile / a.output_tiles * CLUSTER + rank) * TM + warp * 16;
        if (HAS_EPILOGUE) mbarrier_wait_replaced(s.results_empty, n_tiles);
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i)
#pragma unroll
          for (int column = 0; column < OUTPUTS; column += 64) {
            float* results = acc + i * ACCS + column / 2;
            if (a.bias) {
#pragma unroll
              for (int j = 0; j < 32; ++j) {
                const int col = first_output + column + j / 4 * 8 + lane % 4 * 2 + j % 2;
                if (col < out_features) results[j] += widen(a.bias[col]);
              }
            }
            if constexpr (HAS_EPILOGUE) {
              const int strip = (warpgroup * OUTPUTS + column) / 64;
              stage_rows<T>(s.results[strip * TM + i * 64 + warp * 16], results);
            } else {
              store_rows<T>(s.results[(warpgroup * 4 + warp) * 16], results,
                            [&](int row, int col) -> T* {
                              const long long token = first_token + i * 64 + row;
                              const int output = first_output + column + col;
                              return token < a.tokens && output < out_features
                                         ? a.y + token * out_features + output
                                         : nullptr;
                            });
            }
          }
        if (HAS_EPILOGUE) {
          __syncwarp();
          if (lane == 0) mbarrier_arrive_item(s.results_full, n_tiles);
          ++n_tiles;
        }
      });
}

// Epilogue warp: computes and stores every EPILOGUE_WARPS-th token of each tile. Operands are
// loaded RING steps ahead, and two steps at a time are computed, so that their latencies overlap.
template <int ACTIVATION>
__device__ void store_tiles(const Arguments& a, Shared& s, int rank, int clusters) {
  const Epilogue<CONFIG_EPILOGUE, T, Arguments, ACTIVATION> epilogue{a};
  constexpr int LANES = TN / 8, AT_ONCE = 32 / LANES;  // lanes per token; tokens per step
  constexpr int ROWS = EPILOGUE_WARPS * AT_ONCE, STEPS = TM / ROWS;
  constexpr int PAIR = 2, RING = EPILOGUE_RING;
  static_assert(RING % PAIR == 0 && STEPS % PAIR == 0, "steps are computed in pairs");
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, column = lane % LANES * 8;
  const int first_row = lane / LANES * EPILOGUE_WARPS + warp;
  const int out_features = a.out_blocks * B, tiles = a.token_tiles * a.output_tiles;
  const long long stride = ROWS * out_features;  // elements from one step to the next
  const char* results = s.results[column / 64 * TM + first_row];

  struct Lane {
    T* y;       // this lane's first results of a tile
    int steps;  // that exist
  };
  auto lane_of = [&](int tile) -> Lane {
    const int output = tile % a.output_tiles * TN + column;
    const long long token = (long long)(tile / a.output_tiles * CLUSTER + rank) * TM + first_row;
    const long long steps = output < out_features ? (a.tokens - token + ROWS - 1) / ROWS : 0;
    return {a.y + token * out_features + output, (int)min(steps, (long long)STEPS)};
  };
  auto operand_at = [&](int slot, int j) {
    return &s.operands[(warp * RING + slot) * OPERANDS + j][lane];
  };
  int ahead_tile = blockIdx.x / CLUSTER, ahead_step = 0, ahead_slot = 0;
  Lane ahead = lane_of(ahead_tile);
  auto prefetch = [&] {  // a pair of steps
    if (OPERANDS == 0) return;
    if (ahead_tile < tiles) {
#pragma unroll
      for (int i = 0; i < PAIR; ++i)
#pragma unroll
        for (int j = 0; j < OPERANDS; ++j)
          cp_async(operand_at(ahead_slot + i, j),
                   epilogue.operand(j, ahead.y + (ahead_step + i) * stride),
                   ahead_step + i < ahead.steps);
      ahead_slot = wrap<RING>(ahead_slot + PAIR);
      ahead_step += PAIR;
      if (ahead_step == STEPS) {
        ahead_step = 0;
        ahead_tile += clusters;
        ahead = lane_of(ahead_tile);
      }
    }
    cp_async_commit();
  };
  for (int i = 0; i < RING; i += PAIR) prefetch();

  int n_tiles = 0, slot = 0;
  for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += clusters, ++n_tiles) {
    const Lane current = lane_of(tile);
    T* y = current.y;
    mbarrier_wait_item(s.results_full, n_tiles);
    for (int step = 0; step < STEPS; step += PAIR) {
      if (OPERANDS > 0) cp_async_wait<RING / PAIR - 1>();
      uint4 result[PAIR];
      typename decltype(epilogue)::Read read[PAIR] = {};
#pragma unroll
      for (int i = 0; i < PAIR; ++i) {
        const int row = (step + i) * ROWS, chunk = column / 8 % 8 ^ (row + first_row) % 8;
        result[i] = *reinterpret_cast<const uint4*>(results + row * 128 + chunk * 16);
#pragma unroll
        for (int j = 0; j < OPERANDS; ++j) read[i].vectors[j] = *operand_at(slot + i, j);
      }
#pragma unroll
      for (int i = 0; i < PAIR; ++i, y += stride)
        epilogue.store(y, result[i], read[i], step + i < current.steps);
      slot = wrap<RING>(slot + PAIR);
      prefetch();  // into the slots that were just read
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive_item(s.results_empty, n_tiles);
  }
}

// The same with the activation of the arguments, so that the loops contain only its code.
__device__ void store_tiles_activated(const Arguments& a, Shared& s, int rank, int clusters) {
  switch (a.activation) {
    case RELU:
      return store_tiles<RELU>(a, s, rank, clusters);
    case GELU:
      return store_tiles<GELU>(a, s, rank, clusters);
    case GELU_TANH:
      return store_tiles<GELU_TANH>(a, s, rank, clusters);
    case SILU:
      return store_tiles<SILU>(a, s, rank, clusters);
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    block_linear(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int rank = cluster_rank(), clusters = gridDim.x / CLUSTER;
  init_barriers(s, CLUSTER * WARPS, PRODUCER_WARPS + WARPS);
  if (HAS_EPILOGUE && threadIdx.x == 0) {
    mbarrier_init(s.results_full, WARPS);
    mbarrier_init(s.results_empty, EPILOGUE_WARPS);
    fence_mbarrier_init();
  }
  cluster_sync();
  // The total must not exceed what the launch allocates: 224, 168, 128 or 96 registers per thread.
  constexpr int CONSUMER_REGISTERS = THREADS <= 384 ? 224 : HAS_EPILOGUE ? 168 : 104;
  constexpr int EPILOGUE_REGISTERS = 120;
  if (threadIdx.x < 128) {
    warpgroup_reg_dealloc<56>();
    const int warp = threadIdx.x / 32;
    if (warp < PRODUCER_WARPS)
      produce(a, s, rank, warp, clusters);
    else
      schedule(a, s, clusters);
  } else if (!HAS_EPILOGUE || threadIdx.x < 128 + 32 * WARPS) {
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    consume(a, s, rank, clusters);
  } else {
    warpgroup_reg_dealloc<EPILOGUE_REGISTERS>();
    if constexpr (CONFIG_EPILOGUE == ADDED)
      store_tiles<ANY>(a, s, rank, clusters);
    else
      store_tiles_activated(a, s, rank, clusters);
  }
  cluster_sync();  // no thread block may exit while others access its shared memory
}
