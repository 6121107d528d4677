#pragma once

namespace oodk {

// Element types of scores and logits, for kernels, which see no torch header.
enum class DType { f64, f32, bf16, f16 };

} // namespace oodk
