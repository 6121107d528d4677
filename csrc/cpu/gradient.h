#pragma once

#include "cpu/memory.h"
#include "stable.h"

namespace oodk {

// The gradient of logits, contiguous and about to be written.
inline Tensor new_gradient(const Tensor& logits) {
  Tensor grad = empty(sizes_of(logits), logits.scalar_type(), logits);
  advise_huge_pages(grad.mutable_data_ptr(), grad.numel() * grad.element_size());
  return grad;
}

} // namespace oodk
