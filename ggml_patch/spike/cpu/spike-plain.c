// Plain C kernels: what the others must equal.
#include "spike-kernels.h"

#include <string.h>

// Bytes hold 17 codes of at most 15 without overflow.
enum { SPIKES_PER_BYTE_SUM = 17 };

// Two rows of neurons, 64 each or 32, in byte lanes.
typedef struct {
    uint8_t low[SPIKE_LINE_BYTES];
    uint8_t high[SPIKE_LINE_BYTES];
} byte_sums;

SPIKE_INLINE void add_line(byte_sums * sums, const uint8_t * line, int line_bytes) {
    uint8_t codes[SPIKE_LINE_BYTES]; // a copy that nothing aliases, so that the loops become vector instructions
    memcpy(codes, line, (size_t) line_bytes);
    for (int j = 0; j < line_bytes; j++) {
        sums->low[j] = (uint8_t) (sums->low[j] + (codes[j] & 15));
    }
    for (int j = 0; j < line_bytes; j++) {
        sums->high[j] = (uint8_t) (sums->high[j] + (codes[j] >> 4));
    }
}

// Adds (or subtracts) the codes of the lines that fire to the neurons' current.
SPIKE_INLINE void add_arrivals(const uint8_t * lines, int line_bytes, const uint32_t * offsets, uint32_t n, bool negative, int32_t * current) {
    while (n > 0) {
        const uint32_t group = n < SPIKES_PER_BYTE_SUM ? n : SPIKES_PER_BYTE_SUM;
        byte_sums sums;
        memset(&sums, 0, sizeof(sums));
        for (uint32_t e = 0; e < group; e++) {
            add_line(&sums, lines + offsets[e], line_bytes);
        }
        for (int j = 0; j < line_bytes; j++) {
            current[j]              += negative ? -sums.low[j]  : sums.low[j];
            current[j + line_bytes] += negative ? -sums.high[j] : sums.high[j];
        }
        offsets += group;
        n       -= group;
    }
}

// A spike that arrives at magnitude m stays in the current for the m steps to come, so that its weight enters the
// potential m times: the product, by additions (Abel summation).
SPIKE_INLINE void run_program(const uint8_t * lines, int line_bytes, const spike_program * program, const uint32_t * offsets, int32_t * potential) {
    int32_t current[SPIKE_TILE_ROWS] = { 0 };
    int32_t sum[SPIKE_TILE_ROWS]     = { 0 };
    offsets += program->first;
    for (int s = 0; s < program->n_steps; s++) {
        const spike_step * step = &program->steps[s];
        add_arrivals(lines, line_bytes, offsets, step->n_positive, false, current);
        offsets += step->n_positive;
        add_arrivals(lines, line_bytes, offsets, step->n_negative, true, current);
        offsets += step->n_negative;
        for (int r = 0; r < 2*line_bytes; r++) {
            sum[r] += current[r];
        }
        if (step->spill) {
            for (int r = 0; r < 2*line_bytes; r++) {
                potential[r] += sum[r] - step->correction;
                sum[r] = 0;
            }
        }
    }
}

static void integrate(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                      int32_t potential[SPIKE_TILE_ROWS]) {
    run_program(lines, SPIKE_LINE_BYTES, program, offsets, potential);
}

static void integrate_half(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                           int32_t potential[SPIKE_HALF_TILE], spike_ahead * ahead) {
    (void) ahead; // nothing is requested
    run_program(lines, SPIKE_HALF_LINE, program, offsets, potential);
}

static void add_salient(const uint8_t * salients, const int8_t * values, int64_t n_blocks, int16_t sum[SPIKE_TILE_ROWS],
                        const uint8_t * next_tile) {
    (void) next_tile; // nothing is requested
    memset(sum, 0, SPIKE_TILE_ROWS*sizeof(int16_t));
    for (int64_t b = 0; b < n_blocks; b++) {
        for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
            for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
                const int value = values[salients[r] & 63];
                switch (salients[r] >> 6) {
                    case 1: sum[r] = (int16_t) (sum[r] + value); break;
                    case 2: sum[r] = (int16_t) (sum[r] - value); break;
                    default: break; // no weight, or an invalid one
                }
            }
            salients += SPIKE_TILE_ROWS;
        }
        values += QK_SPK;
    }
}

const spike_kernels spike_kernels_plain_c = { "plain-c", integrate, integrate_half, add_salient, false, false, NULL, spike_list_spikes, &spike_prompt_kernels_plain_c };
