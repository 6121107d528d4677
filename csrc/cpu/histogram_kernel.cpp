// Two look-ups and an increment a score: prefix -> where its counters are -> counter. A block's
// counters are found first, which vectorises, and then incremented.
#include "cpu/histogram_kernel.h"

#include <algorithm>

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

constexpr int kBlock = 512; // scores: their keys and counters take 4 KiB of the nearest cache

// 0 where float32 holds the value.
OODK_INLINE uint32_t rounded(double value) {
  return double(float(value)) != value && value == value;
}
template <typename S>
OODK_INLINE uint32_t rounded(S) {
  return 0;
}

// The scores of a block search the atoms of their prefixes in step, which vectorises.
void find_atoms(const HistogramTable& table, const int32_t* keys, int n, uint32_t most,
    uint32_t refused, uint32_t* index) {
  const uint32_t n_atoms = uint32_t(table.n_atoms), bins = uint32_t(table.bins);
  const int32_t* atoms = table.atoms;
  uint32_t low[kBlock], left[kBlock];
  for (int i = 0; i < n; ++i) {
    const HistogramEntry entry{table.entries[(uint32_t(keys[i]) >> 16) ^ 0x8000]};
    const uint32_t first = entry.first_atom(), count = entry.n_atoms();
    const bool inside = first + count <= n_atoms;
    low[i] = inside & (count > 0) ? first : 0;
    left[i] = inside ? count : 0;
  }
  for (; most > 1; most -= most / 2)
    for (int i = 0; i < n; ++i) {
      const uint32_t half = left[i] / 2, middle = low[i] + half;
      low[i] = atoms[middle] <= keys[i] ? middle : low[i];
      left[i] -= half;
    }
  for (int i = 0; i < n; ++i) {
    const bool atom = (left[i] > 0) & (atoms[low[i]] == keys[i]) & (index[i] != refused);
    index[i] = atom ? bins + low[i] : index[i];
  }
}

template <typename S, typename Count>
void count_block(const HistogramInput& in, const S* scores, const uint8_t* rows, int n, int sign,
    Count* counts) {
  const HistogramTable& table = in.table;
  const int64_t width = in.width();
  const uint32_t bins = uint32_t(table.bins), refused = uint32_t(width - kFacts + kRefused);
  uint32_t index[kBlock], n_rounded = 0, low_bits = 0, most_atoms = 0;
  int32_t keys[kBlock];
  for (int i = 0; i < n; ++i) {
    n_rounded += rounded(widen(scores[i]));
    const uint32_t bits = float_bits(float(widen(scores[i])));
    low_bits |= bits;
    keys[i] = order_key(bits);
  }
  for (int i = 0; i < n; ++i) {
    const HistogramEntry entry{table.entries[(uint32_t(keys[i]) >> 16) ^ 0x8000]};
    const uint32_t bin = entry.start() + ((uint32_t(keys[i]) & 0xffff) >> entry.shift());
    // NaN has the keys beyond those of the infinities.
    const bool number = keys[i] <= 0x7f800000 && keys[i] >= int32_t(0x807fffff);
    index[i] = number & (bin < bins) ? bin : refused;
    most_atoms |= entry.n_atoms();
  }
  if (most_atoms && table.n_atoms)
    find_atoms(table, keys, n, most_atoms, refused, index);

  Count* base = counts + in.row * width;
  const auto fact = [&](int64_t row, Fact f) -> Count& {
    return counts[(row + 1) * width - kFacts + f];
  };
  uint32_t n_refused = 0;
  for (int i = 0; i < n; ++i)
    n_refused += index[i] == refused;
  if (!rows) {
    for (int i = 0; i < n; ++i)
      base[index[i]] += sign;
    fact(in.row, kScores) += sign * Count(n - n_refused);
  } else {
    const uint32_t last = uint32_t(in.n_rows - 1 - in.row);
    uint32_t outside = 0;
    for (int i = 0; i < n; ++i)
      outside += rows[i] > last;
    if (outside | n_refused || in.n_rows * width > UINT32_MAX) {
      for (int i = 0; i < n; ++i) {
        const bool counted = rows[i] <= last;
        const int64_t row = counted ? rows[i] : 0;
        const uint32_t at = counted ? index[i] : refused;
        base[row * width + at] += sign;
        fact(in.row + row, kScores) += at == refused ? 0 : sign;
      }
    } else {
      for (int i = 0; i < n; ++i)
        index[i] += rows[i] * uint32_t(width);
      for (int i = 0; i < n; ++i)
        base[index[i]] += sign;
      int rest = n;
      for (uint32_t row = 0; row <= last && rest; ++row) {
        int here = 0;
        for (int i = 0; i < n; ++i)
          here += rows[i] == row;
        fact(in.row + row, kScores) += sign * Count(here);
        rest -= here;
      }
    }
  }
  fact(in.row, kRounded) += sign * Count(n_rounded);
  fact(in.row, kLowBits) |= low_bits & 0xffff;
}

template <typename Count>
void count_scores(const HistogramInput& in, int64_t begin, int64_t end, int sign, Count* counts) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    const S* scores = static_cast<const S*>(in.scores);
    for (int64_t i = begin; i < end; i += kBlock)
      count_block(in, scores + i, in.rows ? in.rows + i : nullptr,
          int(std::min<int64_t>(kBlock, end - i)), sign, counts);
  });
}

void count(const HistogramInput& in, int64_t begin, int64_t end, int sign, int64_t* counts) {
  count_scores(in, begin, end, sign, counts);
}

void count_private(const HistogramInput& in, int64_t begin, int64_t end, uint32_t* counts) {
  count_scores(in, begin, end, 1, counts);
}

} // namespace

extern const HistogramKernels histogram_kernels = {count, count_private};

} // namespace OODK_CPU_NS
} // namespace oodk
