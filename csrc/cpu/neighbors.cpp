// CPU backend of nearest_neighbors.
//
// A task is a chunk of the queries against a part of the bank, which it takes block by block: a block
// is loaded, packed as columns that stay in a core's cache, and multiplied with all tiles of the
// chunk. A pair whose product shows that it is too far apart ends there; of the others, a few times
// k ln(N / k) a query, the distance is computed from differences, and the least k stay in a heap.
//
// What the products leave out is certain not to be among the k nearest. With Q = |q|^2 and B = |b|^2
// as computed, the product s = q . b - B / 2 gives |q - b|^2 as Q - 2 s, and that is within
// e = c (Q + B) of the distance from differences, c = (3 d + 64) u, u = 2^-24 (2^-53): sums of d
// products take 2 d u of that at most, the sum of differences d u / 8 + 20 u, norms and the rounding
// of centered rows the rest; what underflows is less than 4 d times the least normal number. So a pair
// is left out where Q - 2 s - e > t, t the k-th distance so far: where
//
//   q . b - (1 - c) B / 2  <  ((1 - c) Q - t) / 2 - 4 d * least.
//
// All others are decided by their distances and rows. So the result is that of comparing all
// distances, whatever the blocks, the parts and the number of threads; a frame in which rows lie
// closer to 0 makes e less and changes nothing else.
#include "ops/neighbors.h"

#include <atomic>
#include <tuple>

#include "cpu/kmeans/solver.h"
#include "cpu/neighbors_kernel.h"

namespace oodk {
namespace {

template <typename T>
struct Neighbor {
  T distance;
  int64_t row;
  bool operator<(const Neighbor& other) const {
    return distance < other.distance || (distance == other.distance && row < other.row);
  }
};

// Rows of a matrix, loaded; those that are left out as zeros.
template <typename T>
class Block {
 public:
  Block(const TensorRows& from, bool normalize, int64_t most)
      : stride(row_stride<T>(from.width)),
        rows(most * stride),
        norm2(most),
        from_(from),
        normalize_(normalize),
        most_(most),
        scale_(most) {}

  void load(int64_t first, int64_t count) {
    const auto* x = (const char*)from_.tensor.const_data_ptr();
    source_ = {x + first * from_.stride * from_.tensor.element_size(), from_.dtype, from_.width,
        from_.stride};
    kernels_.scales(source_, 0, count, normalize_, scale_);
    source_.scale = normalize_ ? scale_.get() : nullptr;
    size = count;
    load_into(rows);
  }
  // The rows relative to a center (null for 0), until load() or placed() is called again; norm2 will
  // be their squared norms.
  const T* placed(const T* center) {
    const T* found = rows;
    if (center) {
      if (!centered_)
        centered_ = Buffer<T>(most_ * stride);
      source_.center = center;
      load_into(centered_);
      found = centered_;
    }
    neighbor_kernels<T>().norms(found, stride, size, norm2);
    return found;
  }
  bool left_out(int64_t i) const {
    return scale_[i] != scale_[i];
  }
  const T* row(int64_t i) const {
    return rows + i * stride;
  }

  int64_t size = 0, stride;
  Buffer<T> rows, norm2;

 private:
  void load_into(T* to) const {
    kernels_.load(source_, 0, size, to, stride);
    for (int64_t i = 0; i < size; ++i)
      if (left_out(i))
        std::fill_n(to + i * stride, stride, T(0));
  }

  const KmeansKernels<T>& kernels_ = kmeans_kernels<T>();
  const TensorRows& from_;
  bool normalize_;
  int64_t most_;
  PointRows source_{};
  Buffer<T> scale_, centered_;
};

template <typename T>
class Search {
 public:
  Search(const NeighborArgs& args, bool normalize)
      : args_(args), n_(args.bank.count), d_(args.bank.width), k_(args.k), normalize_(normalize) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t bytes = std::max(row_stride<T>(d_) * int64_t(sizeof(T)) * 2,
        k_ * int64_t(sizeof(Neighbor<T>)) /
            4); // of a query; more of the bank are read than written
    const int64_t most = std::clamp(kChunkBytes / bytes, kernels_.tile, kMostQueries);
    const int64_t queries = args.queries.count;
    int64_t chunks =
        std::max((queries + most - 1) / most, std::min(threads, queries / kFewQueries));
    if (chunks > 1 && chunks < 8 * threads)
      chunks = round_up(chunks, threads);
    chunk_ = std::max<int64_t>(1, (queries + chunks - 1) / std::max<int64_t>(chunks, 1));
    chunks_ = (queries + chunk_ - 1) / chunk_;
    // A part has a heap of its own for each query.
    parts_ = std::clamp<int64_t>(n_ / std::max(kFewRows, 8 * k_), 1,
        std::max<int64_t>(1, threads / std::max<int64_t>(chunks_, 1)));
    panels_ = std::clamp<int64_t>(kBlockBytes / (panel() * d_ * int64_t(sizeof(T))), 1, 16);
  }

  void run() {
    find_center();
    const int64_t queries = args_.queries.count;
    const Buffer<Neighbor<T>> found(parts_ > 1 ? parts_ * queries * k_ : 0);
    parallel(chunks_ * parts_, double(chunk_) * double(n_) * double(d_) / double(parts_),
        [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t chunk = task / parts_, part = task % parts_;
            const int64_t first = chunk * chunk_, last = std::min(queries, first + chunk_);
            const int64_t begin_row = part * n_ / parts_, end_row = (part + 1) * n_ / parts_;
            if (parts_ > 1) {
              take(first, last, begin_row, end_row, found + (part * queries + first) * k_);
              continue;
            }
            const Buffer<Neighbor<T>> own((last - first) * k_);
            take(first, last, begin_row, end_row, own);
            for (int64_t q = first; q < last; ++q)
              write(q, own + (q - first) * k_);
          }
        });
    check_bank("nearest_neighbors", bad_, n_);
    if (parts_ > 1)
      merge(found);
  }

 private:
  static constexpr int64_t kChunkBytes = 8 << 20; // of queries, as rows and as tiles
  static constexpr int64_t kBlockBytes = 384 << 10; // of bank rows packed: of a cache of 512 KiB
  static constexpr int64_t kMostQueries = 4096;
  static constexpr int64_t kFewQueries = 256; // whose products cost no more than packing the bank
  static constexpr int64_t kFewRows = 1024; // of the bank, that are worth a thread
  static constexpr int64_t kDirect = 4; // queries that are faster without products
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  int64_t panel() const {
    return kmeans_kernels<T>().panel;
  }

  // The mean of some rows of the bank, where it is farther from 0 than they are from it: products
  // tell little there.
  void find_center() {
    if (normalize_ || chunk_ <= kDirect)
      return;
    const int64_t count = std::min<int64_t>(n_, 256);
    Block<T> row(args_.bank, false, 1);
    std::vector<double> mean(d_), square(d_);
    double norm2 = 0, variance = 0;
    for (int64_t i = 0; i < count; ++i) {
      row.load(i * n_ / count, 1);
      for (int64_t j = 0; j < d_; ++j) {
        mean[j] += double(row.rows[j]) / double(count);
        square[j] += double(row.rows[j]) * double(row.rows[j]) / double(count);
      }
    }
    for (int64_t j = 0; j < d_; ++j) {
      norm2 += mean[j] * mean[j];
      variance += square[j] - mean[j] * mean[j];
    }
    if (is_far(norm2, variance))
      center_.assign(mean.begin(), mean.end());
  }

  // The heaps (last - first, k) of queries [first, last) against the rows [begin, end) of the bank,
  // sorted in the end.
  void take(int64_t first, int64_t last, int64_t begin, int64_t end, Neighbor<T>* heaps) {
    const int64_t count = last - first, tiles = (count + kernels_.tile - 1) / kernels_.tile;
    const bool direct = count <= kDirect;
    const T* center = center_.empty() ? nullptr : center_.data();
    Block<T> queries(args_.queries, normalize_, count);
    queries.load(first, count);
    const Buffer<T> packed(direct ? 0 : tiles * kernels_.tile * d_);
    if (!direct)
      kernels_.pack(queries.placed(center), queries.stride, count, d_, packed);
    std::vector<int64_t> size(count);

    const int64_t most = panels_ * panel();
    Block<T> rows(args_.bank, normalize_, most);
    const Buffer<T> columns(direct ? 0 : most * d_), bias(most);
    const Buffer<int32_t> found(direct ? 0 : most * kernels_.tile);
    const auto meet = [&](int64_t q, int64_t i, int64_t row) {
      const T distance = kernels_.distance(queries.row(q), rows.row(i), queries.stride);
      offer(heaps + q * k_, size[q], {distance, row});
    };
    for (int64_t at = begin; at < end && !interrupt_.poll(); at += most) {
      rows.load(at, std::min(most, end - at));
      for (int64_t i = 0; i < rows.size; ++i)
        if (rows.left_out(i))
          refuse(at + i);
      if (direct) {
        for (int64_t i = 0; i < rows.size; ++i)
          for (int64_t q = 0; q < count; ++q)
            meet(q, i, at + i);
        continue;
      }
      kmeans_kernels<T>().pack(rows.placed(center), rows.stride, rows.size, d_, columns);
      const int64_t panels = (rows.size + panel() - 1) / panel();
      for (int64_t i = 0; i < panels * panel(); ++i)
        bias[i] = i < rows.size ? bias_of(rows.norm2[i]) : -kInf;
      for (int64_t t = 0; t < tiles; ++t) {
        T floor[NeighborKernels<T>::kMostRows];
        for (int64_t r = 0; r < kernels_.tile; ++r) {
          const int64_t q = t * kernels_.tile + r;
          floor[r] = q < count && !queries.left_out(q)
              ? floor_of(queries.norm2[q], size[q] < k_ ? kInf : heaps[q * k_].distance)
              : kInf;
        }
        const int64_t pairs =
            kernels_.scan(packed + t * kernels_.tile * d_, d_, columns, bias, panels, floor, found);
        for (int64_t p = 0; p < pairs; ++p) {
          const int64_t i = found[p] / NeighborKernels<T>::kMostRows;
          const int64_t q = t * kernels_.tile + found[p] % NeighborKernels<T>::kMostRows;
          if (i < rows.size && q < count)
            meet(q, i, at + i);
        }
      }
    }
    for (int64_t q = 0; q < count; ++q) {
      Neighbor<T>* heap = heaps + q * k_;
      std::sort_heap(heap, heap + size[q]);
      std::fill(heap + size[q], heap + k_, Neighbor<T>{kInf, kNone});
      if (queries.left_out(q))
        std::fill_n(heap, k_, Neighbor<T>{std::numeric_limits<T>::quiet_NaN(), -1});
    }
  }

  // A norm that overflows relative to the center leaves nothing out.
  T bias_of(T norm2) const {
    return norm2 < kInf ? -(1 - error_) * norm2 / 2 : kInf;
  }
  T floor_of(T norm2, T kth) const {
    return norm2 < kInf
        ? ((1 - error_) * norm2 - kth) / 2 - T(4 * d_) * std::numeric_limits<T>::min()
        : -kInf;
  }

  void offer(Neighbor<T>* heap, int64_t& size, Neighbor<T> next) const {
    if (size < k_) {
      heap[size++] = next;
      std::push_heap(heap, heap + size);
    } else if (next < *heap) {
      std::pop_heap(heap, heap + k_);
      heap[k_ - 1] = next;
      std::push_heap(heap, heap + k_);
    }
  }

  void refuse(int64_t row) {
    int64_t known = bad_;
    while (row < known && !bad_.compare_exchange_weak(known, row)) {
    }
  }

  void write(int64_t q, const Neighbor<T>* found) const {
    T* distance = (T*)args_.distances.mutable_data_ptr() + q * k_;
    int64_t* index = args_.indices.mutable_data_ptr<int64_t>() + q * k_;
    for (int64_t i = 0; i < k_; ++i) {
      distance[i] = found[i].distance;
      index[i] = found[i].row;
    }
  }

  void merge(const Neighbor<T>* found) const {
    const int64_t queries = args_.queries.count;
    parallel(queries, 16.0 * double(parts_ * k_), [&](int64_t begin, int64_t end) {
      std::vector<Neighbor<T>> all(parts_ * k_);
      for (int64_t q = begin; q < end; ++q) {
        for (int64_t p = 0; p < parts_; ++p)
          std::copy_n(found + (p * queries + q) * k_, k_, all.begin() + p * k_);
        if (all[0].row >= 0)
          std::partial_sort(all.begin(), all.begin() + k_, all.end());
        write(q, all.data());
      }
    });
  }

  const NeighborArgs& args_;
  const NeighborKernels<T>& kernels_ = neighbor_kernels<T>();
  int64_t n_, d_, k_;
  bool normalize_;
  T error_ = T(3 * d_ + 64) * std::numeric_limits<T>::epsilon() / 2; // c
  int64_t chunk_, chunks_, parts_, panels_;
  std::vector<T> center_;
  std::atomic<int64_t> bad_ = kNone;
  Interrupt interrupt_;
};

std::tuple<Tensor, Tensor> nearest_neighbors(
    const Tensor& queries, const Tensor& bank, int64_t k, bool normalize) {
  const NeighborArgs args = neighbor_args("nearest_neighbors", queries, bank, k);
  if (args.queries.dtype == DType::f64)
    Search<double>(args, normalize).run();
  else
    Search<float>(args, normalize).run();
  return {args.distances, args.indices};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("nearest_neighbors", TORCH_BOX(&oodk::nearest_neighbors));
}
