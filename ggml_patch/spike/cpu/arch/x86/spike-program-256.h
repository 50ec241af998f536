// Lines in vectors of 256 bits, for one token: AVX2 takes all lines so, and AVX-512 those of half a tile.
#pragma once

#include "spike-requests.h"
#include "spike-sums-256.h"

// vectors: of a line, 1 or 2. With ahead NULL nothing is requested. Whether it is, vectors, negative and pairs are known when this
// is compiled.
SPIKE_INLINE const uint32_t * add_list256(const uint8_t * lines, int vectors, const uint32_t * offsets, int n, bool negative, tile256 * current,
                                          spike_ahead * ahead, int pairs) {
    while (n > 0) {
        int group = n < SPIKES_PER_BYTE_SUM ? n : SPIKES_PER_BYTE_SUM;
        n -= group;
        __m256i both[MAX_VECTORS], upper[MAX_VECTORS];
        for (int v = 0; v < vectors; v++) {
            both[v] = upper[v] = _mm256_setzero_si256();
        }
        do {
            for (int e = 0; e < SPIKE_LIST_UNIT; e++) {
                add_line256(lines + offsets[e], vectors, both, upper);
            }
            if (ahead) {
                request(ahead, pairs);
            }
            offsets += SPIKE_LIST_UNIT;
            group   -= SPIKE_LIST_UNIT;
        } while (group > 0);
        flush256(both, upper, vectors, negative, current);
    }
    return offsets;
}

SPIKE_INLINE void run_program256(const uint8_t * lines, int vectors, const spike_program * program, const uint32_t * offsets, int32_t * potential,
                                 spike_ahead * ahead, int pairs) {
    const lanes256 silent = { _mm256_setzero_si256(), _mm256_setzero_si256() };
    tile256 current = { { silent, silent }, { silent, silent } }, sum = current;
    offsets += program->first;
    for (int s = 0; s < program->n_steps; s++) {
        const spike_step * step = &program->steps[s];
        offsets = add_list256(lines, vectors, offsets, step->n_positive, false, &current, ahead, pairs);
        offsets = add_list256(lines, vectors, offsets, step->n_negative, true,  &current, ahead, pairs);
        grow256(&sum, vectors, &current);
        if (step->spill) {
            spill256(&sum, vectors, step->correction, 0, potential);
        }
    }
}

static void integrate_half(const uint8_t * lines, const spike_program * program, const uint32_t * offsets, int32_t potential[SPIKE_HALF_TILE],
                           spike_ahead * ahead) {
    if (!ahead) {
        run_program256(lines, SPIKE_HALF_LINE/32, program, offsets, potential, NULL, 0);
    } else if (ahead->third) {
        run_program256(lines, SPIKE_HALF_LINE/32, program, offsets, potential, ahead, 3);
    } else {
        run_program256(lines, SPIKE_HALF_LINE/32, program, offsets, potential, ahead, 2);
    }
}
