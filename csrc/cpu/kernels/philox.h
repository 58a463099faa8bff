// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011), on vectors of counters.
//
// A lane is 64 bits wide and holds one 32-bit word in its lower half: that is what widening
// multiplications read, so that the upper half may hold anything and nothing needs to be cleared.
#pragma once

#include "vec.h"

namespace attn_kd::ATTN_KD_ISA {

// The 64-bit products of the lanes' lower halves with `multiplier`.
inline vec<uint64_t> multiply_words(vec<uint64_t> x, uint32_t multiplier) {
  const vec<uint64_t> m = broadcast<uint64_t>(multiplier);
#if defined(__AVX512F__)
  return (vec<uint64_t>)_mm512_mul_epu32((__m512i)x, (__m512i)m);
#elif defined(__AVX2__)
  return (vec<uint64_t>)_mm256_mul_epu32((__m256i)x, (__m256i)m);
#else
  return (x & 0xffffffffu) * m;
#endif
}

// Replaces a counter of four words by its four random words.
inline void philox(vec<uint64_t> (&word)[4], const uint32_t (&key)[2]) {
  uint32_t key0 = key[0], key1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const vec<uint64_t> product0 = multiply_words(word[0], 0xD2511F53u);
    const vec<uint64_t> product1 = multiply_words(word[2], 0xCD9E8D57u);
    word[0] = (product1 >> 32) ^ word[1] ^ broadcast<uint64_t>(key0);
    word[1] = product1;
    word[2] = (product0 >> 32) ^ word[3] ^ broadcast<uint64_t>(key1);
    word[3] = product0;
    key0 += 0x9E3779B9u;  // the golden ratio's and sqrt(3)'s fractions
    key1 += 0xBB67AE85u;
  }
}

}  // namespace attn_kd::ATTN_KD_ISA
