// Integers that order as floating-point numbers do, from their bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/host_device.h"

namespace oodk {
namespace {

OODK_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Where the sign is set all other bits are flipped; then -0.0, which is all ones, becomes +0.0.
// NaN has the keys beyond those of the infinities. Without a branch, for vectors.
template <typename Bits>
OODK_HOST_DEVICE inline std::make_signed_t<Bits> order_key(Bits bits) {
  static_assert(std::is_unsigned_v<Bits>);
  const Bits negative = Bits(0) - Bits(bits >> (8 * sizeof(Bits) - 1));
  const Bits key = bits ^ Bits(negative & Bits(Bits(~Bits(0)) >> 1));
  return std::make_signed_t<Bits>(key + (key == Bits(~Bits(0))));
}

// The same, where NaN, of either sign, has the greatest key of all and no score has it; inf_bits are
// the bits of +inf.
template <typename Bits>
OODK_HOST_DEVICE inline std::make_signed_t<Bits> order_key_nan_last(Bits bits, int64_t inf_bits) {
  constexpr Bits most = Bits(Bits(~Bits(0)) >> 1);
  return Bits(bits & most) > Bits(inf_bits) ? std::make_signed_t<Bits>(most) : order_key(bits);
}

} // namespace
} // namespace oodk
