// The pipeline of the kernels that multiply dy^T x on sm_90a; what is to be multiplied, and what
// becomes of it, is theirs.
//
// A thread block works on one job after another: strips of dy, 64 features wide, and strips of x,
// X_WIDTH wide, over a range of steps of STEP tokens. Of the first four warps one plans the jobs
// and the others copy, a step each in turn; two warpgroups multiply, each up to 256 features of x
// with strips of dy. In shared memory the strips of a step lie beside each other, those of dy
// first.

#pragma once
#include "hopper.cuh"

constexpr int STEP = CONFIG_STEP, X_WIDTH = CONFIG_X_WIDTH;
constexpr int RING = CONFIG_RING;            // strips of x that there is room for
constexpr int DY_STRIDE = CONFIG_DY_STRIDE;  // from a warpgroup's strip of dy to its next one
constexpr int WARPGROUPS = 2, WARPS = 4 * WARPGROUPS, COPIERS = 3, THREADS = 128 + 32 * WARPS;
constexpr int STRIP = 64, STRIP_BYTES = STEP * STRIP * 2;
constexpr int X_LINE = 2 * X_WIDTH, X_BYTES = STEP * X_LINE, PER_STRIP = STRIP / X_WIDTH;
constexpr int MOST = 4;  // times 64 features of x, for a warpgroup: what its registers hold
constexpr int DY_STRIPS = X_WIDTH < STRIP ? 1 : 8;  // of a job, at most
constexpr int X_STRIPS = WARPGROUPS * MOST * PER_STRIP;
constexpr int MOST_STAGES = 8;  // steps that are under way at most
// Steps take barriers in turn: twice as many, so that a warp that is behind or ahead of the others
// cannot take the barrier of one step for that of another.
constexpr int BARRIERS = 2 * MOST_STAGES;
static_assert(RING / (DY_STRIPS * PER_STRIP + X_STRIPS) >= COPIERS,
              "steps that are held, and copied");
constexpr int JOBS = 2;  // that are planned at a time

struct Job {
  int end;                                           // instead of a job: there is no more
  int first_step, end_step;                          // of the tokens
  int n_dy, n_x;                                     // strips
  int dy_features[DY_STRIPS], x_features[X_STRIPS];  // where they begin
  // For each warpgroup: its first strips of dy and of x, and where in its features of x runs begin,
  // each of which is multiplied with one strip of dy: bit i for 64 i; the end of the last is a bit
  // too. If strips are narrower, the end is rounded up.
  int dy[WARPGROUPS], x[WARPGROUPS], runs[WARPGROUPS];
  int where;  // for whoever stores the result
};

struct alignas(1024) Shared {
  char ring[RING][X_BYTES];
  char results[WARPS][16 * 128];
  Job jobs[JOBS];
  u64 full[BARRIERS], empty[BARRIERS], planned[JOBS], done[JOBS];
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
    barrier_arrive(&s.planned[place<JOBS>(count)]);
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
    barrier_arrive(&s.done[place<JOBS>(count)]);
  }
}

// One warp of each thread block: writes zeros into the slots of dW that `entries` has from `first`
// on, the empty ones.
template <int B, typename T>
__device__ void clear_slots(T* dw, const int2* entries, int first, int capacity) {
  for (int entry = first + blockIdx.x; entry < capacity; entry += gridDim.x) {
    uint4* block = reinterpret_cast<uint4*>(dw + (long long)entries[entry].y * B * B);
    for (int i = threadIdx.x % 32; i < B * B / 8; i += 32) block[i] = make_uint4(0, 0, 0, 0);
  }
}

// Steps take stages of shared memory in turn, as many as fit; a job goes on where the one before
// has ended, unless it needs another number of them.
struct Stages {
  int n = 0, size, at = 0;   // size: in strips of x
  int count = 0, first = 0;  // steps of all jobs so far; when the stages were last cut
  __device__ void follow(const Job& job) {
    const int fit = min(RING / (job.n_dy * PER_STRIP + job.n_x), MOST_STAGES);
    if (fit != n) n = fit, size = RING / fit, at = 0, first = count;
  }
  // The last step that must be gone before the next may be copied; -1: none.
  __device__ int in_the_way() const { return max(count - n, first - 1); }
  __device__ void next() {
    ++count;
    at = at + 1 == n ? 0 : at + 1;
  }
};

// A warp: copies every COPIERS-th step, a lane a strip of x and a strip of dy.
__device__ inline void copy_strips(Shared& s, const TensorMap& dy, const TensorMap& x, int copier) {
  static_assert(DY_STRIPS <= 32 && X_STRIPS <= 32, "a lane each");
  const int lane = threadIdx.x % 32;
  Stages stages;
  follow_jobs(s, [&](const Job& job) {
    stages.follow(job);
    const int n_dy = job.n_dy, n_x = job.n_x, end_step = job.end_step;
    const int dy_feature = lane < n_dy ? job.dy_features[lane] : 0;
    const int x_feature = lane < n_x ? job.x_features[lane] : 0;
    const int bytes = (n_dy * PER_STRIP + n_x) * X_BYTES;
    for (int step = job.first_step, own = copier; step < end_step; ++step, stages.next()) {
      if (own-- > 0) continue;
      own = COPIERS - 1;
      u64* full = &s.full[place<BARRIERS>(stages.count)];
      char (*to)[X_BYTES] = s.ring + stages.at * stages.size;
      const int older = stages.in_the_way();
      if (older >= 0) barrier_wait(&s.empty[place<BARRIERS>(older)], parity<BARRIERS>(older));
      if (lane == 0) barrier_expect(full, bytes);
      __syncwarp();
      if (lane < n_dy) copy_box(to[lane * PER_STRIP], dy, full, dy_feature, step * STEP);
      if (lane < n_x) copy_box(to[n_dy * PER_STRIP + lane], x, full, x_feature, step * STEP);
      __syncwarp();
    }
  });
}

// Multiplies the features of x up to the next set bit of RUNS with one strip of dy, those after it
// with the next one, until the last bit.
template <int RUNS, int RUN = 0>
__device__ void multiply_runs(float* sums, unsigned dy, unsigned x) {
  if constexpr (RUNS > 1) {
    constexpr int n = RUNS >> 1 & 1 ? 1 : RUNS >> 2 & 1 ? 2 : RUNS >> 3 & 1 ? 3 : 4;
    multiply_add<n * STRIP, true, X_LINE, true>(sums, advance(dy, RUN * DY_STRIDE * STRIP_BYTES),
                                                x);
    multiply_runs<(RUNS >> n), RUN + 1>(sums + 32 * n, dy, advance(x, n * PER_STRIP * X_BYTES));
  }
}

// Multiplies all steps of a job. The sums live here from zeros to results: were they common to the
// kinds of runs, which cut them into products differently, the compiler would move them.
template <int RUNS, typename Store>
__device__ void multiply_job(Shared& s, const Job& job, Stages& stages, int warpgroup,
                             Store store) {
  const int first_of_x = job.n_dy * PER_STRIP + job.x[warpgroup];
  const unsigned first_dy = uniform(describe(s.ring[job.dy[warpgroup] * PER_STRIP]));
  const unsigned first_x = uniform(describe(s.ring[first_of_x], X_BYTES));
  const int stage_bytes = uniform(stages.size * X_BYTES);
  float sums[32 * MOST];
#pragma unroll
  for (int i = 0; i < 32 * MOST; ++i) sums[i] = 0;
  int before = -1;  // the step before, whose products may still be under way
  auto release = [&] {
    if (before >= 0 && threadIdx.x % 32 == 0) barrier_arrive(&s.empty[place<BARRIERS>(before)]);
  };
  for (int step = job.first_step; step < job.end_step; ++step, stages.next()) {
    const int count = stages.count;
    barrier_wait(&s.full[place<BARRIERS>(count)], parity<BARRIERS>(count));
    if constexpr (RUNS > 1) {
      const int at = uniform(stages.at) * stage_bytes;
      products_begin();
#pragma unroll
      for (int k = 0; k < STEP; k += 16)
        multiply_runs<RUNS>(sums, advance(first_dy, at + k * 128),
                            advance(first_x, at + k * X_LINE));
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

// Calls multiply_job with the runs that the job has for this warpgroup.
template <int RUNS = 1, typename Store>
__device__ void multiply_any(Shared& s, const Job& job, Stages& stages, int warpgroup,
                             Store store) {
  static_assert(MOST == 4 && (RUNS & 1), "the first strip begins a run");
  // Where runs take every second strip of dy, they have even numbers of strips of x; narrow strips
  // come in one run.
  constexpr bool one_run = (RUNS - 1 & RUNS - 2) == 0;
  constexpr bool possible = (DY_STRIDE == 1 || (RUNS & 10) == 0) && (PER_STRIP == 1 || one_run);
  if constexpr (RUNS < 32) {
    if (possible && uniform(job.runs[warpgroup]) == RUNS)
      multiply_job<possible ? RUNS : 1>(s, job, stages, warpgroup, store);
    else
      multiply_any<RUNS + 2>(s, job, stages, warpgroup, store);
  }
}

// A warpgroup; store(job, warpgroup, sums) has 32 sums for 64 features of x, as `multiply_add` lays
// them out.
template <typename Store>
__device__ void multiply_jobs(Shared& s, Store store) {
  const int warpgroup = uniform(threadIdx.x / 128 - 1);
  Stages stages;
  follow_jobs(s, [&](const Job& job) {
    stages.follow(job);
    multiply_any(s, job, stages, warpgroup, store);
  });
}

// The whole kernel: plan(planner) is for one warp, store as above; when all is multiplied, the
// warpgroups call end(true) and the other warps end(false).
template <typename Plan, typename Store, typename End>
__device__ void run_jobs(Shared& s, const TensorMap& dy, const TensorMap& x, Plan plan, Store store,
                         End end) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < BARRIERS; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS);
    }
    for (int job = 0; job < JOBS; ++job) {
      // Each lane arrives, for what it has written or read.
      barrier_init(&s.planned[job], 32);
      barrier_init(&s.done[job], 32 * (COPIERS + WARPS));
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
