// The work of blocks, the sum of w * g over each slot, for many layers in one launch.
//
//   values, gradient          T [slots, chunks of 16 bytes]   16-byte aligned
//   work, saliency, movement  float [slots]
//
// First adds the old `work` to the running sums: its magnitude to `saliency`, its negative to
// `movement`. Grid (any, layers): each warp reduces one slot at a time, in a fixed order.

#include "common.cuh"

typedef CONFIG_T T;
constexpr int LAYERS = CONFIG_LAYERS;

struct Layer {
  const Chunk<T>* values;
  const Chunk<T>* gradient;
  float* work;
  float* saliency;  // null if not requested
  float* movement;  // likewise
  int slots, chunks;
};

struct Arguments {
  float scale;  // factor by which the gradients are multiplied
  Layer layers[LAYERS];
};

LAUNCH_FACTS(block_work, 256, 0, MEMBER(scale), MEMBER(layers));

extern "C" __global__ void block_work(const __grid_constant__ Arguments a) {
  typedef Accumulator<T>::type Acc;
  const Layer& layer = a.layers[blockIdx.y];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int slot = blockIdx.x * warps + threadIdx.x / 32; slot < layer.slots;
       slot += gridDim.x * warps) {
    const Chunk<T>* values = layer.values + (long long)slot * layer.chunks;
    const Chunk<T>* gradient = layer.gradient + (long long)slot * layer.chunks;
    Acc sum = 0;
#pragma unroll 4
    for (int i = lane; i < layer.chunks; i += 32) {
      const Chunk<T> w = values[i], g = gradient[i];
#pragma unroll
      for (int e = 0; e < Chunk<T>::SIZE; e++) sum += widen(w.element[e]) * widen(g.element[e]);
    }
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) {
      const float previous = layer.work[slot], current = (float)(sum / a.scale);
      if (layer.saliency) layer.saliency[slot] += fabsf(previous);
      if (layer.movement) layer.movement[slot] -= previous;
      layer.work[slot] = isfinite(current) ? current : 0.f;
    }
  }
}
