// MOS (Huang & Li, CVPR 2021). For group k with "others" logit o and class logits z_c:
//
//   m = max_c z_c    s = sum_c e^(z_c - m)    p_others = e^o / (e^o + s e^m)
//
// Everything the ops return is made of (m, s, o) of each group. A row is read once: what is added up
// is e^z, which for all usual logits neither overflows nor vanishes, and s = sum e^z / e^m follows.
// Where it may have, which the sum itself shows, the group is read again with its maximum at hand.
//
// Sums and maxima of a wide group stay in the lanes they came in until those of `lanes` rows are
// there, and are reduced together. Narrow groups would leave most lanes empty: there e^z of all
// columns of the rows goes to a buffer, whichever group they are of, and is added up from there.
// What follows the statistics has rows as lanes.
#include "cpu/mos_kernel.h"

#include "cpu/simd.h"
#include "cpu/softmax_gradient.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// Groups that are gathered at a time; columns of narrow ones, whose buffer is 24 KiB at most, within
// a first-level cache; the columns, others included, that a narrow group has at most.
constexpr int kSpan = 16;
constexpr int64_t kTile = 384;
template <typename T>
constexpr int64_t kNarrow = 4 * lanes<T>;

// Sums of e^z of which nothing was lost, for any logits from -55 to 69 at the least.
template <typename T>
constexpr T kSmallSum = std::is_same_v<T, float> ? T(0x1p-64) : T(0x1p-512);
template <typename T>
constexpr T kLargeSum = std::is_same_v<T, float> ? T(0x1p100) : T(0x1p900);
template <typename T>
constexpr T kSmallOthers = std::is_same_v<T, float> ? T(-80) : T(-690); // e^z is a normal number
template <typename T>
constexpr T kLargeOthers = std::is_same_v<T, float> ? T(69) : T(620);

template <typename T>
struct Stats { // each (groups, lanes)
  explicit Stats(int64_t groups)
      : best(groups * lanes<T>), sum(groups * lanes<T>), others(groups * lanes<T>), far(groups) {}
  VectorBuffer<T> best, sum, others;
  VectorBuffer<uint32_t> far; // (groups,): bit r is set where row r's sum is of e^(z - best)
};

// What is subtracted before e^x: the maximum, but 0 where that is -inf, lest -inf - -inf be NaN.
template <typename T>
OODK_INLINE T shift(T best) {
  return best == -std::numeric_limits<T>::infinity() ? T(0) : best;
}

// best and sum of e^(z - best) of n class logits of any size.
template <typename S, typename T = acc_t<S>>
void far_group(const S* z, int64_t n, T* best, T* sum) {
  constexpr int L = lanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const auto at = [&](int64_t i) { return load_first(z + i, int(n - i < L ? n - i : L), -inf); };
  vec<T> most = splat(-inf), s{};
  for (int64_t i = 0; i < n; i += L)
    most = max(at(i), most); // any of the values where one is NaN: the sum is NaN then
  *best = reduce_max(most);
  const vec<T> c = splat(shift(*best));
  for (int64_t i = 0; i < n; i += L)
    s += exp(at(i) - c);
  *sum = reduce_add(s);
}

// Group k again in the rows that are `far`.
template <typename T, typename S>
__attribute__((noinline)) void far_rows(
    const S* const* rows, ivec<T> far, const int64_t* at, const Stats<T>& stats, int64_t k) {
  for (int r = 0; r < lanes<T>; ++r)
    if (far[r]) {
      const int64_t to = k * lanes<T> + r;
      stats.far[k] |= 1u << r;
      far_group(rows[r] + at[0] + 1, at[1] - at[0] - 1, stats.best + to, stats.sum + to);
    }
}

// Fetches n values ahead of time, of the next row: a processor's own prefetching ends with a page.
template <int n, typename S>
OODK_INLINE void prefetch(const S* z) {
#pragma GCC unroll 4
  for (int i = 0; i < int(n * sizeof(S)); i += 64)
    __builtin_prefetch((const char*)z + i);
}

// Sum of e^z, and if wanted the maximum, of a wide group's n class logits, lane by lane.
template <bool kBest, typename S, typename T = acc_t<S>>
OODK_INLINE void wide_group(const S* z, int64_t n, int64_t stride, vec<T>* best, vec<T>* sum) {
  constexpr int L = lanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  vec<T> s0{}, s1{}, m0 = splat(-inf), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    vec<T> a, b;
    load_two(z + i, a, b);
    prefetch<2 * L>(z + i + stride);
    s0 += exp_term(a);
    s1 += exp_term(b);
    if (kBest) {
      m0 = max(a, m0);
      m1 = max(b, m1);
    }
  }
  const auto add = [&](vec<T> a) {
    s0 += exp_term(a);
    if (kBest)
      m0 = max(a, m0);
  };
  if (i + L <= n) {
    add(load(z + i));
    i += L;
  }
  if (i < n)
    add(load_last(z, i, n, -inf));
  *sum = s0 + s1;
  if (kBest)
    *best = max(m0, m1);
}

// Statistics of adjacent narrow groups, kTile columns at most, of `lanes` rows of which `count` differ.
template <bool kBest, typename S, typename T = acc_t<S>>
void narrow_groups(const S* const* rows, int count, int64_t width, int64_t stride,
    const int64_t* offsets, int64_t groups, T* best, T* sum, T* others) {
  constexpr int L = lanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  constexpr int64_t step = kTile + 2 * L;
  alignas(64) T terms[L * step];
  const int64_t first = offsets[0], columns = offsets[groups] - first, left = width - first;
  for (int r = 0; r < count; ++r) {
    const S* const z = rows[r] + first;
    T* const to = terms + r * step;
    if (left < L)
      store(to, exp_term(load_first(z, int(left), T(0))));
    else
      for (int64_t i = 0; i < columns; i += L) { // the last ones again where the row ends
        const int64_t at = i + L <= left ? i : left - L;
        prefetch<L>(z + at + 2 * stride);
        store(to + at, exp_term(load(z + at)));
      }
    for (int64_t k = 0; k < groups; ++k)
      others[k * L + r] = widen(rows[r][offsets[k]]);
  }
  for (int r = count; r < L; ++r)
    std::memcpy(terms + r * step, terms + (count - 1) * step, sizeof(T) * step);
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t column = offsets[k] + 1, n = offsets[k + 1] - column;
    const T* const from = terms + (column - first);
    const ivec<T> kept = first_lanes<T>(int(n % L));
    vec<T> m[L];
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r)
      m[r] = kept ? load(from + r * step + n / L * L) : vec<T>{};
    for (int64_t i = 0; i + L <= n; i += L)
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        m[r] += load(from + r * step + i);
    store(sum + k * L, reduce_each<T>(m, [](vec<T> a, vec<T> b) { return a + b; }));
    if (!kBest)
      continue;
    if (width < L) {
      for (int r = 0; r < L; ++r)
        m[r] = load_first(rows[r] + column, int(n), -inf);
    } else { // the last n % L, and what is before them where the row ends
      const int64_t at = column + n / L * L, start = at + L <= width ? at : width - L;
      const ivec<T> last =
          first_lanes<T>(int(at - start + n % L)) & ~first_lanes<T>(int(at - start));
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        m[r] = last ? load(rows[r] + start) : splat(-inf);
      for (int64_t i = column; i < at; i += L)
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r)
          m[r] = max(load(rows[r] + i), m[r]);
    }
    store(best + k * L, reduce_each<T>(m, [](vec<T> a, vec<T> b) { return max(a, b); }));
  }
}

// Statistics of adjacent wide groups, kSpan at most.
template <bool kBest, typename S, typename T = acc_t<S>>
void wide_groups(const S* const* rows, int count, int64_t stride, const int64_t* offsets,
    int64_t groups, T* best, T* sum, T* others) {
  constexpr int L = lanes<T>;
  vec<T> sums[kSpan * L], bests[kBest ? kSpan * L : 1];
  for (int r = 0; r < count; ++r)
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t column = offsets[k] + 1, to = k * L + r;
      wide_group<kBest>(
          rows[r] + column, offsets[k + 1] - column, stride, bests + (kBest ? to : 0), sums + to);
      others[to] = widen(rows[r][column - 1]);
    }
  for (int64_t k = 0; k < groups; ++k) {
    for (int64_t to = k * L + count; to < (k + 1) * L; ++to) {
      sums[to] = sums[to - 1];
      if (kBest)
        bests[to] = bests[to - 1];
    }
    store(sum + k * L, reduce_each<T>(sums + k * L, [](vec<T> a, vec<T> b) { return a + b; }));
    if (kBest)
      store(best + k * L,
          reduce_each<T>(bests + k * L, [](vec<T> a, vec<T> b) { return max(a, b); }));
  }
}

// Statistics of the rows [first, first + count), count <= lanes; `best` only if wanted, or where the
// sum is far.
template <bool kBest, typename S, typename T = acc_t<S>>
void block_stats(const MosRows& in, int64_t first, int count, const Stats<T>& stats) {
  constexpr int L = lanes<T>;
  const S* rows[L]; // those past the end are the last one
  for (int r = 0; r < L; ++r)
    rows[r] = (const S*)in.logits + (first + (r < count ? r : count - 1)) * in.stride;
  const int64_t* const at = in.offsets;
  for (int64_t k = 0, last; k < in.groups; k = last) {
    const auto narrow = [&](int64_t g) { return at[g + 1] - at[g] <= kNarrow<T>; };
    const bool are_narrow = narrow(k);
    for (last = k + 1; last < in.groups && narrow(last) == are_narrow; ++last)
      if (are_narrow ? at[last + 1] - at[k] > kTile : last - k == kSpan)
        break;
    T *const best = stats.best + k * L, *const sum = stats.sum + k * L;
    T* const others = stats.others + k * L;
    if (are_narrow)
      narrow_groups<kBest>(rows, count, in.width, in.stride, at + k, last - k, best, sum, others);
    else
      wide_groups<kBest>(rows, count, in.stride, at + k, last - k, best, sum, others);
  }
  for (int64_t k = 0; k < in.groups; ++k) {
    T* const others = stats.others + k * L;
    for (int r = count; r < L; ++r)
      others[r] = others[count - 1];
    const vec<T> s = load(stats.sum + k * L), o = load(others);
    const ivec<T> near =
        (s >= kSmallSum<T>)&(s <= kLargeSum<T>)&(o >= kSmallOthers<T>)&(o <= kLargeOthers<T>);
    stats.far[k] = 0;
    if (any<T>(~near)) [[unlikely]]
      far_rows<T>(rows, ~near, at + k, stats, k);
  }
}

// Everything the ops need of one group, rows as lanes. NaN where the group holds +inf or nothing but
// -inf, as torch.softmax has it. Only `ratio` does without `best`.
template <typename T>
struct Group {
  vec<T> best, others;
  vec<T> m; // largest logit, others included
  vec<T> sum; // of the classes, e^(z - best), >= 1
  vec<T> ratio; // (1 - p) / p, p the probability of the others
  vec<T> p_best; // the probability of the best class

  OODK_INLINE Group(const Stats<T>& stats, int64_t k)
      : best(load(stats.best + k * lanes<T>)), others(load(stats.others + k * lanes<T>)) {
    const vec<T> s = load(stats.sum + k * lanes<T>);
    const vec<T> e_others = exp_term(others), all = s + e_others;
    m = max(others, best);
    sum = max(s * exp_term(-best), splat(T(1)));
    ratio = s / e_others;
    p_best = min(exp_term(best) / all, splat(T(1)));
    if (stats.far[k] != 0) [[unlikely]]
      far(stats.far[k], s);
  }

  OODK_INLINE vec<T> total() const { // of all, e^(z - m), >= 1
    return exp(best - m) * sum + exp(others - m);
  }
  OODK_INLINE vec<T> log_odds() const {
    return (best - others) + log(sum);
  }

 private:
  OODK_INLINE void far(uint32_t rows, vec<T> s) {
    ivec<T> far{};
    for (int r = 0; r < lanes<T>; ++r)
      far[r] = -int_t<T>(rows >> r & 1);
    const vec<T> e_best = exp(best - m), e_others = exp(others - m);
    const vec<T> all = e_best * s + e_others;
    sum = far ? s : sum;
    ratio = far ? e_best * s / e_others : ratio;
    p_best = far ? e_best / all : p_best;
  }
};

// Calls f(first row, number of rows, statistics) for each block of rows in [begin, end).
template <bool kBest, typename S, typename F>
OODK_INLINE void for_each_block(const MosRows& in, int64_t begin, int64_t end, F f) {
  using T = acc_t<S>;
  const Stats<T> stats(in.groups);
  for (int64_t first = begin; first < end; first += lanes<T>) {
    const int count = int(end - first < lanes<T> ? end - first : lanes<T>);
    block_stats<kBest, S>(in, first, count, stats);
    f(first, count, stats);
  }
}

template <typename T>
OODK_INLINE void store_rows(void* to, int64_t first, int count, vec<T> value) {
  count == lanes<T> ? store((T*)to + first, value) : store_first((T*)to + first, count, value);
}

template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// The score by the largest of the groups' ratios.
template <typename T>
OODK_INLINE vec<T> score_of(vec<T> ratio) {
  return T(-1) / (T(1) + ratio);
}

void score(const MosRows& in, int64_t begin, int64_t end, void* out) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for_each_block<false, S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
      vec<T> most{}, any_nan{};
      for (int64_t k = 0; k < in.groups; ++k) {
        const vec<T> ratio = Group<T>(stats, k).ratio;
        most = max(ratio, most);
        any_nan += ratio;
      }
      store_rows<T>(out, first, count, any_nan != any_nan ? any_nan : score_of<T>(most));
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
    for_each_block<true, S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
      const auto row = [&](int r) { return (const S*)in.logits + (first + r) * in.stride; };
      vec<T> most{}, any_nan{};
      vec<T> most_prob = splat(T(-1)), second_prob = most_prob;
      ivec<T> winner{};
      for (int64_t k = 0; k < in.groups; ++k) {
        const Group<T> g(stats, k);
        most = max(g.ratio, most);
        any_nan += g.ratio;
        const vec<T> q = g.p_best;
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
          const vec<T> q = g.p_best;
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
      vec<T> most_odds = log(most);
      // Beyond what a ratio holds, and where that of a sum near its limits is not exact.
      const ivec<T> extreme = ~((most > T(1e-15)) & (most < T(1e15)));
      if (any<T>(extreme)) {
        vec<T> odds = splat(-inf);
        for (int64_t k = 0; k < in.groups; ++k) {
          const vec<T> one = Group<T>(stats, k).log_odds();
          odds = one > odds ? one : odds;
        }
        most_odds = extreme ? odds : most_odds;
      }
      const ivec<T> nan = any_nan != any_nan;
      store_rows<T>(score, first, count, nan ? any_nan : score_of<T>(most));
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
OODK_INLINE void store_stats(const MosRows& in, int64_t k, int64_t first, int count,
    const Group<T>& g, vec<T> total, void* stats) {
  T* to = (T*)stats + (first * in.groups + k) * 2;
  for (int r = 0; r < count; ++r, to += 2 * in.groups) {
    to[0] = g.m[r];
    to[1] = total[r];
  }
}

void log_others(const MosRows& in, int64_t begin, int64_t end, void* out, void* stats_out) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for_each_block<true, S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
      for (int64_t k = 0; k < in.groups; ++k) {
        const Group<T> g(stats, k);
        const vec<T> total = g.total(), value = (g.others - g.m) - log(total);
        for (int r = 0; r < count; ++r)
          ((T*)out)[(first + r) * in.groups + k] = value[r];
        store_stats<T>(in, k, first, count, g, total, stats_out);
      }
    });
  });
}

void loss(const MosRows& in, int64_t begin, int64_t end, const MosTarget& target_of, void* out,
    void* stats_out) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for_each_block<true, S>(in, begin, end, [&](int64_t first, int count, const Stats<T>& stats) {
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
        const vec<T> total = g.total();
        sum += log(total) + (g.m - z);
        store_stats<T>(in, k, first, count, g, total, stats_out);
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
