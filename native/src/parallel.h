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

// Calls body(i) for each i below n, in any order and on any thread.
//
// The caller takes part in the work, as in XLA's own loops. It only waits for items that other
// threads have started: all threads of the pool may be waiting in such calls.
template <class Pool, class Body>
void parallel_for(Pool& pool, std::ptrdiff_t n, const Body& body) {
  struct Work {
    std::atomic<std::ptrdiff_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable changed;
  };
  // Shared, since a scheduled task may start after this call has returned.
  const auto work = std::make_shared<Work>();
  const auto run = [work, n, &body] {
    for (std::ptrdiff_t i; (i = work->next.fetch_add(1)) < n;) {
      body(i);
      if (work->done.fetch_add(1) + 1 < n) continue;
      std::lock_guard<std::mutex> lock(work->mutex);
      work->changed.notify_one();
    }
  };
  const std::ptrdiff_t helpers = std::min<std::ptrdiff_t>(pool.num_threads(), n) - 1;
  for (std::ptrdiff_t i = 0; i < helpers; ++i) pool.Schedule([run] { run(); });
  run();
  const auto finished = [&] { return work->done >= n; };
  // Waking a thread takes 20 us, about as long as an item.
  const auto sleep = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  while (!finished() && std::chrono::steady_clock::now() < sleep) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->changed.wait(lock, finished);
}

// For each example e, calls first(e, i) for all i below n, then between(e), then second(e, i) for
// all i.
//
// A thread calls second for the items for which it called first, from the last to the first: the
// last ones are still in the cache of its core. It does not wait for the others before it begins
// with the next example, but takes over what they have left at the end.
template <class Pool, class First, class Between, class Second>
void two_passes(Pool& pool, std::ptrdiff_t examples, std::ptrdiff_t n, const First& first,
                const Between& between, const Second& second) {
  if (n == 1) {
    parallel_for(pool, examples, [&](std::ptrdiff_t e) {
      first(e, 0);
      between(e);
      second(e, 0);
    });
    return;
  }
  struct Example {
    std::atomic<std::ptrdiff_t> next{0}, done{0};
    std::atomic<bool> ready{false};
  };
  std::vector<Example> all(examples);
  std::vector<std::atomic<bool>> taken(examples * n);
  const auto take = [&](std::ptrdiff_t e, std::ptrdiff_t i) {
    if (!taken[e * n + i].exchange(true)) second(e, i);
  };
  const std::ptrdiff_t threads = std::min<std::ptrdiff_t>(pool.num_threads(), examples * n);
  parallel_for(pool, threads, [&](std::ptrdiff_t) {
    std::vector<std::ptrdiff_t> own;
    for (std::ptrdiff_t e = 0; e < examples; ++e) {
      Example& example = all[e];
      own.clear();
      for (std::ptrdiff_t i; (i = example.next.fetch_add(1)) < n;) {
        first(e, i);
        own.push_back(i);
        if (example.done.fetch_add(1) + 1 < n) continue;
        between(e);
        example.ready = true;
      }
      if (own.empty()) continue;
      // Items that are missing belong to threads that are running.
      while (!example.ready) std::this_thread::yield();
      for (auto i = own.rbegin(); i != own.rend(); ++i) take(e, *i);
    }
    for (std::ptrdiff_t e = 0; e < examples; ++e) {
      // Otherwise its items belong to threads that are running.
      if (!all[e].ready) continue;
      for (std::ptrdiff_t i = 0; i < n; ++i) take(e, i);
    }
  });
}

}  // namespace normjax

#endif  // NORMJAX_PARALLEL_H_
