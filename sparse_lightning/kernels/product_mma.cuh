// C[TM, TN] += A B on tensor cores: bf16 or fp16 with fp32 sums (mma.sync m16n8k16, from sm_80 on).
//
// GROUPS_M x GROUPS_N warps share the tile. A and B each lie in shared memory either with k along
// the rows' length ([TM or TN][TK]) or, if K_ROWS, one row for each k ([TK][TM or TN]); `ldmatrix`
// transposes the latter on the way.

#pragma once
#include "common.cuh"

template <bool TRANSPOSED>
__device__ void load_matrices(unsigned (&out)[4], const void* row) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
}

__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned* b,
                                    bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned* b,
                                    fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename T, int TM, int TN, int TK, int GROUPS_M, int GROUPS_N, bool A_K_ROWS,
          bool B_K_ROWS>
struct Product {
  static constexpr int THREADS = 32 * GROUPS_M * GROUPS_N;
  static constexpr int M = TM / GROUPS_M, N = TN / GROUPS_N;  // a warp's part of the tile
  static constexpr int PARTS_M = M / 16, PARTS_N = N / 8;
  static_assert(M % 16 == 0 && N % 16 == 0 && TK % 16 == 0, "a warp works on 16 x 16 x 16");

  typedef Tile<T, A_K_ROWS ? TK : TM, A_K_ROWS ? TM : TK> TileA;
  typedef Tile<T, B_K_ROWS ? TK : TN, B_K_ROWS ? TN : TK> TileB;

  float sums[PARTS_M][PARTS_N][4] = {};

  // Where this warp's part begins.
  __device__ static int first_m() { return threadIdx.x / 32 / GROUPS_N * M; }
  __device__ static int first_n() { return threadIdx.x / 32 % GROUPS_N * N; }

  // What a warp multiplies at a time: 16 elements along k.
  struct Fragments {
    unsigned left[PARTS_M][4], right[PARTS_N / 2][4];
  };

  __device__ static void load(Fragments& out, TileA a, TileB b, int k) {
    const int lane = threadIdx.x % 32;
    // ldmatrix takes the rows of its four 8 x 8 matrices from lanes 0-7, 8-15, 16-23 and 24-31:
    // `low` steps from matrix to matrix first, `high` second.
    const int row = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < PARTS_M; ++i) {
      const int m = first_m() + 16 * i;
      load_matrices<A_K_ROWS>(
          out.left[i], A_K_ROWS ? a.at(k + row + high, m + low) : a.at(m + row + low, k + high));
    }
#pragma unroll
    for (int j = 0; j < PARTS_N / 2; ++j) {
      const int n = first_n() + 16 * j;
      load_matrices<B_K_ROWS>(
          out.right[j], B_K_ROWS ? b.at(k + row + low, n + high) : b.at(n + row + high, k + low));
    }
  }

  __device__ void multiply(TileA a, TileB b) {
    Fragments fragments[2];  // the next is on its way while the tensor cores work on this one
    load(fragments[0], a, b, 0);
#pragma unroll
    for (int k = 0; k < TK; k += 16) {
      const Fragments& now = fragments[k / 16 % 2];
      if (k + 16 < TK) load(fragments[(k / 16 + 1) % 2], a, b, k + 16);
#pragma unroll
      for (int i = 0; i < PARTS_M; ++i)
#pragma unroll
        for (int j = 0; j < PARTS_N; ++j)
          multiply_add(sums[i][j], now.left[i], now.right[j / 2] + j % 2 * 2, T());
    }
  }

  // Lays the sums out in shared memory.
  __device__ void store(Tile<float, TM, TN> out) const {
    const int row = first_m() + threadIdx.x % 32 / 4, col = first_n() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < PARTS_M; ++i)
#pragma unroll
      for (int j = 0; j < PARTS_N; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          *reinterpret_cast<float2*>(out.at(row + 16 * i + 4 * e, col + 8 * j)) =
              make_float2(sums[i][j][e], sums[i][j][e + 1]);
  }
};
