// Numbers of 16 bits picked out of vectors, which AVX2 has no instruction for.
#pragma once

#include "spike/cpu/spike-pack.h"
#include "spike/spike.h"

#include <immintrin.h>

// Those of eight numbers whose bits are set, in order; what follows them in eight places is overwritten.
SPIKE_INLINE uint16_t * pack_numbers(__m128i numbers, uint32_t set, uint16_t * next) {
    const __m128i pack = _mm_loadu_si128((const __m128i *) spike_pack[set]);
    _mm_storeu_si128((__m128i *) next, _mm_shuffle_epi8(numbers, pack));
    return next + __builtin_popcount(set);
}
