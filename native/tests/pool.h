// A thread pool with the two methods of XLA's pool that the kernels call.

#ifndef NORMJAX_TESTS_POOL_H_
#define NORMJAX_TESTS_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <utility>
#include <vector>

namespace normjax::test {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  // Runs all scheduled tasks before it returns.
  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  template <class F>
  void Schedule(F&& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace(std::forward<F>(task));
    }
    changed_.notify_one();
  }

  std::int64_t num_threads() const { return static_cast<std::int64_t>(threads_.size()); }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::queue<std::function<void()>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

constexpr int kThreads[] = {1, 2, 3, 8};

// A pool of 1 to 8 threads that exists until the program ends.
inline ThreadPool& shared_pool(int threads) {
  static std::unique_ptr<ThreadPool> pools[9];
  std::unique_ptr<ThreadPool>& pool = pools[threads];
  if (pool == nullptr) pool = std::make_unique<ThreadPool>(threads);
  return *pool;
}

}  // namespace normjax::test

#endif  // NORMJAX_TESTS_POOL_H_
