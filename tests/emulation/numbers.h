// 16-bit floats in plain C++.
#pragma once

#include <gpu/types.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tformer::gpu::emulation {

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float wide(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float wide(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + ((127 - 15) << 23)));
  const float small = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -small : small;
}

// To the nearest, ties to even; NaN to the one that the GPU gives.
template <class T>
T narrow(float x);

template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline f16 narrow<f16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)))};
  uint32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  bits -= (127 - 15) << 23;
  return {static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}

}  // namespace tformer::gpu::emulation
