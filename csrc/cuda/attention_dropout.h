// Which weights of a tile dropout keeps, as bits in shared memory: philox.h, one counter for eight keys.
#pragma once

#include <gpu/device.h>

#include "../params.h"
#include "dropout.h"

namespace tformer::gpu {

constexpr int kKeepBlock = static_cast<int>(kPhiloxBlock);

// Bits of kQueries x (64 kBlocks) pairs; bit k of a query's word n is key first + 64 n + k.
template <int kQueries, int kBlocks>
struct KeepBits {
  static constexpr int kBytes = kQueries * kBlocks * 8;
  char* data;

  // By all threads of the block. first_key is a multiple of 64.
  template <int kThreads>
  TFORMER_DEVICE void draw(const AttentionParams& p, int b, int h, int first_query, int first_key) const {
    const auto seed = static_cast<uint64_t>(*p.dropout_seed);
    const uint32_t threshold = dropout_threshold(p.dropout_p);
    // a thread takes half of a word, four counters: of each of its four groups of 16 keys one byte
    for (int n = thread_index(); n < kQueries * kBlocks * 2; n += kThreads) {
      const int query = n / (2 * kBlocks), block = n / 2 % kBlocks, half = n % 2;
      const auto base = static_cast<uint32_t>((first_key / kKeepBlock + block) * kPhiloxCounters + 4 * half);
      uint32_t bits[4] = {0, 0, 0, 0};
#pragma unroll 2
      for (uint32_t c = 0; c < 4; ++c) {
        const PhiloxWords random = philox(base + c, static_cast<uint32_t>(first_query + query),
                                          static_cast<uint32_t>(h), static_cast<uint32_t>(b), seed);
#pragma unroll
        for (int group = 0; group < 4; ++group) {
#pragma unroll
          for (uint32_t odd = 0; odd < 2; ++odd) {
            const bool keep = random.number(group, static_cast<int>(odd)) >= threshold;
            bits[group] |= static_cast<uint32_t>(keep) << (2 * c + odd);
          }
        }
      }
      char* word = data + (query * kBlocks + block) * 8 + half;
#pragma unroll
      for (int w = 0; w < 4; ++w) word[2 * w] = static_cast<char>(bits[w]);
    }
  }

  TFORMER_DEVICE uint64_t word(int query, int block) const {
    return reinterpret_cast<const uint64_t*>(data)[query * kBlocks + block];
  }
};

// One pair alone.
TFORMER_DEVICE bool is_kept(const AttentionParams& p, int b, int h, int i, int j) {
  const auto at = static_cast<uint32_t>(j / kKeepBlock) * kPhiloxCounters + static_cast<uint32_t>(j % 16 / 2);
  const PhiloxWords random = philox(at, static_cast<uint32_t>(i), static_cast<uint32_t>(h), static_cast<uint32_t>(b),
                                    static_cast<uint64_t>(*p.dropout_seed));
  // put together, since a word by its number would go to memory
  const uint64_t first = static_cast<uint64_t>(random.word[1]) << 32 | random.word[0];
  const uint64_t second = static_cast<uint64_t>(random.word[3]) << 32 | random.word[2];
  const uint64_t words = j % kKeepBlock < 32 ? first : second;
  const auto number = static_cast<uint32_t>(words >> (j % 2 * 32 + j / 16 % 2 * 16)) & 0xFFFF;
  return number >= dropout_threshold(p.dropout_p);
}

}  // namespace tformer::gpu
