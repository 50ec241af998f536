// Lines in vectors of 256 bits, for one token: AVX2 takes all lines so, and AVX-512 those of half a tile.
#pragma once

#include "spike-requests.h"

#include <immintrin.h>

// Sums as in spike-schedule-256.h. vectors: of a line, 1 or 2, known when this is compiled.
enum { MAX_VECTORS = SPIKE_LINE_BYTES/32, SPIKES_PER_BYTE_SUM = 16 };

// 16-bit sums of 32 rows.
typedef struct {
    __m256i even, odd;
} lanes256;

// Of the rows of each vector's low codes, and of its high ones.
typedef struct {
    lanes256 low[MAX_VECTORS], high[MAX_VECTORS];
} tile256;

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER256(a, b) __asm__("" : "+x"(a), "+x"(b))

SPIKE_INLINE __m256i add256(__m256i a, __m256i b, bool negative) {
    return negative ? _mm256_sub_epi16(a, b) : _mm256_add_epi16(a, b);
}

SPIKE_INLINE void widen256(__m256i bytes, bool negative, lanes256 * current) {
    current->even = add256(current->even, bytes, negative);
    current->odd  = add256(current->odd,  _mm256_srli_epi16(bytes, 8), negative);
}

// With ahead NULL nothing is requested. Whether it is, negative and pairs are known when this is compiled, too.
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
                const __m256i * line = (const __m256i *) (lines + offsets[e]);
                for (int v = 0; v < vectors; v++) {
                    __m256i y = _mm256_loadu_si256(line + v);
                    __asm__("" : "+x"(y)); // loaded once, not by each of its two uses
                    both[v]  = _mm256_add_epi8(both[v],  y);
                    upper[v] = _mm256_add_epi8(upper[v], _mm256_srli_epi16(y, 4));
                    KEEP_ORDER256(both[v], upper[v]);
                }
            }
            if (ahead) {
                request(ahead, pairs);
            }
            offsets += SPIKE_LIST_UNIT;
            group   -= SPIKE_LIST_UNIT;
        } while (group > 0);
        for (int v = 0; v < vectors; v++) {
            const __m256i high_spilled = _mm256_slli_epi16(_mm256_and_si256(upper[v], _mm256_set1_epi8(15)), 4);
            const __m256i low_spilled  = _mm256_and_si256(_mm256_srli_epi16(both[v], 4), _mm256_set1_epi16(0xF0));
            widen256(_mm256_sub_epi8(both[v],  high_spilled), negative, &current->low[v]);
            widen256(_mm256_sub_epi8(upper[v], low_spilled),  negative, &current->high[v]);
        }
    }
    return offsets;
}

SPIKE_INLINE void accumulate8(int32_t * potential, __m128i sums) {
    __m256i * p = (__m256i *) potential;
    _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), _mm256_cvtepi16_epi32(sums)));
}

// 32 rows, even and odd ones apart, to 32 bits.
SPIKE_INLINE void spill256(lanes256 * sum, __m256i correction, int32_t * potential) {
    const __m256i e  = _mm256_sub_epi16(_mm256_sub_epi16(sum->even, _mm256_slli_epi16(sum->odd, 8)), correction);
    const __m256i o  = _mm256_sub_epi16(sum->odd, correction);
    const __m256i lo = _mm256_unpacklo_epi16(e, o); // rows 0-7, 16-23
    const __m256i hi = _mm256_unpackhi_epi16(e, o); // rows 8-15, 24-31
    accumulate8(potential,      _mm256_castsi256_si128(lo));
    accumulate8(potential + 8,  _mm256_castsi256_si128(hi));
    accumulate8(potential + 16, _mm256_extracti128_si256(lo, 1));
    accumulate8(potential + 24, _mm256_extracti128_si256(hi, 1));
    sum->even = sum->odd = _mm256_setzero_si256();
}

SPIKE_INLINE void grow256(lanes256 * sum, const lanes256 * by) {
    sum->even = _mm256_add_epi16(sum->even, by->even);
    sum->odd  = _mm256_add_epi16(sum->odd,  by->odd);
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
        for (int v = 0; v < vectors; v++) {
            grow256(&sum.low[v],  &current.low[v]);
            grow256(&sum.high[v], &current.high[v]);
        }
        if (step->spill) {
            const __m256i correction = _mm256_set1_epi16(step->correction);
            for (int v = 0; v < vectors; v++) {
                spill256(&sum.low[v],  correction, potential + 32*v);
                spill256(&sum.high[v], correction, potential + 32*(vectors + v));
            }
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
