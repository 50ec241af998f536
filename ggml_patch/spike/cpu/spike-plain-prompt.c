// Plain C kernels for many tokens: what the others must equal.
#include "spike-prompt-kernels.h"

#include <string.h>

static void copy_lines(const uint8_t * from, size_t stride, int64_t width, int64_t n, uint8_t * to) {
    const size_t bytes = (size_t) 1 << spike_line_shift(width);
    for (const uint8_t * end = to + (n << (spike_line_shift(width) + 1)); to < end;) {
        memcpy(to, from, bytes);
        for (size_t j = 0; j < bytes; j++) {
            to[bytes + j] = (uint8_t) ~from[j];
        }
        from += stride;
        to   += 2*bytes;
    }
    memset(to, 0, bytes);
}

// Half a tile to the 32-bit potentials, which wrap like unsigned ones until all programs have run.
static void spill(int32_t * sum, const spike_schedule_step * step, int32_t * potential) {
    for (int j = 0; j < SPIKE_LINE_BYTES; j++) {
        potential[j] = (int32_t) ((uint32_t) potential[j] + ((uint32_t) (sum[j] - step->correction) << step->shift));
        sum[j] = 0;
    }
}

// A spike at a step stays in the current for the steps to come, so that its weight enters the potential as many times as
// its magnitude says (Abel summation).
static void integrate_schedule(const uint8_t * lines, int64_t width, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t * potential) {
    enum { MAX_ROWS = SPIKE_MAX_WIDTH*SPIKE_TILE_ROWS };
    const int64_t bytes = (int64_t) 1 << spike_line_shift(width);
    int32_t current[MAX_ROWS] = { 0 }, sum[MAX_ROWS] = { 0 }; // bytes of low nibbles, then of high ones
    spikes += program->first;
    for (uint32_t s = 0; s < program->n_steps; s++) {
        const spike_schedule_step * step = &program->steps[s];
        for (int e = 0; e < step->n_spikes; e++) {
            const uint8_t * line = lines + ((size_t) spikes[e] << spike_line_shift(width));
            for (int64_t j = 0; j < bytes; j++) {
                current[j] += line[j] & 15;
            }
            for (int64_t j = 0; j < bytes; j++) {
                current[bytes + j] += line[j] >> 4;
            }
        }
        spikes += step->n_spikes;
        for (int64_t j = 0; j < 2*bytes; j++) {
            sum[j] += current[j];
        }
        if (step->action == SPIKE_DOUBLE) {
            for (int64_t j = 0; j < 2*bytes; j++) {
                sum[j] += sum[j];
            }
        } else if (step->action == SPIKE_SPILL) {
            for (int64_t tile = 0; tile < width; tile++) {
                spill(sum + tile*SPIKE_LINE_BYTES, step, potential + tile*SPIKE_TILE_ROWS);
                spill(sum + bytes + tile*SPIKE_LINE_BYTES, step, potential + tile*SPIKE_TILE_ROWS + SPIKE_LINE_BYTES);
            }
        }
    }
}

static void transpose_values(const int8_t * const fine[8], const int8_t * const coarse[8], const int shift[8], int64_t n, int16_t * lines) {
    for (int t = 0; t < 8; t++) {
        for (int64_t i = 0; i < n; i++) {
            const int coarse_part = fine[t] ? (int) ((unsigned) coarse[t][i] << shift[t]) : 0;
            lines[i*SPIKE_TOKEN_LINE + t] = (int16_t) (fine[t] ? fine[t][i] + coarse_part : 0);
        }
    }
}

static void add_salient_lines(const uint8_t * salients, const int16_t * values, int64_t n_blocks, int64_t stride, int32_t * potential) {
    for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
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
        list[count] = (uint16_t) (i/QK_SPK*2*QK_SPK + line_in_block[i]);
        count += key[i] == wanted;
    }
    return count;
}

const spike_prompt_kernels spike_prompt_kernels_plain_c = {
    1, copy_lines, integrate_schedule, 2, transpose_values, add_salient_lines, gather_lines, gather_inputs,
};
