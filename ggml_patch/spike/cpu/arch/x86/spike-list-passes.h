// Lists of spikes by a pass for every magnitude and sign: what the kernels of AVX2 and AVX-512 have in common.
//
// The counting sort of the plain C kernel needs a counter soon after it was written, which takes some CPUs three times as long as others.
#pragma once

#include "spike/cpu/spike-kernels.h"

#include <immintrin.h>
#include <string.h>

// The inputs that fire, and those of one value, numbered from `first` on; returned is where the list ends. largest: of the
// magnitudes. The including file has both.
SPIKE_INLINE uint16_t * list_active(const int8_t * values, int64_t n, int64_t first, uint16_t * list, int * largest);
SPIKE_INLINE uint16_t * list_value(const int8_t * values, int64_t n, int64_t first, int wanted, uint16_t * list);

static void list_spikes(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                        spike_lists * lists) {
    int largest;
    lists->n_active = (uint32_t) (list_active(values, n, first, active, &largest) - active);
    memset(lists->count, 0, sizeof(lists->count));
    const __m128i padding = _mm_set1_epi16((short) zero_line);
    uint16_t * next = lines;
    for (int m = largest; m > 0; m--) {
        for (int negative = 0; negative < 2; negative++) {
            uint16_t * end = list_value(values, n, first, negative ? -m : m, next);
            const uint32_t count = (uint32_t) (end - next);
            _mm_storel_epi64((__m128i *) end, padding);
            next += (count + SPIKE_LIST_UNIT - 1) & ~(uint32_t) (SPIKE_LIST_UNIT - 1);
            lists->count[2*m + negative] = (uint16_t) count;
        }
    }
    lists->n_places = (uint32_t) (next - lines);
}
