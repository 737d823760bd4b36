// Whether attention's products of float32 and float16 are made in tile registers, of numbers split into bfloat16
// slices.
#pragma once

#include <string>

#include "../params.h"

namespace tformer {

// What the kernels in force do with a call of these parameters, forward or backward. Slices are made for each query,
// key and value, and gain with each pair of them: only large products are split, or all or none if set_cpu_split says
// so.
bool splits_products(const AttentionParams& p, bool backward);

// "auto", "always" or "never", for the calls that follow, in any thread. Throws std::invalid_argument for another name;
// the message begins with `source`.
void set_cpu_split(const std::string& name, const std::string& source = "set_cpu_split");
std::string cpu_split();

// Sets what the environment variable TFORMER_CPU_SPLIT says, or else "auto".
void set_cpu_split_from_environment();

}  // namespace tformer
