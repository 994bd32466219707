// y = x W^T + bias (FORWARD), or dx = dy W, on sm_90a: what block_linear.cu computes, for bf16 and
// fp16 and B = 64 or 128, with bulk copies and warpgroup products.
//
//   x      [tokens, in_features]       values [capacity, B, B]      y [tokens, out_features]
//   bias   [out_features] or null
//   slots  int [out_blocks, in_blocks] by strides: the slot of each block, -1 where there is none
//
// "in" and "out" are as seen from the product, as in block_linear.cu.
//
// A thread block computes TOKENS x OUTPUTS of y at a time, a tile. k runs over slabs of 64 inputs;
// a slab in which none of the tile's blocks is present is left out. Of the first four warps one
// plans (finds the slabs, and the slots of their blocks) and the others copy, a slab each in turn;
// the other warpgroups multiply, each with its share of the outputs. The thread blocks of a cluster
// do the same for different tokens, and share the copies of W.
//
// Shared memory is one ring of granules. A slab takes those of x, [TOKENS][64], and then one for
// each output block that is present in it: the block (B = 64), or half of it (128). Sums run over
// ascending k, so results depend neither on slots nor on timing.

#include "hopper/activations.cuh"
#include "hopper/sm90.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr bool FORWARD = CONFIG_FORWARD;

constexpr int TOKENS = CONFIG_TOKENS, OUTPUTS = CONFIG_OUTPUTS, SLAB = CONFIG_SLAB;
constexpr int CLUSTER = CONFIG_CLUSTER;
constexpr int WARPGROUPS = CONFIG_WARPGROUPS, WARPS = 4 * WARPGROUPS, COPIERS = 3;
constexpr int THREADS = 128 + 32 * WARPS;
constexpr int STAGES = CONFIG_STAGES;  // slabs that can be under way, if they fit
static_assert(SLAB == 64 && B % SLAB == 0, "a line of shared memory, in one block");

constexpr int ROWS = OUTPUTS / B;                               // output blocks of a tile
constexpr int LINE = 2 * SLAB;                                  // bytes in a row of shared memory
constexpr int X_BYTES = TOKENS * LINE, PART_BYTES = 64 * LINE;  // a part: 64 tokens
constexpr int GRANULE = B * LINE, GRANULES = CONFIG_GRANULES, X_GRANULES = X_BYTES / GRANULE;
// A slab is held until the next one has come, and a copier may be some slabs ahead of the others.
static_assert(2 * (X_GRANULES + ROWS) <= GRANULES, "two slabs fit");
static_assert(GRANULES / (X_GRANULES + 1) + COPIERS <= STAGES, "no barrier is taken for another's");

struct Arguments {
  TensorMap x, values;  // boxes: B tokens, or 64 rows of a block, by 64 inputs
  const T* bias;
  const int* slots;
  T* y;
  int out_stride, in_stride;
  int out_blocks, in_blocks;
  long long tokens;
  int token_tiles, output_tiles;  // of TOKENS * CLUSTER, and of OUTPUTS
  T* other;                       // see `finish`
  int activation;                 // likewise
};

constexpr int WINDOW = 32;  // slabs that the planning warp looks at at once, a lane each
constexpr int PLANS = 4;

struct Plan {
  int n;  // slabs of the window in which the tile has any block
  int slots[WINDOW][ROWS];
};

// A slab that is to be multiplied; they are counted over all tiles of the thread block.
struct alignas(16) Slab {
  unsigned present;   // its output blocks, a bit each
  int first_granule;  // that it takes, counted likewise
  int first_k;        // its first input
};
constexpr int SLABS = 256;  // more than can be planned ahead, or under way

struct alignas(1024) Shared {
  char granules[GRANULES][GRANULE];
  char y[WARPS][16 * 128];  // 16 tokens x 64 outputs, on their way out
  Slab slabs[SLABS];
  Plan plans[PLANS];
  u64 full[STAGES], empty[STAGES], planned[PLANS], done[PLANS];
};
static_assert(sizeof(Shared) == CONFIG_SHARED_BYTES, "hopper_programs.py must count alike");

__device__ inline int granules_of(unsigned present) { return X_GRANULES + __popc(present); }

// One warp: looks up which blocks are present, ahead of the copies.
__device__ void plan(const Arguments& a, Shared& s, int clusters) {
  const int lane = threadIdx.x % 32, n_slabs = a.in_blocks * B / SLAB;
  int window = 0, n = 0, granules = 0;  // so far
  for (int tile = blockIdx.x / CLUSTER; tile < a.token_tiles * a.output_tiles; tile += clusters) {
    const int first_out = tile % a.output_tiles * ROWS;
    for (int first_slab = 0; first_slab < n_slabs; first_slab += WINDOW, ++window) {
      Plan& p = s.plans[place<PLANS>(window)];
      const int first_k = (first_slab + lane) * SLAB, in_block = first_k / B;
      const int* at = a.slots + (long long)in_block * a.in_stride;
      barrier_wait(&s.done[place<PLANS>(window)], parity<PLANS>(window) ^ 1);
      unsigned present = 0;
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const int out_block = first_out + row;
        const bool inside = in_block < a.in_blocks && out_block < a.out_blocks;
        const int slot = inside ? __ldg(at + (long long)out_block * a.out_stride) : -1;
        present |= (unsigned)(slot >= 0) << row;
        p.slots[lane][row] = slot;
      }
      const unsigned slabs = __ballot_sync(0xffffffff, present);
      const int own = present ? granules_of(present) : 0, upto = through(own);
      if (present)
        s.slabs[place<SLABS>(n + __popc(slabs & ((1u << lane) - 1)))] = {
            present, granules + upto - own, first_k};
      granules += __shfl_sync(0xffffffff, upto, 31);
      n += __popc(slabs);
      if (lane == 0) p.n = __popc(slabs);
      barrier_arrive(&s.planned[place<PLANS>(window)]);
    }
  }
}

// Calls begin(tile), each(slab's number, plan) for every slab of the tile, and end(tile).
template <typename Begin, typename Each, typename End>
__device__ void follow_plan(const Arguments& a, Shared& s, int clusters, Begin begin, Each each,
                            End end) {
  const int n_slabs = a.in_blocks * B / SLAB;
  int window = 0, n = 0;
  for (int tile = blockIdx.x / CLUSTER; tile < a.token_tiles * a.output_tiles; tile += clusters) {
    begin(tile);
    for (int first_slab = 0; first_slab < n_slabs; first_slab += WINDOW, ++window) {
      const Plan& p = s.plans[place<PLANS>(window)];
      barrier_wait(&s.planned[place<PLANS>(window)], parity<PLANS>(window));
      for (const int end_of_window = n + p.n; n < end_of_window; ++n) each(n, p);
      barrier_arrive(&s.done[place<PLANS>(window)]);
    }
    end(tile);
  }
}

// A warp: copies every COPIERS-th slab, its x and this thread block's share of its W.
__device__ void copy(const Arguments& a, Shared& s, int rank, int copier, int clusters) {
  const int lane = threadIdx.x % 32;
  int token;
  follow_plan(
      a, s, clusters, [&](int tile) { token = (tile / a.output_tiles * CLUSTER + rank) * TOKENS; },
      [&](int n, const Plan& p) {
        if (n % COPIERS != copier) return;
        const Slab slab = s.slabs[place<SLABS>(n)];
        // The slab that had these barriers must be gone, and any that still holds these granules.
        const int end = slab.first_granule + granules_of(slab.present), older = n - STAGES + lane;
        const bool in_the_way =
            lane < STAGES &&
            (lane == 0 || older < 0 || s.slabs[place<SLABS>(older)].first_granule < end - GRANULES);
        const int last = n - STAGES + __popc(__ballot_sync(0xffffffff, in_the_way)) - 1;
        if (last >= 0) barrier_wait(&s.empty[place<STAGES>(last)], parity<STAGES>(last));

        u64* full = &s.full[place<STAGES>(n)];
        if (lane == 0) {
          barrier_expect(full, X_BYTES + __popc(slab.present) * GRANULE);
#pragma unroll
          for (int i = 0; i < X_GRANULES; ++i)
            copy_box(s.granules[place<GRANULES>(slab.first_granule + i)], a.x, full, slab.first_k,
                     token + i * B);
        }
        if (lane < ROWS && slab.present >> lane & 1 && lane % CLUSTER == rank) {
          const int before = X_GRANULES + __popc(slab.present & ((1u << lane) - 1));
          const int slot = p.slots[slab.first_k / SLAB % WINDOW][lane];
          const int half = slab.first_k % B;  // of a block that is wider than a slab
          char* to = s.granules[place<GRANULES>(slab.first_granule + before)];
#pragma unroll
          for (int part = 0; part < B; part += SLAB)
            copy_box_to_all(to + part * LINE, a.values, full, FORWARD ? half : part,
                            FORWARD ? part : half, slot, (1 << CLUSTER) - 1);
        }
        __syncwarp();
      },
      [](int) {});
}

// A warpgroup: multiplies the tokens with its share of the output blocks.
__device__ void multiply(const Arguments& a, Shared& s, int rank, int clusters) {
  constexpr int OWN = ROWS / WARPGROUPS, PARTS = TOKENS / 64;
  constexpr int SUMS = OWN * B / 2;  // of a thread, for 64 tokens
  const int warpgroup = uniform(threadIdx.x / 128 - 1), lane = threadIdx.x % 32;
  const unsigned first_left = uniform(describe(s.granules));
  const unsigned first_right = uniform(describe(s.granules, FORWARD ? 16 : PART_BYTES));
  int before = -1;  // the slab before, whose products may still be under way
  float sums[PARTS * SUMS];
  auto release = [&] {
    if (before >= 0 && lane < CLUSTER) barrier_arrive(&s.empty[place<STAGES>(before)], lane);
  };
  follow_plan(
      a, s, clusters,
      [&](int) {
#pragma unroll
        for (int i = 0; i < PARTS * SUMS; ++i) sums[i] = 0;
      },
      [&](int n, const Plan&) {
        // Alike in all lanes, which the compiler must know: it keeps descriptions in uniform
        // registers.
        const Slab& slab = s.slabs[place<SLABS>(n)];
        const unsigned all = uniform(slab.present);
        const int granule = uniform(place<GRANULES>(slab.first_granule));
        const unsigned present = all >> warpgroup * OWN;
        int next = X_GRANULES + __popc(all & ((1u << warpgroup * OWN) - 1));  // granule of W
        auto granule_at = [&](unsigned first, int i) {
          const int at = granule + i;
          return advance(first, (at < GRANULES ? at : at - GRANULES) * GRANULE);
        };
        unsigned left[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
          left[part] = advance(granule_at(first_left, part * PART_BYTES / GRANULE),
                               part * PART_BYTES % GRANULE);
        barrier_wait(&s.full[place<STAGES>(n)], parity<STAGES>(n));
        int groups = 0;
#pragma unroll
        for (int row = 0; row < OWN; ++row)
          if (present >> row & 1) {
            // Forward, W has k along its rows; for dx it has a row for each k, and those of a block
            // that is wider than a slab are in two parts.
            const unsigned right = granule_at(first_right, next++);
            products_begin();
#pragma unroll
            for (int k = 0; k < SLAB; k += 16)
#pragma unroll
              for (int part = 0; part < PARTS; ++part)
                multiply_add<B, false, LINE, !FORWARD>(sums + part * SUMS + row * B / 2,
                                                       advance(left[part], k * 2),
                                                       advance(right, k * (FORWARD ? 2 : LINE)));
            products_commit();
            ++groups;
          }
        products_wait_but<OWN>(groups);  // all but this slab's
        release();
        before = n;
      },
      [&](int tile) {
        products_wait<0>();
        release();
        before = -1;

        constexpr int SHARE = OUTPUTS / WARPGROUPS;
        const int warp = threadIdx.x / 32 % 4, out_features = a.out_blocks * B;
        const int first_output = tile % a.output_tiles * OUTPUTS + warpgroup * SHARE;
        const long long first_token =
            (long long)(tile / a.output_tiles * CLUSTER + rank) * TOKENS + warp * 16;
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
          for (int column = 0; column < SHARE; column += 64) {
            float* of_columns = sums + part * SUMS + column / 2;
            if (a.bias) {
#pragma unroll
              for (int j = 0; j < 32; ++j) {
                const int col = first_output + column + j / 4 * 8 + lane % 4 * 2 + j % 2;
                if (col < out_features) of_columns[j] += widen(a.bias[col]);
              }
            }
            store_rows<T>(
                s.y[warpgroup * 4 + warp], of_columns,
                [&](int row, int col) -> T* {
                  const long long token = first_token + part * 64 + row;
                  const int output = first_output + column + col;
                  return token < a.tokens && output < out_features
                             ? a.y + token * out_features + output
                             : nullptr;
                },
                finish<FORWARD, T>(a));
          }
      });
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    block_linear(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int rank = rank_in_cluster(), clusters = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(&s.full[stage], 1);
      barrier_init(&s.empty[stage], CLUSTER * WARPS);
    }
    for (int plan = 0; plan < PLANS; ++plan) {
      // Each lane arrives, for what it has written or read.
      barrier_init(&s.planned[plan], 32);
      barrier_init(&s.done[plan], 32 * (COPIERS + WARPS));
    }
    barrier_inits_end();
  }
  cluster_sync();
  // What some threads give others may take, and no more: at the launch all have 168 or 96.
  constexpr int FOR_SUMS = WARPGROUPS == 2 ? 224 : 104;
  if (threadIdx.x < 128) {
    give_registers<56>();
    const int warp = threadIdx.x / 32;
    if (warp < COPIERS)
      copy(a, s, rank, warp, clusters);
    else
      plan(a, s, clusters);
  } else {
    take_registers<FOR_SUMS>();
    multiply(a, s, rank, clusters);
  }
  cluster_sync();  // nothing of the others may arrive after the end
}
