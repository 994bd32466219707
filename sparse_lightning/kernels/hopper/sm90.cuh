// What sm_90a has and C++ does not: barriers of bulk copies, tensor maps, clusters, warpgroup
// matrix products. Only what the kernels here use.

#pragma once
#include "common.cuh"

typedef unsigned long long u64;

// A matrix in global memory, as the bulk copy engine sees it; encoded by the host.
struct alignas(64) TensorMap {
  u64 words[16];
};

// -- barriers in shared memory ---------------------------------------------------------------

__device__ inline void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine and, once they have met, to the cluster.
__device__ inline void barrier_inits_end() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and says how many bytes of copies belong to this phase.
__device__ inline void barrier_expect(u64* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ inline void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives at the same barrier of a thread block of this cluster.
__device__ inline void barrier_arrive(u64* barrier, int block_of_cluster) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(block_of_cluster)
      : "memory");
}

// Waits until the phase with this parity has ended. Scopes stay the thread block's, also where
// others of the cluster arrive: they only say that they have read, and what they write they write
// by copies, which the barrier counts. A wider scope would empty the caches at every call.
__device__ inline void barrier_wait(u64* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Where the n-th of something is in its ring, and the parity of its phase.
template <int SIZE>
__device__ int place(int n) {
  return (unsigned)n % SIZE;
}
template <int SIZE>
__device__ int parity(int n) {
  return (unsigned)n / SIZE & 1;
}

// -- clusters --------------------------------------------------------------------------------

__device__ inline int rank_in_cluster() {
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

// The address of what lies at this place in a thread block of this cluster.
__device__ inline unsigned in_cluster(const void* own, int block_of_cluster) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(own)), "r"(block_of_cluster));
  return address;
}
__device__ inline float4 load_in_cluster(unsigned address) {
  float4 four;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(address)
               : "memory");
  return four;
}

// -- bulk copies -----------------------------------------------------------------------------

// A box of a matrix; the barrier counts its bytes. What lies outside the matrix arrives as zeros.
__device__ inline void copy_box(void* to, const TensorMap& map, u64* barrier, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// The same, to the same place in each thread block of the cluster that `blocks` has a bit for; each
// one's own barrier counts its bytes.
__device__ inline void copy_box_to_all(void* to, const TensorMap& map, u64* barrier, int col,
                                       int row, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(blocks)
      : "memory");
}

// A box of the matrix with that index, to the same place in each thread block of the cluster that
// `blocks` has a bit for; each one's own barrier counts its bytes.
__device__ inline void copy_box_to_all(void* to, const TensorMap& map, u64* barrier, int col,
                                       int row, int index, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row), "r"(index), "h"(blocks)
      : "memory");
}

// Lets copies that others begin later write what this thread has read or written.
__device__ inline void copies_follow() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Bytes as they lie in global memory, a multiple of 16.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// -- warpgroups ------------------------------------------------------------------------------

// Waits for THREADS threads, all of which call this: not for those of warps with other roles.
template <int THREADS>
__device__ void warps_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Sums over the lanes up to this.
__device__ inline int through(int own) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(0xffffffff, own, distance);
    if (threadIdx.x % 32 >= distance) own += below;
  }
  return own;
}

// Returns a number that is the same in all lanes of a warp, and lets the compiler know.
__device__ inline unsigned uniform(unsigned number) { return __shfl_sync(0xffffffff, number, 0); }

// Stores four 8 x 8 matrices; lanes 0-7, 8-15, 16-23, 24-31 give the addresses of their rows.
__device__ inline void store_matrices(void* row, const unsigned (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

template <int REGISTERS>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Describes a matrix in shared memory: the lower half of the description. `next` is the distance
// in bytes from one such matrix to the one beside it, where a product needs more columns than a
// row has.
__device__ inline unsigned describe(const void* matrix, int next = 16) {
  return (shared_address(matrix) & 0x3ffff) >> 4 | next >> 4 << 16;
}

// The upper half, for rows of ROW_BYTES, swizzled over as many, that follow each other.
template <int ROW_BYTES>
__device__ constexpr unsigned upper_half() {
  return (8 * ROW_BYTES >> 4) | (ROW_BYTES == 128 ? 1u : ROW_BYTES == 64 ? 2u : 3u) << 30;
}

// Advances a description; the start must stay a multiple of 16 bytes.
__device__ inline unsigned advance(unsigned description, int bytes) {
  return description + (bytes >> 4);
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The same, for a number of at most MOST that is not known when compiling.
template <int MOST>
__device__ void products_wait_but(int pending) {
  if constexpr (MOST > 0)
    if (pending < MOST) return products_wait_but<MOST - 1>(pending);
  products_wait<MOST>();
}

#define SUMS4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS8(i) SUMS4(i), SUMS4(i + 4)
#define SUMS16(i) SUMS8(i), SUMS8(i + 8)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define SUMS64(i) SUMS32(i), SUMS32(i + 32)
#define NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES16 NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES32 \
  NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                      \
  NAMES32                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define SUMS96(i) SUMS64(i), SUMS32(i + 64)
#define SUMS128(i) SUMS64(i), SUMS64(i + 64)
#define NAMES96                                                                      \
  NAMES64                                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES128                                                                     \
  NAMES96                                                                            \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109" \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122"   \
  ", %123, %124, %125, %126, %127"

#define PRODUCT(N, NAMES, SUMS, A, B, A_HIGH, B_HIGH, A_TRANSPOSED, B_TRANSPOSED)              \
  asm volatile(                                                                                \
      "{\n.reg .b64 a, b;\n"                                                                   \
      "mov.b64 a, {" A ", " A_HIGH                                                             \
      "};\n"                                                                                   \
      "mov.b64 b, {" B ", " B_HIGH                                                             \
      "};\n"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." CONFIG_PTX_TYPE "." CONFIG_PTX_TYPE    \
      " {" NAMES "}, a, b, 1, 1, 1, " A_TRANSPOSED ", " B_TRANSPOSED ";\n}"                    \
      : SUMS                                                                                   \
      : "r"(a), "r"(b), "n"(upper_half<128>()), "n"(upper_half<B_ROW_BYTES>()), "n"(A_K_ROWS), \
        "n"(B_K_ROWS))

// Begins C[64, N] += A B for 16 elements along k, both matrices in shared memory: each has k along
// its rows or, if K_ROWS, one row for each k. A's rows are 128 bytes long. C is spread over the
// warpgroup: a thread's elements 4j..4j+3 lie in columns 8j + 2 (lane % 4) + {0, 1, 0, 1} of rows
// 16 warp + lane / 4 + {0, 0, 8, 8}.
template <int N, bool A_K_ROWS, int B_ROW_BYTES, bool B_K_ROWS>
__device__ void multiply_add(float* c, unsigned a, unsigned b) {
  static_assert(N % 64 == 0 && N > 0 && N <= 256, "a width that is needed");
  if constexpr (N == 64) PRODUCT(64, NAMES32, SUMS32(0), "%32", "%33", "%34", "%35", "%36", "%37");
  if constexpr (N == 128)
    PRODUCT(128, NAMES64, SUMS64(0), "%64", "%65", "%66", "%67", "%68", "%69");
  if constexpr (N == 192)
    PRODUCT(192, NAMES96, SUMS96(0), "%96", "%97", "%98", "%99", "%100", "%101");
  if constexpr (N == 256)
    PRODUCT(256, NAMES128, SUMS128(0), "%128", "%129", "%130", "%131", "%132", "%133");
}

// How results are written, eight at a time: first what is needed is read, then, when all is on its
// way, written.
template <typename T>
struct AsItIs {
  __device__ uint4 read(const T*) const { return {}; }
  __device__ void write(T* to, uint4 results, uint4) const {
    *reinterpret_cast<uint4*>(to) = results;
  }
};

// Writes a warp's share, 16 rows, of 64 columns of C, through shared memory: so that whole lines
// are written. `staging` is the warp's own; at(row, col) is where eight elements go, or null.
template <typename T, typename At, typename Finish = AsItIs<T>>
__device__ void store_rows(char* staging, const float* sums, At at, Finish finish = {}) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 64; j += 16) {
    unsigned words[4];  // rows 0-7 and 8-15 of 8 columns, then of the next 8
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = round_to<T>(sums[j / 2 + 2 * i]).bits |
                 (unsigned)round_to<T>(sums[j / 2 + 2 * i + 1]).bits << 16;
    const int row = lane % 16, chunk = (j / 8 + lane / 16) ^ row % 8;
    store_matrices(staging + row * 128 + chunk * 16, words);
  }
  uint4 read[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T* to = at(4 * i + lane / 8, lane % 8 * 8);
    if (to) read[i] = finish.read(to);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * i + lane / 8, chunk = (lane % 8) ^ row % 8;
    T* to = at(row, lane % 8 * 8);
    if (to)
      finish.write(to, *reinterpret_cast<const uint4*>(staging + row * 128 + chunk * 16), read[i]);
  }
  __syncwarp();
}
