// Products of strips of dy with strips of x on sm_90a, by two warpgroups: each multiplies up to 256
// features of x with strips of dy.

#pragma once
#include "hopper/gradient.cuh"

constexpr int DY_STRIDE = CONFIG_DY_STRIDE;  // from a warpgroup's strip of dy to its next one
constexpr int WARPGROUPS = 2;
constexpr int MOST = 4;  // times 64 features of x, for a warpgroup: what its registers hold
static_assert(WARPS == 4 * WARPGROUPS && X_WIDTH == STRIP, "strips are as wide as products");
static_assert(DY_STRIPS + X_STRIPS <= RING / 2, "a step is held until the next has arrived");

// For each warpgroup: its first strips of dy and of x, and where in its features of x runs begin,
// each of which is multiplied with one strip of dy: bit i for 64 i; the end of the last is a bit
// too.
struct Runs {
  int dy[WARPGROUPS], x[WARPGROUPS], runs[WARPGROUPS];
  int where;  // for whoever stores the result
};

// Multiplies the features of x up to the next set bit of RUNS with one strip of dy, those after it
// with the next one, until the last bit.
template <int RUNS, int RUN = 0>
__device__ void multiply_runs(float* sums, unsigned dy, unsigned x) {
  if constexpr (RUNS > 1) {
    constexpr int n = RUNS >> 1 & 1 ? 1 : RUNS >> 2 & 1 ? 2 : RUNS >> 3 & 1 ? 3 : 4;
    multiply_add<n * STRIP, true, LINE, true>(sums, advance(dy, RUN * DY_STRIDE * STRIP_BYTES), x);
    multiply_runs<(RUNS >> n), RUN + 1>(sums + 32 * n, dy, advance(x, n * STRIP_BYTES));
  }
}

// Multiplies all steps of a job. The sums live here from zeros to results: were they common to the
// kinds of runs, which cut them into products differently, the compiler would move them.
template <int RUNS, typename Store>
__device__ void multiply_job(Shared<Runs>& s, const Job<Runs>& job, Stages& stages, int warpgroup,
                             Store store) {
  const unsigned first_dy = uniform(describe(s.ring[job.work.dy[warpgroup]]));
  const unsigned first_x = uniform(describe(s.ring[job.n_dy + job.work.x[warpgroup]], STRIP_BYTES));
  const int stage_bytes = uniform(stages.size * STRIP_BYTES);
  float sums[32 * MOST];
#pragma unroll
  for (int i = 0; i < 32 * MOST; ++i) sums[i] = 0;
  int before = -1;  // the step before, whose products may still be under way
  auto release = [&] {
    if (before >= 0) give_back(s, before);
  };
  for (int step = job.first_step; step < job.end_step; ++step, stages.next()) {
    const int count = stages.count;
    barrier_wait(&s.full[place<BARRIERS>(count)], parity<BARRIERS>(count));
    if constexpr (RUNS > 1) {
      const int at = uniform(stages.at) * stage_bytes;
      products_begin();
#pragma unroll
      for (int k = 0; k < STEP; k += 16)
        multiply_runs<RUNS>(sums, advance(first_dy, at + k * 128), advance(first_x, at + k * LINE));
      products_commit();
      products_wait<1>();
    }
    release();
    before = count;
  }
  if constexpr (RUNS > 1) products_wait<0>();
  release();
  store(job, warpgroup, sums);
}

// A warpgroup: calls multiply_job with the runs that the job has for this warpgroup.
template <int RUNS = 1, typename Store>
__device__ void multiply_any(Shared<Runs>& s, const Job<Runs>& job, Stages& stages, int warpgroup,
                             Store store) {
  static_assert(MOST == 4 && (RUNS & 1), "the first strip begins a run");
  // Where runs take every second strip of dy, they have even numbers of strips of x.
  constexpr bool possible = DY_STRIDE == 1 || (RUNS & 10) == 0;
  if constexpr (RUNS < 32) {
    if (possible && uniform(job.work.runs[warpgroup]) == RUNS)
      multiply_job<possible ? RUNS : 1>(s, job, stages, warpgroup, store);
    else
      multiply_any<RUNS + 2>(s, job, stages, warpgroup, store);
  }
}
