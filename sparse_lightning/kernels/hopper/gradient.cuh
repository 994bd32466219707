// The pipeline of the kernels that multiply dy^T x on sm_90a; what is to be multiplied, and what
// becomes of it, is theirs.
//
// A thread block works on one job after another: strips of dy, 64 features wide, and strips of x,
// X_WIDTH wide, over a range of steps of STEP tokens. Of the first four warps one plans the jobs
// and the others copy, a step each in turn; the other warps multiply. In shared memory the strips
// of a step lie beside each other, those of dy first.

#pragma once
#include "hopper/sm90.cuh"

constexpr int STEP = CONFIG_STEP, X_WIDTH = CONFIG_X_WIDTH;
constexpr int DY_STRIPS = CONFIG_DY_STRIPS, X_STRIPS = CONFIG_X_STRIPS;  // of a job, at most
constexpr int RING = CONFIG_RING;  // strips of x that there is room for
constexpr int WARPS = CONFIG_WARPS, COPIERS = 3, THREADS = 128 + 32 * WARPS;
constexpr int STRIP = 64, LINE = 2 * STRIP, STRIP_BYTES = STEP * LINE;
constexpr int X_LINE = 2 * X_WIDTH, X_BYTES = STEP * X_LINE, PER_STRIP = STRIP / X_WIDTH;
constexpr int MOST_STAGES = 8;  // steps that are under way at most
// Steps take barriers in turn: twice as many, so that a warp that is behind or ahead of the others
// cannot take the barrier of one step for that of another.
constexpr int BARRIERS = 2 * MOST_STAGES;
// Thread blocks that are in step spare L2 much: what several ask for at once it reads once. So no
// more is under way than copies need to arrive in time, in strips of x, if that is enough steps.
constexpr int UNDER_WAY = CONFIG_UNDER_WAY, ENOUGH = CONFIG_ENOUGH;
constexpr int JOBS = 2;  // that are planned at a time

// The thread blocks of a cluster: each part of the tokens has some, which share copies of dy.
constexpr int PARTS = CONFIG_PARTS, SHARERS = CONFIG_SHARERS, CLUSTER = PARTS * SHARERS;
__device__ inline int rank() { return CLUSTER > 1 ? rank_in_cluster() : 0; }
__device__ inline int own_part() { return rank() / SHARERS; }
__device__ inline int own_share() { return rank() % SHARERS; }

// Work: what those who multiply have to know.
template <typename Work>
struct Job {
  int end;                   // instead of a job: there is no more
  int first_step, end_step;  // of the tokens
  int n_dy, n_x;             // strips; of dy, what all that share it need
  int room, copies;  // of a step: what it takes of shared memory, and what this thread block copies
                     // of it at most, both in strips of x
  int dy_features[DY_STRIPS], x_features[X_STRIPS];  // where they begin
  Work work;
};

template <typename Work>
struct alignas(1024) Shared {
  char ring[RING][X_BYTES];
  char results[WARPS][16 * 128];
  Job<Work> jobs[JOBS];
  u64 full[BARRIERS], empty[BARRIERS], planned[JOBS], done[JOBS];
};

// Where there are parts, the thread blocks of a cluster meet twice after each job: when the sums of
// all lie in their rings, and when they have been added up.
__device__ inline void meet() {
  if (PARTS > 1) {
    cluster_sync();
    cluster_sync();
  }
}

// What the planning warp hands jobs to.
template <typename Work>
struct Planner {
  Shared<Work>& s;
  int count = 0;
  // The next job, for all lanes to fill.
  __device__ Job<Work>& begin() {
    barrier_wait(&s.done[place<JOBS>(count)], parity<JOBS>(count) ^ 1);
    return s.jobs[place<JOBS>(count)];
  }
  // Hands it to the other warps: for all tokens, or this thread block's part of them. Those that
  // share dy must have the same `most_x`: the most strips of x that one of them has.
  __device__ void commit(long long tokens, int most_x) {
    if (threadIdx.x % 32 == 0) {
      Job<Work>& job = s.jobs[place<JOBS>(count)];
      const long long steps = (tokens + STEP - 1) / STEP;
      const int part = own_part();
      job.room = job.n_dy * PER_STRIP + most_x;
      job.copies = (job.n_dy * PER_STRIP + SHARERS - 1) / SHARERS + most_x;
      job.end = false;
      job.first_step = (int)(steps * part / PARTS);
      job.end_step = (int)(steps * (part + 1) / PARTS);
    }
    __syncwarp();
    barrier_arrive(&s.planned[place<JOBS>(count++)]);
    meet();
  }
  __device__ void end() {
    begin().end = true;
    barrier_arrive(&s.planned[place<JOBS>(count)]);
  }
};

template <typename Work, typename Each>
__device__ void follow_jobs(Shared<Work>& s, Each each) {
  for (int count = 0;; ++count) {
    const Job<Work>& job = s.jobs[place<JOBS>(count)];
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
  template <typename Work>
  __device__ void follow(const Job<Work>& job) {
    const int fit = min(max(UNDER_WAY / job.copies, ENOUGH), min(RING / job.room, MOST_STAGES));
    if (fit != n) n = fit, size = RING / fit, at = 0, first = count;
  }
  // The last step that must be gone before the next may be copied; -1: none.
  __device__ int in_the_way() const { return max(count - n, first - 1); }
  __device__ void next() {
    ++count;
    at = at + 1 == n ? 0 : at + 1;
  }
};

// A warp gives back a step: to all that copy into it.
template <typename Work>
__device__ void give_back(Shared<Work>& s, int step) {
  u64* empty = &s.empty[place<BARRIERS>(step)];
  const int lane = threadIdx.x % 32;
  if (SHARERS == 1) {
    if (lane == 0) barrier_arrive(empty);
  } else if (lane < SHARERS) {
    barrier_arrive(empty, own_part() * SHARERS + lane);
  }
}

// Where a thread block of a cluster puts its sums, to be added up: in the ring. Called by all that
// multiply, when they have multiplied all steps.
template <typename Work>
__device__ float4* sums_to_add(Shared<Work>& s) {
  warps_sync<32 * WARPS>();
  return reinterpret_cast<float4*>(s.ring);
}

// Adds up the sums of all parts, always in the same order: N times four of them, from `first` on.
template <int N, typename Work>
__device__ void add_parts(Shared<Work>& s, float* total, int first, int stride) {
#pragma unroll 2
  for (int from = 0; from < PARTS; ++from) {
    const unsigned there = in_cluster(s.ring, from * SHARERS + own_share()) + first * 16;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float4 four = load_in_cluster(there + i * stride * 16);
      total[4 * i] += four.x, total[4 * i + 1] += four.y;
      total[4 * i + 2] += four.z, total[4 * i + 3] += four.w;
    }
  }
}

// A warp: copies every COPIERS-th step of a job, a lane a strip of x and a strip of dy.
template <typename Work>
__device__ void copy_strips(Shared<Work>& s, const TensorMap& dy, const TensorMap& x,
                            const Job<Work>& job, Stages& stages) {
  static_assert(DY_STRIPS <= 32 && X_STRIPS <= 32, "a lane each");
  const int lane = threadIdx.x % 32;
  stages.follow(job);
  const int n_dy = job.n_dy, n_x = job.n_x, end_step = job.end_step;
  const int dy_feature = lane < n_dy ? job.dy_features[lane] : 0;
  const int x_feature = lane < n_x ? job.x_features[lane] : 0;
  const int bytes = (n_dy * PER_STRIP + n_x) * X_BYTES;
  const bool copies_dy = lane < n_dy && lane % SHARERS == own_share();
  const unsigned short sharers = (1 << SHARERS) - 1 << own_part() * SHARERS;
  int own = threadIdx.x / 32;
  for (int step = job.first_step; step < end_step; ++step, stages.next()) {
    if (own-- > 0) continue;
    own = COPIERS - 1;
    u64* full = &s.full[place<BARRIERS>(stages.count)];
    char (*to)[X_BYTES] = s.ring + stages.at * stages.size;
    const int older = stages.in_the_way();
    if (older >= 0) barrier_wait(&s.empty[place<BARRIERS>(older)], parity<BARRIERS>(older));
    if (lane == 0) barrier_expect(full, bytes);
    __syncwarp();
    if (copies_dy) {
      void* place = to[lane * PER_STRIP];
      if (SHARERS == 1)
        copy_box(place, dy, full, dy_feature, step * STEP);
      else
        copy_box_to_all(place, dy, full, dy_feature, step * STEP, sharers);
    }
    if (lane < n_x) copy_box(to[n_dy * PER_STRIP + lane], x, full, x_feature, step * STEP);
    __syncwarp();
  }
}

// Registers of a thread that copies or plans, and of one that multiplies: together not more than
// the launch gives, 168 or 96 for each.
constexpr int FEW_REGISTERS = WARPS == 8 ? 72 : 64, MANY_REGISTERS = WARPS == 8 ? 216 : 104;

// The whole kernel: plan(planner) is for one warp; multiply(job, stages) for each that multiplies,
// and meets the others of the cluster as `meet` does.
template <typename Work, typename Plan, typename Multiply>
__device__ void run_jobs(Shared<Work>& s, const TensorMap& dy, const TensorMap& x, Plan plan,
                         Multiply multiply) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < BARRIERS; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], WARPS * SHARERS);
    }
    for (int job = 0; job < JOBS; ++job) {
      // Each lane arrives, for what it has written or read.
      barrier_init(&s.planned[job], 32);
      barrier_init(&s.done[job], 32 * (COPIERS + WARPS));
    }
    barrier_inits_end();
  }
  __syncthreads();
  if (SHARERS > 1) cluster_sync();
  Stages stages;
  if (threadIdx.x >= 128) {
    take_registers<MANY_REGISTERS>();
    follow_jobs(s, [&](const Job<Work>& job) {
      stages.follow(job);
      multiply(job, stages);
    });
  } else {
    give_registers<FEW_REGISTERS>();
    if (threadIdx.x / 32 < COPIERS) {
      follow_jobs(s, [&](const Job<Work>& job) {
        copy_strips(s, dy, x, job, stages);
        meet();
      });
    } else {
      Planner<Work> planner{s};
      plan(planner);
      planner.end();
    }
  }
  if (SHARERS > 1) cluster_sync();  // nothing of the others may arrive after the end
}
