// What a kernel needs of dropout, made on the host; the seed stays where the kernel reads it.
#pragma once

#include "../philox.h"

namespace tformer {

struct DropoutParams {
  const int64_t* seed;  // null: no dropout
  uint32_t drop_below;  // an element whose number is below this is dropped
  double scale;         // of the others
};

inline DropoutParams dropout_params(double p, const int64_t* seed) {
  return {p > 0 ? seed : nullptr, dropout_threshold(p), dropout_scale(p)};
}

}  // namespace tformer
