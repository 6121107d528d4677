// CPU backend of roc_histogram_. Threads count into histograms of their own where there are scores
// enough to pay for adding these up; counts are integers, so any number of threads gives the same.
#include "ops/histogram.h"

#include <algorithm>
#include <cmath>

#include "cpu/histogram_kernel.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

bool is_nan(const void* scores, DType dtype, int64_t i) {
  const auto half = [&] { return static_cast<const uint16_t*>(scores)[i] & 0x7fff; };
  switch (dtype) {
    case DType::f64: return std::isnan(static_cast<const double*>(scores)[i]);
    case DType::f32: return std::isnan(static_cast<const float*>(scores)[i]);
    case DType::bf16: return half() > 0x7f80;
    case DType::f16: return half() > 0x7c00;
  }
  return false;
}

// Names what was refused.
[[noreturn]] void refuse(const HistogramInput& in, int64_t n) {
  int64_t nans = 0, first = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (in.rows && in.row + in.rows[i] >= in.n_rows)
      throw_value_error(concat("roc_histogram_: side + rows must be in 0..", in.n_rows - 1,
          ", got ", in.row + in.rows[i], " at index ", i));
    if (is_nan(in.scores, in.dtype, i)) {
      first = nans ? first : i;
      ++nans;
    }
  }
  if (!nans)
    throw_value_error("roc_histogram_: table points outside of counts");
  throw_value_error(concat(
      "roc_histogram_: scores must not be NaN, got ", nans, " NaN, the first at index ", first));
}

// The last thread's part is counted where all counts go, the others into counters of their own: of
// one row where all scores are of one.
void count_threaded(const HistogramKernels& kernels, const HistogramInput& in, int64_t n,
    int64_t threads, int64_t* counts) {
  const int64_t width = in.width(), part = (n + threads - 1) / threads, last = threads - 1;
  HistogramInput own_in = in;
  if (!in.rows) {
    own_in.row = 0, own_in.n_rows = 1;
    counts += in.row * width;
  }
  const int64_t size = own_in.n_rows * width;
  std::vector<Buffer<uint32_t>> own; // before anything is counted, since there may be no memory
  for (int64_t t = 0; t < last; ++t)
    own.emplace_back(size);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = std::min(n, t * part), to = std::min(n, (t + 1) * part);
      if (t == last) {
        kernels.count(own_in, from, to, 1, counts);
        continue;
      }
      std::fill_n(own[t].get(), size, 0);
      kernels.count_private(own_in, from, to, own[t]);
    }
  });
  std::vector<int64_t> low_bits(own_in.n_rows);
  const auto low_bits_at = [&](int64_t r) { return (r + 1) * width - kFacts + kLowBits; };
  for (int64_t r = 0; r < own_in.n_rows; ++r) {
    low_bits[r] = counts[low_bits_at(r)];
    for (int64_t t = 0; t < last; ++t)
      low_bits[r] |= own[t][low_bits_at(r)];
  }
  parallel_for(0, size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < last; ++t) {
      const uint32_t* from = own[t].get();
      for (int64_t i = begin; i < end; ++i)
        counts[i] += from[i];
    }
  });
  for (int64_t r = 0; r < own_in.n_rows; ++r)
    counts[low_bits_at(r)] = low_bits[r];
}

int64_t total_refused(const HistogramInput& in, const int64_t* counts) {
  int64_t total = 0;
  for (int64_t r = 0; r < in.n_rows; ++r)
    total += counts[(r + 1) * in.width() - kFacts + kRefused];
  return total;
}

void roc_histogram_(Tensor counts, const Tensor& table, const Tensor& scores, int64_t side,
    std::optional<Tensor> rows, std::optional<Tensor> atoms) {
  const HistogramArgs args = histogram_args(counts, table, scores, side, rows, atoms);
  const HistogramInput in{args.scores.const_data_ptr(), args.dtype, args.row_ptr(), args.row,
      args.n_rows, args.lookup()};
  int64_t* c = counts.mutable_data_ptr<int64_t>();
  const HistogramKernels& kernels = OODK_SELECT_KERNELS(histogram_kernels);
  const int64_t before = total_refused(in, c);

  // A private histogram is written, read and page-faulted once; a thread's share must outweigh it.
  // Parts stay below 2^31 scores, which 32-bit counters hold.
  const int64_t written = (args.rows ? args.n_rows : 1) * args.width;
  const int64_t worth = std::max<int64_t>(1 << 18, written / 2);
  const int64_t threads =
      std::min<int64_t>(args.n / worth, int64_t(torch::stable::get_num_threads()));
  if (threads > 1)
    for (int64_t done = 0; done < args.n; done += threads << 31) {
      HistogramInput part = in;
      const int64_t size = args.dtype == DType::f64 ? 8 : args.dtype == DType::f32 ? 4 : 2;
      part.scores = static_cast<const char*>(in.scores) + done * size;
      part.rows = in.rows ? in.rows + done : nullptr;
      count_threaded(kernels, part, std::min(args.n - done, threads << 31), threads, c);
    }
  else
    kernels.count(in, 0, args.n, 1, c);

  if (total_refused(in, c) != before) {
    kernels.count(in, 0, args.n, -1, c); // all of it back out
    refuse(in, args.n);
  }
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("roc_histogram_", TORCH_BOX(&oodk::roc_histogram_));
}
