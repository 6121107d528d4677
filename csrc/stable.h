// The only gateway to torch: the libtorch stable ABI (torch >= 2.10), and what it lacks.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "errors.h"

namespace oodk {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

#define OODK_CHECK_VALUE(condition, ...)                      \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      ::oodk::throw_value_error(::oodk::concat(__VA_ARGS__)); \
  } while (false)

#define OODK_CHECK_TYPE(condition, ...)                      \
  do {                                                       \
    if (!(condition)) [[unlikely]]                           \
      ::oodk::throw_type_error(::oodk::concat(__VA_ARGS__)); \
  } while (false)

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i)
    text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + (t.dim() == 1 ? ",)" : ")");
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu())
    return "cpu";
  const std::string name = t.is_cuda() ? "cuda:" : "device ";
  return name + std::to_string(t.get_device_index());
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

// The element types of scores and logits.
inline DType float_dtype(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      OODK_CHECK_TYPE(false, op, ": ", argument,
          " must be float64, float32, bfloat16 or float16, got ",
          torch::headeronly::toString(t.scalar_type()));
  }
  return DType::f32;
}

// What half precision is accumulated and returned in.
inline ScalarType accumulate_type(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// The first `dims` dimensions walked in order: `count` items, each `stride` values after the one
// before (as given where there is only one), unless no single stride leads through them.
struct EvenSteps {
  int64_t count, stride;
  bool even;
};

inline EvenSteps even_steps(const Tensor& t, int64_t dims, int64_t stride) {
  EvenSteps steps{1, stride, true};
  for (int64_t i = dims - 1; i >= 0; --i) {
    if (t.size(i) == 1)
      continue;
    if (steps.count == 1)
      steps.stride = t.stride(i);
    else
      steps.even = steps.even && t.stride(i) == steps.stride * steps.count;
    steps.count *= t.size(i);
  }
  return steps;
}

// A tensor seen as `count` rows of `width` adjacent values, `stride` values apart.
struct TensorRows {
  Tensor tensor;
  DType dtype;
  int64_t count, width, stride;
};

// Copies only where the rows are not evenly spaced or their values not adjacent.
inline TensorRows as_rows(const char* op, const char* argument, const Tensor& t) {
  const DType dtype = float_dtype(op, argument, t);
  const int64_t dim = t.dim();
  OODK_CHECK_VALUE(dim >= 1, op, ": ", argument, " must have at least one dimension, got a scalar");
  const int64_t width = t.size(dim - 1);
  const EvenSteps rows = even_steps(t, dim - 1, width);
  const bool adjacent = width <= 1 || t.stride(dim - 1) == 1;
  if (adjacent && rows.even && rows.stride >= width)
    return {t, dtype, rows.count, width, rows.stride};
  return {torch::stable::contiguous(t), dtype, rows.count, width, width};
}

} // namespace oodk
