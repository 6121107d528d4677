#pragma once

namespace oodk {

// What shape_features_ makes of a row of features.
enum class Shape { clip, vra, ash_p, ash_b, ash_s, scale, optfs };

} // namespace oodk
