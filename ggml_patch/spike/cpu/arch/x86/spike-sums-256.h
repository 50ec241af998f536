// Sums of codes in vectors of 256 bits, for one token and for many: AVX2 takes all lines so, and AVX-512 those of half a tile.
#pragma once

#include "spike/cpu/spike-layout.h"

#include <immintrin.h>

// Each byte holds two codes. Per vector and spike three instructions:
//   both  += y        whole bytes
//   upper += y >> 4   shifted in 16-bit lanes and added in bytes: high codes, and in even bytes 16 times the low one of the next byte
// both modulo 256. 16 spikes of 15 fit in a byte, and the lower four bits of each sum are true: those of low and of high
// codes. They tell what the sums' upper four bits hold too much: low = both - 16*(upper % 16) and, in even bytes,
// high = upper - 16*(both of the next byte % 16). After 16 spikes the sums move to 16-bit currents of even and odd bytes.
// The even ones still carry the odd ones times 256, which the spill takes away again.
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

SPIKE_INLINE void add_line256(const uint8_t * line, int vectors, __m256i both[MAX_VECTORS], __m256i upper[MAX_VECTORS]) {
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

SPIKE_INLINE __m256i add_signed256(__m256i a, __m256i b, bool negative) {
    return negative ? _mm256_sub_epi16(a, b) : _mm256_add_epi16(a, b);
}

SPIKE_INLINE void widen256(__m256i bytes, bool negative, lanes256 * current) {
    current->even = add_signed256(current->even, bytes, negative);
    current->odd  = add_signed256(current->odd,  _mm256_srli_epi16(bytes, 8), negative);
}

// The sums in bytes to the currents, or from them.
SPIKE_INLINE void flush256(const __m256i both[MAX_VECTORS], const __m256i upper[MAX_VECTORS], int vectors, bool negative, tile256 * current) {
    for (int v = 0; v < vectors; v++) {
        const __m256i high_spilled = _mm256_slli_epi16(_mm256_and_si256(upper[v], _mm256_set1_epi8(15)), 4);
        const __m256i low_spilled  = _mm256_and_si256(_mm256_srli_epi16(both[v], 4), _mm256_set1_epi16(0xF0));
        widen256(_mm256_sub_epi8(both[v],  high_spilled), negative, &current->low[v]);
        widen256(_mm256_sub_epi8(upper[v], low_spilled),  negative, &current->high[v]);
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
SPIKE_INLINE void spill_lanes256(lanes256 * sum, __m256i correction, __m128i shift, int32_t * potential) {
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

// correction: what each lane holds too much; shift: of what is left.
SPIKE_INLINE void spill256(tile256 * sum, int vectors, int correction, int shift, int32_t * potential) {
    const __m256i corrections = _mm256_set1_epi16((int16_t) correction);
    const __m128i shifts      = _mm_cvtsi32_si128(shift);
    for (int v = 0; v < vectors; v++) {
        spill_lanes256(&sum->low[v],  corrections, shifts, potential + 32*v);
        spill_lanes256(&sum->high[v], corrections, shifts, potential + 32*(vectors + v));
    }
}
