// Sums of codes in vectors of 512 bits, for one token and for many: a line of 128 neurons in one vector. The arithmetic is that of
// spike-sums-256.h.
#pragma once

#include "spike/cpu/spike-layout.h"

#include <immintrin.h>

// 16-bit sums of 64 rows.
typedef struct {
    __m512i even, odd;
} lanes512;

typedef struct {
    lanes512 low, high;
} tile512;

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER512(a, b) __asm__("" : "+v"(a), "+v"(b))

SPIKE_INLINE void add_line512(const uint8_t * line, __m512i * both, __m512i * upper) {
    __m512i y = _mm512_loadu_si512(line);
    __asm__("" : "+v"(y)); // loaded once, not by each of its two uses
    *both  = _mm512_add_epi8(*both,  y);
    *upper = _mm512_add_epi8(*upper, _mm512_srli_epi16(y, 4));
    KEEP_ORDER512(*both, *upper);
}

SPIKE_INLINE __m512i add_signed512(__m512i a, __m512i b, bool negative) {
    return negative ? _mm512_sub_epi16(a, b) : _mm512_add_epi16(a, b);
}

SPIKE_INLINE void widen512(__m512i bytes, bool negative, lanes512 * current) {
    current->even = add_signed512(current->even, bytes, negative);
    current->odd  = add_signed512(current->odd,  _mm512_srli_epi16(bytes, 8), negative);
}

// The sums in bytes to the currents, or from them.
SPIKE_INLINE void flush512(__m512i both, __m512i upper, bool negative, tile512 * current) {
    const __m512i high_spilled = _mm512_slli_epi16(_mm512_and_si512(upper, _mm512_set1_epi8(15)), 4);
    const __m512i low_spilled  = _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi16(0xF0));
    widen512(_mm512_sub_epi8(both,  high_spilled), negative, &current->low);
    widen512(_mm512_sub_epi8(upper, low_spilled),  negative, &current->high);
}

SPIKE_INLINE void grow_lanes512(lanes512 * sum, const lanes512 * by) {
    sum->even = _mm512_add_epi16(sum->even, by->even);
    sum->odd  = _mm512_add_epi16(sum->odd,  by->odd);
}

SPIKE_INLINE void grow512(tile512 * sum, const tile512 * by) {
    grow_lanes512(&sum->low,  &by->low);
    grow_lanes512(&sum->high, &by->high);
}

SPIKE_INLINE void accumulate16(int32_t * potential, __m256i sums, __m128i shift) {
    _mm512_storeu_si512(potential, _mm512_add_epi32(_mm512_loadu_si512(potential), _mm512_sll_epi32(_mm512_cvtepi16_epi32(sums), shift)));
}

// The sums of rows, even and odd ones apart, in what widen512 has made of bytes: without what each row holds too much.
SPIKE_INLINE lanes512 rows_of512(lanes512 sum, lanes512 excess) {
    const lanes512 rows = {
        _mm512_sub_epi16(_mm512_sub_epi16(sum.even, _mm512_slli_epi16(sum.odd, 8)), excess.even),
        _mm512_sub_epi16(sum.odd, excess.odd),
    };
    return rows;
}

// To 32 bits.
SPIKE_INLINE void accumulate_rows512(lanes512 rows, __m128i shift, int32_t * potential) {
    const __m512i lo = _mm512_unpacklo_epi16(rows.even, rows.odd); // rows 0-7, 16-23, 32-39, 48-55
    const __m512i hi = _mm512_unpackhi_epi16(rows.even, rows.odd); // rows 8-15, 24-31, 40-47, 56-63
    const __m512i first_half  = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), hi);
    const __m512i second_half = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), hi);
    accumulate16(potential,      _mm512_castsi512_si256(first_half), shift);
    accumulate16(potential + 16, _mm512_extracti64x4_epi64(first_half, 1), shift);
    accumulate16(potential + 32, _mm512_castsi512_si256(second_half), shift);
    accumulate16(potential + 48, _mm512_extracti64x4_epi64(second_half, 1), shift);
}

SPIKE_INLINE void spill_lanes512(lanes512 * sum, lanes512 correction, __m128i shift, int32_t * potential) {
    accumulate_rows512(rows_of512(*sum, correction), shift, potential);
    sum->even = sum->odd = _mm512_setzero_si512();
}

// correction: what each lane holds too much; shift: of what is left.
SPIKE_INLINE void spill512(tile512 * sum, int correction, int shift, int32_t * potential) {
    const __m512i  lane        = _mm512_set1_epi16((int16_t) correction);
    const lanes512 corrections = { lane, lane };
    const __m128i  shifts      = _mm_cvtsi32_si128(shift);
    spill_lanes512(&sum->low,  corrections, shifts, potential);
    spill_lanes512(&sum->high, corrections, shifts, potential + SPIKE_HALF_TILE);
}
