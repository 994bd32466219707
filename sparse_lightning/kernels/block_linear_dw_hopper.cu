// dW = dy^T x at the present blocks of W, and zeros in the empty slots, on sm_90a: what
// block_linear_dw.cu computes, for bf16 and fp16 and B = 64 or 128.
//
//   dy      [tokens, out_features]   x [tokens, in_features]   dw [capacity, B, B]
//   entries int2 [capacity]          (block column, slot), by block row; the empty slots last
//   n_blocks int                     present blocks: the last of the rows' offsets into `entries`
//   coords  int2 [capacity]          (block row, block column) of each slot
//   partial float [PARTS_A_WORKER * workers][PART]
//
// A tile is `group` blocks that follow each other in `entries`; those of one block row are computed
// together, a segment. Thread blocks, the workers, first take whole tiles in turn, as long as there
// are some for all. What remains is split over tokens, each into the number of parts that ends
// soonest; their sums go to `partial`, and `add_parts` adds them up in order: no atomics, the same
// bits at every run.

#include "gradient_hopper.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr int WIDE = B / STRIP;  // strips of dy and of x that a block takes
constexpr int PARTS_A_WORKER = 2, MOST_PARTS = 8;
constexpr int PIECE = STRIP * STRIP;       // of a result: a strip by a strip
constexpr int PIECES = WARPGROUPS * MOST;  // of a tile
constexpr int PART = PIECES * PIECE;       // floats
static_assert(DY_STRIPS == WIDE && X_STRIPS * WIDE == PIECES, "what a thread block can hold");

struct Arguments {
  TensorMap dy, x;  // boxes of a strip, STEP tokens
  T* dw;
  float* partial;
  const int2* entries;
  const int* n_blocks;
  const int2* coords;
  long long tokens;
  int capacity;
  int group;  // at most X_STRIPS / WIDE
  int workers;
};

// How the tiles are shared out: the last `split` of them in `parts` parts each.
struct Shares {
  int whole, split, parts = 1;
  __device__ explicit Shares(const Arguments& a) {
    const int tiles = (*a.n_blocks + a.group - 1) / a.group;
    whole = tiles / a.workers * a.workers;
    split = tiles - whole;
    // In units of a token's time in a tile; to store and to add a part costs the whole device as
    // much as six tokens (a model for an H100).
    long long least = a.tokens;
    for (int p = 2; p <= MOST_PARTS && split * p <= PARTS_A_WORKER * a.workers; ++p) {
      const long long rounds = (split * p + a.workers - 1) / a.workers;
      const long long cost = rounds * a.tokens / p + 6 * split * p;
      if (cost < least) least = cost, parts = p;
    }
  }
};

// Where a piece of a tile is: block `block` of the tile, and of that block these strips.
struct Place {
  int block, dy_strip, x_strip;
};

// A warpgroup has the whole of a block's columns and, where the block has two strips of dy, one.
__device__ inline Place place_of(int piece) {
  return {piece / (WIDE * WIDE), piece / WIDE % WIDE, piece % WIDE};
}

// Stores the sums of one piece into its block.
__device__ inline void store_piece(const Arguments& a, int entry, Place at, const float* sums,
                                   char* staging) {
  const long long slot = a.entries[entry].y;
  const int first_row = at.dy_strip * STRIP + threadIdx.x / 32 % 4 * 16;
  T* to = a.dw + (slot * B + first_row) * B + at.x_strip * STRIP;
  store_rows<T>(staging, sums, [&](int row, int col) { return to + row * B + col; });
}

// One warp: plans the segments of a tile, or of part `part` of it.
__device__ inline void plan_tile(const Arguments& a, Planner& planner, int tile, int part,
                                 int parts, int where) {
  const int lane = threadIdx.x % 32, steps = (int)((a.tokens + STEP - 1) / STEP);
  const int first = tile * a.group, n = min(a.group, *a.n_blocks - first);
  const int2 block = lane < n ? a.coords[a.entries[first + lane].y] : make_int2(-1, 0);
  int begin = 0;
  while (begin < n) {
    const int row = __shfl_sync(0xffffffff, block.x, begin);
    const unsigned same = __ballot_sync(0xffffffff, block.x == row);  // they follow each other
    const int end = 32 - __clz(same), blocks = end - begin;
    planner.add([&](Segment& segment) {
      if (lane >= begin && lane < end)
        for (int i = 0; i < WIDE; ++i)
          segment.x_features[(lane - begin) * WIDE + i] = block.y * B + i * STRIP;
      if (lane < WARPGROUPS) {
        // Both have all of the blocks, each with its own strip of dy, or half of the blocks.
        const int half = (blocks + 1) / 2;
        segment.first[lane] = WIDE > 1 || lane == 0 ? 0 : half;
        segment.n[lane] = WIDE > 1 ? blocks * WIDE : lane == 0 ? half : blocks - half;
      }
      if (lane == 0) {
        segment.end = false;
        segment.first_step = (int)((long long)steps * part / parts);
        segment.end_step = (int)((long long)steps * (part + 1) / parts);
        segment.dy_feature = row * B;
        segment.n_strips = blocks * WIDE;
        segment.where[0] = where;
        segment.where[1] = first;
        segment.where[2] = begin;
      }
    });
    begin = end;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    block_linear_dw(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int worker = blockIdx.x;

  auto plan = [&](Planner& planner) {
    // Empty slots hold zeros.
    for (int entry = *a.n_blocks + worker; entry < a.capacity; entry += a.workers) {
      uint4* block = reinterpret_cast<uint4*>(a.dw + (long long)a.entries[entry].y * B * B);
      for (int i = threadIdx.x % 32; i < B * B / 8; i += 32) block[i] = make_uint4(0, 0, 0, 0);
    }
    const Shares shares(a);
    for (int tile = worker; tile < shares.whole; tile += a.workers)
      plan_tile(a, planner, tile, 0, 1, -1);
    for (int i = worker; i < shares.split * shares.parts; i += a.workers)
      plan_tile(a, planner, shares.whole + i / shares.parts, i % shares.parts, shares.parts,
                shares.parts > 1 ? i : -1);
  };

  auto store = [&](const Segment& segment, int warpgroup, const float* sums) {
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      if (i >= segment.n[warpgroup]) break;
      const int x_strip = segment.first[warpgroup] + i;
      const Place at = {segment.where[2] + x_strip / WIDE, WIDE > 1 ? warpgroup : 0,
                        x_strip % WIDE};
      if (segment.where[0] < 0) {
        store_piece(a, segment.where[1] + at.block, at, sums + 32 * i,
                    s.results[threadIdx.x / 32 - 4]);
      } else {
        const int piece = (at.block * WIDE + at.dy_strip) * WIDE + at.x_strip;
        float* to = a.partial + ((long long)segment.where[0] * PIECES + piece) * PIECE;
#pragma unroll
        for (int j = 0; j < 32; ++j) to[j * 128 + threadIdx.x % 128] = sums[32 * i + j];
      }
    }
  };
  run_segments(s, a.dy, a.x, plan, store);
}

// blockIdx.x: one of the tiles that were split; blockIdx.y: a piece of it. 128 threads.
extern "C" __global__ void __launch_bounds__(128) add_parts(const __grid_constant__ Arguments a) {
  __shared__ __align__(128) char staging[4][16 * 128];
  const Shares shares(a);
  const int tile = blockIdx.x, piece = blockIdx.y;
  if (tile >= shares.split || shares.parts == 1) return;
  const Place at = place_of(piece);
  const int entry = (shares.whole + tile) * a.group + at.block;
  if (at.block >= a.group || entry >= *a.n_blocks) return;
  float sums[32] = {};
  const float* from = a.partial + ((long long)tile * shares.parts * PIECES + piece) * PIECE;
  for (int part = 0; part < shares.parts; ++part, from += PART)
#pragma unroll
    for (int j = 0; j < 32; ++j) sums[j] += from[j * 128 + threadIdx.x];
  store_piece(a, entry, at, sums, staging[threadIdx.x / 32]);
}
