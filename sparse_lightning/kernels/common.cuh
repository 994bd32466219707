// What every kernel shares: scalar types, tiles in shared memory, the copy pipeline.
//
// A kernel multiplies tiles, C[TM, TN] += A[TM, k] B[k, TN], over many steps of TK along k. It says
// where each 16 bytes of A and B come from; `run_pipeline` brings them into shared memory ahead of
// their use, and a `Product` (product_mma.cuh or product_simt.cuh) multiplies them.

#pragma once

struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};

// The dtype in which sums are kept.
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

// 16 bytes of a dtype, the unit of every copy.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int SIZE = 16 / sizeof(T);
  T element[SIZE];
};

// A matrix in shared memory. The chunks of each 128-byte line are permuted by XOR, so that the same
// chunk of eight consecutive rows lies in eight different groups of banks (padding the rows does
// that too, but a row that crosses a line makes an asynchronous copy fetch sectors twice: measured,
// half as much again from L2).
template <typename T, int ROWS_, int COLS_>
struct Tile {
  typedef T Element;
  static constexpr int ROWS = ROWS_, COLS = COLS_, BYTES = ROWS * COLS * sizeof(T);
  static constexpr int CHUNK = Chunk<T>::SIZE, PER_ROW = COLS / CHUNK;
  static constexpr int ROWS_A_LINE = PER_ROW < 8 ? 8 / PER_ROW : 1;
  static_assert((PER_ROW & (PER_ROW - 1)) == 0 && BYTES % 128 == 0, "lines must be whole");
  T* base;  // 128-byte aligned
  __device__ explicit Tile(char* shared) : base(reinterpret_cast<T*>(shared)) {}
  __device__ T* at(int row, int col) const {
    const int chunk = (row * PER_ROW + col / CHUNK) ^ (row / ROWS_A_LINE % 8);
    return base + chunk * CHUNK + col % CHUNK;
  }
};

__device__ inline unsigned shared_address(const void* pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}

// Copies 16 bytes into shared memory without waiting, or writes zeros and reads nothing.
__device__ inline void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Ends a batch of copies; there is one batch a step, an empty one when nothing is left to load.
__device__ inline void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's batches are still under way.
template <int PENDING>
__device__ void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Rows of a matrix in global memory, from some column on; those from `n` on count as zeros.
template <typename T>
struct Rows {
  const T* first;
  int stride, n;
  __device__ bool has(int row) const { return row < n; }
  __device__ const T* at(int row) const { return first + (long long)row * stride; }
};

// Starts to fill a tile. A thread copies one column of chunks: source(col) gives its `Rows`.
template <int THREADS, typename TileType, typename Source>
__device__ void fill_async(TileType tile, Source source) {
  constexpr int PER_ROW = TileType::PER_ROW, ROWS_AT_ONCE = THREADS / PER_ROW;
  static_assert(THREADS % PER_ROW == 0, "every thread must keep to one column");
  const int col = threadIdx.x % PER_ROW * TileType::CHUNK;
  const auto rows = source(col);
#pragma unroll
  for (int first = 0; first < TileType::ROWS; first += ROWS_AT_ONCE) {
    const int row = first + threadIdx.x / PER_ROW;
    if (TileType::ROWS % ROWS_AT_ONCE == 0 || row < TileType::ROWS)
      copy_async(tile.at(row, col), rows.at(row), rows.has(row));
  }
}

// Adds `steps` products of tiles to `product`, STAGES - 1 steps of copies ahead of the arithmetic.
// source_a(step, col) and source_b give the rows of a column, as in `fill_async`. Afterwards all of
// `shared` is free for other use.
template <int STAGES, typename Product, typename SourceA, typename SourceB>
__device__ void run_pipeline(Product& product, char* shared, int steps, SourceA source_a,
                             SourceB source_b) {
  typedef typename Product::TileA TileA;
  typedef typename Product::TileB TileB;
  constexpr int STAGE = TileA::BYTES + TileB::BYTES;

  auto load = [&](int step) {
    if (step < steps) {
      char* stage = shared + step % STAGES * STAGE;
      fill_async<Product::THREADS>(TileA(stage), [&](int col) { return source_a(step, col); });
      fill_async<Product::THREADS>(TileB(stage + TileA::BYTES),
                                   [&](int col) { return source_b(step, col); });
    }
    end_batch();
  };

  for (int step = 0; step < STAGES - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_batches<STAGES - 2>();
    __syncthreads();  // this step's tiles are there, and every warp has left those of the last step
    load(step + STAGES - 1);
    char* stage = shared + step % STAGES * STAGE;
    product.multiply(TileA(stage), TileB(stage + TileA::BYTES));
  }
  wait_for_batches<0>();
  __syncthreads();
}

// Returns the shared memory that such a pipeline takes, and after it a tile of results.
template <int STAGES, typename Product, typename Result>
__device__ constexpr int shared_bytes() {
  constexpr int pipeline = STAGES * (Product::TileA::BYTES + Product::TileB::BYTES);
  return pipeline > Result::BYTES ? pipeline : Result::BYTES;
}
