// dW = dy^T x at the present blocks of W, and zeros in the empty slots, on sm_90a: what
// block_linear_dw.cu computes, for bf16 and fp16 and B = 16 or 32.
//
//   dy      [tokens, out_features]      x [tokens, in_features]      dw [capacity, B, B]
//   slots   int [out_blocks, in_blocks] the slot of each block, -1 where there is none
//   entries int2 [capacity]             (block column, slot), by block row; the empty slots last
//   row_offsets int [out_blocks + 1]    where each row begins in `entries`, and where the last ends
//
// Block rows are taken together in bands. The present blocks, by band, column and row, are cut into
// groups, evenly if copying the dy of a band counts as some blocks. A group is a job, or several if
// it is too much for one: the dy of its bands and those strips of x in which it has a block are
// copied, and only present blocks are multiplied, by products of a warp.
//
// A cluster of PARTS thread blocks takes a group, each a part of the tokens, so that x and dy are
// copied by fewer thread blocks; they add up their sums, always in the same order.

#include "hopper/gradient.cuh"
#include "product_mma.cuh"

typedef CONFIG_T T;
constexpr int B = CONFIG_B;
constexpr int OWN = CONFIG_OWN;  // blocks of a warp, at most
constexpr int BLOCKS = OWN * WARPS;
static_assert(X_WIDTH >= B, "a block is in one strip");
constexpr int MOST_STRIPS = RING / COPIERS;  // of a job: of x, and as many of dy as are as wide
static_assert(DY_STRIPS / 2 * PER_STRIP < MOST_STRIPS && BLOCKS >= 32, "a band's column fits");

struct Work {
  int n;               // blocks
  int blocks[BLOCKS];  // where their x and dy begin, in units of 16 bytes: of x in the upper half
};

constexpr int PAGE = CONFIG_PAGE;  // columns that are looked up at a time
struct Memory : Shared<Work> {
  unsigned columns[PAGE];  // bits for the rows of a band
};

struct Arguments {
  TensorMap dy, x;  // boxes of a strip, STEP tokens
  T* dw;
  const int* slots;
  const int2* entries;
  const int* row_offsets;
  const int2* coords;
  long long tokens;
  int capacity;
  int out_blocks, in_blocks;
  int band_rows;  // at most 32
  int band_cost;  // of copying the dy of a band, in blocks
  int groups;
};

// The bands, and how blocks are cut into groups; to be asked by whole warps.
struct Bands {
  const Arguments& a;
  int n;
  __device__ explicit Bands(const Arguments& a)
      : a(a), n((a.out_blocks + a.band_rows - 1) / a.band_rows) {}
  // The first block of a band.
  __device__ int begin(int band) const {
    return a.row_offsets[min(band * a.band_rows, a.out_blocks)];
  }
  // The band at a place, if each takes `cost` in addition to its blocks.
  __device__ int at(int place, int cost) const {
    const int lane = threadIdx.x % 32;
    for (int band = 0;; band += 32) {
      const int next = band + lane + 1;
      const unsigned later =
          __ballot_sync(0xffffffff, next >= n || begin(next) + next * cost > place);
      if (later) return min(band + __ffs(later) - 1, n - 1);
    }
  }
  // The first block of a group.
  __device__ int first(int group) const {
    const int cost = a.band_cost;
    const long long places = begin(n) + n * cost;
    const int place = (int)(places * group / a.groups), band = at(place, cost);
    return max(begin(band), min(begin(band + 1), place - (band + 1) * cost));
  }
};

// One warp: finds which rows of a band, whose entries are [begin, end), have a block in each of
// PAGE columns.
__device__ inline void look_up(const Arguments& a, Memory& s, int begin, int end, int first_row,
                               int first_column) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for (int i = lane; i < PAGE; i += 32) s.columns[i] = 0;
  __syncwarp();
  constexpr int AT_ONCE = 8;  // loads that are under way
  for (int i = begin + lane; i - lane < end; i += 32 * AT_ONCE) {
    int2 entries[AT_ONCE];
    int rows[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      entries[j] = i + 32 * j < end ? __ldg(a.entries + i + 32 * j) : make_int2(-1, -1);
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      rows[j] = entries[j].y >= 0 ? __ldg(a.coords + entries[j].y).x - first_row : 0;
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int column = entries[j].x - first_column;
      if (entries[j].y >= 0 && 0 <= column && column < PAGE)
        atomicOr(&s.columns[column], 1u << rows[j]);
    }
  }
  __syncwarp();
}

// One warp: plans blocks [first, end) of those by band, column and row.
__device__ inline void plan_group(const Arguments& a, Memory& s, Planner<Work>& planner, int first,
                                  int end) {
  const int lane = threadIdx.x % 32;
  if (first >= end) return;
  const Bands bands(a);
  int band = bands.at(first, 0);
  Job<Work>* job = nullptr;
  int n = 0, n_dy = 0, n_x = 0;  // of the job
  auto commit = [&] {
    if (lane == 0) {
      job->n_dy = n_dy;
      job->n_x = n_x;
      job->work.n = n;
    }
    planner.commit(a.tokens, n_x);
    job = nullptr;
  };
  for (; band < bands.n && bands.begin(band) < end; ++band) {
    const int first_row = band * a.band_rows, rows = min(a.band_rows, a.out_blocks - first_row);
    const int dy_strips = (rows * B + STRIP - 1) / STRIP;
    int first_dy = -1;
    int before = bands.begin(band);
    const int band_end = bands.begin(band + 1), needed_end = min(end, band_end);
    for (int column = lane; before < needed_end; column += 32) {
      if (column % PAGE < 32) look_up(a, s, bands.begin(band), band_end, first_row, column - lane);
      unsigned present = s.columns[column % PAGE];
      const int count = __popc(present), total = __reduce_add_sync(0xffffffff, count);
      before += total;
      if (before <= first || total == 0) continue;
      const int upto = before - total + through(count), from = upto - count;
      // Those of the column that are in the group: all but the lowest and highest few.
      for (int i = from; i < min(upto, first); ++i) present &= present - 1;
      for (int i = max(from, end); i < upto; ++i) present &= ~(1u << 31 - __clz(present));
      // As many columns as fit the job, then the others.
      while (__ballot_sync(0xffffffff, present != 0)) {
        if (job && first_dy < 0 && n_dy + dy_strips > DY_STRIPS) commit();
        if (job == nullptr) {
          job = &planner.begin();
          n = n_dy = n_x = 0;
          first_dy = -1;
        }
        const int blocks_upto = through(__popc(present));
        constexpr int COLUMNS = X_WIDTH / B;  // of a strip
        const unsigned with = __ballot_sync(0xffffffff, present != 0);
        const unsigned of_strip = (with >> lane / COLUMNS * COLUMNS) & ((1u << COLUMNS) - 1);
        const bool leads = of_strip && lane % COLUMNS == __ffs(of_strip) - 1;
        const unsigned leaders = __ballot_sync(0xffffffff, leads);
        const int strips_upto = __popc(leaders & (2u << lane) - 1);
        const int more_dy = first_dy < 0 ? dy_strips : 0;
        const bool fits = n + blocks_upto <= BLOCKS && n_x + strips_upto <= X_STRIPS &&
                          (n_dy + more_dy) * PER_STRIP + n_x + strips_upto <= MOST_STRIPS;
        const unsigned fit = __ballot_sync(0xffffffff, fits);
        if (fit == 0) {
          commit();
          continue;
        }
        if (first_dy < 0) {
          first_dy = n_dy;
          if (lane < dy_strips) job->dy_features[n_dy + lane] = first_row * B + lane * STRIP;
          n_dy += dy_strips;
        }
        if (fits) {
          const int strip = n_x + strips_upto - 1;
          if (leads) job->x_features[strip] = column * B / X_WIDTH * X_WIDTH;
          int i = n + blocks_upto - __popc(present);
          for (; present; present &= present - 1, ++i) {
            const int row = __ffs(present) - 1;
            const int dy = (first_dy + row * B / STRIP) * STRIP_BYTES + row * B % STRIP * 2;
            const int x = strip * X_BYTES + column * B % X_WIDTH * 2;
            job->work.blocks[i] = dy >> 4 | x >> 4 << 16;
          }
        }
        const int last = 31 - __clz(fit);  // fits is so for all lanes up to one
        n += __shfl_sync(0xffffffff, blocks_upto, last);
        n_x += __shfl_sync(0xffffffff, strips_upto, last);
        if (__ballot_sync(0xffffffff, present != 0)) commit();
      }
    }
  }
  if (job) commit();
}

// The slot of a block of the job.
__device__ inline int slot_of(const Arguments& a, const Job<Work>& job, int block) {
  constexpr int DY = STRIP_BYTES / 16, X = X_BYTES / 16;
  const int dy = job.work.blocks[block] & 0xffff, x = (unsigned)job.work.blocks[block] >> 16;
  const int row = (job.dy_features[dy / DY] + dy % DY * 8) / B;
  const int column = (job.x_features[x / X] + x % X * 8) / B;
  return __ldg(a.slots + (long long)row * a.in_blocks + column);
}

typedef float Sums[B / 16][B / 8][4];  // of a block, as products of a warp have them

// A warp stores the sums of a block, through shared memory, by whole lines.
__device__ inline void store_block(const Sums& sums, char* staging, T* to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < B / 16; ++m)
#pragma unroll
    for (int j = 0; j < B / 8; j += 2) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* two = sums[m][j + i / 2] + i % 2 * 2;
        words[i] = round_to<T>(two[0]).bits | (unsigned)round_to<T>(two[1]).bits << 16;
      }
      store_matrices(staging + ((m * 16 + lane % 16) * B + (j + lane / 16) * 8) * 2, words);
    }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < B * B / 8; i += 32)
    reinterpret_cast<uint4*>(to)[i + lane] = reinterpret_cast<const uint4*>(staging)[i + lane];
  __syncwarp();
}

// Where lanes find the rows of the four 8 x 8 matrices, 16 tokens x 16 features, that `ldmatrix`
// transposes: in lines of LINE bytes, one for each token. The second matrix has the next tokens
// (`tokens_first`) or features.
template <int LINE>
__device__ int of_lane(bool tokens_first) {
  const int lane = threadIdx.x % 32, low = lane / 8 % 2, high = lane / 16;
  const int row = (tokens_first ? low : high) * 8 + lane % 8, chunk = tokens_first ? high : low;
  const int swizzle = LINE == 128 ? row % 8 : row / 2 % 4;  // as the copy engine does
  return row * LINE + (chunk ^ swizzle) * 16;
}

// A warp: multiplies an equal share of the job's blocks.
__device__ inline void multiply(const Arguments& a, Shared<Work>& s, const Job<Work>& job,
                                Stages& stages) {
  const int warp = uniform(threadIdx.x / 32 - 4), lane = threadIdx.x % 32;
  const int n_blocks = job.work.n;
  const int first = n_blocks * warp / WARPS, n = n_blocks * (warp + 1) / WARPS - first;
  const int x_begins = job.n_dy * STRIP_BYTES;
  int blocks[OWN];
  unsigned fresh = 0;  // whether a block has other columns than that before
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    blocks[i] = i < n ? uniform(job.work.blocks[first + i]) : 0;
    fresh |= (unsigned)(i == 0 || blocks[i] >> 16 != blocks[i - 1] >> 16) << i;
  }
  const int of_dy = of_lane<128>(false), of_x = of_lane<X_LINE>(true);
  Sums sums[OWN];
#pragma unroll
  for (int i = 0; i < OWN * B * B / 32; ++i) sums[0][0][0][i] = 0;
  for (int step = job.first_step; step < job.end_step; ++step, stages.next()) {
    const int count = stages.count;
    barrier_wait(&s.full[place<BARRIERS>(count)], parity<BARRIERS>(count));
    const char* dy = s.ring[stages.at * stages.size];
    const char* x = dy + x_begins;
    unsigned right[STEP / 16][B / 16][4];
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (i < n) {
        unsigned left[STEP / 16][B / 16][4];
        const int dy_at = (blocks[i] & 0xffff) << 4 ^ of_dy;
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k)
#pragma unroll
          for (int m = 0; m < B / 16; ++m)
            load_matrices<true>(left[k][m], dy + (dy_at ^ m * 32) + k * 16 * 128);
        if (fresh >> i & 1) {
          const int x_at = (unsigned)blocks[i] >> 16 << 4 ^ of_x;
#pragma unroll
          for (int k = 0; k < STEP / 16; ++k)
#pragma unroll
            for (int j = 0; j < B / 16; ++j)
              load_matrices<true>(right[k][j], x + (x_at ^ j * 32) + k * 16 * X_LINE);
        }
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k)
#pragma unroll
          for (int m = 0; m < B / 16; ++m)
#pragma unroll
            for (int j = 0; j < B / 8; ++j)
              multiply_add(sums[i][m][j], left[k][m], right[k][j / 2] + j % 2 * 2, T());
      }
    __syncwarp();
    give_back(s, count);
  }
  char* staging = s.results[warp];
  if constexpr (PARTS == 1) {
    static_assert(OWN <= 32, "a lane each");
    const int slots = lane < n ? slot_of(a, job, first + lane) : 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (i < n) {
        const long long slot = __shfl_sync(0xffffffff, slots, i);
        store_block(sums[i], staging, a.dw + slot * (B * B));
      }
  } else {
    constexpr int FOURS = B * B / 128;
    static_assert(BLOCKS * B * B * 4 <= RING * X_BYTES, "room for the sums");
    float4* own = sums_to_add(s) + lane;  // [block][FOURS][lane]
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (i < n)
#pragma unroll
        for (int j = 0; j < FOURS; ++j) {
          const float* four = sums[i][0][0] + 4 * j;
          own[((first + i) * FOURS + j) * 32] = make_float4(four[0], four[1], four[2], four[3]);
        }
    cluster_sync();
    for (int block = own_part() + PARTS * warp; block < n_blocks; block += PARTS * WARPS) {
      const long long slot = slot_of(a, job, block);
      Sums total = {};
      add_parts<FOURS>(s, total[0][0], block * FOURS * 32 + lane, 32);
      store_block(total, staging, a.dw + slot * (B * B));
    }
    copies_follow();
    cluster_sync();
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    block_linear_dw(const __grid_constant__ Arguments a) {
  static_assert(sizeof(Memory) == CONFIG_SHARED_BYTES, "hopper_programs.py must count alike");
  extern __shared__ __align__(1024) char memory[];
  Memory& s = *reinterpret_cast<Memory*>(memory);
  auto plan = [&](Planner<Work>& planner) {
    const int n_blocks = a.row_offsets[a.out_blocks];
    const Bands bands(a);
    for (int group = blockIdx.x / CLUSTER; group < a.groups; group += gridDim.x / CLUSTER)
      plan_group(a, s, planner, bands.first(group), bands.first(group + 1));
    clear_slots<B>(a.dw, a.entries, n_blocks, a.capacity);
  };
  run_jobs(s, a.dy, a.x, plan,
           [&](const Job<Work>& job, Stages& stages) { multiply(a, s, job, stages); });
}
