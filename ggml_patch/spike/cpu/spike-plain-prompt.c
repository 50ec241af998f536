// Plain C kernels for many tokens: what the others must equal.
#include "spike-prompt-kernels.h"

#include <string.h>

// Lines without the bits that are not in the mask.
static void copy_masked(const uint8_t * from, size_t stride, int64_t n, uint8_t mask, uint8_t * to) {
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < SPIKE_LINE_BYTES; j++) {
            to[j] = from[j] & mask;
            to[SPIKE_LINE_BYTES + j] = (uint8_t) ~from[j] & mask;
        }
        from += stride;
        to   += 2*SPIKE_LINE_BYTES;
    }
    memset(to, 0, SPIKE_LINE_BYTES);
}

static void copy_lines(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy_masked(from, stride, n, 0xFF, to);
}

static void copy_half(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy_masked(from, stride, n, 0x0F, to);
}

// To the 32-bit potentials, which wrap like unsigned ones until all programs have run.
static void spill(int32_t * sum, int n_rows, const spike_schedule_step * step, int32_t * potential) {
    for (int r = 0; r < n_rows; r++) {
        potential[r] = (int32_t) ((uint32_t) potential[r] + ((uint32_t) (sum[r] - step->correction) << step->shift));
        sum[r] = 0;
    }
}

// A spike at a step stays in the current for the steps to come, so that its weight enters the potential as many times as
// its magnitude says (Abel summation).
static void run_schedule(const uint8_t * lines, int n_rows, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential) {
    int32_t current[SPIKE_TILE_ROWS] = { 0 }, sum[SPIKE_TILE_ROWS] = { 0 };
    spikes += program->first;
    for (uint32_t s = 0; s < program->n_steps; s++) {
        const spike_schedule_step * step = &program->steps[s];
        for (int e = 0; e < step->n_spikes; e++) {
            const uint8_t * line = spike_schedule_line(lines, spikes[e]);
            for (int r = 0; r < SPIKE_HALF_TILE; r++) {
                current[r] += line[r] & 15;
            }
            for (int r = SPIKE_HALF_TILE; r < n_rows; r++) {
                current[r] += line[r - SPIKE_HALF_TILE] >> 4;
            }
        }
        spikes += step->n_spikes;
        for (int r = 0; r < n_rows; r++) {
            sum[r] += current[r];
        }
        if (step->action == SPIKE_DOUBLE) {
            for (int r = 0; r < n_rows; r++) {
                sum[r] += sum[r];
            }
        } else if (step->action == SPIKE_SPILL) {
            spill(sum, n_rows, step, potential);
        }
    }
}

static void integrate_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t potential[SPIKE_TILE_ROWS]) {
    run_schedule(lines, SPIKE_TILE_ROWS, program, spikes, potential);
}

static void integrate_half(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                           int32_t potential[SPIKE_HALF_TILE]) {
    run_schedule(lines, SPIKE_HALF_TILE, program, spikes, potential);
}

static void transpose_values(const int8_t * const fine[8], const int8_t * const coarse[8], const int shift[8], int64_t n, int16_t * lines) {
    for (int t = 0; t < 8; t++) {
        for (int64_t i = 0; i < n; i++) {
            const int coarse_part = fine[t] ? (int) ((unsigned) coarse[t][i] << shift[t]) : 0;
            lines[i*SPIKE_TOKEN_LINE + t] = (int16_t) (fine[t] ? fine[t][i] + coarse_part : 0);
        }
    }
}

static void add_salient_lines(const uint8_t * salients, int64_t n_rows, const int16_t * values, int64_t n_blocks, int64_t stride, int32_t * potential) {
    for (int64_t r = 0; r < n_rows; r++) {
        int16_t sum[SPIKE_TOKEN_LINE] = { 0 };
        for (int64_t b = 0; b < n_blocks; b++) {
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                const uint8_t   salient = salients[(b*SPIKE_SALIENT_SLOTS + slot)*SPIKE_TILE_ROWS + r];
                const int16_t * line    = values + (b*QK_SPK + (salient & 63))*SPIKE_TOKEN_LINE;
                if (salient >> 6 == 1) {
                    for (int t = 0; t < SPIKE_TOKEN_LINE; t++) {
                        sum[t] = (int16_t) (sum[t] + line[t]);
                    }
                } else if (salient >> 6 == 2) {
                    for (int t = 0; t < SPIKE_TOKEN_LINE; t++) {
                        sum[t] = (int16_t) (sum[t] - line[t]);
                    }
                }
            }
        }
        int32_t * own = potential;
        for (int t = 0; t < SPIKE_TOKEN_LINE; t++) {
            own[r] += 16*sum[t];
            own    += stride;
        }
    }
}

static uint32_t gather_lines(const uint8_t * key, const uint16_t * line, int64_t n, uint8_t wanted, uint16_t * list) {
    uint32_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        list[count] = line[i];
        count += key[i] == wanted;
    }
    return count;
}

static uint32_t gather_inputs(const uint8_t * key, const uint8_t * line_in_block, int64_t n, uint8_t wanted, uint16_t * list) {
    uint32_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        list[count] = (uint16_t) (SPIKE_SCHEDULE_SCALE*(i/QK_SPK*2*QK_SPK + line_in_block[i]));
        count += key[i] == wanted;
    }
    return count;
}

const spike_prompt_kernels spike_prompt_kernels_plain_c = {
    copy_lines, copy_half, integrate_schedule, integrate_half, 2, transpose_values, add_salient_lines, gather_lines, gather_inputs,
};
