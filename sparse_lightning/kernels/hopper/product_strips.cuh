// WGMMA of strips of dy with strips of x on sm_90a, by two consumer warpgroups: each multiplies up
// to 256 features of x by strips of dy.

#pragma once
#include "hopper/gradient.cuh"

constexpr int DY_STRIDE = CONFIG_DY_STRIDE;  // between consecutive strips of dy of a warpgroup
constexpr int WARPGROUPS = 2;
constexpr int MAX_X = 4;  // strips of x of a warpgroup, by its registers
static_assert(WARPS == 4 * WARPGROUPS && X_WIDTH == STRIP, "consumers and strips suit WGMMA");

// A run is a sequence of strips of x that are multiplied by the same strip of dy. For each
// warpgroup: its first strips of dy and of x, and a bit mask of runs. Bit i is set if a run begins
// at its i-th strip of x; the highest bit ends the last run.
struct Runs {
  static constexpr int EXTRA_BYTES = 0;
  int dy[WARPGROUPS], x[WARPGROUPS], runs[WARPGROUPS];
  int origin;  // identifies the results for the epilogue
};
static_assert(DY_STRIPS + X_STRIPS <= OPERAND_STRIPS<Runs> / 2, "two stages fit");

// Multiplies the strips of x of each run in RUNS by that run's strip of dy.
template <int RUNS, int RUN = 0>
__device__ void multiply_runs(float* acc, unsigned dy, unsigned x) {
  if constexpr (RUNS > 1) {
    constexpr int n = RUNS >> 1 & 1 ? 1 : RUNS >> 2 & 1 ? 2 : RUNS >> 3 & 1 ? 3 : 4;
    wgmma_m64k16<n * STRIP, true, ROW_BYTES, true>(
        acc, advance_descriptor(dy, RUN * DY_STRIDE * DY_STRIP_BYTES), x);
    multiply_runs<(RUNS >> n), RUN + 1>(acc + 32 * n, dy,
                                        advance_descriptor(x, n * DY_STRIP_BYTES));
  }
}

// Consumer warpgroup: processes a work item. Each RUNS has accumulators of its own, because it
// assigns them to WGMMAs differently, and the compiler would move shared ones between registers.
template <int RUNS, typename Store>
__device__ void consume_runs(Shared<Runs>& s, const WorkItem<Runs>& item, PipelineState& state,
                             int warpgroup, Store store) {
  const unsigned dy_base = warp_uniform(descriptor_low(s.operands[item.payload.dy[warpgroup]]));
  const unsigned x_base = warp_uniform(
      descriptor_low(s.operands[item.n_dy + item.payload.x[warpgroup]], DY_STRIP_BYTES));
  const int stage_bytes = warp_uniform(state.stage_strips * DY_STRIP_BYTES);
  float acc[32 * MAX_X];
#pragma unroll
  for (int i = 0; i < 32 * MAX_X; ++i) acc[i] = 0;
  int previous = -1;  // the previous k-tile, whose WGMMAs may still be in flight
  auto release_previous = [&] {
    if (previous >= 0) release(s, previous);
  };
  for (int i = item.first_k_tile; i < item.end_k_tile; ++i, state.advance()) {
    const int k_tile = state.k_tile;
    mbarrier_wait_item(s.full, k_tile);
    if constexpr (RUNS > 1) {
      const int offset = warp_uniform(state.stage) * stage_bytes;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < TK; k += 16)
        multiply_runs<RUNS>(acc, advance_descriptor(dy_base, offset + k * 128),
                            advance_descriptor(x_base, offset + k * ROW_BYTES));
      wgmma_commit();
      wgmma_wait<1>();
    }
    release_previous();
    previous = k_tile;
  }
  if constexpr (RUNS > 1) wgmma_wait<0>();
  release_previous();
  store(item, warpgroup, acc);
}

// Consumer warpgroup: calls `consume_runs` with the runs of this warpgroup.
template <int RUNS = 1, typename Store>
__device__ void dispatch_runs(Shared<Runs>& s, const WorkItem<Runs>& item, PipelineState& state,
                              int warpgroup, Store store) {
  static_assert(MAX_X == 4 && (RUNS & 1), "the first strip begins a run");
  // With a stride of two in dy, runs have even numbers of strips of x.
  constexpr bool is_possible = DY_STRIDE == 1 || (RUNS & 10) == 0;
  if constexpr (RUNS < 32) {
    if (is_possible && warp_uniform(item.payload.runs[warpgroup]) == RUNS)
      consume_runs<is_possible ? RUNS : 1>(s, item, state, warpgroup, store);
    else
      dispatch_runs<RUNS + 2>(s, item, state, warpgroup, store);
  }
}
