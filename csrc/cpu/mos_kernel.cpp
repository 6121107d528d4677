// MOS (Huang & Li, CVPR 2021). For group k with "others" logit o and class logits z_c:
//
//   m = max_c z_c    s = sum_c e^(z_c - m)    p_others = e^o / (e^o + s e^m)
//
// (m, s, o) of all groups of a row come from one read of it: a row fits the nearest caches, so the
// second pass, for s, costs no memory traffic. Everything the ops return is made of them.
//
// Rows are taken `lanes` at a time. A wide group is read along the row, one row after the other. A
// narrow one would leave most lanes of a vector empty, so narrow groups are transposed: lanes are
// rows, and no horizontal reduction is left. What follows the statistics always has rows as lanes.
#include "cpu/mos_kernel.h"

#include "cpu/simd.h"
#include "cpu/softmax_gradient.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// Columns that are transposed at once, 16 KiB at most: half of a first-level cache. And the group
// width from which reading along the row pays: four vectors, for two horizontal reductions.
constexpr int64_t kTile = 256;
template <typename T>
constexpr int64_t kWide = 4 * lanes<T>;

template <typename T>
struct Stats { // each (groups, lanes)
  explicit Stats(int64_t groups)
      : best(groups * lanes<T>), sum(groups * lanes<T>), others(groups * lanes<T>) {}
  VectorBuffer<T> best, sum, others;
};

// What is subtracted before e^x: the maximum, but 0 where that is -inf, lest -inf - -inf be NaN.
template <typename T>
OODK_INLINE T shift(T best) {
  return best == -std::numeric_limits<T>::infinity() ? T(0) : best;
}
template <typename T>
OODK_INLINE vec<T> shift_lanes(vec<T> best) {
  return best == -std::numeric_limits<T>::infinity() ? vec<T>{} : best;
}

// best and sum of n >= lanes adjacent class logits.
template <typename S, typename T = acc_t<S>>
OODK_INLINE void along_row(const S* z, int64_t n, T* best, T* sum) {
  constexpr int L = lanes<T>;
  const T m = max_of(z, n);
  const vec<T> c = splat(shift(m));
  vec<T> s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    s0 += exp(load(z + i) - c);
    s1 += exp(load(z + i + L) - c);
  }
  if (i + L <= n) {
    s0 += exp(load(z + i) - c);
    i += L;
  }
  if (i < n) { // the last vector overlaps the one before: only its last n - i lanes are new
    T is_new[2 * L];
    for (int j = 0; j < 2 * L; ++j)
      is_new[j] = j < L ? T(0) : T(1);
    const vec<T> e = exp(load(z + n - L) - c);
    s1 += load(is_new + (n - i)) > T(0) ? e : vec<T>{};
  }
  *best = m;
  *sum = reduce_add(s0 + s1);
}

// The same with rows as lanes.
template <typename T>
OODK_INLINE void along_lanes(const vec<T>* z, int64_t n, vec<T>* best, vec<T>* sum) {
  vec<T> m = z[0];
  for (int64_t i = 1; i < n; ++i)
    m = max(z[i], m);
  // A maximum that started as NaN or met one may be any of the values; the sum is NaN then.
  const vec<T> c = shift_lanes<T>(m);
  vec<T> s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    s0 += exp(z[i] - c);
    s1 += exp(z[i + 1] - c);
  }
  if (i < n)
    s0 += exp(z[i] - c);
  *best = m;
  *sum = s0 + s1;
}

// Statistics of the rows [first, first + count), count <= lanes.
template <typename S, typename T = acc_t<S>>
void block_stats(const MosRows& in, int64_t first, int count, const Stats<T>& stats) {
  constexpr int L = lanes<T>;
  const S* rows[L];
  for (int r = 0; r < L; ++r)
    rows[r] = (const S*)in.logits + (first + (r < count ? r : count - 1)) * in.stride;
  const int64_t* at = in.offsets;
  bool narrow = false;
  for (int r = 0; r < L; ++r) // rows past the end repeat the last one's results
    for (int64_t k = 0; k < in.groups; ++k) {
      const int64_t n = at[k + 1] - at[k] - 1;
      if (n < kWide<T>) {
        narrow = true;
        continue;
      }
      const int64_t i = k * L + r;
      if (r < count) {
        along_row(rows[r] + at[k] + 1, n, stats.best + i, stats.sum + i);
        stats.others[i] = widen(rows[r][at[k]]);
      } else {
        stats.best[i] = stats.best[i - 1];
        stats.sum[i] = stats.sum[i - 1];
        stats.others[i] = stats.others[i - 1];
      }
    }
  if (!narrow)
    return;
  vec<T> columns[kTile];
  for (int64_t k = 0; k < in.groups;) {
    int64_t last = k; // groups [k, last) are narrow and fit one tile
    while (last < in.groups && at[last + 1] - at[last] <= kWide<T> && at[last + 1] - at[k] <= kTile)
      ++last;
    if (last == k) {
      ++k;
      continue;
    }
    load_columns(rows, in.width, at[k], at[last], columns);
    for (int64_t g = k; g < last; ++g) {
      const vec<T>* z = columns + (at[g] - at[k]);
      vec<T> best, sum;
      along_lanes<T>(z + 1, at[g + 1] - at[g] - 1, &best, &sum);
      store(stats.best + g * L, best);
      store(stats.sum + g * L, sum);
      store(stats.others + g * L, z[0]);
    }
    k = last;
  }
}

// Everything the ops need of one group, rows as lanes. Where the group holds +inf or nothing but
// -inf, `total` is NaN, as torch.softmax has it.
template <typename T>
struct Group {
  vec<T> best, sum, others;
  vec<T> m; // largest logit, others included
  vec<T> e_best, e_others; // e^(best - m), e^(others - m)
  vec<T> total; // sum e^(z - m)

  OODK_INLINE Group(const Stats<T>& stats, int64_t k)
      : best(load(stats.best + k * lanes<T>)),
        sum(load(stats.sum + k * lanes<T>)),
        others(load(stats.others + k * lanes<T>)) {
    m = max(others, best);
    e_best = exp(best - m);
    e_others = exp(others - m);
    total = e_best * sum + e_others;
  }
};

// Calls f(first row, number of rows, statistics) for each block of rows in [begin, end).
template <typename S, typename F>
OODK_INLINE void for_each_block(const MosRows& in, int64_t begin, int64_t end, F f) {
  using T = acc_t<S>;
  const Stats<T> stats(in.groups);
  for (int64_t first = begin; first < end; first += lanes<T>) {
    const int count = int(end - first < lanes<T> ? end - first : lanes<T>);
    block_stats<S>(in, first, count, stats);
    f(first, count, stats);
  }
}

template <typename T>
OODK_INLINE void store_rows(void* to, int64_t first, int count, vec<T> value) {
  count == lanes<T> ? store((T*)to + first, value) : store_first((T*)to + first, count, value);
}

template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

void score(const MosRows& in, int64_t begin, int64_t end, void* out) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for_each_block<S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
      vec<T> least = splat(T(1)), any_nan{};
      for (int64_t k = 0; k < in.groups; ++k) {
        const Group<T> g(stats, k);
        const vec<T> p = g.e_others / g.total;
        least = p < least ? p : least;
        any_nan += p;
      }
      store_rows<T>(out, first, count, any_nan != any_nan ? any_nan : -least);
    });
  });
}

// log((1 - p) / p) of a group's best class: the rest of the group, others included, against it. It
// decides where p, in all its digits, is 1 or equal to another group's. z: the group's columns.
template <typename S, typename T = acc_t<S>>
T log_rest(const S* z, int64_t n, T best) {
  const int64_t first = 1 + find_first(z + 1, n - 1, best);
  T most = -std::numeric_limits<T>::infinity(), sum = 0;
  for (int64_t i = 0; i < n; ++i)
    most = i != first && widen(z[i]) > most ? T(widen(z[i])) : most;
  for (int64_t i = 0; i < n; ++i)
    sum += i != first ? std::exp(widen(z[i]) - shift(most)) : T(0);
  return (most - best) + std::log(sum);
}

void predict(const MosRows& in, int64_t begin, int64_t end, void* score, void* log_odds,
    int64_t* label, int64_t* group, void* prob) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    constexpr int L = lanes<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    // Relative rounding error of a probability: of its sums, and of e^x as x falls.
    const T rounding = std::numeric_limits<T>::epsilon() * T(16 + in.width / L);
    for_each_block<S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
      const auto row = [&](int r) { return (const S*)in.logits + (first + r) * in.stride; };
      vec<T> least = splat(T(1)), any_nan{}, most_odds = splat(-inf);
      vec<T> most_prob = splat(T(-1)), second_prob = most_prob;
      ivec<T> winner{};
      for (int64_t k = 0; k < in.groups; ++k) {
        const Group<T> g(stats, k);
        const vec<T> p = g.e_others / g.total;
        least = p < least ? p : least;
        any_nan += p;
        const vec<T> odds = (g.best - g.others) + log(g.sum);
        most_odds = odds > most_odds ? odds : most_odds;
        const vec<T> q = g.e_best / g.total;
        // NaN counts as the largest, as in torch.max; the first of equals stays.
        const ivec<T> better = (q > most_prob) | ((q != q) & (most_prob == most_prob));
        second_prob = max(better ? most_prob : q, second_prob);
        most_prob = better ? q : most_prob;
        winner = better ? ivec<T>{} + int_t<T>(k) : winner;
      }
      // Probabilities from here on are as good as the best one, as far as they tell.
      const vec<T> doubt = rounding - 2 * std::numeric_limits<T>::epsilon() * log(most_prob);
      const vec<T> bound = most_prob > T(1e-30) ? most_prob - most_prob * doubt : vec<T>{};
      const ivec<T> open = (second_prob >= bound) & (most_prob == most_prob);
      if (any<T>(open)) {
        vec<T> least_rest = splat(inf);
        for (int64_t k = 0; k < in.groups; ++k) {
          const Group<T> g(stats, k);
          const vec<T> q = g.e_best / g.total;
          const ivec<T> close = open & (q >= bound);
          for (int r = 0; r < count && any<T>(close); ++r) {
            if (!close[r])
              continue;
            const int64_t at = in.offsets[k];
            const T rest = log_rest(row(r) + at, in.offsets[k + 1] - at, T(g.best[r]));
            if (rest < least_rest[r]) {
              least_rest[r] = rest;
              most_prob[r] = q[r];
              winner[r] = int_t<T>(k);
            }
          }
        }
      }
      const ivec<T> nan = any_nan != any_nan;
      store_rows<T>(score, first, count, nan ? any_nan : -least);
      store_rows<T>(log_odds, first, count, nan ? any_nan : most_odds);
      store_rows<T>(prob, first, count, most_prob);
      for (int r = 0; r < count; ++r) {
        const int64_t k = winner[r];
        const T best = most_prob[r] == most_prob[r] ? stats.best[k * L + r] : kNaN<T>;
        const int64_t column = in.offsets[k] + 1 +
            find_first(row(r) + in.offsets[k] + 1, in.offsets[k + 1] - in.offsets[k] - 1, best);
        group[first + r] = k;
        label[first + r] = column - (k + 1); // the others of groups 0..k come before it
      }
    });
  });
}

template <typename T>
OODK_INLINE void store_stats(
    const MosRows& in, int64_t k, int64_t first, int count, const Group<T>& g, void* stats) {
  T* to = (T*)stats + (first * in.groups + k) * 2;
  for (int r = 0; r < count; ++r, to += 2 * in.groups) {
    to[0] = g.m[r];
    to[1] = g.total[r];
  }
}

void log_others(const MosRows& in, int64_t begin, int64_t end, void* out, void* stats_out) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for_each_block<S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
      for (int64_t k = 0; k < in.groups; ++k) {
        const Group<T> g(stats, k);
        const vec<T> value = (g.others - g.m) - log(g.total);
        for (int r = 0; r < count; ++r)
          ((T*)out)[(first + r) * in.groups + k] = value[r];
        store_stats<T>(in, k, first, count, g, stats_out);
      }
    });
  });
}

void loss(const MosRows& in, int64_t begin, int64_t end, const MosTarget& target_of, void* out,
    void* stats_out) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for_each_block<S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
      vec<T> target{}; // the target's logit
      ivec<T> holder = ivec<T>{} - 1; // the group that holds it
      ivec<T> ignored{};
      for (int r = 0; r < count; ++r) {
        if (target_of.ignored(first + r)) {
          ignored[r] = -1;
          continue;
        }
        const S* row = (const S*)in.logits + (first + r) * in.stride;
        holder[r] = int_t<T>(target_of.group(first + r));
        target[r] = widen(row[target_of.column(first + r)]);
      }
      vec<T> sum{};
      for (int64_t k = 0; k < in.groups; ++k) {
        const Group<T> g(stats, k);
        const vec<T> z = holder == int_t<T>(k) ? target : g.others;
        sum += log(g.total) + (g.m - z);
        store_stats<T>(in, k, first, count, g, stats_out);
      }
      store_rows<T>(out, first, count, ignored ? vec<T>{} : sum);
    });
  });
}

void log_others_backward(const MosRows& in, int64_t begin, int64_t end, const void* grad,
    const void* stats, void* grad_logits) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for (int64_t r = begin; r < end; ++r) {
      const S* row = (const S*)in.logits + r * in.stride;
      S* to = (S*)grad_logits + r * in.width;
      for (int64_t k = 0; k < in.groups; ++k) {
        const T g = ((const T*)grad)[r * in.groups + k];
        const T* st = (const T*)stats + (r * in.groups + k) * 2;
        const int64_t at = in.offsets[k];
        const T m = st[0], scale = -g / st[1];
        scaled_softmax(row + at, in.offsets[k + 1] - at, in.width - at, m, scale, T(0), to + at);
        add_onehot(row + at, m, scale, g, to + at);
      }
    }
  });
}

void loss_backward(const MosRows& in, int64_t begin, int64_t end, const MosTarget& target_of,
    const void* grad, const void* stats, void* grad_logits) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for (int64_t r = begin; r < end; ++r) {
      const S* row = (const S*)in.logits + r * in.stride;
      S* to = (S*)grad_logits + r * in.width;
      if (target_of.ignored(r)) {
        std::memset((void*)to, 0, in.width * sizeof(S));
        continue;
      }
      const T g = ((const T*)grad)[r];
      const int64_t holder = target_of.group(r), column = target_of.column(r);
      for (int64_t k = 0; k < in.groups; ++k) {
        const T* st = (const T*)stats + (r * in.groups + k) * 2;
        const int64_t at = in.offsets[k];
        const T m = st[0], scale = g / st[1];
        scaled_softmax(row + at, in.offsets[k + 1] - at, in.width - at, m, scale, T(0), to + at);
        const int64_t target = k == holder ? column : at;
        add_onehot(row + target, m, scale, -g, to + target);
      }
    }
  });
}

} // namespace

extern const MosKernels mos_kernels = {
    score, predict, log_others, loss, log_others_backward, loss_backward};

} // namespace OODK_CPU_NS
} // namespace oodk
