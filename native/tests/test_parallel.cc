// Tests of the parallel loops.

#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "pool.h"

namespace normjax::test {
namespace {

using Index = std::ptrdiff_t;

constexpr Index kMany[] = {0, 1, 2, 3, 7, 8, 9, 100, 1009};

void check_each_once(ThreadPool& pool, Index n) {
  std::vector<std::atomic<int>> seen(n);
  parallel_for(pool, n, [&](Index i) { ++seen[i]; });
  for (Index i = 0; i < n; ++i) CHECK(seen[i] == 1, "n", n, "i", i, "seen", seen[i].load());
}

void test_each_once() {
  for (int threads : kThreads) {
    for (Index n : kMany) check_each_once(shared_pool(threads), n);
  }
}

// Writes without locks are visible when the loop returns.
void test_visible() {
  for (int threads : kThreads) {
    std::vector<Index> written(503);
    parallel_for(shared_pool(threads), 503, [&](Index i) { written[i] = i + 1; });
    for (Index i = 0; i < 503; ++i) CHECK(written[i] == i + 1, "threads", threads, "i", i);
  }
}

// A task that starts after the loop has returned must not use its freed data.
void test_tasks_that_come_late() {
  ThreadPool pool(3);
  for (int turn = 0; turn < 200; ++turn) {
    const auto sum = std::make_unique<std::atomic<Index>>(0);
    parallel_for(pool, 5, [&](Index i) { *sum += i; });
    CHECK(*sum == 10, "turn", turn, "sum", sum->load());
  }
}

class Gate {
 public:
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

// Runs body(thread) on all threads of a pool at the same time.
template <class Body>
void on_all_threads(ThreadPool& pool, const Body& body) {
  const std::int64_t threads = pool.num_threads();
  std::atomic<std::int64_t> begun{0}, done{0};
  Gate all, end;
  for (std::int64_t t = 0; t < threads; ++t) {
    pool.Schedule([&, t, threads] {
      if (++begun == threads) all.open();
      all.wait();
      body(t);
      if (++done == threads) end.open();
    });
  }
  end.wait();
}

void test_pool_that_is_busy() {
  for (int threads : kThreads) {
    ThreadPool pool(threads);
    Gate gate;
    for (int t = 0; t < threads; ++t) pool.Schedule([&] { gate.wait(); });
    check_each_once(pool, 100);
    gate.open();
  }
}

void test_nested() {
  for (int threads : kThreads) {
    ThreadPool& pool = shared_pool(threads);
    on_all_threads(pool, [&](Index) {
      for (int turn = 0; turn < 20; ++turn) check_each_once(pool, 50);
    });
  }
}

void test_nested_twice() {
  for (int threads : kThreads) {
    ThreadPool& pool = shared_pool(threads);
    on_all_threads(pool, [&](Index) {
      std::atomic<Index> sum{0};
      parallel_for(pool, 5, [&](Index i) {
        parallel_for(pool, 7, [&](Index k) { sum += 7 * i + k; });
      });
      CHECK(sum == 34 * 35 / 2, "threads", threads, "sum", sum.load());
    });
  }
}

// Several threads outside of the pool may call at the same time.
void test_callers_outside() {
  ThreadPool pool(2), callers(3);
  on_all_threads(callers, [&](Index) {
    for (int turn = 0; turn < 50; ++turn) check_each_once(pool, 20);
  });
}

// The order of the steps of each example.
struct Steps {
  explicit Steps(Index examples, Index n)
      : n(n), first(examples * n), second(examples * n), done(examples), between(examples) {}

  Index n;
  std::vector<std::atomic<int>> first, second;
  std::vector<std::atomic<Index>> done, between;
};

void check_two_passes(ThreadPool& pool, Index examples, Index n) {
  Steps steps(examples, n);
  std::vector<Index> without_lock(examples);
  two_passes(
      pool, examples, n,
      [&](Index e, Index i) {
        CHECK(steps.between[e] == 0, "first after between", e, i);
        ++steps.first[e * n + i];
        ++steps.done[e];
      },
      [&](Index e) {
        CHECK(steps.done[e] == n, "between before the last", e, steps.done[e].load());
        // A delay, so that a second pass that does not wait would start now.
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        ++steps.between[e];
        without_lock[e] = e + 1;
      },
      [&](Index e, Index i) {
        CHECK(steps.between[e] == 1 && without_lock[e] == e + 1, "second before between", e, i);
        ++steps.second[e * n + i];
      });
  for (Index i = 0; i < examples * n; ++i) {
    CHECK(steps.first[i] == 1 && steps.second[i] == 1, "examples", examples, "n", n, "i", i,
          steps.first[i].load(), steps.second[i].load());
  }
  for (Index e = 0; e < examples; ++e) CHECK(steps.between[e] == 1, e, steps.between[e].load());
}

void check_two_passes(ThreadPool& pool) {
  for (Index examples : {0, 1, 2, 3, 5}) {
    for (Index n : {1, 2, 7, 40}) {
      check_two_passes(pool, examples, n);
    }
  }
}

void test_two_passes() {
  for (int threads : kThreads) check_two_passes(shared_pool(threads));
}

// What a thread has read last is still in its cache.
void test_two_passes_order() {
  std::vector<Index> order;
  two_passes(
      shared_pool(1), 2, 3, [&](Index e, Index i) { order.push_back(10 * e + i); },
      [&](Index e) { order.push_back(10 * e + 9); },
      [&](Index e, Index i) { order.push_back(-10 * e - i); });
  const std::vector<Index> expected = {0, 1, 2, 9, -2, -1, 0, 10, 11, 12, 19, -12, -11, -10};
  CHECK(order == expected, "steps", order.size());
}

void test_two_passes_nested() {
  for (int threads : kThreads) {
    ThreadPool& pool = shared_pool(threads);
    on_all_threads(pool, [&](Index) { check_two_passes(pool); });
  }
}

// Many short loops with little work, to provoke races at their start and end.
void test_stress() {
  for (int threads : {2, 8}) {
    ThreadPool& pool = shared_pool(threads);
    for (Index turn = 0; turn < 1000; ++turn) {
      std::vector<Index> written(turn % 5);
      parallel_for(pool, turn % 5, [&](Index i) { written[i] = turn; });
      for (Index value : written) CHECK(value == turn, "turn", turn, "value", value);
      if (turn % 20 == 0) check_two_passes(pool, 3, 1 + turn % 3);
    }
  }
}

}  // namespace

void test_parallel(Suite& suite) {
  suite.test("parallel: each index once", test_each_once);
  suite.test("parallel: results are visible", test_visible);
  suite.test("parallel: tasks that come late", test_tasks_that_come_late);
  suite.test("parallel: a pool that is busy", test_pool_that_is_busy);
  suite.test("parallel: loops on all threads at once", test_nested);
  suite.test("parallel: loops in loops on all threads at once", test_nested_twice);
  suite.test("parallel: callers outside of the pool", test_callers_outside);
  suite.test("parallel: two passes", test_two_passes);
  suite.test("parallel: the second pass begins with the last item", test_two_passes_order);
  suite.test("parallel: two passes on all threads at once", test_two_passes_nested);
  suite.test("parallel: stress", test_stress);
}

}  // namespace normjax::test
