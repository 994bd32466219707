// The pipeline of the kernels that multiply dy^T x on sm_90a; what is to be multiplied, and what
// becomes of it, is theirs.
//
// A thread block works on one job after another: 64-wide strips of dy and of x, over a range of
// steps of STEP tokens. Of the first four warps one plans the jobs and the others copy, a step each
// in turn; two warpgroups multiply, each up to MOST strips of x with strips of dy.

#pragma once
#include "hopper.cuh"

constexpr int STEP = CONFIG_STEP, RING = CONFIG_RING;  // strips that there is room for
constexpr int DY_STRIDE = CONFIG_DY_STRIDE;  // from a warpgroup's strip of dy to its next one
constexpr int WARPGROUPS = 2, WARPS = 4 * WARPGROUPS, COPIERS = 3, THREADS = 128 + 32 * WARPS;
constexpr int STRIP = 64, STRIP_BYTES = STEP * STRIP * 2;
constexpr int MOST = 4;         // strips of x that a warpgroup multiplies: what its registers hold
constexpr int STRIPS = 16;      // that a job has at most
constexpr int MOST_STAGES = 8;  // steps that are under way at most
constexpr int JOBS = 2;         // that are planned at a time

struct Job {
  int end;                   // instead of a job: there is no more
  int first_step, end_step;  // of the tokens
  int n_x, n_strips;         // strips of x; of x and dy
  int features[STRIPS];      // where they begin, first those of x
  // For each warpgroup: its first strips of x and of dy, and of its strips of x, which begin a run
  // that is multiplied with one strip of dy: bit i for the i-th; the bit after the last is set too.
  int x[WARPGROUPS], dy[WARPGROUPS], runs[WARPGROUPS];
  int where;  // for whoever stores the result
};

struct alignas(1024) Shared {
  char ring[RING][STRIP_BYTES];
  char results[WARPS][16 * 128];
  Job jobs[JOBS];
  u64 full[MOST_STAGES], empty[MOST_STAGES], planned[JOBS], done[JOBS];
};
static_assert(sizeof(Shared) == CONFIG_SHARED_BYTES, "hopper_programs.py must count alike");

// What the planning warp hands jobs to.
struct Planner {
  Shared& s;
  int count = 0;
  // fill(job) is called by all lanes, in turn with the warps that follow.
  template <typename Fill>
  __device__ void add(Fill fill) {
    Job& job = s.jobs[place<JOBS>(count)];
    barrier_wait(&s.done[place<JOBS>(count)], parity<JOBS>(count) ^ 1);
    fill(job);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&s.planned[place<JOBS>(count)]);
    ++count;
  }
  __device__ void end() {
    add([](Job& job) { job.end = true; });
  }
};

template <typename Each>
__device__ void follow_jobs(Shared& s, Each each) {
  for (int count = 0;; ++count) {
    const Job& job = s.jobs[place<JOBS>(count)];
    barrier_wait(&s.planned[place<JOBS>(count)], parity<JOBS>(count));
    if (job.end) return;
    each(job);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&s.done[place<JOBS>(count)]);
  }
}

// Steps of a job take stages of shared memory in turn, as many as fit. How often each was taken, by
// whichever job, decides the parity of its barriers.
struct Stages {
  int n, at = 0;
  unsigned& taken;  // a bit for each stage: an odd number of times
  __device__ Stages(const Job& job, unsigned& taken)
      : n(min(RING / job.n_strips, MOST_STAGES)), taken(taken) {}
  __device__ int parity() const { return taken >> at & 1; }
  __device__ void next() {
    taken ^= 1u << at;
    at = at + 1 == n ? 0 : at + 1;
  }
};

// A warp: copies every COPIERS-th step; a lane copies one strip.
__device__ inline void copy_strips(Shared& s, const TensorMap& dy, const TensorMap& x, int copier) {
  const int lane = threadIdx.x % 32;
  unsigned taken = 0;
  follow_jobs(s, [&](const Job& job) {
    // The job before cut the ring otherwise: all of it must be gone.
    for (int stage = 0; stage < MOST_STAGES; ++stage)
      barrier_wait(&s.empty[stage], taken >> stage & 1 ^ 1);
    const int feature = lane < job.n_strips ? job.features[lane] : 0;
    Stages stages(job, taken);
    for (int step = job.first_step; step < job.end_step; ++step, stages.next()) {
      if ((step - job.first_step) % COPIERS != copier) continue;
      u64* full = &s.full[stages.at];
      barrier_wait(&s.empty[stages.at], stages.parity() ^ 1);
      if (lane == 0) barrier_expect(full, job.n_strips * STRIP_BYTES);
      __syncwarp();
      if (lane < job.n_strips)
        copy_box(s.ring[stages.at * job.n_strips + lane], lane < job.n_x ? x : dy, full, feature,
                 step * STEP);
      __syncwarp();
    }
  });
}

// Multiplies the strips of x up to the next set bit of RUNS with one strip of dy, those after it
// with the next one, until the last bit.
template <int RUNS, int RUN = 0>
__device__ void multiply_runs(float* sums, unsigned dy, unsigned x) {
  if constexpr (RUNS > 1) {
    constexpr int n = RUNS >> 1 & 1 ? 1 : RUNS >> 2 & 1 ? 2 : RUNS >> 3 & 1 ? 3 : 4;
    multiply_add<n * STRIP, true, 128, true>(sums, advance(dy, RUN * DY_STRIDE * STRIP_BYTES), x);
    multiply_runs<(RUNS >> n), RUN + 1>(sums + 32 * n, dy, advance(x, n * STRIP_BYTES));
  }
}

// Multiplies all steps of a job. The sums live here from zeros to results: were they common to the
// kinds of runs, which cut them into products differently, the compiler would move them.
template <int RUNS, typename Store>
__device__ void multiply_job(Shared& s, const Job& job, unsigned& taken, int warpgroup,
                             Store store) {
  const int strips = uniform(job.n_strips);
  const unsigned first_x = uniform(describe(s.ring[job.x[warpgroup]], STRIP_BYTES));
  const unsigned first_dy = uniform(describe(s.ring[job.dy[warpgroup]]));
  Stages stages(job, taken);
  float sums[32 * MOST];
#pragma unroll
  for (int i = 0; i < 32 * MOST; ++i) sums[i] = 0;
  int before = -1;  // the stage of the step before, whose products may still be under way
  auto release = [&] {
    if (before >= 0 && threadIdx.x % 32 == 0) barrier_arrive(&s.empty[before]);
  };
  for (int step = job.first_step; step < job.end_step; ++step, stages.next()) {
    const int stage = uniform(stages.at);
    barrier_wait(&s.full[stage], stages.parity());
    if constexpr (RUNS > 1) {
      const int at = stage * strips * STRIP_BYTES;
      products_begin();
#pragma unroll
      for (int k = 0; k < STEP; k += 16)
        multiply_runs<RUNS>(sums, advance(first_dy, at + k * 128), advance(first_x, at + k * 128));
      products_commit();
      products_wait<1>();
    }
    release();
    before = stage;
  }
  if constexpr (RUNS > 1) products_wait<0>();
  release();
  store(job, warpgroup, sums);
}

// Calls multiply_job with the runs that the job has for this warpgroup.
template <int RUNS = 1, typename Store>
__device__ void multiply_any(Shared& s, const Job& job, unsigned& taken, int warpgroup,
                             Store store) {
  static_assert(MOST == 4 && (RUNS & 1), "the first strip begins a run");
  // Where runs take every second strip of dy, they have even numbers of strips.
  constexpr bool possible = DY_STRIDE == 1 || (RUNS & 10) == 0;
  if constexpr (RUNS < 32) {
    if (possible && uniform(job.runs[warpgroup]) == RUNS)
      multiply_job<possible ? RUNS : 1>(s, job, taken, warpgroup, store);
    else
      multiply_any<RUNS + 2>(s, job, taken, warpgroup, store);
  }
}

// A warpgroup; store(job, warpgroup, sums) has 32 sums a strip of x, as `multiply_add` lays them
// out.
template <typename Store>
__device__ void multiply_jobs(Shared& s, Store store) {
  const int warpgroup = uniform(threadIdx.x / 128 - 1);
  unsigned taken = 0;
  follow_jobs(s, [&](const Job& job) { multiply_any(s, job, taken, warpgroup, store); });
}

// The whole kernel: plan(planner) is for one warp, store as above; when all is multiplied, the
// warpgroups call end(true) and the other warps end(false).
template <typename Plan, typename Store, typename End>
__device__ void run_jobs(Shared& s, const TensorMap& dy, const TensorMap& x, Plan plan, Store store,
                         End end) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < MOST_STAGES; ++stage) {
      barrier_init(&s.full[stage], 1);
      barrier_init(&s.empty[stage], WARPS);
    }
    for (int job = 0; job < JOBS; ++job) {
      barrier_init(&s.planned[job], 1);
      barrier_init(&s.done[job], COPIERS + WARPS);
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
    end(false);
  } else {
    take_registers<224>();
    multiply_jobs(s, store);
    end(true);
  }
}
