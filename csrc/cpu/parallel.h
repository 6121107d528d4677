#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "stable.h"

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace oodk {

// f(begin, end) over parts of [begin, end) of at least `grain` items, on torch's threads. What f
// throws is thrown again, as what it is: torch would make a RuntimeError without its message of it.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr thrown;
  std::atomic_flag taken;
  const auto guarded = [&](int64_t b, int64_t e) {
    try {
      f(b, e);
    } catch (...) {
      if (!taken.test_and_set())
        thrown = std::current_exception();
    }
  };
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer does not see through libgomp: it is told that all before happens before f, and
  // f before all after. Static, lest a thread read anything before it has been told.
  static char forked, joined;
  const auto task = [&](int64_t b, int64_t e) {
    __tsan_acquire(&forked);
    guarded(b, e);
    __tsan_release(&joined);
  };
  __tsan_release(&forked);
  torch::stable::parallel_for(begin, end, grain, task);
  __tsan_acquire(&joined);
#else
  torch::stable::parallel_for(begin, end, grain, guarded);
#endif
  if (thrown)
    std::rethrow_exception(thrown);
}

// f(begin, end) over `rows` rows of `width` values on torch's threads. Each range starts at a
// multiple of the widest vector, so that a row's place in its vector, and with it every bit of the
// result, does not depend on the number of threads.
template <typename F>
void for_row_blocks(int64_t rows, int64_t width, const F& f) {
  constexpr int64_t block = 16, least = 1 << 15; // rows; values that are worth a thread
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, least / std::max<int64_t>(1, width * block));
  parallel_for(0, blocks, grain,
      [&](int64_t begin, int64_t end) { f(begin * block, std::min(end * block, rows)); });
}

} // namespace oodk
