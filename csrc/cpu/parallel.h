#pragma once

#include <algorithm>
#include <cstdint>

#include "stable.h"

namespace oodk {

// f(begin, end) over `rows` rows of `width` values on torch's threads. Each range starts at a
// multiple of the widest vector, so that a row's place in its vector, and with it every bit of the
// result, does not depend on the number of threads.
template <typename F>
void for_row_blocks(int64_t rows, int64_t width, const F& f) {
  constexpr int64_t block = 16, least = 1 << 15; // rows; values that are worth a thread
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, least / std::max<int64_t>(1, width * block));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    f(begin * block, std::min(end * block, rows));
  });
}

} // namespace oodk
