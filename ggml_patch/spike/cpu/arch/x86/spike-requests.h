// Requests of lines while others are added, see spike_ahead: what the kernels of AVX2 and AVX-512 have in common.
#pragma once

#include "spike/cpu/spike-kernels.h"

#include <immintrin.h>

// The compiler would make one product of a loop's steps.
#define KEEP_SUM(a) __asm__("" : "+r"(a))

SPIKE_INLINE void prefetch_pair(const uint8_t * line) {
    _mm_prefetch((const char *) line, _MM_HINT_T1);
    _mm_prefetch((const char *) line + SPIKE_LINE_BYTES, _MM_HINT_T1);
}

SPIKE_INLINE void prefetch_run(const uint8_t * run, const spike_ahead * ahead, int pairs) {
    prefetch_pair(run);
    prefetch_pair(run + ahead->second);
    if (pairs == 3) {
        prefetch_pair(run + ahead->third);
    }
}

// A run for the first time, and others again.
SPIKE_INLINE void request(spike_ahead * ahead, int pairs) {
    const uint8_t * const * next = ahead->runs + (ahead->position >> SPIKE_AHEAD_SHIFT);
    for (int time = 0; time < SPIKE_AHEAD_TIMES; time++) {
        prefetch_run(next[-time*SPIKE_AHEAD_AGAIN], ahead, pairs);
    }
    ahead->position += ahead->step;
    KEEP_SUM(ahead->position);
}
