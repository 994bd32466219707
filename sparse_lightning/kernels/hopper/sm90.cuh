// PTX wrappers for sm_90a, as far as the kernels use them: mbarriers, TMA, WGMMA and setmaxnreg.

#pragma once
#include "clusters.cuh"

typedef unsigned long long u64;

constexpr int MAX_SHARED_BYTES = 227 * 1024;  // per thread block

// A TMA descriptor of a tensor in global memory (CUtensorMap), encoded by the host.
struct alignas(64) TensorMap {
  u64 words[16];
};

// Returns how many items of `item_bytes` a struct in shared memory can hold; `bytes_with_one` is
// its size with one.
__device__ constexpr int count_that_fits(int bytes_with_one, int item_bytes) {
  return 1 + (MAX_SHARED_BYTES - bytes_with_one) / item_bytes;
}

// -- mbarriers -------------------------------------------------------------------------------

__device__ inline void mbarrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the async proxy and, after a cluster sync, to the cluster.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and adds to the bytes that the phase expects from TMA loads.
__device__ inline void mbarrier_arrive_expect_tx(u64* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ inline void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives at the same barrier in the thread block of that rank in the cluster.
__device__ inline void mbarrier_arrive_remote(u64* barrier, int cluster_rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(cluster_rank)
      : "memory");
}

// Waits until the phase with this parity completes. CTA scope suffices even for remote arrivals:
// they only signal that a stage has been read, and only TMA writes to remote shared memory, whose
// bytes the barrier counts. Cluster scope would invalidate L1 at every call.
__device__ inline void mbarrier_wait(u64* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The index of the n-th item in a circular buffer of SIZE items, and its barrier's phase parity.
template <int SIZE>
__device__ int wrap(int n) {
  return (unsigned)n % SIZE;
}
template <int SIZE>
__device__ int phase(int n) {
  return (unsigned)n / SIZE & 1;
}

// Arrives or waits at the barrier of the n-th item in a circular buffer; `_replaced` waits for that
// of the item that the n-th replaces.
template <int SIZE>
__device__ void mbarrier_arrive_item(u64 (&barriers)[SIZE], int n) {
  mbarrier_arrive(&barriers[wrap<SIZE>(n)]);
}
template <int SIZE>
__device__ void mbarrier_wait_item(u64 (&barriers)[SIZE], int n) {
  mbarrier_wait(&barriers[wrap<SIZE>(n)], phase<SIZE>(n));
}
template <int SIZE>
__device__ void mbarrier_wait_replaced(u64 (&barriers)[SIZE], int n) {
  mbarrier_wait(&barriers[wrap<SIZE>(n)], phase<SIZE>(n) ^ 1);
}

// Initialises the barriers of a warp-specialised kernel. `releases` arrivals release a stage; in
// the schedule, every lane of the scheduler and of `readers` warps arrives, for its own accesses.
template <typename Shared>
__device__ void init_barriers(Shared& s, int releases, int readers) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < sizeof(s.full) / sizeof(u64); ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], releases);
    }
    for (int i = 0; i < sizeof(s.schedule_full) / sizeof(u64); ++i) {
      mbarrier_init(&s.schedule_full[i], 32);
      mbarrier_init(&s.schedule_empty[i], 32 * readers);
    }
    fence_mbarrier_init();
  }
}

// -- TMA -------------------------------------------------------------------------------------

// Loads a box of a matrix; elements outside the matrix arrive as zeros.
__device__ inline void tma_load_2d(void* destination, const TensorMap& map, u64* barrier, int col,
                                   int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// Multicasts a box to the thread blocks of the cluster in `mask`, to the same address in each, and
// signals the barrier of each.
__device__ inline void tma_load_2d_multicast(void* destination, const TensorMap& map, u64* barrier,
                                             int col, int row, unsigned short mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(mask)
      : "memory");
}
__device__ inline void tma_load_3d_multicast(void* destination, const TensorMap& map, u64* barrier,
                                             int col, int row, int index, unsigned short mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row), "r"(index), "h"(mask)
      : "memory");
}

// Loads contiguous bytes, a multiple of 16, without a tensor map.
__device__ inline void tma_load_1d(void* destination, const void* source, int bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(destination)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Orders this thread's accesses to shared memory before later TMA loads into it.
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- warps -----------------------------------------------------------------------------------

// Synchronises THREADS threads, all of which call this; warps with other roles do not take part.
template <int THREADS>
__device__ void named_barrier_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ inline int inclusive_warp_scan(int value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int lower = __shfl_up_sync(0xffffffff, value, distance);
    if (threadIdx.x % 32 >= distance) value += lower;
  }
  return value;
}

// Returns a value that all lanes of a warp share, in a form that the compiler knows to be uniform.
__device__ inline unsigned warp_uniform(unsigned value) {
  return __shfl_sync(0xffffffff, value, 0);
}

// Stores four 8 x 8 matrices; lanes 0-7, 8-15, 16-23, 24-31 supply the addresses of their rows.
__device__ inline void stmatrix_x4(void* row, const unsigned (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// Register reallocation between warpgroups (setmaxnreg).
template <int REGISTERS>
__device__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// -- WGMMA -----------------------------------------------------------------------------------

// Returns the low word of the descriptor of a matrix in shared memory. `leading_bytes`, the leading
// dimension byte offset, is the distance to the next matrix where an operand is wider than a row.
__device__ inline unsigned descriptor_low(const void* matrix, int leading_bytes = 16) {
  return (shared_address(matrix) & 0x3ffff) >> 4 | leading_bytes >> 4 << 16;
}

// Returns the high word, for contiguous rows of ROW_BYTES in the swizzle mode of that width.
template <int ROW_BYTES>
__device__ constexpr unsigned descriptor_high() {
  return (8 * ROW_BYTES >> 4) | (ROW_BYTES == 128 ? 1u : ROW_BYTES == 64 ? 2u : 3u) << 30;
}

// Moves the start address in a low word by a multiple of 16 bytes.
__device__ inline unsigned advance_descriptor(unsigned low, int bytes) {
  return low + (bytes >> 4);
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The same for a number of pending groups, at most MAX, known only at run time.
template <int MAX>
__device__ void wgmma_wait_dynamic(int pending) {
  if constexpr (MAX > 0)
    if (pending < MAX) return wgmma_wait_dynamic<MAX - 1>(pending);
  wgmma_wait<MAX>();
}

#define ACC4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define ACC8(i) ACC4(i), ACC4(i + 4)
#define ACC16(i) ACC8(i), ACC8(i + 8)
#define ACC32(i) ACC16(i), ACC16(i + 16)
#define ACC64(i) ACC32(i), ACC32(i + 32)
#define REGS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGS16 REGS8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGS32 \
  REGS16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGS64                                                                       \
  REGS32                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define ACC96(i) ACC64(i), ACC32(i + 64)
#define ACC128(i) ACC64(i), ACC64(i + 64)
#define REGS96                                                                       \
  REGS64                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGS128                                                                      \
  REGS96                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109" \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122"   \
  ", %123, %124, %125, %126, %127"

#define WGMMA(N, REGS, ACC, A, B, A_HIGH, B_HIGH, A_TRANSPOSED, B_TRANSPOSED)               \
  asm volatile(                                                                             \
      "{\n.reg .b64 a, b;\n"                                                                \
      "mov.b64 a, {" A ", " A_HIGH                                                          \
      "};\n"                                                                                \
      "mov.b64 b, {" B ", " B_HIGH                                                          \
      "};\n"                                                                                \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." CONFIG_PTX_TYPE "." CONFIG_PTX_TYPE \
      " {" REGS "}, a, b, 1, 1, 1, " A_TRANSPOSED ", " B_TRANSPOSED ";\n}"                  \
      : ACC                                                                                 \
      : "r"(a), "r"(b), "n"(descriptor_high<128>()), "n"(descriptor_high<B_ROW_BYTES>()),   \
        "n"(A_K_ROWS), "n"(B_K_ROWS))

// Issues C[64, N] += A B for 16 elements along k, both operands in shared memory, K-major or, if
// K_ROWS, with one row for each k. `a` and `b` are low words of descriptors; A's rows are 128 bytes
// long. A thread's accumulators 4j..4j+3 are in columns 8j + 2 (lane % 4) + {0, 1, 0, 1} of rows
// 16 warp + lane / 4 + {0, 0, 8, 8}.
template <int N, bool A_K_ROWS, int B_ROW_BYTES, bool B_K_ROWS>
__device__ void wgmma_m64k16(float* c, unsigned a, unsigned b) {
  static_assert(N % 64 == 0 && N > 0 && N <= 256, "widths that the kernels use");
  if constexpr (N == 64) WGMMA(64, REGS32, ACC32(0), "%32", "%33", "%34", "%35", "%36", "%37");
  if constexpr (N == 128) WGMMA(128, REGS64, ACC64(0), "%64", "%65", "%66", "%67", "%68", "%69");
  if constexpr (N == 192) WGMMA(192, REGS96, ACC96(0), "%96", "%97", "%98", "%99", "%100", "%101");
  if constexpr (N == 256)
    WGMMA(256, REGS128, ACC128(0), "%128", "%129", "%130", "%131", "%132", "%133");
}

// -- epilogue --------------------------------------------------------------------------------

// Rounds a warp's 16 rows of 64 columns of C into shared memory. The 16-byte chunk c of a row r, of
// 128 bytes, is at chunk c ^ r % 8, so that neither writes nor reads conflict.
template <typename T>
__device__ void stage_rows(char* staging, const float* acc) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 64; j += 16) {
    unsigned words[4];  // rows 0-7 and 8-15 of 8 columns, then of the next 8
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = round_pair<T>(acc[j / 2 + 2 * i], acc[j / 2 + 2 * i + 1]);
    const int row = lane % 16, chunk = (j / 8 + lane / 16) ^ row % 8;
    stmatrix_x4(staging + row * 128 + chunk * 16, words);
  }
}

// Stores a warp's 16 rows of 64 columns of C through shared memory, so that whole 128-byte lines
// are written. `staging` belongs to the warp; pointer_at(row, col) is the destination of eight
// elements, or null.
template <typename T, typename PointerAt, typename Epilogue = StoreEpilogue<T>>
__device__ void store_rows(char* staging, const float* acc, PointerAt pointer_at,
                           Epilogue epilogue = {}) {
  const int lane = threadIdx.x % 32;
  stage_rows<T>(staging, acc);
  // Each lane stores four times, and loads what the epilogue reads for LOADS of them ahead.
  constexpr int LOADS = Epilogue::LOADS;
#pragma unroll
  for (int first = 0; first < 4; first += LOADS) {
    typename Epilogue::Read loaded[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const T* destination = pointer_at(4 * (first + i) + lane / 8, lane % 8 * 8);
      if (destination) loaded[i] = epilogue.load(destination);
    }
    if (first == 0) __syncwarp();
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int row = 4 * (first + i) + lane / 8, chunk = (lane % 8) ^ row % 8;
      T* destination = pointer_at(row, lane % 8 * 8);
      if (destination)
        epilogue.store(destination,
                       *reinterpret_cast<const uint4*>(staging + row * 128 + chunk * 16),
                       loaded[i]);
    }
  }
  __syncwarp();
}
