// The work of blocks, the sum of w * g over each slot, of many layers in one launch.
//
//   values, gradient  T [slots, chunks of 16 bytes]
//   work, saliency, movement  float [slots]
//
// What `work` holds is first taken into the sums: its size into `saliency`, its negative into
// `movement`. A warp adds up a slot, always in the same order.

#include "common.cuh"

typedef CONFIG_T T;
constexpr int LAYERS = CONFIG_LAYERS;

struct Layer {
  const Chunk<T>* values;
  const Chunk<T>* gradient;
  float* work;
  float* saliency;  // null where it is not wanted, as `movement`
  float* movement;
  int slots, chunks;
};

struct Arguments {
  float scale;  // what the gradients are multiplied by
  Layer layers[LAYERS];
};

// Grid (any, layers).
extern "C" __global__ void block_work(const __grid_constant__ Arguments a) {
  typedef Accumulator<T>::type Sum;
  const Layer& layer = a.layers[blockIdx.y];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int slot = blockIdx.x * warps + threadIdx.x / 32; slot < layer.slots;
       slot += gridDim.x * warps) {
    const Chunk<T>* values = layer.values + (long long)slot * layer.chunks;
    const Chunk<T>* gradient = layer.gradient + (long long)slot * layer.chunks;
    Sum sum = 0;
#pragma unroll 4
    for (int i = lane; i < layer.chunks; i += 32) {
      const Chunk<T> w = values[i], g = gradient[i];
#pragma unroll
      for (int e = 0; e < Chunk<T>::SIZE; e++) sum += widen(w.element[e]) * widen(g.element[e]);
    }
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (lane == 0) {
      const float before = layer.work[slot], now = (float)(sum / a.scale);
      if (layer.saliency) layer.saliency[slot] += fabsf(before);
      if (layer.movement) layer.movement[slot] -= before;
      layer.work[slot] = isfinite(now) ? now : 0.f;
    }
  }
}
