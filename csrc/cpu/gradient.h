#pragma once

#include "cpu/memory.h"
#include "ops/rows.h"

namespace oodk {

// The gradient of logits, about to be written.
inline Tensor new_gradient(const RowArgs& args) {
  Tensor grad = args.new_gradient();
  advise_huge_pages(grad.mutable_data_ptr(), grad.numel() * grad.element_size());
  return grad;
}

} // namespace oodk
