// AVX2 for many tokens.
#include "spike-pack-256.h"
#include "spike-salient-tokens.h"
#include "spike-schedule-256.h"
#include "spike-token-lines.h"

#include <string.h>

static void copy_lines(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy256(from, stride, SPIKE_LINE_BYTES/32, n, to);
}

static void integrate_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t potential[SPIKE_TILE_ROWS]) {
    run_schedule256(lines, SPIKE_LINE_BYTES/32, program, spikes, potential, NULL);
}

static void integrate_schedule_ahead(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                                     int32_t potential[SPIKE_TILE_ROWS], spike_line_requests * requests) {
    run_schedule256(lines, SPIKE_LINE_BYTES/32, program, spikes, potential, requests);
}

static uint32_t gather_lines(const uint8_t * key, const uint16_t * line, int64_t n, uint8_t wanted, uint16_t * list) {
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += QK_SPK) {
        const uint64_t found = find_bytes(key + i, _mm256_set1_epi8((char) wanted));
        for (int k = 0; k < QK_SPK/8; k++) {
            pack_eight(_mm_loadu_si128((const __m128i *) (line + i + 8*k)), found, k, next);
        }
        next += __builtin_popcountll(found);
    }
    return (uint32_t) (next - list);
}

// By SPIKE_SCHEDULE_SCALE.
SPIKE_INLINE __m128i scaled(__m128i lines) {
    return _mm_slli_epi16(lines, 3);
}

static uint32_t gather_inputs(const uint8_t * key, const uint8_t * line_in_block, int64_t n, uint8_t wanted, uint16_t * list) {
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += QK_SPK) {
        const uint64_t found = find_bytes(key + i, _mm256_set1_epi8((char) wanted));
        const __m128i  first = _mm_set1_epi16((int16_t) (2*i)); // line of the block
        for (int k = 0; k < QK_SPK/8; k++) {
            const __m128i eight = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *) (line_in_block + i + 8*k)));
            pack_eight(scaled(_mm_add_epi16(first, eight)), found, k, next);
        }
        next += __builtin_popcountll(found);
    }
    return (uint32_t) (next - list);
}

// A single instruction applies a sign to 16 values.
SPIKE_INLINE void add_slots(const uint8_t * salient, const int16_t * values, int n_blocks, int n_tokens, int16_t sums[SPIKE_TOKEN_LINE]) {
    static const int32_t SIGNS[4] = { 0, 0x00010001, -1, 0 }; // bits 6-7: nothing, add, subtract, nothing
    const size_t line_bytes = SPIKE_TOKEN_LINE*sizeof(*values);
    const int vectors = n_tokens/16;
    __m256i sum[SPIKE_TOKEN_LINE/16];
    for (int q = 0; q < vectors; q++) {
        sum[q] = _mm256_load_si256((const __m256i *) (sums + 16*q));
    }
    for (int k = 0; k < n_blocks; k++) {
        for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
            const uint32_t  own  = *salient;
            const __m256i * line = (const __m256i *) ((const char *) values + (own & 63)*line_bytes);
            const __m256i   sign = _mm256_set1_epi32(SIGNS[own >> 6]);
            for (int q = 0; q < vectors; q++) {
                sum[q] = _mm256_add_epi16(sum[q], _mm256_sign_epi16(_mm256_loadu_si256(line + q), sign));
                __asm__("" : "+x"(sum[q]) : : "memory"); // or the compiler reads the lines of several weights before it adds any, and runs out of registers
            }
            salient += SPIKE_TILE_ROWS;
        }
        values += QK_SPK*SPIKE_TOKEN_LINE;
    }
    for (int q = 0; q < vectors; q++) {
        _mm256_store_si256((__m256i *) (sums + 16*q), sum[q]);
    }
}

const spike_prompt_kernels spike_prompt_kernels_avx2 = {
    copy_lines, copy_half, integrate_schedule, integrate_schedule_ahead, integrate_half_schedule, add_salient_tokens, 24, transpose_values, add_salient_lines, gather_lines, gather_inputs, spike_list_rare,
};
