// Made-up weights and tokens for the native checks.
#pragma once

#include "spike/cpu/spike-layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t random_state;

static uint32_t next_random(void) { // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30)*0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27)*0x94D049BB133111EBu;
    return (uint32_t) (z >> 32);
}

static int64_t random_below(int64_t n) {
    return (int64_t) ((uint64_t) next_random()*(uint64_t) n >> 32);
}

static void * allocate(size_t size) {
    void * memory = aligned_alloc(64, (size + 63) & ~(size_t) 63);
    if (!memory) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    memset(memory, 0, size);
    return memory;
}

enum salience { NO_SALIENT, SOME_SALIENT, ALL_SALIENT, N_SALIENCES };
enum codes    { RANDOM_CODES, SMALLEST_CODES, LARGEST_CODES, MIXED_EXTREMES, N_CODES };

static void fill_weights(block_spk4 * blocks, int64_t n_rows, int64_t n_blocks, enum salience salience, enum codes kind) {
    for (int64_t r = 0; r < n_rows; r++) {
        const uint16_t header = (uint16_t) (0x3C00 | random_below(16));
        for (int64_t b = 0; b < n_blocks; b++) {
            block_spk4 * x = blocks + r*n_blocks + b;
            x->header = header;
            for (int j = 0; j < QK_SPK/2; j++) {
                const uint8_t random = (uint8_t) next_random();
                const uint8_t mixed  = (r & 1) ? 0xFF : 0x00; // extremes side by side in a line
                x->codes[j] = kind == RANDOM_CODES ? random : kind == SMALLEST_CODES ? 0 : kind == LARGEST_CODES ? 0xFF : mixed;
            }
            const int position = (int) random_below(QK_SPK);
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                const bool salient = salience == ALL_SALIENT || (salience == SOME_SALIENT && random_below(8) == 0);
                const int  sign    = 1 + (int) random_below(2);
                x->salient[slot] = salient ? (uint8_t) (((position + slot) & 63) | sign << 6) : 0;
            }
        }
    }
}

enum pattern { SPARSE, NORMAL, DENSE, EARLIEST, LATEST, LARGEST, ALTERNATING, ALL_TIMES, UP_THEN_DOWN, ONE_SPIKE, SILENCE, N_PATTERNS };

static int value_of(enum pattern pattern, int64_t i, int64_t n) {
    const int uniform = (int) random_below(32) - 16;
    switch (pattern) {
        case SPARSE:       return random_below(20) ? 0 : uniform;
        case NORMAL:       return (int) (random_below(6) + random_below(6) + random_below(6)) - 8;
        case DENSE:        return uniform;
        case EARLIEST:     return -16;
        case LATEST:       return 1;
        case LARGEST:      return 15;
        case ALTERNATING:  return i & 1 ? 15 : -16;
        case ALL_TIMES:    return (int) (i % 32) - 16;
        case UP_THEN_DOWN: return i < n/2 ? 15 : -16;
        case ONE_SPIKE:    return i == n - 1 ? -16 : 0;
        default:           return 0;
    }
}

// Blocks of exactly these values; one in coarse_share of them is coarse, at 2^shift, none if that is 0.
static void fill_token(block_spka * blocks, int64_t n_inputs, enum pattern pattern, int64_t coarse_share, int shift) {
    for (int64_t i = 0; i < n_inputs; i++) {
        block_spka * x = blocks + i/QK_SPK;
        const int      j      = (int) (i % QK_SPK);
        const int      value  = value_of(pattern, i, n_inputs);
        const bool     coarse = coarse_share && value != 0 && random_below(coarse_share) == 0;
        const bool     salient = coarse || value < -8 || value > 7;
        const int      stored = salient ? value + 16 : value + 8;
        const uint64_t bit    = (uint64_t) 1 << j;
        x->threshold     = 1.0f;
        x->zero_point    = 8;
        x->salient_shift = (uint8_t) (coarse_share ? shift : 0);
        x->salient_mask |= salient ? bit : 0;
        x->coarse_mask  |= coarse ? bit : 0;
        x->fifth_bits   |= salient && stored & 16 ? bit : 0;
        x->codes[j % (QK_SPK/2)] |= (uint8_t) ((stored & 15) << (j < QK_SPK/2 ? 0 : 4));
    }
}
