// What linear.cu computes, for bf16 and fp16 and few tokens: y = x W^T + bias (FORWARD), or
// dx = dy W, bound by reading W once.
//
// Arguments and grid are those of linear.cu. The warps of a tile, in one thread block or the SPLITS
// of a cluster, share the present blocks of its output block: each multiplies its own, and the sums
// are added in the order of warps, so results depend neither on slots nor on timing.
//
// A warp computes the transpose of its tile with mma.sync m16n8k16, outputs as rows (A = W) and
// tokens as columns (B = x^T), so that eight tokens suffice. It takes k-steps of 32, from one block
// or two blocks of 16. W goes from global memory straight into registers, STAGES k-steps ahead.
//
// Fragments: lane 4 g + t of a warp should hold elements 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 along k
// of rows g and g + 8. The order of k is free, as long as W and x agree. So the lane loads 16
// bytes, elements 8 t to 8 t + 7 of the k-step: the first four are its part of one mma, the others
// of the next. For dx, where k runs over W's rows, `movmatrix` transposes what was loaded:
//
//   load i: row 8 (g / 2) + g % 2 + 2 i of the k-step, and WORDS pairs of outputs, 2 WORDS t on
//   word r of it, transposed: rows 8 t + 2 i and 8 t + 2 i + 1, output 2 WORDS (g / 2) + g % 2 + 2
//   r
//
// WORDS is 4, of 32 outputs; or 2 where a block has only 16.
//
// With NM, `values` holds two of each four neighbouring elements of a row, [capacity, B, B / 2],
// and `positions` says which, [capacity, B, B / 8]: a byte has four bits for each of two groups,
// the first in its low half, and of these the low two are the column of the first element and the
// high two that of the second. A load then reads half of the bytes, and `spread` puts the elements
// of a group in their columns, with zeros between them, once they are needed.

#include "portable/linear.cuh"
#include "product_mma.cuh"

constexpr int STAGES = CONFIG_STAGES, WARPS = CONFIG_GROUPS_K, THREADS = 32 * WARPS;
constexpr int WORKERS = SPLITS * WARPS;
constexpr int STEP_BLOCKS = B < 32 ? 32 / B : 1, BLOCK_STEPS = B < 32 ? 1 : B / 32;
constexpr int WORDS = B < 32 ? 2 : 4;
constexpr bool NM = CONFIG_NM;
constexpr int MMAS_M = TN / 16, MMAS_N = TM / 8;
static_assert(TK == 32, "a k-step is 32");
static_assert(TN % 16 == 0 && TM % 8 == 0, "mma.sync computes 16 outputs x 8 tokens");
static_assert(FORWARD || TN % (8 * WORDS) == 0, "a load for dx has 8 WORDS outputs");

// Sums in shared memory, by warp and token. The pitch spreads the stores of a warp over all banks,
// and its rows are aligned to 16 bytes.
constexpr int PITCH = TN + 4;
constexpr int SHARED_BYTES = WARPS * TM * PITCH * 4;
static_assert(SHARED_BYTES <= 99 * 1024, "the limit of a thread block on the smallest device");
LINEAR_LAUNCH_FACTS(THREADS, SHARED_BYTES);

// Loads N words that no other thread block of the tile's tokens needs, past L1.
template <int N>
__device__ void load_streaming(unsigned (&out)[N], const T* address) {
  if constexpr (N == 1)
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(out[0]) : "l"(address));
  else if constexpr (N == 4)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "l"(address));
  else
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "l"(address));
}

// Transposes a matrix of 8 x 8 elements, of which lane 4 g + t has elements 2 t, 2 t + 1 of row g.
__device__ inline unsigned transpose_8x8(unsigned word) {
  unsigned out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
  return out;
}

// Puts two elements in their columns of a group of four, two words with zeros elsewhere. `columns`
// has two bits for the column of each.
__device__ inline void spread(unsigned (&out)[2], unsigned elements, unsigned columns) {
  // The bytes to select for the four columns, four bits each: 4 is zero, 0 and 1 are the first
  // element, 2 and 3 the second.
  const unsigned selector =
      0x44444444u ^ 0x54u << ((columns & 3) * 8) ^ 0x76u << ((columns >> 2 & 3) * 8);
  out[0] = __byte_perm(elements, 0, selector);
  out[1] = __byte_perm(elements, 0, selector >> 16);
}

// A load of W stands for LOAD_WORDS words.
constexpr int LOAD_WORDS = FORWARD ? 4 : WORDS, LOADS = 8 * MMAS_M / LOAD_WORDS;

// Where a lane's loads of a k-step begin.
struct FirstLoad {
  const T* values;
  const unsigned char* positions;
  int shift;  // of the lane's bits in a byte of positions

  __device__ FirstLoad(const Arguments& a, int slot, int row, int col) {
    const long long element = ((long long)slot * B + row) * B + col;
    values = a.values + (NM ? element / 2 : element);
    positions = NM ? a.positions + element / 8 : nullptr;
    shift = col & 4;
  }
};

// The words of W that a lane has of a k-step, by mma, half of the k-step, and place in the mma.
typedef unsigned Fragments[MMAS_M][2][4];

__device__ inline void place(Fragments& w, int load, const unsigned (&words)[LOAD_WORDS]) {
#pragma unroll
  for (int r = 0; r < LOAD_WORDS; ++r) {
    if (FORWARD)
      w[load / 2][r / 2][load % 2 + r % 2 * 2] = words[r];
    else
      w[load / 4 * (WORDS / 2) + r / 2][load % 4 / 2][load % 2 * 2 + r % 2] = words[r];
  }
}

// A lane's words of W for one k-step. Loads are `offset` elements after the first, and give zeros
// unless they exist.
template <bool NM_>
struct Weights;

template <>
struct Weights<false> {
  Fragments w;
  __device__ void load(int index, const FirstLoad& first, int offset, int slot) {
    unsigned words[LOAD_WORDS] = {};
    if (slot >= 0) load_streaming(words, first.values + offset);
    place(w, index, words);
  }
  __device__ const Fragments& fragments(Fragments&) const { return w; }
};

template <>
struct Weights<true> {
  unsigned kept[LOADS][LOAD_WORDS / 2], columns[LOADS];
  __device__ void load(int index, const FirstLoad& first, int offset, int slot) {
    unsigned words[LOAD_WORDS / 2] = {};
    if (slot >= 0) load_streaming(words, first.values + offset / 2);
#pragma unroll
    for (int i = 0; i < LOAD_WORDS / 2; ++i) kept[index][i] = words[i];
    columns[index] = slot >= 0 ? __ldg(first.positions + offset / 8) >> first.shift : 0;
  }
  __device__ const Fragments& fragments(Fragments& w) const {
#pragma unroll
    for (int index = 0; index < LOADS; ++index) {
      unsigned words[LOAD_WORDS];
#pragma unroll
      for (int group = 0; group < LOAD_WORDS / 2; ++group) {
        unsigned pair[2];
        spread(pair, kept[index][group], columns[index] >> (4 * group));
        words[2 * group] = pair[0];
        words[2 * group + 1] = pair[1];
      }
      place(w, index, words);
    }
    return w;
  }
};

// The operands of a warp for one k-step, as loaded.
struct Step {
  Weights<NM> w;
  uint4 x[MMAS_N];
};

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS) block_linear(const Arguments a) {
  extern __shared__ __align__(128) float sums[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int share = blockIdx.x % SPLITS, worker = share * WARPS + warp;
  const OutputTile tile(a, blockIdx.x / SPLITS);
  const int n_tokens = (int)min((long long)TM, a.tokens - tile.first_token);
  const T* x = a.x + tile.first_token * a.in_features;

  // Groups of STEP_BLOCKS entries go round the warps of the tile.
  const int begin = a.offsets[tile.out_block], end = a.offsets[tile.out_block + 1];
  const int groups = (end - begin + STEP_BLOCKS - 1) / STEP_BLOCKS;
  const int own_groups = max(0, (groups - worker + WORKERS - 1) / WORKERS);
  const int steps = own_groups * BLOCK_STEPS;

  // Lane i holds the i-th of the next 32 entries of the warp.
  int2 held = make_int2(0, -1);
  auto load = [&](Step& out, int step) {
    const int group = step / BLOCK_STEPS, first_k = step % BLOCK_STEPS * 32;
    constexpr int HELD_GROUPS = 32 / STEP_BLOCKS;
    if (step % (HELD_GROUPS * BLOCK_STEPS) == 0) {
      const int entry = begin + ((group + lane / STEP_BLOCKS) * WORKERS + worker) * STEP_BLOCKS +
                        lane % STEP_BLOCKS;
      held = entry < end ? a.entries[entry] : make_int2(0, -1);
    }
    const int first_held = group % HELD_GROUPS * STEP_BLOCKS;
    // The block in which a lane's eight elements along k lie.
    const int k_block = STEP_BLOCKS == 1 ? 0 : 8 * t / B, k = first_k + 8 * t % B;
    const int in_block = __shfl_sync(~0u, held.x, first_held + k_block);
    const int k_slot = __shfl_sync(~0u, held.y, first_held + k_block);
    if (FORWARD) {
      const FirstLoad from(a, k_slot, tile.first_out, k);
#pragma unroll
      for (int l = 0; l < LOADS; ++l) out.w.load(l, from, (8 * l + g) * B, k_slot);
    } else {
      const int row = g / 2 * 8 + g % 2, row_block = STEP_BLOCKS == 1 ? 0 : row / B;
      const int slot = __shfl_sync(~0u, held.y, first_held + row_block);
      const FirstLoad from(a, slot, first_k + row % B, tile.first_out + 2 * WORDS * t);
#pragma unroll
      for (int l = 0; l < LOADS; ++l) out.w.load(l, from, l % 4 * 2 * B + l / 4 * 8 * WORDS, slot);
    }
#pragma unroll
    for (int n = 0; n < MMAS_N; ++n) {
      const int token = 8 * n + g;
      const T* elements = x + (long long)token * a.in_features + in_block * B + k;
      out.x[n] = k_slot >= 0 && token < n_tokens ? __ldg(reinterpret_cast<const uint4*>(elements))
                                                 : make_uint4(0, 0, 0, 0);
    }
  };

  float acc[MMAS_M][MMAS_N][4] = {};
  auto multiply = [&](const Step& step) {
    Fragments spread_out;
    const Fragments& fragments = step.w.fragments(spread_out);
#pragma unroll
    for (int m = 0; m < MMAS_M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the k-step
        unsigned w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          w[i] = FORWARD ? fragments[m][half][i] : transpose_8x8(fragments[m][half][i]);
#pragma unroll
        for (int n = 0; n < MMAS_N; ++n) {
          const unsigned x[2] = {half ? step.x[n].z : step.x[n].x,
                                 half ? step.x[n].w : step.x[n].y};
          mma_m16n8k16(acc[m][n], w, x, T());
        }
      }
  };

  Step stages[STAGES];
#pragma unroll
  for (int i = 0; i < STAGES; ++i) load(stages[i], i);
  for (int first = 0; first < steps; first += STAGES) {
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
      multiply(stages[i]);
      load(stages[i], first + STAGES + i);
    }
  }

#pragma unroll
  for (int m = 0; m < MMAS_M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr int PER_LOAD = WORDS / 2;  // mmas of the outputs of one load for dx
      const int output = FORWARD ? 16 * m + 8 * half + g
                                 : m / PER_LOAD * 8 * WORDS + g / 2 * 2 * WORDS + g % 2 +
                                       (m % PER_LOAD * 2 + half) * 2;
#pragma unroll
      for (int n = 0; n < MMAS_N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          sums[(warp * TM + 8 * n + 2 * t + e) * PITCH + output] = acc[m][n][2 * half + e];
    }
  __syncthreads();
  constexpr int PER_ROW = TN / 8;
  for (int chunk = threadIdx.x; chunk < TM * PER_ROW; chunk += THREADS) {
    const int token = chunk / PER_ROW, col = chunk % PER_ROW * 8;
    if (token >= n_tokens) break;
    float total[8] = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += sums[(w * TM + token) * PITCH + col + i];
    if constexpr (SPLITS > 1) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[token * PITCH + col + i] = total[i];
    } else {
      tile.store(a, token, col, total);
    }
  }
  if constexpr (SPLITS > 1) {
    cluster_sync();
    for (int chunk = share * THREADS + threadIdx.x; chunk < TM * PER_ROW;
         chunk += SPLITS * THREADS) {
      const int token = chunk / PER_ROW, col = chunk % PER_ROW * 8;
      if (token >= n_tokens) break;
      float total[8] = {};
      add_shares<SPLITS>(total, [&](int i) { return &sums[token * PITCH + col + i]; });
      tile.store(a, token, col, total);
    }
    cluster_sync();  // no thread block ends while others read its sums
  }
}
