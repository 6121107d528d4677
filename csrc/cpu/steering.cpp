// CPU backend of _steer_histogram_: where the bins of a histogram of scores go. Its words are those
// of oodkernels/metrics/streaming/_sketch.py, which says the same in torch.
#include "ops/steering.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/order_key.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

constexpr int64_t kFirstSample = 1 << 17, kSample = 1 << 12, kProbe = 1 << 10;
constexpr int64_t kCrowd = 12, kMaxAtoms = 127;
constexpr double kFull = 8, kTail = 1e-3, kGrowth = 1.125;
constexpr int32_t kNoAtom = 0x7fffffff, kLeastKey = -0x7f800001, kLargestKey = 0x7f800000;

[[noreturn]] void refuse_state(const char* what) {
  throw_value_error(concat("_steer_histogram_: ", what));
}

struct Sampled {
  std::vector<int32_t> keys; // ascending
  std::vector<uint8_t> rows;
};

// Sorts by the high half.
void sort_by_high_half(std::vector<uint64_t>& values) {
  constexpr int bits = 11, digits = 3;
  if (values.size() < 1 << 11) {
    std::sort(values.begin(), values.end());
    return;
  }
  std::vector<uint32_t> places(digits << bits);
  const auto digit_of = [](uint64_t value, int d) {
    return (d << bits) + (uint32_t(value >> 32) >> (d * bits) & ((1 << bits) - 1));
  };
  for (uint64_t value : values)
    for (int d = 0; d < digits; ++d)
      ++places[digit_of(value, d)];
  std::vector<uint64_t> sorted(values.size());
  for (int d = 0; d < digits; ++d) {
    std::exclusive_scan(places.begin() + (d << bits), places.begin() + ((d + 1) << bits),
        places.begin() + (d << bits), 0u);
    for (uint64_t value : values)
      sorted[places[digit_of(value, d)]++] = value;
    values.swap(sorted);
  }
}

// Scores picked evenly, with jitter against periods.
template <typename T>
Sampled sample_of(const HistogramArgs& args, int64_t most) {
  const T* scores = static_cast<const T*>(args.scores.const_data_ptr());
  const int64_t step = (args.n + most - 1) / most, size = (args.n + step - 1) / step;
  std::vector<uint64_t> order(size); // key, then place, in one
  std::vector<uint8_t> rows(size, uint8_t(std::min<int64_t>(255, args.row)));
  for (int64_t s = 0; s < size; ++s) {
    const uint64_t at = uint64_t(s * step), jitter = (at * 2654435761u) >> 11 & 0xfffff;
    const int64_t i = std::min(s * step + int64_t(jitter) % step, args.n - 1);
    const uint32_t key = uint32_t(order_key(float_bits(float(scores[i]))));
    order[s] = uint64_t(key ^ 0x80000000u) << 32 | uint64_t(s);
    if (const uint8_t* more = args.row_ptr())
      rows[s] = uint8_t(std::min<int64_t>(255, args.row + more[i]));
  }
  sort_by_high_half(order);
  Sampled sample{std::vector<int32_t>(size), std::vector<uint8_t>(size)};
  for (int64_t s = 0; s < size; ++s) {
    sample.keys[s] = int32_t(uint32_t(order[s] >> 32) ^ 0x80000000u);
    sample.rows[s] = rows[uint32_t(order[s])];
  }
  return sample;
}

Sampled sample_of(const HistogramArgs& args, int64_t most) {
  switch (args.dtype) {
    case DType::f64: return sample_of<double>(args, most);
    case DType::f32: return sample_of<float>(args, most);
    case DType::bf16: return sample_of<torch::headeronly::BFloat16>(args, most);
    default: return sample_of<torch::headeronly::Half>(args, most);
  }
}

// Every fourth.
Sampled thinned(const Sampled& sample) {
  Sampled kept;
  for (size_t i = 0; i < sample.keys.size(); i += 4) {
    kept.keys.push_back(sample.keys[i]);
    kept.rows.push_back(sample.rows[i]);
  }
  return kept;
}

int64_t prefix_of(int32_t key) {
  return (key >> 16) + kPrefixes / 2;
}

// The low 16 bits of the float32 value that has this key.
uint32_t raw_bits(int32_t key) {
  return uint32_t(key ^ ((key >> 31) & 0x7fffffff)) & 0xffff;
}

class Steering {
 public:
  Steering(const SteeringArgs& args, int64_t* counts, int32_t* blocks, int64_t* table,
      int32_t* atoms, int64_t& used, double& scale, bool half, double share)
      : bins_(args.bins),
        n_rows_(args.histogram.n_rows),
        width_(args.histogram.width),
        n_atoms_(args.n_atoms),
        counts_(counts),
        blocks_(blocks),
        table_(table),
        atoms_(atoms),
        used_(used),
        scale_(scale),
        half_(half),
        share_(share) {}

  int64_t counted() const {
    int64_t total = 0;
    for (int64_t r = 0; r < n_rows_; ++r)
      total += fact(r, kScores);
    return total;
  }

  // Whether blocks need no look: what comes crowds no bin.
  bool is_steady(const Sampled& sample) const {
    const std::vector<int32_t>& keys = sample.keys;
    const int64_t size = int64_t(keys.size());
    const int spare = spare_bits(keys);
    std::vector<int64_t> counter(size);
    std::vector<double> full(n_rows_);
    for (int64_t r = 0; r < n_rows_; ++r)
      full[r] = kFull * share_ * scale_ * double(fact(r, kScores));
    for (int64_t i = 0; i < size; ++i) {
      const HistogramEntry entry = entry_of(keys[i]);
      counter[i] = counter_of(entry, keys[i]);
      // A sample in a bin that is overfull, or of which there are more than of any bin should be; a
      // lone key has nothing to be refined.
      if (int64_t(entry.shift()) <= spare)
        continue;
      bool suspect = i >= kCrowd && counter[i] == counter[i - kCrowd];
      for (int64_t r = 0; r < n_rows_ && !suspect; ++r)
        suspect = double(counts_[r * width_ + counter[i]]) > full[r];
      if (suspect && !is_atom(keys[i]))
        return false;
    }
    return true;
  }

  // Refines what n scores, of which this is a sample, would overfill.
  void adapt(const Sampled& sample, int64_t n) {
    const std::vector<int32_t>& keys = sample.keys;
    const int64_t size = int64_t(keys.size());
    const double each = double(n) / double(size), share = share_ * scale_;
    const auto is_number = [&](int64_t i) {
      return keys[i] >= kLeastKey && keys[i] <= kLargestKey;
    };
    std::vector<int64_t> n_side(n_rows_);
    for (int64_t i = 0; i < size; ++i)
      if (is_number(i) && sample.rows[i] < n_rows_)
        ++n_side[sample.rows[i]];

    const int64_t bits = 16 - spare_bits(keys);
    add_atoms(keys, bits);
    std::vector<int64_t> counter(size), shift(size);
    std::vector<uint8_t> rest(size);
    for (int64_t i = 0; i < size; ++i) {
      const HistogramEntry entry = entry_of(keys[i]);
      counter[i] = counter_of(entry, keys[i]);
      shift[i] = entry.shift();
      rest[i] = is_number(i) && !is_atom(keys[i]);
    }
    std::vector<double> excess(size, 0.0);
    for (int64_t r = 0; r < n_rows_; ++r) {
      const int64_t own = std::max<int64_t>(1, n_side[r]);
      const double total = double(fact(r, kScores)) + double(own) * each, unit = each / total;
      const int64_t* row = counts_ + r * width_;
      int64_t below = 0, bin_end = 0, prefix_end = 0;
      int64_t in_bin = 0, in_prefix = 0;
      for (int64_t i = 0; i < size; ++i) {
        const auto of_row = [&](int64_t k) { return sample.rows[k] == r && rest[k]; };
        below += sample.rows[i] == r && is_number(i);
        if (i == bin_end)
          for (in_bin = 0; bin_end < size && counter[bin_end] == counter[i]; ++bin_end)
            in_bin += of_row(bin_end);
        if (i == prefix_end)
          for (in_prefix = 0; prefix_end < size && keys[prefix_end] >> 16 == keys[i] >> 16;
              ++prefix_end)
            in_prefix += of_row(prefix_end);
        // One sample less than there are, lest a lone one pass for a crowd.
        double load = double(row[counter[i]]) / total + double(in_bin >= 4 ? in_bin - 1 : 0) * unit;
        load = std::max(load, double(in_prefix - 1) * unit / double(1 << (16 - shift[i])));
        const double tail = double(std::min(below, own - below + 1)) / double(own);
        double allowed = std::min(kTail * tail, share);
        allowed = std::max(std::max(allowed, share / 64), 4 / total);
        excess[i] = std::max(excess[i], load / allowed);
      }
    }

    const std::vector<int8_t> level = levels();
    std::vector<int8_t> target = level;
    const int64_t most = (bits + 1) / 2;
    bool grows = false;
    for (int64_t i = 0; i < size; ++i) {
      int64_t more = 0;
      if (rest[i] && excess[i] > 2)
        while (more < kLevels && excess[i] > double(size_of(more)))
          ++more;
      const int8_t wanted = int8_t(std::min((16 - shift[i]) / 2 + more, most));
      int8_t& t = target[prefix_of(keys[i])];
      t = std::max(t, wanted);
      grows |= t > level[prefix_of(keys[i])];
    }
    if (grows)
      refine(level, target);
  }

 private:
  int64_t& fact(int64_t row, Fact f) const {
    return counts_[(row + 1) * width_ - kFacts + f];
  }
  HistogramEntry entry_of(int32_t key) const {
    return {uint64_t(table_[prefix_of(key)])};
  }
  int64_t counter_of(HistogramEntry entry, int32_t key) const {
    const int64_t bin = entry.start() + ((uint32_t(key) & 0xffff) >> entry.shift());
    if (entry.shift() > 16 || bin >= bins_)
      refuse_state("table points outside of counts");
    return bin;
  }

  // How many of the low bits are 0 in every score so far and in the sample.
  int spare_bits(const std::vector<int32_t>& keys) const {
    uint32_t low = 0x10000;
    for (int32_t key : keys)
      low |= raw_bits(key);
    for (int64_t r = 0; r < n_rows_; ++r)
      low |= uint32_t(fact(r, kLowBits)) & 0xffff;
    return std::countr_zero(low);
  }

  bool is_atom(int32_t key) const {
    const HistogramEntry entry = entry_of(key);
    const int64_t first = entry.first_atom(), last = first + entry.n_atoms();
    return last <= n_atoms_ && std::binary_search(atoms_ + first, atoms_ + last, key);
  }

  // Gives frequent keys of a sample counters of their own.
  void add_atoms(const std::vector<int32_t>& keys, int64_t bits) {
    const int64_t size = int64_t(keys.size());
    int64_t runs = 0;
    for (int64_t i = 0; i < size; ++i)
      runs += i == 0 || keys[i] != keys[i - 1];
    const int64_t least = runs * 8 <= size ? 1 : 8;
    int64_t kept = std::find(atoms_, atoms_ + n_atoms_, kNoAtom) - atoms_, in_prefix = 0;
    std::vector<int32_t> fresh;
    const int64_t had = kept;
    for (int64_t i = 0, end = 0; i < size; i = end) {
      for (end = i; end < size && keys[end] == keys[i];)
        ++end;
      if (i == 0 || keys[i] >> 16 != keys[i - 1] >> 16)
        in_prefix = 0;
      const HistogramEntry entry = entry_of(keys[i]);
      const bool number = keys[i] >= kLeastKey && keys[i] <= kLargestKey;
      if (!number || end - i < least || int64_t(entry.shift()) <= 16 - bits || is_atom(keys[i]))
        continue;
      if (++in_prefix + entry.n_atoms() <= kMaxAtoms && kept < n_atoms_) {
        fresh.push_back(keys[i]);
        ++kept;
      }
    }
    if (fresh.empty())
      return;
    // From the end on, so that nothing is written over that is still to be moved.
    int64_t from = had - 1, next = int64_t(fresh.size()) - 1;
    for (int64_t to = kept - 1; next >= 0; --to) {
      const bool old = from >= 0 && atoms_[from] > fresh[next];
      atoms_[to] = old ? atoms_[from] : fresh[next];
      for (int64_t r = 0; r < n_rows_; ++r) {
        int64_t* counters = counts_ + r * width_ + bins_;
        counters[to] = old ? counters[from] : 0;
      }
      old ? --from : --next;
    }
    int64_t at = 0;
    for (int64_t p = 0; p < kPrefixes; ++p) {
      const int64_t first = at;
      while (at < n_atoms_ && atoms_[at] != kNoAtom && prefix_of(atoms_[at]) <= p)
        ++at;
      const uint64_t n = uint64_t(std::min(at - first, kMaxAtoms));
      table_[p] = int64_t((uint64_t(table_[p]) & 0xffffffff) | uint64_t(first) << 32 | n << 56);
    }
  }

  // The finest level of each prefix. No block may lead outside, nor may all be more than there is.
  std::vector<int8_t> levels() const {
    std::vector<int8_t> level(kPrefixes, -1);
    int64_t total = 0;
    for (int64_t l = 0; l < kLevels; ++l)
      for (int64_t p = 0; p < kPrefixes; ++p)
        if (const int64_t start = blocks_[l * kPrefixes + p]; start >= 0) {
          total += size_of(l);
          if (start + size_of(l) > bins_)
            refuse_state("blocks must lie in counts");
          level[p] = int8_t(l);
        }
    if (total > bins_ || used_ < 0 || used_ > bins_ ||
        std::find(level.begin(), level.end(), -1) != level.end())
      refuse_state("blocks must hold one for each prefix and fit in counts");
    return level;
  }

  static int64_t size_of(int64_t level) {
    return int64_t(1) << 2 * level;
  }
  void point_at(int64_t prefix, int64_t level, int64_t start) {
    const uint64_t atoms = uint64_t(table_[prefix]) >> 32 << 32;
    table_[prefix] = int64_t(atoms | uint64_t(16 - 2 * level) | uint64_t(start) << 5);
  }

  void refine(std::vector<int8_t> level, std::vector<int8_t> target) {
    std::vector<int32_t> grown;
    for (int64_t p = 0; p < kPrefixes; ++p)
      if (target[p] > level[p])
        grown.push_back(int32_t(p));
    const auto wanted = [&] {
      int64_t total = 0;
      for (int32_t p : grown)
        total += target[p] > level[p] ? size_of(target[p]) : 0;
      return total;
    };
    if (used_ + wanted() > bins_ && counted() > 0)
      compact(level);
    for (; used_ + wanted() > bins_;)
      for (int32_t p : grown)
        target[p] -= target[p] > level[p];
    for (int32_t p : grown)
      if (target[p] > level[p]) {
        blocks_[target[p] * kPrefixes + p] = int32_t(used_);
        point_at(p, target[p], used_);
        used_ += size_of(target[p]);
      }
  }

  int64_t base_level(int64_t prefix) const {
    const int64_t at = prefix - kPrefixes / 2, exponent = (at < 0 ? ~at : at) >> 7;
    // Those of float16, subnormals included: 2^-24 to 2^15.
    return half_ && exponent >= 127 - 24 && exponent <= 127 + 15 ? 2 : 0;
  }

  // Where more than half of the bins are used, makes blocks coarser that merit it.
  void compact(std::vector<int8_t>& level) {
    int64_t base_bins = 0;
    for (int64_t p = 0; p < kPrefixes; ++p)
      base_bins += size_of(base_level(p));
    const int64_t half = (base_bins + bins_) / 2;
    if (used_ <= half)
      return;

    struct Fine { // a prefix that may become coarser
      int32_t prefix;
      int8_t level, base, best;
      double slack;
    };
    std::vector<Fine> fine;
    int64_t fixed = 0; // bins of all others
    for (int64_t p = 0; p < kPrefixes; ++p) {
      const int8_t base = int8_t(std::min<int64_t>(base_level(p), level[p]));
      if (level[p] > base)
        fine.push_back({int32_t(p), level[p], base, level[p], 0});
      else
        fixed += bins_upto(p, level[p]);
    }
    // The share of its side that the average score of a block has for company in its bin.
    parallel_for(0, int64_t(fine.size()), 256, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        Fine& block = fine[f];
        const int64_t start = blocks_[block.level * kPrefixes + block.prefix];
        double met = 0;
        for (int64_t r = 0; r < n_rows_; ++r) {
          const int64_t* bin = counts_ + r * width_ + start;
          const double total = double(std::max<int64_t>(1, fact(r, kScores)));
          double squares = 0, sum = 0;
          for (int64_t i = 0; i < size_of(block.level); ++i) {
            const double count = double(bin[i]);
            squares += count * std::max(0.0, count - 1);
            sum += count;
          }
          met = std::max(met, sum > 0 ? squares / sum / total : 0);
        }
        block.slack = std::log2(share_ / std::max(met, 1e-300));
      }
    });
    for (int exponent = -4; exponent < 14; ++exponent) {
      int64_t total = fixed;
      for (Fine& block : fine) {
        const double coarser = std::clamp(std::floor((block.slack + exponent) / 2), 0.0, 16.0);
        block.best = int8_t(std::max<int64_t>(block.level - int64_t(coarser), block.base));
        total += bins_upto(block.prefix, block.best);
        if (blocks_[block.best * kPrefixes + block.prefix] < 0)
          total += size_of(block.best);
      }
      scale_ = std::exp2(std::max(0, exponent));
      if (total <= half)
        break;
    }
    for (const Fine& block : fine)
      level[block.prefix] = block.best;
    move_to(level);
  }

  // Bins of a prefix's blocks of a level or below.
  int64_t bins_upto(int64_t prefix, int64_t level) const {
    int64_t total = 0;
    for (int64_t l = 0; l <= level; ++l)
      total += blocks_[l * kPrefixes + prefix] >= 0 ? size_of(l) : 0;
    return total;
  }

  // Lays out the blocks anew, of each prefix up to a level, and moves what all blocks hold there.
  void move_to(const std::vector<int8_t>& level) {
    struct Move {
      int32_t from, to;
      int8_t level, shift;
    };
    std::vector<Move> moves;
    std::vector<int32_t> old(blocks_, blocks_ + kLevels * kPrefixes);
    used_ = 0;
    for (int64_t l = 0; l < kLevels; ++l)
      for (int64_t p = 0; p < kPrefixes; ++p) {
        int32_t& block = blocks_[l * kPrefixes + p];
        const bool present = (block >= 0 && l <= level[p]) || l == level[p];
        block = present ? int32_t(used_) : -1;
        if (present && l == level[p])
          point_at(p, l, used_);
        used_ += present ? size_of(l) : 0;
      }
    for (int64_t l = 0; l < kLevels; ++l)
      for (int64_t p = 0; p < kPrefixes; ++p)
        if (const int32_t from = old[l * kPrefixes + p]; from >= 0) {
          const int64_t to = std::min<int64_t>(l, level[p]);
          moves.push_back({from, blocks_[to * kPrefixes + p], int8_t(l), int8_t(2 * (l - to))});
        }
    parallel_for(0, n_rows_, 1, [&](int64_t begin, int64_t end) {
      const Buffer<int64_t> moved(used_);
      for (int64_t r = begin; r < end; ++r) {
        int64_t* row = counts_ + r * width_;
        std::fill_n(moved.get(), used_, 0);
        for (const Move& move : moves)
          for (int64_t i = 0; i < size_of(move.level); ++i)
            moved[move.to + (i >> move.shift)] += row[move.from + i];
        std::copy_n(moved.get(), used_, row);
        std::fill(row + used_, row + bins_, 0);
      }
    });
  }

  const int64_t bins_, n_rows_, width_, n_atoms_;
  int64_t* const counts_;
  int32_t* const blocks_;
  int64_t* const table_;
  int32_t* const atoms_;
  int64_t& used_;
  double& scale_;
  const bool half_;
  const double share_;
};

void steer_histogram_(Tensor counts, Tensor blocks, Tensor table, Tensor atoms, Tensor used,
    Tensor scale, Tensor adapted, const Tensor& scores, int64_t side, std::optional<Tensor> rows,
    bool first, bool half, double share) {
  const SteeringArgs args =
      steering_args(counts, blocks, table, atoms, used, scale, adapted, scores, side, rows, share);
  const int64_t n = args.histogram.n;
  if (n == 0)
    return;
  Steering steering(args, counts.mutable_data_ptr<int64_t>(), blocks.mutable_data_ptr<int32_t>(),
      table.mutable_data_ptr<int64_t>(), atoms.mutable_data_ptr<int32_t>(),
      *used.mutable_data_ptr<int64_t>(), *scale.mutable_data_ptr<double>(), half, share);
  int64_t& looked_at = *adapted.mutable_data_ptr<int64_t>();
  const int64_t before = steering.counted(), total = before + n;
  if (!first && double(total) <= kGrowth * double(looked_at)) {
    // A look each time that 1/64 to 1/32 more has come.
    const int step = std::max(0, int(std::bit_width(uint64_t(total))) - 6);
    if (before >> step == total >> step || steering.is_steady(sample_of(args.histogram, kProbe)))
      return;
  }
  const Sampled sample = sample_of(args.histogram, first ? kFirstSample : kSample);
  steering.adapt(sample, n);
  if (first) { // bins are refined by what is known of their blocks
    const Sampled fewer = thinned(sample);
    for (int pass = 0; pass < 3; ++pass)
      steering.adapt(fewer, n);
  }
  looked_at = total;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("_steer_histogram_", TORCH_BOX(&oodk::steer_histogram_));
}
