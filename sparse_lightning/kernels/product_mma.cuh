// C[TM, TN] += A B on tensor cores: bf16 or fp16, accumulated in fp32 (mma.sync m16n8k16, sm_80+).
//
// GROUPS_M x GROUPS_N warps share the tile, and GROUPS_K such groups each k-tile; `store` adds the
// groups' accumulators in order. A and B are K-major in shared memory ([TM or TN][TK])
// or, if K_ROWS, M- or N-major with one row for each k ([TK][TM or TN]), which `ldmatrix`
// transposes.

#pragma once
#include "common.cuh"

template <bool TRANSPOSED>
__device__ void ldmatrix_x4(unsigned (&out)[4], const void* row) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
}

#define MMA_M16N8K16(T, TYPE)                                                                   \
  __device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned* b, \
                                      T) {                                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                         \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
MMA_M16N8K16(bf16, "bf16")
MMA_M16N8K16(fp16, "f16")

template <typename T, int TM, int TN, int TK, int GROUPS_M, int GROUPS_N, bool A_K_ROWS,
          bool B_K_ROWS, int GROUPS_K = 1>
struct Product {
  static constexpr int THREADS = 32 * GROUPS_M * GROUPS_N * GROUPS_K;
  static constexpr int WARP_M = TM / GROUPS_M, WARP_N = TN / GROUPS_N;
  static constexpr int MMAS_M = WARP_M / 16, MMAS_N = WARP_N / 8;
  static constexpr int WARP_K = TK / GROUPS_K;
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && WARP_K % 16 == 0,
                "a warp tile is a multiple of 16 x 16 x 16");

  typedef Tile<T, A_K_ROWS ? TK : TM, A_K_ROWS ? TM : TK> TileA;
  typedef Tile<T, B_K_ROWS ? TK : TN, B_K_ROWS ? TN : TK> TileB;

  float acc[MMAS_M][MMAS_N][4] = {};

  // Where this warp's tile begins.
  __device__ static int first_m() { return threadIdx.x / 32 / GROUPS_N % GROUPS_M * WARP_M; }
  __device__ static int first_n() { return threadIdx.x / 32 % GROUPS_N * WARP_N; }
  __device__ static int group_k() { return threadIdx.x / 32 / GROUPS_N / GROUPS_M; }

  // The operands of a warp tile for 16 elements along k.
  struct Fragments {
    unsigned a[MMAS_M][4], b[MMAS_N / 2][4];
  };

  __device__ static void load(Fragments& out, TileA a, TileB b, int k) {
    const int lane = threadIdx.x % 32;
    // ldmatrix takes the row addresses of its four 8 x 8 matrices from lanes 0-7, 8-15, 16-23 and
    // 24-31: `low` distinguishes the matrices of a pair, `high` the two pairs.
    const int row = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < MMAS_M; ++i) {
      const int m = first_m() + 16 * i;
      ldmatrix_x4<A_K_ROWS>(
          out.a[i], A_K_ROWS ? a.at(k + row + high, m + low) : a.at(m + row + low, k + high));
    }
#pragma unroll
    for (int j = 0; j < MMAS_N / 2; ++j) {
      const int n = first_n() + 16 * j;
      ldmatrix_x4<B_K_ROWS>(
          out.b[j], B_K_ROWS ? b.at(k + row + low, n + high) : b.at(n + row + high, k + low));
    }
  }

  __device__ void multiply(TileA a, TileB b) {
    Fragments fragments[2];  // double-buffered: one loads while the tensor cores use the other
    const int first_k = group_k() * WARP_K;
    load(fragments[0], a, b, first_k);
#pragma unroll
    for (int k = 0; k < WARP_K; k += 16) {
      const Fragments& current = fragments[k / 16 % 2];
      if (k + 16 < WARP_K) load(fragments[(k / 16 + 1) % 2], a, b, first_k + k + 16);
#pragma unroll
      for (int i = 0; i < MMAS_M; ++i)
#pragma unroll
        for (int j = 0; j < MMAS_N; ++j)
          mma_m16n8k16(acc[i][j], current.a[i], current.b[j / 2] + j % 2 * 2, T());
    }
  }

  // Stores the accumulators to shared memory, which holds their sum over the groups of warps after
  // the next __syncthreads().
  __device__ void store(Tile<float, TM, TN> out) const {
    const int row = first_m() + threadIdx.x % 32 / 4, col = first_n() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int group = 0; group < GROUPS_K; ++group) {
      if (group > 0) __syncthreads();
      if (group != group_k()) continue;
#pragma unroll
      for (int i = 0; i < MMAS_M; ++i)
#pragma unroll
        for (int j = 0; j < MMAS_N; ++j)
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            float2* sum = reinterpret_cast<float2*>(out.at(row + 16 * i + 4 * e, col + 8 * j));
            const float2 before = group > 0 ? *sum : make_float2(0, 0);
            *sum = make_float2(before.x + acc[i][j][e], before.y + acc[i][j][e + 1]);
          }
    }
  }
};
