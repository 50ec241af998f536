// Lines of tokens: how AVX2 adds the salient weights of many tokens.
#pragma once

#include "spike/cpu/spike-salient-lines.h"

#include <immintrin.h>
#include <string.h>

SPIKE_INLINE void transpose8(__m128i x[8]) {
    __m128i pairs[8], fours[8];
    for (int i = 0; i < 4; i++) { // rows 2*i and 2*i + 1
        pairs[i]     = _mm_unpacklo_epi16(x[2*i], x[2*i + 1]); // columns 0-3
        pairs[4 + i] = _mm_unpackhi_epi16(x[2*i], x[2*i + 1]); // columns 4-7
    }
    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < 2; i++) { // rows 4*i .. 4*i + 3
            fours[4*h + i]     = _mm_unpacklo_epi32(pairs[4*h + 2*i], pairs[4*h + 2*i + 1]); // columns 4*h, 4*h + 1
            fours[4*h + 2 + i] = _mm_unpackhi_epi32(pairs[4*h + 2*i], pairs[4*h + 2*i + 1]); // columns 4*h + 2, 4*h + 3
        }
    }
    for (int c = 0; c < 4; c++) {
        x[2*c]     = _mm_unpacklo_epi64(fours[2*c], fours[2*c + 1]);
        x[2*c + 1] = _mm_unpackhi_epi64(fours[2*c], fours[2*c + 1]);
    }
}

SPIKE_INLINE __m128i widen8(const int8_t * values) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *) values);
    return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}

static void transpose_values(const int8_t * const fine[8], const int8_t * const coarse[8], const int shift[8], int64_t n, int16_t * lines) {
    for (int64_t i = 0; i < n; i += 8) {
        __m128i x[8];
        for (int t = 0; t < 8; t++) {
            x[t] = _mm_setzero_si128();
            if (fine[t]) {
                x[t] = _mm_add_epi16(widen8(fine[t] + i), _mm_sll_epi16(widen8(coarse[t] + i), _mm_cvtsi32_si128(shift[t])));
            }
        }
        transpose8(x);
        for (int k = 0; k < 8; k++) {
            _mm_storeu_si128((__m128i *) (lines + k*SPIKE_TOKEN_LINE), x[k]);
        }
        lines += 8*SPIKE_TOKEN_LINE;
    }
}

// Sums of eight rows, so many tokens each, times 16 to the tokens' potentials.
SPIKE_INLINE void add_transposed(const int16_t sums[8][SPIKE_TOKEN_LINE], int n_tokens, int64_t stride, int32_t * potential) {
    for (int t = 0; t < n_tokens; t += 8) {
        __m128i x[8];
        for (int r = 0; r < 8; r++) {
            x[r] = _mm_loadu_si128((const __m128i *) (sums[r] + t));
        }
        transpose8(x);
        for (int k = 0; k < 8; k++) {
            __m256i * p = (__m256i *) potential;
            _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), _mm256_slli_epi32(_mm256_cvtepi16_epi32(x[k]), 4)));
            potential += stride;
        }
    }
}

// The weights of so many blocks of a row to its sums; the including file has it.
SPIKE_INLINE void add_slots(const uint8_t * salient, const int16_t * values, int n_blocks, int n_tokens, int16_t sums[SPIKE_TOKEN_LINE]);

SPIKE_INLINE void add_lines_of(const uint8_t * salients, int64_t n_rows, const int16_t * values, int64_t n_blocks, int n_tokens, int64_t stride,
                               int32_t * potential) {
    enum { NEAR_BLOCKS = 2, NEAR_ROWS = SPIKE_HALF_TILE }; // their values and the sums stay in the first-level cache
    enum { NEAR_BYTES = NEAR_BLOCKS*QK_SPK*sizeof(int16_t[SPIKE_TOKEN_LINE]), COMING_BYTES = NEAR_BYTES/NEAR_ROWS };
    _Alignas(64) int16_t sums[NEAR_ROWS][SPIKE_TOKEN_LINE];
    for (int row0 = 0; row0 < n_rows; row0 += NEAR_ROWS) {
        const uint8_t * salient = salients + row0;
        const int16_t * value   = values;
        memset(sums, 0, sizeof(sums));
        for (int64_t left = n_blocks; left > 0; left -= NEAR_BLOCKS) {
            const int16_t * next   = value + NEAR_BYTES/sizeof(*value);
            const char *    coming = (const char *) (left > NEAR_BLOCKS ? next : values); // weights jump about in it, so that no prefetcher sees an order
            for (int row = 0; row < NEAR_ROWS; row++) {
                for (int k = 0; k < COMING_BYTES; k += 64) {
                    _mm_prefetch(coming + row*COMING_BYTES + k, _MM_HINT_T1);
                }
                if (left >= NEAR_BLOCKS) {
                    add_slots(salient + row, value, NEAR_BLOCKS, n_tokens, sums[row]);
                } else {
                    add_slots(salient + row, value, 1, n_tokens, sums[row]);
                }
            }
            salient += NEAR_BLOCKS*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
            value    = next;
        }
        for (int row = 0; row < NEAR_ROWS; row += 8) {
            add_transposed((const int16_t (*)[SPIKE_TOKEN_LINE]) sums + row, n_tokens, stride, potential + row0 + row);
        }
    }
}
