// Clusters of thread blocks, which can read each other's shared memory (sm_90+).

#pragma once
#include "common.cuh"

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Returns the distributed shared memory address of the same location in another thread block.
__device__ inline unsigned remote_shared_address(const void* local, int cluster_rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(local)), "r"(cluster_rank));
  return address;
}
__device__ inline float4 load_remote_shared(unsigned address) {
  float4 out;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
               : "r"(address)
               : "memory");
  return out;
}

// Adds N floats of each thread block of a cluster to `sums`, in the order of ranks. at(i) is the
// local address of the i-th float, which four at a time are adjacent.
template <int CLUSTER_SIZE, int N, typename At>
__device__ void add_shares(float (&sums)[N], At at) {
#pragma unroll
  for (int rank = 0; rank < CLUSTER_SIZE; ++rank)
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 part = load_remote_shared(remote_shared_address(at(i), rank));
      sums[i] += part.x, sums[i + 1] += part.y, sums[i + 2] += part.z, sums[i + 3] += part.w;
    }
}
