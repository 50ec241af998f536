// Salient weights of a few tokens, each of which looks its values up: how AVX2 adds them where whole lines of tokens would not pay.
#pragma once

#include "spike-sums-256.h"

#include "spike/cpu/spike-kernels.h"

enum {
    TOKENS_TOGETHER = 16,    // that share what is made of the weights
    ROWS_TOGETHER = 32,
    BLOCKS_PER_BYTE_SUM = 2, // eight values of -16..15 fit a byte
    BYTE_MIDDLE = 128,       // what sums in bytes start from, so that they have no sign
};

// The weights of a slot in 32 rows, taken apart for pshufb.
typedef struct {
    __m256i index[QK_SPK/16]; // into each quarter of a block's values; where a weight points elsewhere, or is none, with the upper bit, which gives 0
    __m256i negative;
} salient_weights;

// Those of up to BLOCKS_PER_BYTE_SUM blocks.
typedef struct {
    int             n_blocks;
    salient_weights of[BLOCKS_PER_BYTE_SUM][SPIKE_SALIENT_SLOTS];
    lanes256        n_negative;
} salient_rows;

// One class of a token.
typedef struct {
    const int8_t *   values;
    const uint64_t * blocks;    // bits of those that have any; NULL: all may
    int              shift;     // of what they add to the potential
    int32_t *        potential;
    lanes256         sum;
    int              n_sums;    // in bytes that it holds
} salient_values;

SPIKE_INLINE salient_weights take_apart(const uint8_t * salient) {
    const __m256i weights = _mm256_loadu_si256((const __m256i *) salient), zero = _mm256_setzero_si256();
    const __m256i present = _mm256_add_epi8(weights, _mm256_set1_epi8(0x40)); // its upper bit: bits 7-6 are 01 to add and 10 to subtract
    const __m256i absent  = _mm256_andnot_si256(present, _mm256_set1_epi8((char) 0x80));
    const __m256i place   = _mm256_or_si256(_mm256_and_si256(weights, _mm256_set1_epi8(QK_SPK - 1)), absent);
    salient_weights w;
    for (int q = 0; q < QK_SPK/16; q++) {
        const __m256i in_quarter = _mm256_xor_si256(place, _mm256_set1_epi8((char) (16*q))); // 16 or more: elsewhere
        w.index[q] = _mm256_adds_epu8(in_quarter, _mm256_set1_epi8(0x80 - 16));
    }
    w.negative = _mm256_and_si256(_mm256_cmpgt_epi8(zero, weights), _mm256_cmpgt_epi8(zero, present));
    return w;
}

SPIKE_INLINE void take_blocks_apart(const uint8_t * salient, int64_t n_blocks, salient_rows * rows) {
    __m256i n_negative = _mm256_setzero_si256();
    rows->n_blocks = n_blocks < BLOCKS_PER_BYTE_SUM ? (int) n_blocks : BLOCKS_PER_BYTE_SUM;
    for (int b = 0; b < rows->n_blocks; b++) {
        for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
            rows->of[b][slot] = take_apart(salient);
            n_negative = _mm256_sub_epi8(n_negative, rows->of[b][slot].negative);
            salient += SPIKE_TILE_ROWS;
        }
    }
    rows->n_negative.even = rows->n_negative.odd = _mm256_setzero_si256();
    widen256(n_negative, false, &rows->n_negative);
}

// The values that a block's weights point at, to a sum in bytes. A value v that is subtracted adds its complement -v - 1: n_negative makes up for it.
SPIKE_INLINE __m256i look_up_block(const salient_weights weights[SPIKE_SALIENT_SLOTS], const int8_t * values, __m256i sum) {
    __m256i quarter[QK_SPK/16];
    for (int q = 0; q < QK_SPK/16; q++) {
        quarter[q] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) values + q));
    }
    for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
        const salient_weights * w = &weights[slot];
        const __m256i low  = _mm256_or_si256(_mm256_shuffle_epi8(quarter[0], w->index[0]), _mm256_shuffle_epi8(quarter[1], w->index[1]));
        const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(quarter[2], w->index[2]), _mm256_shuffle_epi8(quarter[3], w->index[3]));
        sum = _mm256_add_epi8(sum, _mm256_xor_si256(_mm256_or_si256(low, high), w->negative));
        __asm__("" : "+x"(sum) : : "memory"); // or the compiler looks all weights up before it adds any, and runs out of registers
    }
    return sum;
}

// block is even.
SPIKE_INLINE bool has_values(const salient_values * token, int64_t block) {
    return !token->blocks || (token->blocks[block/64] >> block % 64 & ((1 << BLOCKS_PER_BYTE_SUM) - 1));
}

SPIKE_INLINE void look_up(const salient_rows * rows, int64_t block, salient_values * token) {
    const int8_t * values = token->values + block*QK_SPK;
    __m256i bytes = look_up_block(rows->of[0], values, _mm256_set1_epi8((char) BYTE_MIDDLE));
    if (rows->n_blocks > 1) {
        bytes = look_up_block(rows->of[1], values + QK_SPK, bytes);
    }
    widen256(bytes, false, &token->sum);
    grow_lanes256(&token->sum, &rows->n_negative);
    token->n_sums++;
}

static void add_values(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, salient_values * tokens, int n_tokens) {
    for (int64_t row = 0; row < n_rows; row += ROWS_TOGETHER) {
        for (salient_values * token = tokens; token < tokens + n_tokens; token++) {
            token->sum.even = token->sum.odd = _mm256_setzero_si256();
            token->n_sums   = 0;
        }
        for (int64_t b = 0; b < n_blocks; b += BLOCKS_PER_BYTE_SUM) {
            salient_rows rows;
            take_blocks_apart(salients + b*(SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS) + row, n_blocks - b, &rows);
            for (salient_values * token = tokens; token < tokens + n_tokens; token++) {
                if (has_values(token, b)) {
                    look_up(&rows, b, token);
                }
            }
        }
        for (salient_values * token = tokens; token < tokens + n_tokens; token++) {
            const __m256i excess = _mm256_set1_epi16((short) (BYTE_MIDDLE*token->n_sums));
            spill_lanes256(&token->sum, excess, _mm_cvtsi32_si128(4 + token->shift), token->potential + row);
        }
    }
}

static void add_salient_tokens(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const spike_salient_token * tokens, int64_t n_tokens) {
    salient_values classes[2*TOKENS_TOGETHER];
    for (const spike_salient_token * token = tokens, * all = tokens + n_tokens; token < all;) {
        const spike_salient_token * end = all - token < TOKENS_TOGETHER ? all : token + TOKENS_TOGETHER;
        salient_values * next = classes;
        for (; token < end; token++) {
            if (token->fine) {
                *next++ = (salient_values) { .values = token->fine, .potential = token->potential };
            }
            if (token->coarse) {
                *next++ = (salient_values) { .values = token->coarse, .blocks = token->coarse_blocks, .shift = token->shift, .potential = token->potential };
            }
        }
        add_values(salients, n_rows, n_blocks, classes, (int) (next - classes));
    }
}
