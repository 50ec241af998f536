// AVX-512 (F, BW, VL, VBMI, VBMI2) for many tokens: a line is one vector.
#include "spike-schedule-256.h"
#include "spike-sums-512.h"
#include "spike-token-lines.h"

#include <string.h>

static void copy_lines(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    const __m512i ones = _mm512_set1_epi8(-1);
    const uint8_t * ahead = from + (stride << 4) + (stride << 3); // lines of a strip come from afar, and no prefetcher sees their order
    for (const uint8_t * end = to + n*(2*SPIKE_LINE_BYTES); to < end; to += 2*SPIKE_LINE_BYTES) {
        _mm_prefetch((const char *) ahead, _MM_HINT_T0);
        const __m512i y = _mm512_loadu_si512(from);
        _mm512_storeu_si512(to, y);
        _mm512_storeu_si512(to + SPIKE_LINE_BYTES, _mm512_xor_si512(y, ones));
        from  += stride;
        ahead += stride;
    }
    memset(to, 0, SPIKE_LINE_BYTES);
}

// Up to 16 spikes of a step to the currents.
SPIKE_INLINE void add_group(const uint8_t * lines, const uint16_t * spikes, int n, tile512 * current) {
    __m512i both = _mm512_setzero_si512(), upper = both;
    if (n == SPIKES_PER_BYTE_SUM) {
        for (int e = 0; e < SPIKES_PER_BYTE_SUM; e++) {
            add_line512(spike_schedule_line(lines, SPIKE_LINE_BYTES, spikes[e]), &both, &upper);
        }
    } else {
        do {
            for (int e = 0; e < SPIKE_SCHEDULE_UNIT; e++) {
                add_line512(spike_schedule_line(lines, SPIKE_LINE_BYTES, spikes[e]), &both, &upper);
            }
            spikes += SPIKE_SCHEDULE_UNIT;
            n      -= SPIKE_SCHEDULE_UNIT;
        } while (n > 0);
    }
    flush512(both, upper, false, current);
}

static void integrate_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t potential[SPIKE_TILE_ROWS]) {
    const lanes512 silent = { _mm512_setzero_si512(), _mm512_setzero_si512() };
    tile512 current = { silent, silent }, sum = current;
    spikes += program->first;
    const spike_schedule_step * step = program->steps;
    for (const spike_schedule_step * end = step + program->n_steps; step < end; step++) {
        int left = step->n_spikes;
        for (; left >= SPIKES_PER_BYTE_SUM; left -= SPIKES_PER_BYTE_SUM) {
            add_group(lines, spikes, SPIKES_PER_BYTE_SUM, &current);
            spikes += SPIKES_PER_BYTE_SUM;
        }
        if (left > 0) {
            add_group(lines, spikes, left, &current);
            spikes += left;
        }
        grow512(&sum, &current);
        if (step->action == SPIKE_DOUBLE) {
            grow512(&sum, &sum);
        } else if (step->action == SPIKE_SPILL) {
            spill512(&sum, step->correction, step->shift, potential);
        }
    }
}

// 64 tokens in two vectors: values are masked where there is no weight and complemented where one is to be subtracted, and
// what complements lack is counted.
SPIKE_INLINE void add_slots(const uint8_t * salient, const int16_t * values, int n_blocks, int16_t sums[SPIKE_TOKEN_LINE]) {
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

// By SPIKE_SCHEDULE_SCALE.
SPIKE_INLINE __m512i scaled(__m512i lines) {
    return _mm512_slli_epi16(lines, 3);
}

// Bytes, of which `count` are of use, as 16-bit lines of a block.
SPIKE_INLINE void append_lines(__m512i lines, __m512i first, int count, uint16_t * list) {
    _mm512_storeu_si512(list, scaled(_mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(lines)))));
    if (count > 32) {
        _mm512_storeu_si512(list + 32, scaled(_mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(lines, 1)))));
    }
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
        append_lines(lines, first, count, next);
        next += count;
        first = _mm512_add_epi16(first, lines_per_block);
    }
    return (uint32_t) (next - list);
}

static uint32_t list_rare(const spike_chunk_values * values, const spike_rare_steps * of, uint16_t * lines, uint8_t * steps) {
    const __m512i first_of = _mm512_loadu_si512(of->first), second_of = _mm512_loadu_si512(of->second);
    const __m512i coarse_bit = _mm512_set1_epi8(SPIKE_RARE_COARSE);
    uint32_t next = 0;
    for (int64_t i = 0; i < values->n; i += QK_SPK) {
        const __mmask64 rare = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(values->key + i), _mm512_set1_epi8((char) SPIKE_RARE));
        if (!rare) {
            continue;
        }
        const __m512i coarse    = _mm512_loadu_si512(values->coarse + i);
        const __m512i magnitude = _mm512_abs_epi8(_mm512_add_epi8(_mm512_loadu_si512(values->fine + i), coarse)); // one of them is 0
        const __m512i place     = _mm512_or_si512(magnitude, _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(coarse, coarse), coarse_bit));
        const __m512i own_place = _mm512_maskz_compress_epi8(rare, place);
        const __m512i own_line  = _mm512_maskz_compress_epi8(rare, _mm512_loadu_si512(values->line_in_block + i));
        const __m512i first_line = _mm512_set1_epi16((short) (2*i));
        const __m512i second    = _mm512_permutexvar_epi8(own_place, second_of); // of what is beyond the last one: that of 0, none
        const int     n_first   = (int) __builtin_popcountll(rare);
        append_lines(own_line, first_line, n_first, lines + next);
        _mm512_storeu_si512(steps + next, _mm512_permutexvar_epi8(own_place, first_of));
        next += (uint32_t) n_first;
        const __mmask64 two      = _mm512_test_epi8_mask(second, second);
        const int       n_second = (int) __builtin_popcountll(two);
        append_lines(_mm512_maskz_compress_epi8(two, own_line), first_line, n_second, lines + next);
        _mm512_storeu_si512(steps + next, _mm512_maskz_compress_epi8(two, second));
        next += (uint32_t) n_second;
    }
    return next;
}

const spike_prompt_kernels spike_prompt_kernels_avx512 = {
    copy_lines, copy_half, integrate_schedule, integrate_half_schedule, 24, transpose_values, add_salient_lines, gather_lines, gather_inputs, list_rare,
};
