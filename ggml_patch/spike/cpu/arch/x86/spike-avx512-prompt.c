// AVX-512 (F, BW, VL, VBMI, VBMI2) for many tokens: two tiles side by side, 256 neurons. The arithmetic is that of spike-avx2-prompt.c.
#include "spike-token-lines.h"

#include <string.h>

static void copy_lines(const uint8_t * from, size_t stride, int64_t width, int64_t n, uint8_t * to) {
    const __m512i ones = _mm512_set1_epi8(-1);
    const uint8_t * ahead = from + (stride << 4) + (stride << 3); // lines of a strip come from afar, and no prefetcher sees their order
    for (const uint8_t * end = to + (n << (spike_line_shift(width) + 1)); to < end;) {
        for (int64_t w = 0; w < width; w++) {
            _mm_prefetch((const char *) ahead + SPIKE_LINE_BYTES*w, _MM_HINT_T0);
            const __m512i y = _mm512_loadu_si512(from + SPIKE_LINE_BYTES*w);
            _mm512_storeu_si512(to + SPIKE_LINE_BYTES*w, y);
            _mm512_storeu_si512(to + SPIKE_LINE_BYTES*(width + w), _mm512_xor_si512(y, ones));
        }
        from  += stride;
        ahead += stride;
        to    += 2*SPIKE_LINE_BYTES*width;
    }
    memset(to, 0, (size_t) (SPIKE_LINE_BYTES*width));
}

typedef struct {
    __m512i low_even, low_odd, high_even, high_odd;
} lanes;

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER(a, b) __asm__("" : "+v"(a), "+v"(b))

#define INLINE static inline __attribute__((always_inline))

// SPIKE_SCHEDULE_UNIT spikes to the sums in bytes.
INLINE void add_unit(const uint8_t * lines, int width, const uint16_t * spikes, __m512i low[SPIKE_MAX_WIDTH], __m512i high[SPIKE_MAX_WIDTH]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int e = 0; e < SPIKE_SCHEDULE_UNIT; e++) {
        const uint8_t * line = lines + ((size_t) spikes[e] << spike_line_shift(width));
        for (int w = 0; w < width; w++) {
            __m512i y = _mm512_loadu_si512(line + SPIKE_LINE_BYTES*w);
            __asm__("" : "+v"(y)); // loaded once, not by each of its two uses
            low[w]  = _mm512_add_epi8(low[w], _mm512_and_si512(y, nibble));
            high[w] = _mm512_add_epi16(high[w], _mm512_srli_epi16(y, 4));
            KEEP_ORDER(low[w], high[w]);
        }
    }
}

INLINE void flush(__m512i low, __m512i high, lanes * current) {
    const __m512i low_odd  = _mm512_srli_epi16(low, 8);
    const __m512i high_own = _mm512_sub_epi16(high, _mm512_slli_epi16(low_odd, 4));
    current->low_even  = _mm512_add_epi16(current->low_even,  low);
    current->low_odd   = _mm512_add_epi16(current->low_odd,   low_odd);
    current->high_even = _mm512_add_epi16(current->high_even, high_own);
    current->high_odd  = _mm512_add_epi16(current->high_odd,  _mm512_srli_epi16(high_own, 8));
}

INLINE void grow(lanes * sum, const lanes * by) {
    sum->low_even  = _mm512_add_epi16(sum->low_even,  by->low_even);
    sum->low_odd   = _mm512_add_epi16(sum->low_odd,   by->low_odd);
    sum->high_even = _mm512_add_epi16(sum->high_even, by->high_even);
    sum->high_odd  = _mm512_add_epi16(sum->high_odd,  by->high_odd);
}

INLINE void accumulate16(int32_t * potential, __m256i sums, __m128i shift) {
    _mm512_storeu_si512(potential, _mm512_add_epi32(_mm512_loadu_si512(potential), _mm512_sll_epi32(_mm512_cvtepi16_epi32(sums), shift)));
}

// 64 rows, even and odd ones apart, to 32 bits.
INLINE void spill64(__m512i even, __m512i odd, const spike_schedule_step * step, int32_t * potential) {
    const __m512i correction = _mm512_set1_epi16((int16_t) step->correction);
    const __m128i shift = _mm_cvtsi32_si128(step->shift);
    const __m512i e = _mm512_sub_epi16(_mm512_sub_epi16(even, _mm512_slli_epi16(odd, 8)), correction);
    const __m512i o = _mm512_sub_epi16(odd, correction);
    const __m512i lo = _mm512_unpacklo_epi16(e, o); // rows 0-7, 16-23, 32-39, 48-55
    const __m512i hi = _mm512_unpackhi_epi16(e, o); // rows 8-15, 24-31, 40-47, 56-63
    const __m512i first_half  = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), hi);
    const __m512i second_half = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), hi);
    accumulate16(potential,      _mm512_castsi512_si256(first_half), shift);
    accumulate16(potential + 16, _mm512_extracti64x4_epi64(first_half, 1), shift);
    accumulate16(potential + 32, _mm512_castsi512_si256(second_half), shift);
    accumulate16(potential + 48, _mm512_extracti64x4_epi64(second_half, 1), shift);
}

// With width known when this is compiled.
INLINE void run_schedule(const uint8_t * lines, int width, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential) {
    enum { SPIKES_PER_BYTE_SUM = 16, FULL_UNITS = SPIKES_PER_BYTE_SUM/SPIKE_SCHEDULE_UNIT };
    const __m512i zero = _mm512_setzero_si512();
    const lanes silent = { zero, zero, zero, zero };
    lanes current[SPIKE_MAX_WIDTH], sum[SPIKE_MAX_WIDTH];
    for (int w = 0; w < width; w++) {
        current[w] = sum[w] = silent;
    }
    spikes += program->first;
    const spike_schedule_step * step = program->steps;
    for (const spike_schedule_step * end = step + program->n_steps; step < end; step++) {
        int left = step->n_spikes;
        for (; left >= SPIKES_PER_BYTE_SUM; left -= SPIKES_PER_BYTE_SUM) {
            __m512i low[SPIKE_MAX_WIDTH] = { zero, zero }, high[SPIKE_MAX_WIDTH] = { zero, zero };
            for (int u = 0; u < FULL_UNITS; u++) {
                add_unit(lines, width, spikes + u*SPIKE_SCHEDULE_UNIT, low, high);
            }
            spikes += SPIKES_PER_BYTE_SUM;
            for (int w = 0; w < width; w++) {
                flush(low[w], high[w], &current[w]);
            }
        }
        if (left > 0) {
            __m512i low[SPIKE_MAX_WIDTH] = { zero, zero }, high[SPIKE_MAX_WIDTH] = { zero, zero };
            do {
                add_unit(lines, width, spikes, low, high);
                spikes += SPIKE_SCHEDULE_UNIT;
                left   -= SPIKE_SCHEDULE_UNIT;
            } while (left > 0);
            for (int w = 0; w < width; w++) {
                flush(low[w], high[w], &current[w]);
            }
        }
        for (int w = 0; w < width; w++) {
            grow(&sum[w], &current[w]);
        }
        if (step->action == SPIKE_DOUBLE) {
            for (int w = 0; w < width; w++) {
                grow(&sum[w], &sum[w]);
            }
        } else if (step->action == SPIKE_SPILL) {
            for (int w = 0; w < width; w++) {
                spill64(sum[w].low_even,  sum[w].low_odd,  step, potential + w*SPIKE_TILE_ROWS);
                spill64(sum[w].high_even, sum[w].high_odd, step, potential + w*SPIKE_TILE_ROWS + 64);
                sum[w] = silent;
            }
        }
    }
}

static void integrate_schedule(const uint8_t * lines, int64_t width, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t * potential) {
    if (width == 2) {
        run_schedule(lines, 2, program, spikes, potential);
    } else {
        run_schedule(lines, 1, program, spikes, potential);
    }
}

// 64 tokens in two vectors: values are masked where there is no weight and complemented where one is to be subtracted, and
// what complements lack is counted.
INLINE void add_slots(const uint8_t * salient, const int16_t * values, int n_blocks, int16_t sums[SPIKE_TOKEN_LINE]) {
    static const int32_t PRESENT[4] = { 0, -1, -1, 0 }, NEGATIVE[4] = { 0, 0, -1, 0 }; // bits 6-7: nothing, add, subtract, nothing
    enum { XOR_OF_AND = 0x78 }; // negative ^ (present & value)
    __m512i first = _mm512_load_si512(sums), second = _mm512_load_si512(sums + 32), lacking = _mm512_setzero_si512();
    for (int k = 0; k < n_blocks; k++) {
        for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
            const int16_t * line     = values + (*salient & 63)*SPIKE_TOKEN_LINE;
            const __m512i   present  = _mm512_set1_epi32(PRESENT[*salient >> 6]);
            const __m512i   negative = _mm512_set1_epi32(NEGATIVE[*salient >> 6]);
            first   = _mm512_add_epi16(first,  _mm512_ternarylogic_epi32(negative, present, _mm512_loadu_si512(line), XOR_OF_AND));
            second  = _mm512_add_epi16(second, _mm512_ternarylogic_epi32(negative, present, _mm512_loadu_si512(line + 32), XOR_OF_AND));
            lacking = _mm512_sub_epi16(lacking, negative);
            salient += SPIKE_TILE_ROWS;
        }
        values += QK_SPK*SPIKE_TOKEN_LINE;
    }
    _mm512_store_si512(sums,      _mm512_add_epi16(first,  lacking));
    _mm512_store_si512(sums + 32, _mm512_add_epi16(second, lacking));
}

static uint32_t gather_lines(const uint8_t * key, const uint16_t * line, int64_t n, uint8_t wanted, uint16_t * list) {
    const __m512i w = _mm512_set1_epi8((char) wanted);
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 found = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(key + i), w);
        const __mmask32 first = (__mmask32) found, second = (__mmask32) (found >> 32);
        _mm512_storeu_si512(next, _mm512_maskz_compress_epi16(first, _mm512_loadu_si512(line + i)));
        next += __builtin_popcount(first);
        _mm512_storeu_si512(next, _mm512_maskz_compress_epi16(second, _mm512_loadu_si512(line + i + 32)));
        next += __builtin_popcount(second);
    }
    return (uint32_t) (next - list);
}

static uint32_t gather_inputs(const uint8_t * key, const uint8_t * line_in_block, int64_t n, uint8_t wanted, uint16_t * list) {
    const __m512i w = _mm512_set1_epi8((char) wanted);
    const __m512i lines_per_block = _mm512_set1_epi16(2*QK_SPK);
    __m512i first = _mm512_setzero_si512(); // line of the block
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += QK_SPK) {
        const __mmask64 found = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(key + i), w);
        const __m512i   lines = _mm512_maskz_compress_epi8(found, _mm512_loadu_si512(line_in_block + i));
        const int       count = (int) __builtin_popcountll(found);
        _mm512_storeu_si512(next, _mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(lines))));
        if (count > 32) {
            _mm512_storeu_si512(next + 32, _mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(lines, 1))));
        }
        next += count;
        first = _mm512_add_epi16(first, lines_per_block);
    }
    return (uint32_t) (next - list);
}

const spike_prompt_kernels spike_prompt_kernels_avx512 = {
    2, copy_lines, integrate_schedule, 24, transpose_values, add_salient_lines, gather_lines, gather_inputs,
};
