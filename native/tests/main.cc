// Runs all tests, or those whose names contain the argument. --large runs only the large arrays.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "check.h"

namespace normjax::test {
namespace {

std::atomic<long> failures{0};

}  // namespace

bool failed() {
  constexpr long kPrinted = 5;
  return failures.fetch_add(1) < kPrinted;
}

void print(const char* file, int line, const char* condition, const std::string& values) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  std::printf("  %s:%d: %s is false:%s\n", file, line, condition, values.c_str());
}

void Suite::test(const std::string& name, const std::function<void()>& body) {
  if (name.find(filter_) == std::string::npos) return;
  failures = 0;
  const auto start = std::chrono::steady_clock::now();
  body();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const long count = failures;
  ++(count == 0 ? passed_ : failed_);
  const std::string verdict = count == 0 ? "ok" : std::to_string(count) + " FAILURES";
  std::printf("%s: %s (%.2f s)\n", name.c_str(), verdict.c_str(), seconds.count());
  std::fflush(stdout);
}

int Suite::finish() const {
  std::printf("%d passed, %d failed\n", passed_, failed_);
  return failed_ == 0 && passed_ > 0 ? 0 : 1;
}

}  // namespace normjax::test

int main(int argc, char** argv) {
  using namespace normjax::test;
  if (argc > 1 && std::strcmp(argv[1], "--large") == 0) {
    Suite suite("");
    test_large(suite);
    return suite.finish();
  }
  Suite suite(argc > 1 ? argv[1] : "");
  test_vectors(suite);
  test_parallel(suite);
  test_rows_forward(suite);
  test_rows_backward(suite);
  test_columns_forward(suite);
  test_columns_backward(suite);
  return suite.finish();
}
