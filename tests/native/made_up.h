// Made-up weights and tokens, and what products are computed from, for the native checks and the fuzz targets.
#pragma once

#include "spike/cpu/spike-kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t random_state;

static inline uint32_t next_random(void) { // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30)*0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27)*0x94D049BB133111EBu;
    return (uint32_t) (z >> 32);
}

static inline int64_t random_below(int64_t n) {
    return (int64_t) ((uint64_t) next_random()*(uint64_t) n >> 32);
}

// Memory of exactly this size, so that a sanitizer sees every step outside. As the system gives it: what depends on its
// contents is a fault.
static inline void * allocate_unset(size_t size) {
    void * memory = NULL;
    if (posix_memalign(&memory, 64, size) != 0) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return memory;
}

static inline void * allocate(size_t size) {
    return memset(allocate_unset(size), 0, size);
}

enum salience { NO_SALIENT, SOME_SALIENT, ALL_SALIENT, N_SALIENCES };
enum codes    { RANDOM_CODES, SMALLEST_CODES, LARGEST_CODES, MIXED_EXTREMES, N_CODES };

static inline void fill_weights(block_spk4 * blocks, int64_t n_rows, int64_t n_blocks, enum salience salience, enum codes kind) {
    for (int64_t r = 0; r < n_rows; r++) {
        const uint16_t header = (uint16_t) (0x3C00 | random_below(16));
        for (int64_t b = 0; b < n_blocks; b++) {
            block_spk4 * x = blocks + r*n_blocks + b;
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
        memcpy(blocks[r*n_blocks].salient, &header, sizeof(header));
    }
}

enum pattern { SPARSE, NORMAL, DENSE, EARLIEST, LATEST, LARGEST, ALTERNATING, ALL_TIMES, UP_THEN_DOWN, ONE_SPIKE, SILENCE, N_PATTERNS };

static inline int value_of(enum pattern pattern, int64_t i, int64_t n) {
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
static inline void fill_token(block_spka * blocks, int64_t n_inputs, enum pattern pattern, int64_t coarse_share, int shift) {
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

// ---- what products are computed from

// The spikes of a token, in programs of chunk_blocks blocks at most.
static inline spike_train * make_train(const block_spka * token, int64_t n_inputs, int64_t chunk_blocks) {
    const int64_t n_chunks = spike_chunks(n_inputs, chunk_blocks);
    spike_train * train = (spike_train *) allocate_unset(spike_train_size(n_inputs, n_chunks));
    train->n_chunks = (int32_t) n_chunks;
    int8_t * values = spike_train_values_to_fill(train, n_inputs);
    for (int64_t b = 0; b < n_inputs/QK_SPK; b++) {
        spike_activation_values(token + b, values + b*QK_SPK, values + n_inputs + b*QK_SPK);
    }
    spike_train_build(token, n_inputs, train);
    return train;
}

// A train's offsets for tiles whose lines are this far apart.
static inline uint32_t * scaled_offsets(const spike_train * train, size_t stride) {
    uint32_t * scaled = (uint32_t *) allocate_unset(((size_t) train->n_spikes + 1)*sizeof(uint32_t));
    for (uint32_t e = 0; e < train->n_spikes; e++) {
        scaled[e] = spike_train_lines(train)[e]*(uint32_t) stride;
    }
    return scaled;
}

// The same spikes as the kernels for many tokens take them.
static inline spike_schedule * make_schedule(const block_spka * token, int64_t n_inputs, int64_t chunk_blocks) {
    const int64_t n_chunks = spike_chunks(n_inputs, chunk_blocks);
    spike_schedule * schedule = (spike_schedule *) allocate_unset(spike_schedule_size(n_inputs, n_chunks));
    schedule->n_chunks = (int32_t) n_chunks;
    int8_t * values = spike_schedule_values_to_fill(schedule, n_inputs);
    for (int64_t b = 0; b < n_inputs/QK_SPK; b++) {
        spike_activation_values(token + b, values + b*QK_SPK, values + n_inputs + b*QK_SPK);
    }
    spike_schedule_build(token, n_inputs, schedule);
    return schedule;
}

// Potentials of a tile with codes counted from 8 and without salient weights: [class][row].
static inline void schedule_potentials(const spike_prompt_kernels * with, const spike_layout * layout, const uint8_t * packed,
                                       int64_t tile, const spike_schedule * schedule, int32_t * potential) {
    const bool half = spike_is_half_tile(layout, tile);
    const spike_tile_lines from = spike_lines_of_tile(layout, packed, tile);
    memset(potential, 0, SPIKE_SCHEDULE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
    for (int64_t c = 0; c < schedule->n_chunks; c++) {
        const int64_t first = spike_chunk_start(layout->n_inputs, schedule->n_chunks, c);
        const int64_t n     = spike_chunk_start(layout->n_inputs, schedule->n_chunks, c + 1) - first;
        uint8_t * lines = (uint8_t *) allocate_unset((size_t) (spike_schedule_lines(n)*(half ? SPIKE_HALF_LINE : SPIKE_LINE_BYTES)));
        (half ? with->copy_half : with->copy_lines)(from.first + (size_t) first*from.stride, from.stride, n, lines);
        spike_line_requests same = { from.first, from.first + (size_t) n*from.stride, from.stride, 1 + (int) (c % 3) }; // which changes nothing
        for (int k = 0; k < SPIKE_SCHEDULE_CLASSES; k++) {
            const spike_schedule_program * program = spike_schedule_program_of(schedule, k, c);
            const uint16_t * spikes = spike_schedule_spikes(schedule);
            int32_t * own = potential + k*SPIKE_TILE_ROWS;
            if (half) {
                with->integrate_half_schedule(lines, program, spikes, own, with->integrate_schedule_ahead && c % 2 == 0 ? &same : NULL);
            } else if (with->integrate_schedule_ahead && (tile + c) % 2 == 0) {
                with->integrate_schedule_ahead(lines, program, spikes, own, &same);
            } else {
                with->integrate_schedule(lines, program, spikes, own);
            }
        }
        if (same.next < from.first || same.next > same.end) {
            fprintf(stderr, "requests ran away\n");
            abort();
        }
        free(lines);
    }
}
