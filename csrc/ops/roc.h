// Contract of the ROC ops (schemas: library.cpp), shared by the CPU and the CUDA backend.
#pragma once

#include "stable.h"

#include "common/exact_sums.h"

namespace oodk {

// Scores as bits, one after the other or `stride` scores apart.
struct RocScores {
  Tensor tensor;
  int64_t count, stride;
  int width; // bytes of a score, and of its key
  int64_t inf_bits; // +inf as an integer; a larger magnitude is NaN
  ScalarType key_type;
};

// Copies only where no single stride leads from each score to the next.
inline RocScores roc_scores(const Tensor& t) {
  const char* op = "_roc_keys";
  const DType dtype = float_dtype(op, "scores", t);
  OODK_CHECK_VALUE(t.dim() >= 1, op, ": scores must have at least one dimension, got a scalar");
  const EvenSteps all = even_steps(t, t.dim(), 1);
  OODK_CHECK_VALUE(all.count > 0, op, ": scores must not be empty");
  RocScores scores{all.even ? t : torch::stable::contiguous(t), all.count,
      all.even ? all.stride : 1, 2, 0, ScalarType::Short};
  switch (dtype) {
    case DType::f64:
      scores.width = 8, scores.inf_bits = 0x7ff0000000000000, scores.key_type = ScalarType::Long;
      break;
    case DType::f32:
      scores.width = 4, scores.inf_bits = 0x7f800000, scores.key_type = ScalarType::Int;
      break;
    case DType::bf16: scores.inf_bits = 0x7f80; break;
    case DType::f16: scores.inf_bits = 0x7c00; break;
  }
  return scores;
}

struct RocKeys {
  Tensor id, ood; // (N,) and (M,), contiguous
  int64_t n, m;
  int width;

  // (kRocCounts, 2): the integers of RocSums as high * 2^62 + low.
  Tensor new_counts() const {
    return empty({kRocCounts, 2}, ScalarType::Long, id);
  }
  Tensor new_areas() const {
    return empty({kRocAreas}, ScalarType::Double, id);
  }
};

inline RocKeys roc_keys(const Tensor& id_keys, const Tensor& ood_keys) {
  const char* op = "_roc_counts";
  const auto check = [&](const char* argument, const Tensor& t) {
    const ScalarType type = t.scalar_type();
    OODK_CHECK_TYPE(
        type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Short, op, ": ",
        argument, " must be int64, int32 or int16, got ", torch::headeronly::toString(type));
    OODK_CHECK_VALUE(t.dim() == 1 && t.size(0) >= 1, op, ": ", argument,
        " must have shape (N,), N >= 1, got ", shape_of(t));
    OODK_CHECK_VALUE(t.size(0) < int64_t(1) << 39, op, ": ", argument,
        " must hold fewer than 2^39 keys, got ", t.size(0));
  };
  check("id_keys", id_keys);
  check("ood_keys", ood_keys);
  OODK_CHECK_TYPE(ood_keys.scalar_type() == id_keys.scalar_type(), op,
      ": ood_keys must have the type of id_keys, ",
      torch::headeronly::toString(id_keys.scalar_type()), ", got ",
      torch::headeronly::toString(ood_keys.scalar_type()));
  OODK_CHECK_VALUE(device_of(ood_keys) == device_of(id_keys), op,
      ": ood_keys must be on the device of id_keys, ", device_of(id_keys), ", got ",
      device_of(ood_keys));
  const ScalarType type = id_keys.scalar_type();
  return {torch::stable::contiguous(id_keys), torch::stable::contiguous(ood_keys), id_keys.size(0),
      ood_keys.size(0),
      type == ScalarType::Long      ? 8
          : type == ScalarType::Int ? 4
                                    : 2};
}

} // namespace oodk
