// y = x W^T + bias (FORWARD), or dx = dy W, on sm_90a: what block_linear.cu computes, for bf16 and
// fp16 and B = 16 or 32.
//
//   x      [tokens, in_features]       values [capacity, B, B]      y [tokens, out_features]
//   bias   [out_features] or null
//   slots  int [out_blocks, in_blocks] by strides: the slot of each block, -1 where there is none
//
// "in" and "out" are as seen from the product, as in block_linear.cu.
//
// A thread block computes TOKENS x OUTPUTS of y at a time, a tile; k runs over slabs of SLAB
// inputs, and one in which none of the tile's blocks is present is left out. Of the first four
// warps one plans (finds the slabs, and the slots of their blocks) and the others copy, a slab each
// in turn; the other warps multiply, each 64 tokens with the present blocks of 64 outputs.
//
// A product of a warpgroup has 64 rows and one set of columns; of narrow blocks in so many rows
// most would be absent. So these are products of a warp, block by block, at two thirds of the rate.
// Sums run over ascending k, so results depend neither on slots nor on timing.

#include "hopper/activations.cuh"
#include "hopper/sm90.cuh"
#include "product_mma.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr bool FORWARD = CONFIG_FORWARD;

constexpr int TOKENS = CONFIG_TOKENS, OUTPUTS = CONFIG_OUTPUTS, SLAB = CONFIG_SLAB;
constexpr int STAGES = CONFIG_STAGES;  // slabs of x that there is room for
constexpr int BLOCKS = CONFIG_BLOCKS;  // blocks of W
constexpr int WARPS = TOKENS / 64 * (OUTPUTS / 64), COPIERS = 3, THREADS = 128 + 32 * WARPS;
static_assert(SLAB == 64 || SLAB == 32, "a line of shared memory, or half of one");

constexpr int SUBS = SLAB / B, ROWS = OUTPUTS / B;  // input blocks of a slab, output blocks
constexpr int OWN = 64 / B;                         // output blocks of a warp

constexpr int X_LINE = 2 * SLAB, W_LINE = 2 * B;  // bytes of a row in shared memory
constexpr int X_BYTES = TOKENS * X_LINE, BLOCK_BYTES = B * W_LINE;
static_assert(SUBS * ROWS <= 64 && SUBS * ROWS <= BLOCKS, "bits and room for a slab's blocks");

// A lane of the planning warp looks at B inputs; a window is what the warp looks at at once.
constexpr int WINDOW = 32 / SUBS, PLANS = 3;

// Slabs take barriers in turn: more than there are in all windows that are planned and before them
// in the rings, as a warp says at once which slabs of a window it does not need.
constexpr int BARRIERS = 128;
static_assert(BARRIERS >= PLANS * WINDOW + STAGES + COPIERS, "so far apart warps may be");
static_assert(STAGES + COPIERS <= 32, "a lane each");
static_assert((STAGES & STAGES - 1) == 0 && (BLOCKS & BLOCKS - 1) == 0, "places are found quickly");

struct Arguments {
  TensorMap x;  // boxes: TOKENS x SLAB
  const T* values;
  const T* bias;
  const int* slots;
  T* y;
  int out_stride, in_stride;
  int out_blocks, in_blocks;
  long long tokens;
  int token_tiles, output_tiles;  // of TOKENS, and of OUTPUTS
  T* other;                       // see `finish`
  int activation;                 // likewise
};

struct Plan {
  int n;                    // slabs of the window in which the tile has any block
  int slots[32][ROWS + 1];  // by lane; an odd number, so that lanes write to different banks
};

// A slab that is to be multiplied; they are counted over all tiles of the thread block.
struct alignas(16) Slab {
  u64 present;      // blocks: bit sub * ROWS + row
  int first_block;  // that it takes of the ring, counted likewise
  int first_k;      // its first input
};
constexpr int SLABS = BARRIERS;

struct alignas(1024) Shared {
  char x[STAGES][X_BYTES];
  char y[WARPS][16 * 128];  // 16 tokens x 64 outputs, on their way out
  char blocks[BLOCKS][BLOCK_BYTES];
  Slab slabs[SLABS];
  Plan plans[PLANS];
  u64 full[BARRIERS], empty[BARRIERS], planned[PLANS], done[PLANS];
};
static_assert(sizeof(Shared) == CONFIG_SHARED_BYTES, "hopper_programs.py must count alike");

__device__ inline int n_slabs(const Arguments& a) { return (a.in_blocks * B + SLAB - 1) / SLAB; }

// One warp: looks up which blocks are present, ahead of the copies.
__device__ void plan(const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, tiles = a.token_tiles * a.output_tiles;
  int window = 0, n = 0, blocks = 0;  // so far
  // The slots of a window are on their way while the one before is planned.
  int next[ROWS];
  auto fetch = [&](int tile, int first_slab) {
    const int first_out = tile % a.output_tiles * ROWS, in_block = first_slab * SUBS + lane;
    const int* at =
        a.slots + (long long)first_out * a.out_stride + (long long)in_block * a.in_stride;
#pragma unroll
    for (int row = 0; row < ROWS; ++row, at += a.out_stride) {
      const bool inside = in_block < a.in_blocks && first_out + row < a.out_blocks;
      next[row] = inside ? __ldg(at) : -1;
    }
  };
  if (blockIdx.x < tiles) fetch(blockIdx.x, 0);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
    for (int first_slab = 0; first_slab < n_slabs(a); first_slab += WINDOW, ++window) {
      Plan& p = s.plans[place<PLANS>(window)];
      barrier_wait(&s.done[place<PLANS>(window)], parity<PLANS>(window) ^ 1);
      unsigned rows = 0;
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        rows |= (unsigned)(next[row] >= 0) << row;
        p.slots[lane][row] = next[row];
      }
      if (first_slab + WINDOW < n_slabs(a))
        fetch(tile, first_slab + WINDOW);
      else if (tile + gridDim.x < tiles)
        fetch(tile + gridDim.x, 0);
      u64 present = (u64)rows << lane % SUBS * ROWS;
#pragma unroll
      for (int distance = 1; distance < SUBS; distance *= 2)
        present |= __shfl_xor_sync(0xffffffff, present, distance);
      const bool needed = lane % SUBS == 0 && present;
      const unsigned slabs = __ballot_sync(0xffffffff, needed);
      const int own = needed ? __popcll(present) : 0, upto = through(own);
      if (needed)
        s.slabs[place<SLABS>(n + __popc(slabs & ((1u << lane) - 1)))] = {
            present, blocks + upto - own, (first_slab + lane / SUBS) * SLAB};
      blocks += __shfl_sync(0xffffffff, upto, 31);
      n += __popc(slabs);
      if (lane == 0) p.n = __popc(slabs);
      barrier_arrive(&s.planned[place<PLANS>(window)]);
    }
}

// Calls begin(tile), each(its first slab's number, plan) for every window of the tile, and
// end(tile).
template <typename Begin, typename Each, typename End>
__device__ void follow_plan(const Arguments& a, Shared& s, Begin begin, Each each, End end) {
  int window = 0, n = 0;
  for (int tile = blockIdx.x; tile < a.token_tiles * a.output_tiles; tile += gridDim.x) {
    begin(tile);
    for (int first_slab = 0; first_slab < n_slabs(a); first_slab += WINDOW, ++window) {
      const Plan& p = s.plans[place<PLANS>(window)];
      barrier_wait(&s.planned[place<PLANS>(window)], parity<PLANS>(window));
      each(n, p);
      n += p.n;
      barrier_arrive(&s.done[place<PLANS>(window)]);
    }
    end(tile);
  }
}

// A warp: copies every COPIERS-th slab, its x and its blocks.
__device__ void copy(const Arguments& a, Shared& s, int copier) {
  const int lane = threadIdx.x % 32;
  int token;
  follow_plan(
      a, s, [&](int tile) { token = tile / a.output_tiles * TOKENS; },
      [&](int first, const Plan& p) {
        // A lane for each slab of the window. Before it is copied, the slab that had its stage must
        // be gone, and all that still hold its blocks' places: up to the last of them.
        const Slab of_lane = s.slabs[place<SLABS>(first + lane)];
        const int end = of_lane.first_block + __popcll(of_lane.present);
        int last_of_lane = first + lane - STAGES;
#pragma unroll
        for (int i = STAGES - 1; i > 0; --i) {
          const int older = first + lane - i;
          if (older >= 0 && s.slabs[place<SLABS>(older)].first_block < end - BLOCKS)
            last_of_lane = older;
        }
        for (int n = first + (copier + COPIERS - first % COPIERS) % COPIERS; n < first + p.n;
             n += COPIERS) {
          const int i = n - first;
          const u64 present = __shfl_sync(0xffffffff, of_lane.present, i);
          const int first_block = __shfl_sync(0xffffffff, of_lane.first_block, i);
          const int first_k = __shfl_sync(0xffffffff, of_lane.first_k, i);
          const int last = __shfl_sync(0xffffffff, last_of_lane, i);
          u64* full = &s.full[place<BARRIERS>(n)];
          // A lane for each of them: they are not given back in their order. Before the first this
          // warp has waited for all, at its slab before.
          const int older = n - (STAGES + COPIERS - 1) + lane;
          if (older >= 0 && older <= last)
            barrier_wait(&s.empty[place<BARRIERS>(older)], parity<BARRIERS>(older));
          __syncwarp();
          if (lane == 0) {
            barrier_expect(full, X_BYTES + __popcll(present) * BLOCK_BYTES);
            copy_box(s.x[place<STAGES>(n)], a.x, full, first_k, token);
          }
          __syncwarp();
#pragma unroll
          for (int entry = lane; entry < SUBS * ROWS; entry += 32)
            if (present >> entry & 1) {
              const int slot = p.slots[first_k / B % 32 + entry / ROWS][entry % ROWS];
              const int before = __popcll(present & ((1ull << entry) - 1));
              copy_bytes(s.blocks[place<BLOCKS>(first_block + before)],
                         a.values + (long long)slot * (B * B), BLOCK_BYTES, full);
            }
        }
      },
      [](int) {});
}

// Where a warp finds its operands. Rows of a block are so short that eight of them share banks. Of
// 32 inputs four rows would; so every other pair reads its two chunks of 16 bytes in the other
// order.
struct Operands {
  int of_x, of_w;  // what this lane reads, in a slab, and in a block
  bool swap;       // whether the rows of W it gets elements of were read in the other order

  __device__ explicit Operands(int first_token) {
    const int lane = threadIdx.x % 32, row = lane % 8, low = lane / 8 % 2, high = lane / 16;
    auto swapped = [](int row) { return B == 32 ? row / 2 % 2 : 0; };
    const int permuted = SLAB == 64 ? row : row / 2;  // as the copy engine does
    of_x = (first_token + low * 8 + row) * X_LINE + (high ^ permuted) * 16;
    of_w = FORWARD ? (high * 8 + row) * W_LINE + (low ^ swapped(row)) * 16
                   : (low * 8 + row) * W_LINE + (high ^ swapped(row)) * 16;
    swap = swapped(FORWARD ? lane / 4 : lane % 4 * 2);
  }
  // 16 tokens from `token` on, 16 inputs from k on.
  __device__ void load_x(unsigned (&words)[4], const char* slab, int token, int k) const {
    load_matrices<false>(words, slab + token * X_LINE + (of_x ^ k * 2));
  }
  // 16 outputs from `output` on, 16 inputs from k on.
  __device__ void load_w(unsigned (&words)[4], const char* block, int output, int k) const {
    unsigned loaded[4];
    const int at = FORWARD ? output * W_LINE + k * 2 : k * W_LINE + output * 2;
    load_matrices<!FORWARD>(loaded, block + of_w + at);
    constexpr int OTHER = FORWARD ? 1 : 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = swap ? loaded[i ^ OTHER] : loaded[i];
  }
};

// A warp: multiplies its tokens with its output blocks.
__device__ void multiply(const Arguments& a, Shared& s) {
  const int warp = uniform(threadIdx.x / 32 - 4), lane = threadIdx.x % 32;
  constexpr int GROUPS = OUTPUTS / 64;
  // Warps of one scheduler have different outputs, as some have more blocks than others.
  const int own_tokens = warp / GROUPS * 64;
  const int own_outputs = (warp + warp / GROUPS * (GROUPS / 2)) % GROUPS * 64;
  const Operands operands(own_tokens);
  float sums[4][8][4];
  follow_plan(
      a, s,
      [&](int) {
#pragma unroll
        for (int i = 0; i < 128; ++i) sums[0][0][i] = 0;
      },
      [&](int first, const Plan& p) {
        // A lane for each slab of the window: which of its blocks are this warp's, and, for each
        // input block, where in the ring the first of them is.
        const bool exists = lane < p.n;
        const Slab& of_lane = s.slabs[place<SLABS>(first + lane)];
        const u64 present = exists ? of_lane.present : 0;
        unsigned blocks = 0, firsts = 0;
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) {
          const int bit = sub * ROWS + own_outputs / B;
          blocks |= (unsigned)(present >> bit & ((1u << OWN) - 1)) << sub * OWN;
          const int at = of_lane.first_block + __popcll(present & ((1ull << bit) - 1));
          firsts |= (unsigned)place<BLOCKS>(at) << sub * 8;
        }
        static_assert(BLOCKS <= 256 && SUBS <= 4, "a byte each");
        if (exists && blocks == 0) barrier_arrive(&s.empty[place<BARRIERS>(first + lane)]);
        for (unsigned rest = __ballot_sync(0xffffffff, blocks != 0); rest; rest &= rest - 1) {
          const int i = __ffs(rest) - 1, n = first + i;
          const unsigned own = __shfl_sync(0xffffffff, blocks, i);
          const unsigned own_firsts = __shfl_sync(0xffffffff, firsts, i);
          const char* x_slab = s.x[place<STAGES>(n)];
          barrier_wait(&s.full[place<BARRIERS>(n)], parity<BARRIERS>(n));
#pragma unroll
          for (int sub = 0; sub < SUBS; ++sub) {
            if ((own >> sub * OWN & ((1u << OWN) - 1)) == 0) continue;
            unsigned left[B / 16][4][4];
#pragma unroll
            for (int k = 0; k < B; k += 16)
#pragma unroll
              for (int part = 0; part < 4; ++part)
                operands.load_x(left[k / 16][part], x_slab, part * 16, sub * B + k);
            int at = own_firsts >> sub * 8 & 255;
#pragma unroll
            for (int row = 0; row < OWN; ++row)
              if (own >> (sub * OWN + row) & 1) {
                const char* block = s.blocks[at];
                at = place<BLOCKS>(at + 1);
#pragma unroll
                for (int k = 0; k < B; k += 16)
#pragma unroll
                  for (int output = 0; output < B; output += 16) {
                    unsigned right[4];
                    operands.load_w(right, block, output, k);
#pragma unroll
                    for (int part = 0; part < 4; ++part)
#pragma unroll
                      for (int j = 0; j < 2; ++j)
                        multiply_add(sums[part][(row * B + output) / 8 + j], left[k / 16][part],
                                     right + 2 * j, T());
                  }
              }
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(&s.empty[place<BARRIERS>(n)]);
        }
      },
      [&](int tile) {
        const int out_features = a.out_blocks * B;
        const long long first_token = tile / a.output_tiles * TOKENS + own_tokens;
        const int first_output = tile % a.output_tiles * OUTPUTS + own_outputs;
        if (a.bias) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int output = first_output + j * 8 + lane % 4 * 2;
            if (output >= out_features) break;
#pragma unroll
            for (int part = 0; part < 4; ++part)
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[part][j][i] += widen(a.bias[output + i % 2]);
          }
        }
#pragma unroll
        for (int part = 0; part < 4; ++part)
          store_rows<T>(
              s.y[warp], sums[part][0],
              [&](int row, int col) -> T* {
                const long long token = first_token + part * 16 + row;
                const int output = first_output + col;
                return token < a.tokens && output < out_features
                           ? a.y + token * out_features + output
                           : nullptr;
              },
              finish<FORWARD, T>(a));
      });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    block_linear(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < BARRIERS; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS);
    }
    for (int plan = 0; plan < PLANS; ++plan) {
      // Each lane arrives, for what it has written or read.
      barrier_init(&s.planned[plan], 32);
      barrier_init(&s.done[plan], 32 * (COPIERS + WARPS));
    }
    barrier_inits_end();
  }
  __syncthreads();
  // What some threads give others may take, and no more: at the launch all have 168.
  if (threadIdx.x < 128) {
    give_registers<72>();
    const int warp = threadIdx.x / 32;
    if (warp < COPIERS)
      copy(a, s, warp);
    else
      plan(a, s);
  } else {
    take_registers<216>();
    multiply(a, s);
  }
}
