// AVX-512 (F, BW, VL, VBMI, VBMI2) for many tokens: a line is one vector.
#include "spike-schedule-256.h"
#include "spike-sums-512.h"

#include "spike/cpu/spike-train.h"

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

// ---- salient weights

enum {
    HALF_ROWS = SPIKE_HALF_TILE, // a vector of bytes
    TOKENS_TOGETHER = 2,         // that share the reading of weights
    BLOCKS_PER_BYTE_SUM = 128/(SPIKE_SALIENT_SLOTS*SPIKE_MAX_MAGNITUDE), // of values and their complements, -16..15
    BLOCKS_AT_A_TIME = 64,
};

// The salient weights of some blocks, in which rows there is one, and how many of them subtract.
typedef struct {
    int64_t         first, n;
    const uint8_t * salients;
    __mmask64       present[BLOCKS_AT_A_TIME][SPIKE_SALIENT_SLOTS][2];
    __m512i         n_negative[4]; // 16 bits for each row
} salient_blocks;

SPIKE_INLINE __m512i weights_of(const salient_blocks * of, int64_t block, int slot, int half) {
    return _mm512_loadu_si512(of->salients + (block*SPIKE_SALIENT_SLOTS + slot)*SPIKE_TILE_ROWS + half*HALF_ROWS);
}

static void find_present(salient_blocks * of, int halves) {
    of->n_negative[0] = of->n_negative[1] = of->n_negative[2] = of->n_negative[3] = _mm512_setzero_si512();
    for (int64_t b = 0; b < of->n; b++) {
        for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
            for (int half = 0; half < halves; half++) {
                // bits 7-6 are 01 to add and 10 to subtract
                const __m512i   weights  = weights_of(of, b, slot, half);
                const __mmask64 present  = _mm512_movepi8_mask(_mm512_add_epi8(weights, _mm512_set1_epi8(0x40)));
                const __mmask64 negative = present & _mm512_movepi8_mask(weights);
                of->present[b][slot][half] = present;
                __m512i * count = of->n_negative + 2*half;
                count[0] = _mm512_sub_epi16(count[0], _mm512_movm_epi16((__mmask32) negative));
                count[1] = _mm512_sub_epi16(count[1], _mm512_movm_epi16((__mmask32) (negative >> 32)));
            }
        }
    }
}

// The values that a block's salient weights point at to the sums of each token; bit 6 of a weight tells the sign. With
// complements, what is subtracted enters as its complement, one too little, so that bytes hold the sums of more blocks.
SPIKE_INLINE void look_up(const salient_blocks * of, int64_t block, int halves, bool complements, int n_tokens, const int8_t * const values[],
                          __m512i sums[][2]) {
    __m512i plus[TOKENS_TOGETHER], minus[TOKENS_TOGETHER];
    for (int t = 0; t < n_tokens; t++) {
        plus[t]  = _mm512_loadu_si512(values[t] + block*QK_SPK);
        minus[t] = complements ? _mm512_xor_si512(plus[t], _mm512_set1_epi8(-1)) : _mm512_sub_epi8(_mm512_setzero_si512(), plus[t]);
    }
    for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
        for (int half = 0; half < halves; half++) {
            const __m512i   weights = weights_of(of, block, slot, half);
            const __mmask64 present = of->present[block][slot][half];
            for (int t = 0; t < n_tokens; t++) {
                sums[t][half] = _mm512_add_epi8(sums[t][half], _mm512_maskz_permutex2var_epi8(present, minus[t], weights, plus[t]));
            }
        }
    }
}

// Sums in bytes to 16 bits: the first and the second 32 rows of each half.
SPIKE_INLINE void widen_bytes(const __m512i bytes[2], int halves, __m512i sums[4]) {
    for (int half = 0; half < halves; half++) {
        sums[2*half]     = _mm512_add_epi16(sums[2*half],     _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes[half])));
        sums[2*half + 1] = _mm512_add_epi16(sums[2*half + 1], _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes[half], 1)));
    }
}

SPIKE_INLINE void to_potential(const __m512i sums[4], int halves, int shift, int32_t * potential) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    for (int i = 0; i < 2*halves; i++) {
        accumulate16(potential + 32*i,      _mm512_castsi512_si256(sums[i]),      count);
        accumulate16(potential + 32*i + 16, _mm512_extracti64x4_epi64(sums[i], 1), count);
    }
}

// Up to BLOCKS_PER_BYTE_SUM blocks. after: tokens whose values are brought near meanwhile.
SPIKE_INLINE void add_group_of_blocks(const salient_blocks * of, int64_t block, int n, int halves, int n_tokens, const int8_t * const values[],
                                      const int8_t * const after[], __m512i sums[][4]) {
    __m512i bytes[TOKENS_TOGETHER][2];
    for (int t = 0; t < n_tokens; t++) {
        bytes[t][0] = bytes[t][1] = _mm512_setzero_si512();
    }
    for (int b = 0; b < n; b++) {
        for (int t = 0; t < n_tokens; t++) {
            _mm_prefetch((const char *) (after[t] + (block + b)*QK_SPK), _MM_HINT_T0);
        }
        look_up(of, block + b, halves, true, n_tokens, values, bytes);
    }
    for (int t = 0; t < n_tokens; t++) {
        widen_bytes(bytes[t], halves, sums[t]);
    }
}

SPIKE_INLINE void add_fine(const salient_blocks * of, int halves, int n_tokens, const spike_salient_token * tokens, const spike_salient_token * next) {
    __m512i sums[TOKENS_TOGETHER][4];
    const int8_t * values[TOKENS_TOGETHER], * after[TOKENS_TOGETHER];
    for (int t = 0; t < n_tokens; t++) {
        values[t] = tokens[t].fine + of->first*QK_SPK;
        after[t]  = next[t].fine + of->first*QK_SPK;
        for (int i = 0; i < 4; i++) {
            sums[t][i] = of->n_negative[i];
        }
    }
    int64_t b = 0;
    for (; b + BLOCKS_PER_BYTE_SUM <= of->n; b += BLOCKS_PER_BYTE_SUM) {
        add_group_of_blocks(of, b, BLOCKS_PER_BYTE_SUM, halves, n_tokens, values, after, sums);
    }
    for (; b < of->n; b++) {
        add_group_of_blocks(of, b, 1, halves, n_tokens, values, after, sums);
    }
    for (int t = 0; t < n_tokens; t++) {
        to_potential(sums[t], halves, 4, tokens[t].potential);
    }
}

// Few blocks have coarse values.
SPIKE_INLINE void add_coarse(const salient_blocks * of, int halves, const spike_salient_token * token) {
    const int8_t * values[1] = { token->coarse + of->first*QK_SPK };
    uint64_t left = token->coarse_blocks[of->first/BLOCKS_AT_A_TIME];
    __m512i sums[4] = { _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512() };
    for (; left; left &= left - 1) {
        __m512i bytes[1][2] = { { _mm512_setzero_si512(), _mm512_setzero_si512() } };
        look_up(of, __builtin_ctzll(left), halves, false, 1, values, bytes);
        widen_bytes(bytes[0], halves, sums);
    }
    to_potential(sums, halves, 4 + token->shift, token->potential);
}

SPIKE_INLINE void add_blocks(const salient_blocks * of, int halves, const spike_salient_token * tokens, int64_t n_tokens) {
    int64_t t = 0;
    for (; t + TOKENS_TOGETHER <= n_tokens; t += TOKENS_TOGETHER) {
        const int64_t after = t + 2*TOKENS_TOGETHER <= n_tokens ? t + TOKENS_TOGETHER : t;
        add_fine(of, halves, TOKENS_TOGETHER, tokens + t, tokens + after);
    }
    for (; t < n_tokens; t++) {
        add_fine(of, halves, 1, tokens + t, tokens + t);
    }
    for (t = 0; t < n_tokens; t++) {
        if (tokens[t].coarse && tokens[t].coarse_blocks[of->first/BLOCKS_AT_A_TIME]) {
            add_coarse(of, halves, tokens + t);
        }
    }
}

static void add_salient_tokens(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const spike_salient_token * tokens, int64_t n_tokens) {
    salient_blocks of = { 0 };
    for (; of.first < n_blocks; of.first += of.n) {
        of.n        = n_blocks - of.first < BLOCKS_AT_A_TIME ? n_blocks - of.first : BLOCKS_AT_A_TIME;
        of.salients = salients + of.first*(SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS);
        if (n_rows > HALF_ROWS) {
            find_present(&of, 2);
            add_blocks(&of, 2, tokens, n_tokens);
        } else {
            find_present(&of, 1);
            add_blocks(&of, 1, tokens, n_tokens);
        }
    }
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
    copy_lines, copy_half, integrate_schedule, integrate_half_schedule, add_salient_tokens, INT64_MAX, NULL, NULL, gather_lines, gather_inputs, list_rare,
};
