// Parallel loops on the thread pool of XLA.

#ifndef NORMJAX_PARALLEL_H_
#define NORMJAX_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace normjax {

// Calls body(i) for each i below n, in any order and on any thread.
//
// The caller takes part in the work, as in XLA's own loops. It only waits for items that other
// threads have started: all threads of the pool may be waiting in such calls.
template <class Pool, class Body>
void parallel_for(Pool& pool, std::ptrdiff_t n, const Body& body) {
  struct Work {
    std::atomic<std::ptrdiff_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  // Shared, since a scheduled task may start after this call has returned.
  const auto work = std::make_shared<Work>();
  const auto run = [work, n, &body] {
    for (std::ptrdiff_t i; (i = work->next.fetch_add(1)) < n;) {
      body(i);
      if (work->done.fetch_add(1) + 1 < n) continue;
      std::lock_guard<std::mutex> lock(work->mutex);
      work->finished.notify_one();
    }
  };
  const std::ptrdiff_t helpers = std::min<std::ptrdiff_t>(pool.num_threads(), n) - 1;
  for (std::ptrdiff_t i = 0; i < helpers; ++i) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done >= n; });
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
