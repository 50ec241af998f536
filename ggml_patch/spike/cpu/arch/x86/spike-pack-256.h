// Numbers of 16 bits picked out of vectors, which AVX2 has no instruction for: those of 64 at a time whose bytes are the wanted ones.
#pragma once

#include "spike/cpu/spike-pack.h"
#include "spike/spike.h"

#include <immintrin.h>

// Which of 64 bytes have a value, bit by bit.
SPIKE_INLINE uint64_t find_bytes(const void * bytes, __m256i wanted) {
    const __m256i * b = (const __m256i *) bytes;
    const uint32_t lower = (uint32_t) _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(b), wanted));
    const uint32_t upper = (uint32_t) _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(b + 1), wanted));
    return lower | (uint64_t) upper << 32;
}

// The k-th eight of 64 numbers, to their places in a list of all that are found, in order; what follows them in eight places is
// overwritten. Where they belong is counted anew, so that no eight wait for those before them.
SPIKE_INLINE void pack_eight(__m128i numbers, uint64_t found, int k, uint16_t * list) {
    const int     before = k == 0 ? 0 : __builtin_popcountll(found << (64 - 8*k));
    const __m128i pack   = _mm_loadu_si128((const __m128i *) spike_pack[found >> 8*k & 255]);
    _mm_storeu_si128((__m128i *) (list + before), _mm_shuffle_epi8(numbers, pack));
}
