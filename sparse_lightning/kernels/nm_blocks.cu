// Expands blocks of which two of each four weights are kept to whole blocks, and back.
//
//   values    T [capacity, B, B / 2]         the kept weights
//   blocks    T [capacity, B, B]             whole blocks
//   positions uint8 [capacity, B, B / 8]     two groups of four columns in each byte
//
// T is an unsigned integer of the size of the dtype, as elements only move. A thread moves the two
// groups of a byte at a time, in a grid-stride loop over a one-dimensional grid of any size, so
// reads and writes are coalesced. Pointers must be 16-byte aligned.

#include "common.cuh"

typedef CONFIG_T T;

struct Arguments {
  T* values;
  T* blocks;
  const unsigned char* positions;
  long long n;  // bytes of `positions`
};

#define OFFSETS MEMBER(values), MEMBER(blocks), MEMBER(positions), MEMBER(n)
LAUNCH_FACTS(expand, 256, 0, OFFSETS);
LAUNCH_FACTS(compress, 256, 0, OFFSETS);

constexpr int KEPT_BYTES = 4 * sizeof(T), WHOLE_BYTES = 8 * sizeof(T);

// The kept weights of two groups.
struct alignas(KEPT_BYTES < 16 ? KEPT_BYTES : 16) Kept {
  T element[4];
};

// The two groups.
struct alignas(WHOLE_BYTES < 16 ? WHOLE_BYTES : 16) Whole {
  T element[8];
};

extern "C" __global__ void expand(const Arguments a) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < a.n;
       i += (long long)gridDim.x * blockDim.x) {
    const Kept kept = ((const Kept*)a.values)[i];
    const int columns = a.positions[i];
    Whole whole;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int group = e / 4, first = columns >> (4 * group) & 3,
                second = columns >> (4 * group + 2) & 3;
      whole.element[e] = e % 4 == first    ? kept.element[2 * group]
                         : e % 4 == second ? kept.element[2 * group + 1]
                                           : T(0);
    }
    ((Whole*)a.blocks)[i] = whole;
  }
}

extern "C" __global__ void compress(const Arguments a) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < a.n;
       i += (long long)gridDim.x * blockDim.x) {
    const Whole whole = ((const Whole*)a.blocks)[i];
    const int columns = a.positions[i];
    Kept kept;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int group = e / 2, column = columns >> (2 * e) & 3;
      // A chain of selections keeps the elements in registers, which cannot be indexed.
      kept.element[e] = column == 0   ? whole.element[4 * group]
                        : column == 1 ? whole.element[4 * group + 1]
                        : column == 2 ? whole.element[4 * group + 2]
                                      : whole.element[4 * group + 3];
    }
    ((Kept*)a.values)[i] = kept;
  }
}
