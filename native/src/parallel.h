// A loop over pieces of work on the threads of XLA's own pool.

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

// Whether this thread is one of the pool, which is known once it has run a task.
inline thread_local bool in_pool = false;

// body(i) for each i below n, in any order and on any thread.
//
// A thread of the pool works too. Another one sleeps, so that the pool has all cores: Linux may
// leave the thread that is woken on the core of the one that woke it, and the other core idle.
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
  // It outlives this call in a task that begins when nothing is left to do.
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
    // Nobody waits for a piece that no thread has begun: all threads of the pool may be waiting in
    // calls like this one.
    lock.unlock();
    run();
    lock.lock();
  }
  work->changed.wait(lock, finished);
}

// first(e, i) for each i below n and each example e, then between(e), then second(e, i) for each i.
//
// All is one loop, so that threads meet without sleeping: the pieces of an example's second pass
// come behind those of the first pass of the next example.
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
  // How many pieces of a first pass are done, and one more when the second pass may begin.
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
      // Another thread is at work on what is missing, since pieces are begun in their order.
      while (done[e].load() <= n) std::this_thread::yield();
      second(e, i);
    }
  });
}

}  // namespace normjax

#endif  // NORMJAX_PARALLEL_H_
