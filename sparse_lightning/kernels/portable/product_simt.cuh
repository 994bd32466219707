// C[TM, TN] += A B in exact fp32 or fp64 arithmetic; layouts as in product_mma.cuh.
//
// GROUPS_M x GROUPS_N threads share the tile. A thread's rows are GROUPS_M apart and its columns
// GROUPS_N, so that neighbouring threads read neighbouring addresses.

#pragma once
#include "common.cuh"

template <typename T, int TM, int TN, int TK, int GROUPS_M, int GROUPS_N, bool A_K_ROWS,
          bool B_K_ROWS, int GROUPS_K = 1>
struct Product {
  static_assert(GROUPS_K == 1, "k-tiles are not shared");
  static constexpr int THREADS = GROUPS_M * GROUPS_N;
  static constexpr int M = TM / GROUPS_M, N = TN / GROUPS_N;  // a thread's share of the tile
  static constexpr int K = Chunk<T>::SIZE;                    // elements along k per iteration
  static_assert(TM % GROUPS_M == 0 && TN % GROUPS_N == 0 && TK % K == 0, "shares must be whole");

  typedef Tile<T, A_K_ROWS ? TK : TM, A_K_ROWS ? TM : TK> TileA;
  typedef Tile<T, B_K_ROWS ? TK : TN, B_K_ROWS ? TN : TK> TileB;

  T acc[M][N] = {};

  __device__ static int first_m() { return threadIdx.x / GROUPS_N; }
  __device__ static int first_n() { return threadIdx.x % GROUPS_N; }

  // Returns elements [k, k + K) along k of row or column `mn`.
  template <bool K_ROWS, typename TileType>
  __device__ static Chunk<T> load_along_k(TileType tile, int mn, int k) {
    if (!K_ROWS) return *reinterpret_cast<const Chunk<T>*>(tile.at(mn, k));
    Chunk<T> out;
#pragma unroll
    for (int i = 0; i < K; ++i) out.element[i] = *tile.at(k + i, mn);
    return out;
  }

  __device__ void multiply(TileA a, TileB b) {
#pragma unroll 1  // else the loads of all iterations are hoisted, and the registers spill
    for (int k = 0; k < TK; k += K) {
      Chunk<T> left[M], right[N];
#pragma unroll
      for (int i = 0; i < M; ++i) left[i] = load_along_k<A_K_ROWS>(a, first_m() + i * GROUPS_M, k);
#pragma unroll
      for (int j = 0; j < N; ++j) right[j] = load_along_k<B_K_ROWS>(b, first_n() + j * GROUPS_N, k);
#pragma unroll
      for (int e = 0; e < K; ++e)
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int j = 0; j < N; ++j) acc[i][j] += left[i].element[e] * right[j].element[e];
    }
  }

  // Stores the accumulators to shared memory.
  template <typename Out>
  __device__ void store(Tile<Out, TM, TN> out) const {
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j)
        *out.at(first_m() + i * GROUPS_M, first_n() + j * GROUPS_N) = (Out)acc[i][j];
  }
};
