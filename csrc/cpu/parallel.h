// Work sharing on the OpenMP pool of the process (torch's).
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// f(begin, end, thread) over equal parts of 0..total. One thread does not enter OpenMP, so the pool keeps its size.
template <class F>
inline void parallel_for(int64_t total, int threads, F f) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      f(total * thread / team, total * (thread + 1) / team, int(thread));
    }
    return;
  }
#endif
  f(int64_t(0), total, 0);
}

// f(phase, i, thread) for i in 0..count(phase), handed out to the threads as they become free. A phase begins
// when the one before it has ended.
template <class Count, class F>
inline void parallel_phases(int64_t phases, int threads, Count count, F f) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      for (int64_t phase = 0; phase < phases; ++phase) {
        const int64_t total = count(phase);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < total; ++i) f(phase, i, thread);
      }
    }
    return;
  }
#endif
  for (int64_t phase = 0; phase < phases; ++phase) {
    for (int64_t i = 0; i < count(phase); ++i) f(phase, i, 0);
  }
}

// f(i, thread) for i in 0..total, handed out in the same way.
template <class F>
inline void parallel_tasks(int64_t total, int threads, F f) {
  parallel_phases(1, threads, [&](int64_t) { return total; }, [&](int64_t, int64_t i, int thread) { f(i, thread); });
}

} // namespace
