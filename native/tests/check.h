// Checks that print the failed condition with its values, and a suite that counts tests.

#ifndef NORMJAX_TESTS_CHECK_H_
#define NORMJAX_TESTS_CHECK_H_

#include <functional>
#include <sstream>
#include <string>
#include <utility>

// The values after the condition are evaluated only if it is false.
#define CHECK(condition, ...)                                                                 \
  do {                                                                                        \
    if (!(condition) && normjax::test::failed()) {                                            \
      normjax::test::print(__FILE__, __LINE__, #condition, normjax::test::text(__VA_ARGS__)); \
    }                                                                                         \
  } while (false)

namespace normjax::test {

template <class... Values>
std::string text(const Values&... values) {
  std::ostringstream out;
  out.precision(21);
  ((out << ' ' << values), ...);
  return out.str();
}

// Counts a failure of the running test, from any thread. Returns true if it should be printed.
bool failed();

void print(const char* file, int line, const char* condition, const std::string& values);

// Runs tests whose names contain a filter, and counts them.
class Suite {
 public:
  explicit Suite(std::string filter) : filter_(std::move(filter)) {}

  void test(const std::string& name, const std::function<void()>& body);

  // Prints the counts and returns the exit status of the program.
  int finish() const;

 private:
  std::string filter_;
  int passed_ = 0, failed_ = 0;
};

void test_vectors(Suite& suite);
void test_parallel(Suite& suite);
void test_rows_forward(Suite& suite);
void test_rows_backward(Suite& suite);
void test_columns_forward(Suite& suite);
void test_columns_backward(Suite& suite);
void test_large(Suite& suite);

}  // namespace normjax::test

#endif  // NORMJAX_TESTS_CHECK_H_
