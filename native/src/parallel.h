// Parallel loops on the thread pool of XLA.

#ifndef NORMJAX_PARALLEL_H_
#define NORMJAX_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace normjax {

// Whether this thread belongs to the pool. It is set when the thread runs its first task.
inline thread_local bool in_pool = false;

// Calls body(i) for each i below n, in any order and on any thread.
//
// A caller that belongs to the pool takes part in the work. Any other caller sleeps, so that the
// pool can use all cores: Linux may keep a woken thread on the core of the thread that woke it, and
// leave another core idle.
template <class Pool, class Body>
void parallel_for(Pool& pool, std::ptrdiff_t n, const Body& body) {
  struct Work {
    std::atomic<std::ptrdiff_t> next{0}, done{0};
    std::atomic<bool> begun{false};
    std::mutex mutex;
    std::condition_variable changed;
  };
  if (n <= 1) {
    if (n == 1) body(0);
    return;
  }
  // Shared, since a scheduled task may start after this call has returned.
  const auto work = std::make_shared<Work>();
  const auto run = [work, n, &body] {
    for (std::ptrdiff_t i; (i = work->next.fetch_add(1)) < n;) {
      work->begun = true;
      body(i);
      if (work->done.fetch_add(1) + 1 < n) continue;
      std::lock_guard<std::mutex> lock(work->mutex);
      work->changed.notify_all();
    }
  };
  const std::ptrdiff_t threads = pool.num_threads() - (in_pool ? 1 : 0);
  for (std::ptrdiff_t i = 0; i < std::min(threads, n); ++i) {
    pool.Schedule([run] {
      in_pool = true;
      run();
    });
  }
  const auto finished = [&] { return work->done == n; };
  std::unique_lock<std::mutex> lock(work->mutex);
  if (!in_pool) {
    work->changed.wait_for(lock, std::chrono::microseconds(200), finished);
  }
  if (in_pool || !work->begun) {
    // A caller in the pool must not wait for items that no thread has started: all threads of the
    // pool may be waiting in such calls. If the pool is busy, an outside caller does the work.
    lock.unlock();
    run();
    lock.lock();
  }
  work->changed.wait(lock, finished);
}

// For each example e, calls first(e, i) for all i below n, then between(e), then second(e, i) for
// all i.
//
// It is one parallel loop, so that threads do not sleep between the passes: the items of the second
// pass of an example come after those of the first pass of the next example. If `small`, one thread
// processes each example.
template <class Pool, class First, class Between, class Second>
void two_passes(Pool& pool, std::ptrdiff_t examples, std::ptrdiff_t n, bool small,
                const First& first, const Between& between, const Second& second) {
  if (small) {
    parallel_for(pool, examples, [&](std::ptrdiff_t e) {
      for (std::ptrdiff_t i = 0; i < n; ++i) first(e, i);
      between(e);
      for (std::ptrdiff_t i = 0; i < n; ++i) second(e, i);
    });
    return;
  }
  // For each example, the number of finished items of the first pass, plus 1 after between(e).
  std::vector<std::atomic<std::ptrdiff_t>> done(examples);
  parallel_for(pool, 2 * examples * n, [&](std::ptrdiff_t item) {
    const std::ptrdiff_t stage = item / n, i = item % n, last = 2 * examples - 1;
    if (stage == 0 || (stage % 2 == 1 && stage < last)) {
      const std::ptrdiff_t e = (stage + 1) / 2;
      first(e, i);
      if (done[e].fetch_add(1) + 1 < n) return;
      between(e);
      done[e].fetch_add(1);
    } else {
      const std::ptrdiff_t e = stage == last ? examples - 1 : stage / 2 - 1;
      // Items start in order, so other threads are already running those that are missing.
      while (done[e].load() <= n) std::this_thread::yield();
      second(e, i);
    }
  });
}

}  // namespace normjax

#endif  // NORMJAX_PARALLEL_H_
