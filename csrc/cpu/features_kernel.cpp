// Statistics of rows of features, each row read from memory once.
#include "cpu/features_kernel.h"

#include "common/percentile.h"
#include "cpu/ranking.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

void stats(const void* features, DType dtype, int64_t width, int64_t stride, bool rectified,
    const double* percentiles, int64_t count, int64_t step, int64_t begin, int64_t end, void* l1,
    void* l2, void* sum, void* threshold, void* top_sum) {
  dispatch(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    Ranking<T> ranking(width);
    VectorBuffer<Wanted> wanted(count);
    for (int64_t r = begin; r < end; ++r) {
      const RowSums sums = ranking.read((const S*)features + r * stride, rectified);
      ((T*)l1)[r] = T(sums.l1);
      ((T*)l2)[r] = T(sums.l2);
      ((T*)sum)[r] = T(sums.sum);
      T *const least = (T*)threshold + r * count, *const top = (T*)top_sum + r * count;
      if (ranking.nan()) {
        for (int64_t p = 0; p < count; ++p)
          least[p] = top[p] = std::numeric_limits<T>::quiet_NaN();
        continue;
      }
      if (!count)
        continue;
      int64_t most = 1;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t k = count_above(width, percentiles[r * step + p]);
        wanted[p].k = k;
        most = k > most ? k : most;
      }
      ranking.rank(most);
      for (int64_t p = 0; p < count; ++p)
        wanted[p] = ranking.want(wanted[p].k);
      for (int64_t p = 0; p < count; ++p) {
        const auto found = ranking.find(wanted[p]);
        least[p] = found.value;
        top[p] = T(found.sum);
      }
    }
  });
}

} // namespace

extern const FeatureKernels feature_kernels = {stats};

} // namespace OODK_CPU_NS
} // namespace oodk
