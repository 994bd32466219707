// Copies the blocks of W to and from a dense matrix, for products by cuBLAS.
//
//   values [capacity, B, B]                block by slot, any dtype of 2, 4 or 8 bytes
//   dense  [out_blocks * B, in_blocks * B] same dtype
//   slots  int [out_blocks, in_blocks]     the slot of each block, -1 where absent
//   coords int2 [capacity]                 (block row, block column) of each slot, (-1, -1) if
//                                          empty
//
// Grid-stride loops over a one-dimensional grid of any size; each thread moves 16 bytes at a time,
// and writes are coalesced. Pointers must be 16-byte aligned.

#include "common.cuh"

struct Arguments {
  uint4* values;
  uint4* dense;
  const int* slots;
  const int2* coords;
  int capacity;
  int out_blocks, in_blocks;
  int block_rows;    // B
  int block_chunks;  // 16-byte chunks in a row of a block
};

#define OFFSETS                                                                   \
  MEMBER(values), MEMBER(dense), MEMBER(slots), MEMBER(coords), MEMBER(capacity), \
      MEMBER(out_blocks), MEMBER(in_blocks), MEMBER(block_rows), MEMBER(block_chunks)
LAUNCH_FACTS(unpack_blocks, 256, 0, OFFSETS);
LAUNCH_FACTS(pack_blocks, 256, 0, OFFSETS);

// Fills `dense`, with zeros where a block is absent.
extern "C" __global__ void unpack_blocks(const Arguments a) {
  const long long row_chunks = (long long)a.in_blocks * a.block_chunks;
  const long long n = row_chunks * a.out_blocks * a.block_rows;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
       i += (long long)gridDim.x * blockDim.x) {
    const long long row = i / row_chunks;
    const int chunk = (int)(i % row_chunks);
    const int slot = a.slots[row / a.block_rows * a.in_blocks + chunk / a.block_chunks];
    const long long in_block = row % a.block_rows * a.block_chunks + chunk % a.block_chunks;
    a.dense[i] = slot < 0 ? make_uint4(0, 0, 0, 0)
                          : a.values[(long long)slot * a.block_rows * a.block_chunks + in_block];
  }
}

// Fills `values`, with zeros in empty slots.
extern "C" __global__ void pack_blocks(const Arguments a) {
  const int block = a.block_rows * a.block_chunks;
  const long long n = (long long)a.capacity * block;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
       i += (long long)gridDim.x * blockDim.x) {
    const int2 coords = a.coords[i / block];
    const int in_block = (int)(i % block);
    const long long row = (long long)coords.x * a.block_rows + in_block / a.block_chunks;
    const long long chunk = (long long)coords.y * a.block_chunks + in_block % a.block_chunks;
    a.values[i] =
        coords.x < 0 ? make_uint4(0, 0, 0, 0) : a.dense[row * a.in_blocks * a.block_chunks + chunk];
  }
}
