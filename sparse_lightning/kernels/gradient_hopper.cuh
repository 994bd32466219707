// The pipeline of the kernels that multiply dy^T x on sm_90a; what is to be multiplied, and what
// becomes of it, is theirs.
//
// A thread block works on one segment after another: 64-wide strips of dy and of x, over a range
// of steps of STEP tokens. Of the first four warps one plans the segments and the others copy, a
// step each in turn; two warpgroups multiply, each one strip of dy with a row of strips of x.

#pragma once
#include "hopper.cuh"

constexpr int STEP = CONFIG_STEP, STAGES = CONFIG_STAGES;
constexpr int DY_STRIPS = CONFIG_DY_STRIPS, X_STRIPS = CONFIG_X_STRIPS;
constexpr int WARPGROUPS = 2, WARPS = 4 * WARPGROUPS, COPIERS = 3, THREADS = 128 + 32 * WARPS;
constexpr int STRIP = 64, STRIP_BYTES = STEP * STRIP * 2;
constexpr int MOST = 4;  // strips of x that a warpgroup multiplies: what its registers hold
constexpr int SEGMENTS = 4;

struct Segment {
  int end;                               // instead of a segment: there is no more
  int first_step, end_step;              // of the tokens
  int dy_feature;                        // where its strips of dy begin
  int n_strips;                          // of x
  int x_features[X_STRIPS];              // where they begin
  int first[WARPGROUPS], n[WARPGROUPS];  // of the strips of x, what each warpgroup multiplies
  int where[3];                          // for whoever stores the result
};

struct alignas(1024) Shared {
  char strips[STAGES][DY_STRIPS + X_STRIPS][STRIP_BYTES];
  char results[WARPS][16 * 128];
  Segment segments[SEGMENTS];
  u64 full[STAGES], empty[STAGES], planned[SEGMENTS], done[SEGMENTS];
};
static_assert(sizeof(Shared) == CONFIG_SHARED_BYTES, "hopper_programs.py must count alike");

// What the planning warp hands segments to.
struct Planner {
  Shared& s;
  int count = 0;
  // fill(segment) is called by all lanes, in turn with the warps that follow.
  template <typename Fill>
  __device__ void add(Fill fill) {
    Segment& segment = s.segments[place<SEGMENTS>(count)];
    barrier_wait(&s.done[place<SEGMENTS>(count)], parity<SEGMENTS>(count) ^ 1);
    fill(segment);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&s.planned[place<SEGMENTS>(count)]);
    ++count;
  }
  __device__ void end() {
    add([](Segment& segment) { segment.end = true; });
  }
};

template <typename Each>
__device__ void follow_segments(Shared& s, Each each) {
  for (int count = 0;; ++count) {
    const Segment& segment = s.segments[place<SEGMENTS>(count)];
    barrier_wait(&s.planned[place<SEGMENTS>(count)], parity<SEGMENTS>(count));
    if (segment.end) return;
    each(segment);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&s.done[place<SEGMENTS>(count)]);
  }
}

// A warp: copies every COPIERS-th step; a lane copies one strip.
__device__ inline void copy_strips(Shared& s, const TensorMap& dy, const TensorMap& x, int copier) {
  const int lane = threadIdx.x % 32;
  int n = 0;  // steps so far
  follow_segments(s, [&](const Segment& segment) {
    const bool of_dy = lane < DY_STRIPS, copies = lane < DY_STRIPS + segment.n_strips;
    const int feature = of_dy    ? segment.dy_feature + lane * STRIP
                        : copies ? segment.x_features[lane - DY_STRIPS]
                                 : 0;
    for (int step = segment.first_step; step < segment.end_step; ++step, ++n) {
      if (n % COPIERS != copier) continue;
      const int stage = place<STAGES>(n);
      barrier_wait(&s.empty[stage], parity<STAGES>(n) ^ 1);
      if (lane == 0) barrier_expect(&s.full[stage], (DY_STRIPS + segment.n_strips) * STRIP_BYTES);
      __syncwarp();
      if (copies)
        copy_box(s.strips[stage][lane], of_dy ? dy : x, &s.full[stage], feature, step * STEP);
      __syncwarp();
    }
  });
}

// Multiplies a strip of dy with N strips of x. `n` counts the steps so far.
template <int N>
__device__ void multiply_strips(Shared& s, const Segment& segment, int dy_strip, int x_strip,
                                int& n, float* sums) {
  const int steps = segment.end_step - segment.first_step;
  const unsigned first_left = uniform(describe(s.strips[0][dy_strip]));
  const unsigned first_right = uniform(describe(s.strips[0][DY_STRIPS + x_strip], STRIP_BYTES));
  auto release = [&](int of) {
    if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[place<STAGES>(of)]);
  };
  for (int i = 0; i < steps; ++i, ++n) {
    const int stage = uniform(place<STAGES>(n));
    barrier_wait(&s.full[stage], parity<STAGES>(n));
    if constexpr (N > 0) {
      const int at = stage * (int)sizeof(s.strips[0]);
      products_begin();
#pragma unroll
      for (int k = 0; k < STEP; k += 16)
        multiply_add<N * STRIP, true, 128, true>(sums, advance(first_left, at + k * 128),
                                                 advance(first_right, at + k * 128));
      products_commit();
      products_wait<1>();
      if (i > 0) release(n - 1);
    } else {
      release(n);
    }
  }
  if constexpr (N > 0) {
    products_wait<0>();
    if (steps > 0) release(n - 1);
  }
}

// A warpgroup; store(segment, warpgroup, sums) has 32 sums a strip of x, as `multiply_add` lays
// them out.
template <typename Store>
__device__ void multiply_segments(Shared& s, Store store) {
  const int warpgroup = uniform(threadIdx.x / 128 - 1);
  int n = 0;
  float sums[32 * MOST];
  follow_segments(s, [&](const Segment& segment) {
#pragma unroll
    for (int i = 0; i < 32 * MOST; ++i) sums[i] = 0;
    const int dy_strip = DY_STRIPS > 1 ? warpgroup : 0, x_strip = segment.first[warpgroup];
    const int strips = uniform(segment.n[warpgroup]);
    if (strips == 0)
      multiply_strips<0>(s, segment, dy_strip, x_strip, n, sums);
    else if (strips == 1)
      multiply_strips<1>(s, segment, dy_strip, x_strip, n, sums);
    else if (strips == 2)
      multiply_strips<2>(s, segment, dy_strip, x_strip, n, sums);
    else if (strips == 3)
      multiply_strips<3>(s, segment, dy_strip, x_strip, n, sums);
    else
      multiply_strips<4>(s, segment, dy_strip, x_strip, n, sums);
    store(segment, warpgroup, sums);
  });
}

// The whole kernel: plan(planner) is for one warp, store as above.
template <typename Plan, typename Store>
__device__ void run_segments(Shared& s, const TensorMap& dy, const TensorMap& x, Plan plan,
                             Store store) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(&s.full[stage], 1);
      barrier_init(&s.empty[stage], WARPS);
    }
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      barrier_init(&s.planned[segment], 1);
      barrier_init(&s.done[segment], COPIERS + WARPS);
    }
    barrier_inits_end();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<56>();
    const int warp = threadIdx.x / 32;
    if (warp < COPIERS) {
      copy_strips(s, dy, x, warp);
    } else {
      Planner planner{s};
      plan(planner);
      planner.end();
    }
  } else {
    take_registers<224>();
    multiply_segments(s, store);
  }
}
