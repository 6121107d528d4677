// Rows of logits, staged in shared memory so that a thread can walk along a row.
//
// A warp reads memory at full speed only if its lanes read adjacent units (16 bytes); but a thread
// that stays in one row for many adjacent columns needs few reductions and meets few group
// boundaries, and the threads of a warp that stand at the same column of different rows meet them
// together. So a block copies `rows` whole rows (or spans of them, where rows are long) to shared
// memory unit by unit, and then has its threads walk: thread t is worker t / rows of row t % rows,
// and a row's workers take consecutive pieces of it.
//
//                 unit 0  1  2  3  4  5  ...
//     row 0     |-- worker 0 --|-- worker 1 --|-- ...       thread 0, rows, 2 rows ...
//     row 1     |--------------|--------------|-- ...       thread 1, rows + 1 ...
//
// The same row gives the same bits in any batch, at any alignment, on any GPU: which columns a thread
// takes, and the order in which a row's sums are taken, depend on its width and element type alone.
// Units are those of columns, kPerUnit<S> from column 0 on. A row that does not start at a multiple
// of 16 bytes is staged as it lies in memory, and each of its units put together of two there.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"

namespace oodk::cuda {

template <typename S>
struct Rows {
  const S* data;
  int64_t count, stride; // stride >= width, in values
  int width;

  __device__ const S* operator[](int64_t row) const {
    return data + row * stride;
  }
};

constexpr int kRowThreads = 128; // of a block: four warps wait for each other at a barrier
// Blocks on a multiprocessor: while some wait for memory, others compute.
template <typename S>
constexpr int kRowBlocks = sizeof(S) == sizeof(double) ? 3 : 6;

// How a launch divides its rows among blocks and threads. What follows from the width and the
// element type alone comes first.
struct Tiling {
  int rows_log2; // rows of a block: a power of two
  int copiers_log2; // threads that copy a row together: a power of two
  int row_units; // units of a row
  int units; // units of each row in shared memory at a time
  int pitch; // units from row to row in shared memory, one more than `units` at least
  int chunk; // units of a worker
  bool aligned; // rows start at multiples of 16 bytes
  int64_t inner, inner_end; // a block whose first row is in between has no unit outside the tensor

  __host__ __device__ int rows() const {
    return 1 << rows_log2;
  }
  __device__ int row() const {
    return int(threadIdx.x) & (rows() - 1);
  }
  __device__ int worker() const {
    return int(threadIdx.x) >> rows_log2;
  }
  // After a reduction within each warp, so many partial results remain of every row.
  __host__ __device__ int slots() const {
    return kRowThreads / (rows() < kWarp ? kWarp : rows());
  }
  __device__ int slot() const {
    return int(threadIdx.x) / (rows() < kWarp ? kWarp : rows());
  }
  __host__ __device__ size_t tile_bytes() const {
    return size_t(pitch) * rows() * sizeof(uint4);
  }
  // Room for a partial result of every slot of every row.
  template <typename V>
  __host__ __device__ size_t slot_bytes() const {
    const size_t bytes = slots() == 1 || std::is_empty_v<V> ? 0 : slots() * rows() * sizeof(V);
    return (bytes + sizeof(uint4) - 1) / sizeof(uint4) * sizeof(uint4);
  }
  __host__ int64_t blocks(int64_t count, const Device& device) const {
    return std::min<int64_t>((count + rows() - 1) >> rows_log2, int64_t(device.processors) * 64);
  }
};

// Shared memory of a block's rows, 16 bytes each unit: what 6 blocks of a multiprocessor with 228 KiB
// can have, fewer where there is less.
constexpr int kTileUnits = (32 << 10) / int(sizeof(uint4));

template <typename S>
Tiling tile(const Rows<S>& z) {
  constexpr int V = kPerUnit<S>;
  Tiling t{};
  t.row_units = int((int64_t(z.width) + V - 1) / V);

  // As many rows as fit whole, for the more there are, the more threads meet a group's boundary
  // together, and the fewer workers' results are to be merged.
  // The eight lanes that read shared memory at once must meet eight different units mod 8: 8 / rows
  // workers of each row, an odd number of units apart, and the rows, an odd multiple of that apart.
  const auto step_of = [](int rows) { return std::max(8 / rows, 1); };
  const auto capacity_of = [&](int rows) { return kTileUnits / rows - 2 * step_of(rows); };
  while (2 * t.rows() <= kRowThreads && t.row_units <= capacity_of(2 * t.rows()))
    ++t.rows_log2;
  const int rows = t.rows(), step = step_of(rows), capacity = capacity_of(rows);
  const int spans = (t.row_units + capacity - 1) / capacity;
  t.units = (t.row_units + spans - 1) / spans;
  t.pitch = rows == 1 ? t.units + 1 : (t.units + step) / (2 * step) * (2 * step) + step;
  const int workers = kRowThreads >> t.rows_log2;
  t.chunk = (t.units + workers - 1) / workers;
  if (rows < 8)
    t.chunk |= 1;
  while ((1 << t.copiers_log2) < std::min(t.units, std::max(kWarp, workers)))
    ++t.copiers_log2;

  t.aligned = uintptr_t(z.data) % sizeof(uint4) == 0 && z.stride % V == 0;
  t.inner = (V - 2) / std::max<int64_t>(z.stride, 1) + 1;
  t.inner_end = z.count - t.inner - rows + 1;
  return t;
}

// A row, as far as it is staged.
template <typename S>
struct Row {
  const S* data; // column 0, in device memory
  const S* staged; // column 0, in shared memory, were it there
  int skew; // values between the 16 bytes' boundary before column 0 and it
  int begin, end; // columns staged, from the first of a unit on

  __device__ acc_t<S> here(int column) const { // a staged one
    return widen(staged[column]);
  }
  __device__ acc_t<S> operator[](int column) const {
    return column >= begin && column < end ? here(column) : widen(data[column]);
  }
};

// Copies a unit that may be partly outside the tensor.
template <typename S>
__device__ inline void stage_edge(const Rows<S>& z, const S* from, uint4* to) {
  constexpr int V = kPerUnit<S>;
  const S* const end = z[z.count - 1] + z.width;
  if (from >= z.data && from + V <= end) {
    __pipeline_memcpy_async(to, from, sizeof(uint4));
    return;
  }
#pragma unroll 1
  for (int e = 0; e < V; ++e)
    if (from + e >= z.data && from + e < end)
      ((S*)to)[e] = from[e];
}

// Copies the units [unit, unit + t.units) of the rows from `first` on, asynchronously: of memory, so
// that a row which starts in the midst of one has one more.
template <typename S>
__device__ inline void stage(
    const Rows<S>& z, const Tiling& t, int64_t first, int unit, uint4* tile) {
  constexpr int V = kPerUnit<S>;
  const int copiers = 1 << t.copiers_log2, mine = int(threadIdx.x) & (copiers - 1);
  const int rows = int(min(int64_t(t.rows()), z.count - first));
  const int step = kRowThreads >> t.copiers_log2;
  const bool inside = first >= t.inner && first < t.inner_end;
  int r = int(threadIdx.x) >> t.copiers_log2;
  const S* row = z[first + r];
  uint4* to = tile + r * t.pitch;
  for (; r < rows; r += step, row += step * z.stride, to += step * t.pitch) {
    const int before = skew(row), last = (before + z.width + V - 1) / V - unit;
    const int end = min(t.units + (before > 0), last);
    const uint4* const from = (const uint4*)(row - before) + unit;
    if (inside) {
#pragma unroll 2
      for (int u = mine; u < end; u += copiers)
        __pipeline_memcpy_async(to + u, from + u, sizeof(uint4));
    } else {
#pragma unroll 1
      for (int u = mine; u < end; u += copiers)
        stage_edge(z, (const S*)(from + u), to + u);
    }
  }
  __pipeline_commit();
}

// This thread's row, after stage().
template <typename S>
__device__ inline Row<S> staged_row(
    const Rows<S>& z, const Tiling& t, int64_t row, int unit, const uint4* tile) {
  constexpr int V = kPerUnit<S>;
  const S* const data = z[row];
  const int before = skew(data);
  return {data, (const S*)(tile + t.row() * t.pitch) + (before - unit * V), before, unit * V,
      min((unit + t.units) * V, z.width)};
}

// The columns of the row that are this thread's to walk: [begin, end), from the start of a unit on.
struct Piece {
  int unit; // counted from the first staged one
  int begin, end;
};

template <typename S>
__device__ inline Piece piece(const Row<S>& row, const Tiling& t) {
  constexpr int V = kPerUnit<S>;
  const int unit = min(t.worker() * t.chunk, t.units), unit_end = min(unit + t.chunk, t.units);
  return {unit, row.begin + unit * V, min(row.begin + unit_end * V, row.end)};
}

// The 16 bytes from byte `skip` of two units on.
__device__ inline uint4 straddle(const uint4* units, unsigned skip) {
  const uint4 a = units[0], b = units[1];
  unsigned w[] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 6; ++i)
    w[i] = skip & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i)
    w[i] = skip & 4 ? w[i + 1] : w[i];
  const unsigned bits = skip % 4 * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits)};
}

// The units of a thread's row, counted from the first staged one, in shared memory. What is in one
// beyond the row's end means nothing.
template <typename S>
struct Units {
  const uint4* at;
  unsigned skip; // bytes
  bool aligned;

  __device__ Units(const Row<S>& row, const Tiling& t, const uint4* tile)
      : at(tile + t.row() * t.pitch), skip(row.skew * sizeof(S)), aligned(t.aligned) {}
  __device__ uint4 operator[](int u) const {
    return aligned ? at[u] : straddle(at + u, skip);
  }
};

// Walks along all rows, a span of t.units units at a time. For each of a thread's rows: for each span
// f(row number, whether there is such a row, row, first unit), then done(row number, whether there
// is, row, true). While a span is copied each thread runs meanwhile(first unit); where that is false
// for any thread of the block, f gets no more of the rows at hand, and done false. For whole blocks.
template <typename S, typename Meanwhile, typename F, typename Done>
__device__ inline void for_spans(const Rows<S>& z, const Tiling& t, uint4* tile,
    const Meanwhile& meanwhile, const F& f, const Done& done) {
  for (int64_t first = int64_t(blockIdx.x) << t.rows_log2; first < z.count;
      first += int64_t(gridDim.x) << t.rows_log2) {
    const int64_t r = first + t.row();
    const bool exists = r < z.count;
    Row<S> row{};
    bool whole = true;
    for (int unit = 0; unit < t.row_units; unit += t.units) {
      __syncthreads(); // the span before has been read
      stage(z, t, first, unit, tile);
      const bool go_on = meanwhile(unit);
      __pipeline_wait_prior(0);
      whole = __syncthreads_and(go_on);
      if (!whole)
        break;
      if (exists)
        row = staged_row(z, t, r, unit, tile);
      f(r, exists, row, unit);
    }
    done(r, exists, row, whole);
  }
}

// f(values, column, inside) on the units of a thread's piece of a staged row: the unit's values, the
// first of its columns, and, as bits, which are meant: all but those beyond the row's end.
template <typename S, typename F>
__device__ inline void for_units(
    const Row<S>& row, const Tiling& t, const uint4* tile, const F& f) {
  constexpr int V = kPerUnit<S>;
  const Piece mine = piece(row, t);
  const Units<S> units(row, t, tile);
  int column = mine.begin;
  for (int u = mine.unit; column < mine.end; ++u, column += V) {
    acc_t<S> x[V];
    unpack<S>(units[u], x);
    f(x, column, columns(0, min(V, mine.end - column)));
  }
}

// Values of a unit that are not meant become `instead`.
template <typename T, int N>
__device__ inline void mask(T (&x)[N], unsigned inside, T instead) {
  if (inside != columns(0, N))
#pragma unroll
    for (int e = 0; e < N; ++e)
      x[e] = inside >> e & 1 ? x[e] : instead;
}

// The merged states of a row's workers, valid in the threads of worker 0. `slots`: shared memory,
// t.slot_bytes<State>().
template <typename State>
__device__ inline State reduce_workers(State state, const Tiling& t, State* slots) {
  for (int delta = t.rows(); delta < kWarp; delta *= 2)
    state.merge(shuffle_down(state, delta));
  if (t.slots() > 1) {
    if (t.rows() >= kWarp || threadIdx.x % kWarp < unsigned(t.rows()))
      slots[t.slot() * t.rows() + t.row()] = state;
    __syncthreads();
    if (t.worker() == 0)
      for (int s = 1; s < t.slots(); ++s)
        state.merge(slots[s * t.rows() + t.row()]);
  }
  return state;
}

} // namespace oodk::cuda
