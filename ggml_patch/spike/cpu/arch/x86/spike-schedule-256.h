// Lines in vectors of 256 bits, for many tokens: AVX2 takes all lines so, and AVX-512 those of half a tile.
#pragma once

#include "spike/cpu/spike-prompt-kernels.h"

#include <immintrin.h>
#include <string.h>

// Each byte holds two codes. Per vector and spike three instructions:
//   both  += y        whole bytes
//   upper += y >> 4   shifted in 16-bit lanes and added in bytes: high codes, and in even bytes 16 times the low one of the next byte
// both modulo 256. 16 spikes of 15 fit in a byte, and the lower four bits of each sum are true: those of low and of high
// codes. They tell what the sums' upper four bits hold too much: low = both - 16*(upper % 16) and, in even bytes,
// high = upper - 16*(both of the next byte % 16). After 16 spikes the sums move to 16-bit currents of even and odd bytes.
// The even ones still carry the odd ones times 256, which the spill takes away again.
enum { MAX_VECTORS = SPIKE_LINE_BYTES/32, SPIKES_PER_BYTE_SUM = 16, FULL_UNITS = SPIKES_PER_BYTE_SUM/SPIKE_SCHEDULE_UNIT };

// vectors: of a line, 1 or 2, here and below; known when this is compiled.
SPIKE_INLINE void copy256(const uint8_t * from, size_t stride, int vectors, int64_t n, uint8_t * to) {
    const __m256i ones = _mm256_set1_epi8(-1);
    const uint8_t * ahead = from + (stride << 4); // lines of a strip come from afar, and no prefetcher sees their order
    for (const uint8_t * end = to + 2*n*vectors*(int64_t) sizeof(ones); to < end; to += 2*(size_t) vectors*sizeof(ones)) {
        _mm_prefetch((const char *) ahead, _MM_HINT_T0);
        for (int v = 0; v < vectors; v++) {
            const __m256i y = _mm256_loadu_si256((const __m256i *) from + v);
            _mm256_storeu_si256((__m256i *) to + v, y);
            _mm256_storeu_si256((__m256i *) to + vectors + v, _mm256_xor_si256(y, ones));
        }
        from  += stride;
        ahead += stride;
    }
    memset(to, 0, (size_t) vectors*sizeof(ones));
}

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

// SPIKE_SCHEDULE_UNIT spikes to the sums in bytes.
SPIKE_INLINE void add_unit256(const uint8_t * lines, int vectors, const uint16_t * spikes, __m256i both[MAX_VECTORS], __m256i upper[MAX_VECTORS]) {
    for (int e = 0; e < SPIKE_SCHEDULE_UNIT; e++) {
        const uint8_t * line = spike_schedule_line(lines, (size_t) vectors*sizeof(__m256i), spikes[e]);
        __m256i y[MAX_VECTORS];
        for (int v = 0; v < vectors; v++) {
            y[v] = _mm256_loadu_si256((const __m256i *) line + v);
            __asm__("" : "+x"(y[v])); // loaded once, not by each of its two uses
        }
        for (int v = 0; v < vectors; v++) {
            both[v]  = _mm256_add_epi8(both[v],  y[v]);
            upper[v] = _mm256_add_epi8(upper[v], _mm256_srli_epi16(y[v], 4));
            KEEP_ORDER256(both[v], upper[v]);
        }
    }
}

SPIKE_INLINE void widen256(__m256i bytes, lanes256 * current) {
    current->even = _mm256_add_epi16(current->even, bytes);
    current->odd  = _mm256_add_epi16(current->odd,  _mm256_srli_epi16(bytes, 8));
}

// Up to 16 spikes of a step to the currents.
SPIKE_INLINE void add_group256(const uint8_t * lines, int vectors, const uint16_t * spikes, int n_units, tile256 * current) {
    __m256i both[MAX_VECTORS], upper[MAX_VECTORS];
    for (int v = 0; v < vectors; v++) {
        both[v] = upper[v] = _mm256_setzero_si256();
    }
    if (n_units == FULL_UNITS) {
        for (int u = 0; u < FULL_UNITS; u++) {
            add_unit256(lines, vectors, spikes + u*SPIKE_SCHEDULE_UNIT, both, upper);
        }
    } else {
        do {
            add_unit256(lines, vectors, spikes, both, upper);
            spikes += SPIKE_SCHEDULE_UNIT;
        } while (--n_units > 0);
    }
    for (int v = 0; v < vectors; v++) {
        const __m256i high_spilled = _mm256_slli_epi16(_mm256_and_si256(upper[v], _mm256_set1_epi8(15)), 4);
        const __m256i low_spilled  = _mm256_and_si256(_mm256_srli_epi16(both[v], 4), _mm256_set1_epi16(0xF0));
        widen256(_mm256_sub_epi8(both[v],  high_spilled), &current->low[v]);
        widen256(_mm256_sub_epi8(upper[v], low_spilled),  &current->high[v]);
    }
}

SPIKE_INLINE void grow_lanes256(lanes256 * sum, const lanes256 * by) {
    sum->even = _mm256_add_epi16(sum->even, by->even);
    sum->odd  = _mm256_add_epi16(sum->odd,  by->odd);
}

SPIKE_INLINE void grow256(tile256 * sum, int vectors, const tile256 * by) {
    for (int v = 0; v < vectors; v++) {
        grow_lanes256(&sum->low[v],  &by->low[v]);
        grow_lanes256(&sum->high[v], &by->high[v]);
    }
}

SPIKE_INLINE void accumulate8(int32_t * potential, __m128i sums, __m128i shift) {
    __m256i * p = (__m256i *) potential;
    _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), _mm256_sll_epi32(_mm256_cvtepi16_epi32(sums), shift)));
}

// 32 rows, even and odd ones apart, to 32 bits.
SPIKE_INLINE void spill256(lanes256 * sum, const spike_schedule_step * step, int32_t * potential) {
    const __m256i correction = _mm256_set1_epi16((int16_t) step->correction);
    const __m128i shift = _mm_cvtsi32_si128(step->shift);
    const __m256i e  = _mm256_sub_epi16(_mm256_sub_epi16(sum->even, _mm256_slli_epi16(sum->odd, 8)), correction);
    const __m256i o  = _mm256_sub_epi16(sum->odd, correction);
    const __m256i lo = _mm256_unpacklo_epi16(e, o); // rows 0-7, 16-23
    const __m256i hi = _mm256_unpackhi_epi16(e, o); // rows 8-15, 24-31
    accumulate8(potential,      _mm256_castsi256_si128(lo), shift);
    accumulate8(potential + 8,  _mm256_castsi256_si128(hi), shift);
    accumulate8(potential + 16, _mm256_extracti128_si256(lo, 1), shift);
    accumulate8(potential + 24, _mm256_extracti128_si256(hi, 1), shift);
    sum->even = sum->odd = _mm256_setzero_si256();
}

SPIKE_INLINE void run_schedule256(const uint8_t * lines, int vectors, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential) {
    const lanes256 silent = { _mm256_setzero_si256(), _mm256_setzero_si256() };
    tile256 current = { { silent, silent }, { silent, silent } }, sum = current;
    spikes += program->first;
    const spike_schedule_step * step = program->steps;
    for (const spike_schedule_step * end = step + program->n_steps; step < end; step++) {
        int left = step->n_spikes;
        for (; left >= SPIKES_PER_BYTE_SUM; left -= SPIKES_PER_BYTE_SUM) {
            add_group256(lines, vectors, spikes, FULL_UNITS, &current);
            spikes += SPIKES_PER_BYTE_SUM;
        }
        if (left > 0) {
            add_group256(lines, vectors, spikes, left/SPIKE_SCHEDULE_UNIT, &current);
            spikes += left;
        }
        grow256(&sum, vectors, &current);
        if (step->action == SPIKE_DOUBLE) {
            grow256(&sum, vectors, &sum);
        } else if (step->action == SPIKE_SPILL) {
            for (int v = 0; v < vectors; v++) {
                spill256(&sum.low[v],  step, potential + 32*v);
                spill256(&sum.high[v], step, potential + 32*(vectors + v));
            }
        }
    }
}

static void copy_half(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy256(from, stride, SPIKE_HALF_LINE/32, n, to);
}

static void integrate_half_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                                    int32_t potential[SPIKE_HALF_TILE]) {
    run_schedule256(lines, SPIKE_HALF_LINE/32, program, spikes, potential);
}
