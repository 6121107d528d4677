// MOS (Huang & Li, CVPR 2021). For group k with "others" logit o and class logits z_c:
//
//   m = max_c z_c    s = sum_c e^(z_c - m)    p_others = e^o / (e^o + s e^m)
//
// Forward. (m, s, o) of all groups of a row come from one read of it; everything the ops return is
// made of them. A thread walks along a piece of a row in shared memory (rows.cuh), a unit at a
// time: the unit's maximum, one rescaling of s, one e^x for each logit; a unit that a group
// boundary divides is taken once for each part, the rest masked. The groups that end inside a
// piece are done with on the spot; what a piece has of a group that began before it waits for a
// scan over the row's workers.
// Memory: each logit read once, the outputs written once.
//
// Backward. A thread takes one unit of the gradient after the other (gradient.cuh): dL/dz =
// scale e^(z - m) + onehot, with the statistics that the forward op saved.
// Memory: one read of the logits, one write of the gradient.
//
// A grouping that is not valid (see Grouping) makes every result NaN, and labels and groups 0.
#pragma once

#include "cuda/common.cuh"
#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"

namespace oodk::cuda {

struct MosInput {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  const void* offsets; // (groups + 1,), any contents
  bool wide_offsets; // int64, else int32
  int64_t groups;
  cudaStream_t stream;
};

// The grouping, in device memory. Nothing but valid() may be called before valid() has said yes.
struct Grouping {
  const void* offsets;
  bool wide;
  int64_t count;
  int width;

  __device__ int64_t wide_offset(int64_t k) const {
    return wide ? __ldg((const long long*)offsets + k) : __ldg((const int*)offsets + k);
  }
  __device__ int operator[](int k) const {
    return int(wide_offset(k));
  }

  // Offsets that start at 0, end at the width, and leave every group at least 2 columns. Every
  // thread of the block checks its share of them.
  __device__ bool valid_share() const {
    bool valid = true;
    for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
      const int64_t begin = wide_offset(k), end = wide_offset(k + 1);
      valid = valid && begin >= 0 && end >= begin && end <= width && end - begin >= 2 &&
          (k > 0 || begin == 0) && (k < count - 1 || end == width);
    }
    return valid;
  }

  __device__ int holding(int column) const {
    int low = 0, high = int(count) - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if ((*this)[middle] <= column)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

// --- forward ------------------------------------------------------------------------------------

// What is known of a group after some of its columns.
template <typename T, bool kLocate>
struct Part {
  T best = -kInf<T>, sum = 0; // of the classes
  T others = 0; // only if its column is among them

  // `later`: of the columns that follow.
  __device__ Part then(const Part& later) const {
    Part both;
    both.best = larger(best, later.best);
    const T c = shift(both.best);
    both.sum = sum * exp_fast(best - c) + later.sum * exp_fast(later.best - c);
    both.others = others;
    return both;
  }

  template <int N>
  __device__ void add(const T (&x)[N], int) {
    const T top = fold(x, [](T a, T b) { return larger(a, b); });
    const T most = larger(best, top), c = shift(most);
    T e[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      e[i] = exp_fast(x[i] - c);
    sum = sum * exp_fast(best - c) + fold(e, [](T a, T b) { return a + b; });
    best = most;
  }

  __device__ T class_sum() const { // of e^(z - best)
    return sum;
  }
};

// The same where the largest logit is to be found and held against the rest of its group: the sum
// is of the others' logits, relative to the largest of them, lest the best one drown them.
template <typename T>
struct Part<T, true> {
  T best = -kInf<T>, second = -kInf<T>, rest = 0; // of the classes
  T others = 0; // only if its column is among them
  int at = 0; // where best was met: in the unit's part that begins with this column

  __device__ Part then(const Part& later) const {
    Part both;
    both.best = larger(best, later.best);
    const T loser = smaller(best, later.best);
    both.second = larger(larger(second, later.second), loser);
    const T c = shift(both.second);
    both.rest =
        rest * exp_fast(second - c) + later.rest * exp_fast(later.second - c) + exp_fast(loser - c);
    both.others = others;
    both.at = later.best > best ? later.at : at;
    return both;
  }

  template <int N>
  __device__ void add(const T (&x)[N], int column) {
    T top = -kInf<T>, next = -kInf<T>;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      next = larger(next, smaller(top, x[i]));
      top = larger(top, x[i]);
    }
    const bool better = top > best;
    next = larger(larger(second, next), smaller(best, top));
    const T c = next == -kInf<T> ? shift(larger(best, top)) : next;
    T e[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T d = x[i] - c;
      e[i] = exp_fast(d > 0 ? T(0) : d); // a new best counts 1, which is taken off again
    }
    rest = rest * exp_fast(second - c) + fold(e, [](T a, T b) { return a + b; });
    rest += better ? exp_fast(best - c) - 1 : T(0);
    at = better ? column : at;
    best = better ? top : best;
    second = next;
  }

  __device__ T class_sum() const {
    return 1 + rest * exp_fast(second - shift(best));
  }
  // log((1 - p) / p) of the best class.
  __device__ T log_rest() const {
    const T most = larger(second, others), c = shift(most);
    return (most - best) + log_of(rest * exp_fast(second - c) + exp_fast(others - c));
  }
};

// Everything the ops need of one group. Where the group holds +inf or nothing but -inf, `total` is
// NaN, as torch.softmax has it.
template <typename T, bool kLocate>
struct Group {
  int k;
  Part<T, kLocate> part;
  T sum; // of e^(z - best) of the classes
  T m; // largest logit, others included
  T e_best, e_others; // e^(best - m), e^(others - m)
  T total; // sum e^(z - m)

  __device__ Group(int index, const Part<T, kLocate>& whole)
      : k(index), part(whole), sum(whole.class_sum()) {
    m = larger(part.others, part.best);
    e_best = exp_fast(part.best - m);
    e_others = exp_fast(part.others - m);
    total = e_best * sum + e_others;
  }
};

// The ops. add() takes a row's groups one by one, each thread some of them; State::merge() joins
// what the threads have; write() gets the whole row. invalid() writes a row of an invalid
// grouping, together with other threads: its share of groups is first, first + step, ... kLocate:
// whether it asks where in a group the largest logit is.

template <typename S>
struct MosScore {
  using T = acc_t<S>;
  static constexpr bool kLocate = false;
  T* score;

  struct State {
    T least = 1, nan = 0;

    template <bool kLocate>
    __device__ void add(const Group<T, kLocate>& group) {
      const T p = divide(group.e_others, group.total);
      least = p < least ? p : least;
      nan += p; // NaN if any is
    }
    __device__ void merge(const State& other) {
      least = other.least < least ? other.least : least;
      nan += other.nan;
    }
    __device__ T score() const {
      return nan != nan ? nan : -least;
    }
  };

  __device__ void add(
      State& state, const Group<T, kLocate>& group, int64_t, const Row<S>&, const Grouping&) const {
    state.add(group);
  }
  __device__ void write(const State& state, int64_t row, const Row<S>&, const Grouping&) const {
    score[row] = state.score();
  }
  __device__ void invalid(int64_t row, const Grouping&, int64_t first, int) const {
    if (first == 0)
      score[row] = kNaN<T>;
  }
};

template <typename S>
struct MosPredict {
  using T = acc_t<S>;
  static constexpr bool kLocate = true;
  T *score, *log_odds, *prob;
  int64_t *label, *group;

  struct State {
    typename MosScore<S>::State score;
    T log_odds = -kInf<T>; // the largest
    T rest = kInf<T>, prob = 0; // of the winner: the class with the least rest of its group
    T best = 0; // its logit, its group, and where to look for it
    int group = std::numeric_limits<int>::max(), at = 0;

    // NaN counts as the largest probability, as in torch.max; the first of equals wins.
    __device__ bool beaten_by(T other, int k) const {
      return other < rest || (other != other && (rest == rest || k < group)) ||
          (other == rest && k < group);
    }
    __device__ void merge(const State& other) {
      score.merge(other.score);
      log_odds = larger(log_odds, other.log_odds);
      if (beaten_by(other.rest, other.group)) {
        rest = other.rest;
        prob = other.prob;
        best = other.best;
        group = other.group;
        at = other.at;
      }
    }
  };

  __device__ void add(
      State& state, const Group<T, true>& g, int64_t, const Row<S>&, const Grouping&) const {
    state.score.add(g);
    state.log_odds = larger(state.log_odds, (g.part.best - g.part.others) + log_of(g.sum));
    const T q = divide(g.e_best, g.total), rest = q == q ? g.part.log_rest() : q;
    if (state.beaten_by(rest, g.k)) {
      state.rest = rest;
      state.prob = q;
      state.best = g.part.best;
      state.group = g.k;
      state.at = g.part.at;
    }
  }
  __device__ void write(
      const State& state, int64_t row, const Row<S>& z, const Grouping& groups) const {
    const int begin = groups[state.group] + 1, end = groups[state.group + 1];
    int column = begin;
    if (state.prob == state.prob)
#pragma unroll
      for (int e = kPerUnit<S> - 1; e >= 0; --e)
        if (state.at + e < end && z[state.at + e] == state.best)
          column = state.at + e;
    const T s = state.score.score();
    score[row] = s;
    log_odds[row] = s != s ? s : state.log_odds;
    prob[row] = state.prob;
    label[row] = column - (state.group + 1); // the others of groups 0..k come before it
    group[row] = state.group;
  }
  __device__ void invalid(int64_t row, const Grouping&, int64_t first, int) const {
    if (first > 0)
      return;
    score[row] = log_odds[row] = prob[row] = kNaN<T>;
    label[row] = group[row] = 0;
  }
};

template <typename S>
struct MosLogOthers {
  using T = acc_t<S>;
  static constexpr bool kLocate = false;
  T* log_others;
  Stats<T>* stats;

  struct State {};

  __device__ void add(State&, const Group<T, kLocate>& g, int64_t row, const Row<S>&,
      const Grouping& groups) const {
    const int64_t i = row * groups.count + g.k;
    log_others[i] = (g.part.others - g.m) - log_of(g.total);
    stats[i] = {g.m, g.total};
  }
  __device__ void invalid(int64_t row, const Grouping& groups, int64_t first, int step) const {
    for (int64_t k = first; k < groups.count; k += step) {
      log_others[row * groups.count + k] = kNaN<T>;
      stats[row * groups.count + k] = {kNaN<T>, kNaN<T>};
    }
  }
};

// A row's target: a class, counted without the others columns.
struct RowTarget {
  int64_t label;
  bool ignored;

  __device__ RowTarget(const int64_t* target, int64_t row, int64_t ignore_index)
      : label(__ldg((const long long*)target + row)), ignored(label == ignore_index) {}
  __device__ bool valid(const Grouping& groups) const {
    return label >= 0 && label < groups.width - groups.count;
  }
  // Its column in group k: that of the class if the group holds it, else that of others.
  __device__ int column(const Grouping& groups, int k) const {
    const int begin = groups[k];
    return label >= begin - k && label <= groups[k + 1] - k - 2 ? int(label) + k + 1 : begin;
  }
};

template <typename S>
struct MosLoss {
  using T = acc_t<S>;
  static constexpr bool kLocate = false;
  const int64_t* target;
  int64_t ignore_index;
  T* loss;
  Stats<T>* stats;

  struct State {
    T sum = 0;
    __device__ void merge(const State& other) {
      sum += other.sum;
    }
  };

  __device__ void add(State& state, const Group<T, kLocate>& g, int64_t row, const Row<S>& z,
      const Grouping& groups) const {
    const T logit = z[RowTarget(target, row, ignore_index).column(groups, g.k)];
    state.sum += log_of(g.total) + (g.m - logit);
    stats[row * groups.count + g.k] = {g.m, g.total};
  }
  __device__ void write(
      const State& state, int64_t row, const Row<S>&, const Grouping& groups) const {
    const RowTarget t(target, row, ignore_index);
    loss[row] = t.ignored ? T(0) : t.valid(groups) ? state.sum : kNaN<T>;
  }
  __device__ void invalid(int64_t row, const Grouping& groups, int64_t first, int step) const {
    if (first == 0)
      loss[row] = kNaN<T>;
    for (int64_t k = first; k < groups.count; k += step)
      stats[row * groups.count + k] = {kNaN<T>, kNaN<T>};
  }
};

// What a worker, or several that follow one another, leave behind for those after them: the part
// of the group they end in, and whether that group began with them.
template <typename T, bool kLocate>
struct Open {
  Part<T, kLocate> part;
  int began = false;

  __device__ Open then(const Open& later) const {
    return later.began ? later : Open{part.then(later.part), began};
  }
};

// Walks along a piece of a row and calls close(k, part) for each group that begins and ends in it.
template <typename T, bool kLocate>
struct Walk {
  Open<T, kLocate> open; // the group that the piece ends in
  Part<T, kLocate> head; // a group that began before the piece and ends in it
  int head_group = -1; // -1: there is none

  template <typename S, typename F>
  __device__ void run(const Piece& piece, const Row<S>& row, const Units<S>& units,
      const Grouping& groups, F close) {
    constexpr int V = kPerUnit<S>;
    if (piece.begin >= piece.end)
      return;
    int k = groups.holding(piece.begin), next = groups[k + 1]; // where the next group begins
    if (groups[k] == piece.begin)
      next = groups[k--];
    int from = piece.begin; // columns before it are done
    int column = from; // of the unit
    // A unit before this column is wholly inside a group that goes on after it.
    int whole = min(next, piece.end + 1) - V;
    for (int u = piece.unit; column < piece.end; ++u, column += V) {
      T x[V];
      unpack<S>(units[u], x);
      if (column < whole) {
        open.part.add(x, column);
        continue;
      }
      from = max(from, column);
      const int end = min(column + V, piece.end);
      while (from < end) {
        if (from == next) { // a group begins
          open = {{}, true};
          open.part.others = row.here(from);
          next = groups[++k + 1];
          ++from;
        }
        const int to = min(next, end);
        T y[V];
        const unsigned inside = columns(from - column, to - column);
#pragma unroll
        for (int e = 0; e < V; ++e)
          y[e] = inside >> e & 1 ? x[e] : -kInf<T>;
        open.part.add(y, from);
        from = to;
        if (from == next) { // and here it ends
          if (open.began) {
            close(k, open.part);
          } else {
            head = open.part;
            head_group = k;
          }
        }
      }
      whole = min(next, piece.end + 1) - V;
    }
  }
};

// Scans over the row's workers: what precedes this thread's piece of the group it begins in.
// `carry`: what precedes the span, then, unless it is the last one, what precedes the next.
template <typename T, bool kLocate>
__device__ inline Part<T, kLocate> preceding(const Open<T, kLocate>& open, Part<T, kLocate>& carry,
    bool last, const Tiling& t, Open<T, kLocate>* slots) {
  using Span = Open<T, kLocate>;
  const int lane = int(threadIdx.x) % kWarp, rows = t.rows();
  Span all = open; // of this worker and those before it in the warp
  for (int delta = rows; delta < kWarp; delta *= 2) {
    const Span earlier = shuffle_up(all, delta);
    if (lane >= delta)
      all = earlier.then(all);
  }
  Span before; // without this worker
  if (rows < kWarp) {
    const Span earlier = shuffle_up(all, rows);
    if (lane >= rows)
      before = earlier;
  }
  Span sum{carry};
  if (t.slots() > 1) {
    if (lane >= kWarp - rows)
      slots[t.slot() * rows + t.row()] = all;
    __syncthreads();
    for (int s = 0; s < t.slot(); ++s)
      sum = sum.then(slots[s * rows + t.row()]);
  }
  const Part<T, kLocate> mine = sum.then(before).part;
  if (!last) {
    if (t.slots() == 1)
      sum = sum.then(all);
    for (int s = t.slot(); s < t.slots() && t.slots() > 1; ++s)
      sum = sum.then(slots[s * rows + t.row()]);
    carry = sum.part;
  }
  return mine;
}

// Of float, the loss takes more registers than six blocks leave: on sm_121 it would spill two.
template <typename S, typename Op>
constexpr int kForwardBlocks = kRowBlocks<S> - std::is_same_v<Op, MosLoss<float>>;

template <typename S, typename Op>
__global__ void __launch_bounds__(kRowThreads, kForwardBlocks<S, Op>)
    mos_forward(Rows<S> z, Grouping groups, Tiling tiling, Op op) {
  using T = acc_t<S>;
  using State = typename Op::State;
  using Span = Open<T, Op::kLocate>;
  using Known = Part<T, Op::kLocate>;
  extern __shared__ uint4 shared[];
  Span* const open_slots = (Span*)((char*)shared + tiling.tile_bytes());
  State* const state_slots = (State*)((char*)open_slots + tiling.slot_bytes<Span>());
  State state;
  Known carry;
  const auto check = [&](int unit) { return unit > 0 || groups.valid_share(); };
  const auto add = [&](int64_t r, bool exists, const Row<S>& row, int unit) {
    const auto close = [&](int k, const Known& part) {
      op.add(state, Group<T, Op::kLocate>(k, part), r, row, groups);
    };
    Walk<T, Op::kLocate> walk;
    if (exists)
      walk.run(piece(row, tiling), row, Units<S>(row, tiling, shared), groups, close);
    const Known before =
        preceding(walk.open, carry, unit + tiling.units >= tiling.row_units, tiling, open_slots);
    if (walk.head_group >= 0)
      close(walk.head_group, before.then(walk.head));
  };
  const auto write = [&](int64_t r, bool exists, const Row<S>& row, bool valid) {
    if (!valid) {
      if (exists)
        op.invalid(r, groups, tiling.worker(), kRowThreads >> tiling.rows_log2);
    } else if constexpr (!std::is_empty_v<State>) {
      const State found = reduce_workers(state, tiling, state_slots);
      if (exists && tiling.worker() == 0)
        op.write(found, r, row, groups);
    }
    state = {};
    carry = {};
  };
  for_spans(z, tiling, shared, check, add, write);
}

// --- backward -----------------------------------------------------------------------------------

// Of one group in one row: dL/dz = scale e^(z - m), plus onehot in one column.
template <typename T>
struct Slope {
  T m, scale, onehot;
  int column;
};

template <typename S>
struct MosLogOthersBackward {
  using T = acc_t<S>;
  const T* grad; // (rows, groups)
  const Stats<T>* stats;

  struct Row {
    const T* grad;
    const Stats<T>* stats;
    static constexpr bool ignored = false;

    __device__ Slope<T> slope(const Grouping& groups, int k) const {
      const T g = grad[k];
      const Stats<T> s = stats[k];
      return {s.m, divide(-g, s.total), g, groups[k]};
    }
  };

  __device__ Row row(int64_t r, const Grouping& groups) const {
    return {grad + r * groups.count, stats + r * groups.count};
  }
};

template <typename S>
struct MosLossBackward {
  using T = acc_t<S>;
  const int64_t* target;
  int64_t ignore_index;
  const T* grad; // (rows,)
  const Stats<T>* stats;

  struct Row {
    RowTarget target;
    T grad;
    const Stats<T>* stats;
    bool ignored;

    __device__ Slope<T> slope(const Grouping& groups, int k) const {
      const Stats<T> s = stats[k];
      return {s.m, divide(grad, s.total), -grad, target.column(groups, k)};
    }
  };

  __device__ Row row(int64_t r, const Grouping& groups) const {
    const RowTarget t(target, r, ignore_index);
    return {t, t.valid(groups) ? grad[r] : kNaN<T>, stats + r * groups.count, t.ignored};
  }
};

// A thread stays in the same group but for the shift of rows that start within a unit.
template <typename S, typename Op>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<S>)
    mos_backward(Rows<S> z, Grouping groups, int units, Op op, S* grad_logits) {
  using T = acc_t<S>;
  constexpr int V = kPerUnit<S>;
  const bool valid = __syncthreads_and(groups.valid_share());
  int k = -1;
  write_gradient(z, units, grad_logits, [&](int64_t r, int column, const T(&x)[V], T(&y)[V]) {
#pragma unroll
    for (int e = 0; e < V; ++e)
      y[e] = valid ? T(0) : kNaN<T>;
    const auto row = op.row(r, groups);
    const int end = min(column + V, z.width);
    int from = max(column, 0);
    if (!valid || row.ignored || from >= end)
      return;
    if (k < 0)
      k = groups.holding(from);
    while (groups[k] > from)
      --k;
    while (groups[k + 1] <= from)
      ++k;
    for (int j = k; from < end; ++j) {
      const int to = min(groups[j + 1], end);
      const Slope<T> slope = row.slope(groups, j);
      T value[V];
#pragma unroll
      for (int e = 0; e < V; ++e)
        value[e] = slope.scale * exp_fast(x[e] - slope.m);
      if (slope.column >= column && slope.column < end)
#pragma unroll
        for (int e = 0; e < V; ++e)
          value[e] += column + e == slope.column ? slope.onehot : T(0);
      const unsigned inside = columns(from - column, to - column);
#pragma unroll
      for (int e = 0; e < V; ++e)
        y[e] = inside >> e & 1 ? value[e] : y[e];
      from = to;
    }
  });
}

// --- host ---------------------------------------------------------------------------------------

inline Grouping grouping(const MosInput& in) {
  return {in.offsets, in.wide_offsets, in.groups, int(in.width)};
}

template <typename S>
Rows<S> rows_of(const MosInput& in) {
  return {(const S*)in.logits, in.rows, in.stride, int(in.width)};
}

template <typename S, typename Op>
void launch_forward(const MosInput& in, Op op) {
  const Device device = Device::current();
  const Rows<S> z = rows_of<S>(in);
  const Tiling t = tile(z);
  const size_t shared = t.tile_bytes() + t.slot_bytes<Open<acc_t<S>, Op::kLocate>>() +
      t.slot_bytes<typename Op::State>();
  launch(mos_forward<S, Op>, t.blocks(in.rows, device), kRowThreads, shared, in.stream, z,
      grouping(in), t, op);
}

template <typename S, typename Op>
void launch_backward(const MosInput& in, Op op, void* grad_logits) {
  const Rows<S> z = rows_of<S>(in);
  const GradientGrid grid(z, grad_logits);
  launch(mos_backward<S, Op>, grid.blocks, kBackwardThreads, 0, in.stream, z, grouping(in),
      grid.units, op, (S*)grad_logits);
}

// The outputs are T (rows,) or T (rows, groups), T double for float64 logits and else float; the
// statistics T (rows, groups, 2).

inline void mos_score(const MosInput& in, void* score) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    launch_forward<S>(in, MosScore<S>{(T*)score});
  });
}

inline void mos_predict(
    const MosInput& in, void* score, void* log_odds, int64_t* label, int64_t* group, void* prob) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    launch_forward<S>(in, MosPredict<S>{(T*)score, (T*)log_odds, (T*)prob, label, group});
  });
}

inline void mos_log_others(const MosInput& in, void* log_others, void* stats) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    launch_forward<S>(in, MosLogOthers<S>{(T*)log_others, (Stats<T>*)stats});
  });
}

inline void mos_loss(
    const MosInput& in, const int64_t* target, int64_t ignore_index, void* loss, void* stats) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    launch_forward<S>(in, MosLoss<S>{target, ignore_index, (T*)loss, (Stats<T>*)stats});
  });
}

inline void mos_log_others_backward(
    const MosInput& in, const void* grad, const void* stats, void* grad_logits) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    launch_backward<S>(
        in, MosLogOthersBackward<S>{(const T*)grad, (const Stats<T>*)stats}, grad_logits);
  });
}

inline void mos_loss_backward(const MosInput& in, const int64_t* target, int64_t ignore_index,
    const void* grad, const void* stats, void* grad_logits) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    launch_backward<S>(in,
        MosLossBackward<S>{target, ignore_index, (const T*)grad, (const Stats<T>*)stats},
        grad_logits);
  });
}

} // namespace oodk::cuda
