// Shared by the kernels: scalar types, swizzled tiles in shared memory, the cp.async pipeline of
// the portable kernels, and the launch facts that a kernel publishes.
//
// A portable kernel computes C[TM, TN] += A[TM, k] B[k, TN] in k-tiles of TK. It supplies the
// global address of each 16 bytes of A and B; `run_pipeline` prefetches them into shared memory,
// and a `Product` (product_mma.cuh or product_simt.cuh) multiplies them.

#pragma once

// Publishes what the host must know to launch a kernel, as the array `ENTRY_launch` in the cubin;
// `launch_facts` in compiler.py reads it. The variadic arguments are all members of the struct
// `Arguments`, in order.
#define LAUNCH_FACTS(ENTRY, THREADS, SHARED_BYTES, ...)             \
  extern "C" __device__ __constant__ const int ENTRY##_launch[] = { \
      THREADS, (int)(SHARED_BYTES), sizeof(Arguments), alignof(Arguments), __VA_ARGS__}
// Size and alignment; the host derives offsets, since older versions of NVRTC lack `offsetof`.
#define MEMBER(name) (int)sizeof(Arguments::name), (int)alignof(decltype(Arguments::name))

struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};

// The dtype in which products are accumulated.
template <typename T>
struct Accumulator {
  typedef float type;
};
template <>
struct Accumulator<double> {
  typedef double type;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float widen(fp16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}

template <typename T>
__device__ T round_to(typename Accumulator<T>::type x) {
  return x;
}
template <>
__device__ bf16 round_to<bf16>(float x) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
}
template <>
__device__ fp16 round_to<fp16>(float x) {
  fp16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
}

// Returns two elements as a word, the first in its low half.
template <typename T>
__device__ unsigned round_pair(float low, float high);
template <>
__device__ unsigned round_pair<bf16>(float low, float high) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ unsigned round_pair<fp16>(float low, float high) {
  unsigned out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// 16 bytes of elements, the unit of loads and stores.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int SIZE = 16 / sizeof(T);
  T element[SIZE];
};

// An epilogue stores eight results at a time. `load` reads its other inputs, for up to LOADS of
// them before any is stored, so that latencies overlap.
template <typename T>
struct StoreEpilogue {
  struct Read {};
  static constexpr int LOADS = 4;
  __device__ Read load(const T*) const { return {}; }
  __device__ void store(T* destination, const uint4& results, Read) const {
    *reinterpret_cast<uint4*>(destination) = results;
  }
};

// A matrix in shared memory, XOR-swizzled by chunks within each 128-byte line, so that the same
// chunk of eight consecutive rows lies in eight different groups of banks. (Padding the rows does
// that too, but for a row that crosses a line cp.async fetches sectors twice: 1.5 times the traffic
// from L2 was measured.)
template <typename T, int ROWS_, int COLS_>
struct Tile {
  typedef T Element;
  static constexpr int ROWS = ROWS_, COLS = COLS_, BYTES = ROWS * COLS * sizeof(T);
  static constexpr int CHUNK = Chunk<T>::SIZE, PER_ROW = COLS / CHUNK;
  static constexpr int ROWS_PER_LINE = PER_ROW < 8 ? 8 / PER_ROW : 1;
  static_assert((PER_ROW & (PER_ROW - 1)) == 0 && BYTES % 128 == 0, "lines must be whole");
  T* base;  // 128-byte aligned
  __device__ explicit Tile(char* shared) : base(reinterpret_cast<T*>(shared)) {}
  __device__ T* at(int row, int col) const {
    const int chunk = (row * PER_ROW + col / CHUNK) ^ (row / ROWS_PER_LINE % 8);
    return base + chunk * CHUNK + col % CHUNK;
  }
};

__device__ inline unsigned shared_address(const void* pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}

// Copies 16 bytes to shared memory asynchronously; writes zeros and reads nothing if not `exists`.
__device__ inline void cp_async(void* destination, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)),
               "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}

// Closes a commit group; there is one for each k-tile, an empty one when nothing is left to load.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's commit groups are in flight.
template <int PENDING>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Rows of a matrix in global memory, from one column on; rows from `n` on count as zeros.
template <typename T>
struct Rows {
  const T* first;
  int stride, n;
  __device__ bool has(int row) const { return row < n; }
  __device__ const T* at(int row) const { return first + (long long)row * stride; }
};

// Starts loading a tile. Each thread loads one column of chunks: source(col) returns its `Rows`.
// The addresses come before the copies, which the compiler moves no load across: where an address
// depends on a load, these overlap.
template <int THREADS, typename TileType, typename Source>
__device__ void load_tile_async(TileType tile, Source source) {
  constexpr int PER_ROW = TileType::PER_ROW, ROWS_PER_PASS = THREADS / PER_ROW;
  constexpr int PASSES = (TileType::ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
  static_assert(THREADS % PER_ROW == 0, "every thread must keep to one column");
  const int col = threadIdx.x % PER_ROW * TileType::CHUNK, first = threadIdx.x / PER_ROW;
  const auto rows = source(col);
  decltype(rows.at(0)) addresses[PASSES];
#pragma unroll
  for (int i = 0; i < PASSES; ++i) addresses[i] = rows.at(first + i * ROWS_PER_PASS);
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    const int row = first + i * ROWS_PER_PASS;
    if (TileType::ROWS % ROWS_PER_PASS == 0 || row < TileType::ROWS)
      cp_async(tile.at(row, col), addresses[i], rows.has(row));
  }
}

// Accumulates all k-tiles in `product`, with loads STAGES - 1 k-tiles ahead of the arithmetic.
// source_a(k_tile, col) and source_b return the rows of a column, as for `load_tile_async`. On
// return all of `shared` is free for reuse.
template <int STAGES, typename Product, typename SourceA, typename SourceB>
__device__ void run_pipeline(Product& product, char* shared, int k_tiles, SourceA source_a,
                             SourceB source_b) {
  typedef typename Product::TileA TileA;
  typedef typename Product::TileB TileB;
  constexpr int STAGE_BYTES = TileA::BYTES + TileB::BYTES;

  auto load = [&](int k_tile) {
    if (k_tile < k_tiles) {
      char* stage = shared + k_tile % STAGES * STAGE_BYTES;
      load_tile_async<Product::THREADS>(TileA(stage),
                                        [&](int col) { return source_a(k_tile, col); });
      load_tile_async<Product::THREADS>(TileB(stage + TileA::BYTES),
                                        [&](int col) { return source_b(k_tile, col); });
    }
    cp_async_commit();
  };

  for (int k_tile = 0; k_tile < STAGES - 1; ++k_tile) load(k_tile);
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this k-tile has arrived, and every warp has read the previous one
    load(k_tile + STAGES - 1);
    char* stage = shared + k_tile % STAGES * STAGE_BYTES;
    product.multiply(TileA(stage), TileB(stage + TileA::BYTES));
  }
  cp_async_wait<0>();
  __syncthreads();
}

// Returns the bytes of shared memory of `run_pipeline`, which the results reuse afterwards.
template <int STAGES, typename Product, typename Result>
__device__ constexpr int pipeline_shared_bytes() {
  constexpr int pipeline = STAGES * (Product::TileA::BYTES + Product::TileB::BYTES);
  constexpr int bytes = pipeline > Result::BYTES ? pipeline : Result::BYTES;
  static_assert(bytes <= 99 * 1024, "the limit of a thread block on the smallest device");
  return bytes;
}
