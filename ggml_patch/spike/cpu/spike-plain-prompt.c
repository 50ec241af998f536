// Plain C kernels for many tokens: what the others must equal.
#include "spike-prompt-kernels.h"

#include <string.h>

SPIKE_INLINE void copy(const uint8_t * from, size_t stride, size_t line_bytes, int64_t n, uint8_t * to) {
    for (int64_t i = 0; i < n; i++) {
        memcpy(to, from, line_bytes);
        for (size_t j = 0; j < line_bytes; j++) {
            to[line_bytes + j] = (uint8_t) ~from[j];
        }
        from += stride;
        to   += 2*line_bytes;
    }
    memset(to, 0, line_bytes);
}

static void copy_lines(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy(from, stride, SPIKE_LINE_BYTES, n, to);
}

static void copy_half(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy(from, stride, SPIKE_HALF_LINE, n, to);
}

// To the 32-bit potentials, which wrap like unsigned ones until all programs have run.
SPIKE_INLINE void spill(int32_t * sum, int n_rows, const spike_schedule_step * step, int32_t * potential) {
    for (int r = 0; r < n_rows; r++) {
        potential[r] = (int32_t) ((uint32_t) potential[r] + ((uint32_t) (sum[r] - step->correction) << step->shift));
        sum[r] = 0;
    }
}

// A spike at a step stays in the current for the steps to come, so that its weight enters the potential as many times as
// its magnitude says (Abel summation).
SPIKE_INLINE void run_schedule(const uint8_t * lines, int line_bytes, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential) {
    const int n_rows = 2*line_bytes;
    int32_t current[SPIKE_TILE_ROWS] = { 0 }, sum[SPIKE_TILE_ROWS] = { 0 };
    spikes += program->first;
    for (uint32_t s = 0; s < program->n_steps; s++) {
        const spike_schedule_step * step = &program->steps[s];
        for (int e = 0; e < step->n_spikes; e++) {
            const uint8_t * line = spike_schedule_line(lines, (size_t) line_bytes, spikes[e]);
            for (int j = 0; j < line_bytes; j++) {
                current[j] += line[j] & 15;
            }
            for (int j = 0; j < line_bytes; j++) {
                current[line_bytes + j] += line[j] >> 4;
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
    run_schedule(lines, SPIKE_LINE_BYTES, program, spikes, potential);
}

static void integrate_half_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                                    int32_t potential[SPIKE_HALF_TILE], spike_line_requests * requests) {
    (void) requests;
    run_schedule(lines, SPIKE_HALF_LINE, program, spikes, potential);
}

static void transpose_values(const int8_t * const fine[8], const int8_t * const coarse[8], const int shift[8], int64_t n, int16_t * lines) {
    for (int t = 0; t < 8; t++) {
        for (int64_t i = 0; i < n; i++) {
            const int coarse_part = fine[t] ? (int) ((unsigned) coarse[t][i] << shift[t]) : 0;
            lines[i*SPIKE_TOKEN_LINE + t] = (int16_t) (fine[t] ? fine[t][i] + coarse_part : 0);
        }
    }
}

static void add_salient_lines(const uint8_t * salients, int64_t n_rows, const int16_t * values, int64_t n_blocks, int64_t n_tokens, int64_t stride,
                              int32_t * potential) {
    for (int64_t r = 0; r < n_rows; r++) {
        int16_t sum[SPIKE_TOKEN_LINE] = { 0 };
        for (int64_t b = 0; b < n_blocks; b++) {
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                const uint8_t   salient = salients[(b*SPIKE_SALIENT_SLOTS + slot)*SPIKE_TILE_ROWS + r];
                const int16_t * line    = values + (b*QK_SPK + (salient & 63))*SPIKE_TOKEN_LINE;
                if (salient >> 6 == 1) {
                    for (int t = 0; t < n_tokens; t++) {
                        sum[t] = (int16_t) (sum[t] + line[t]);
                    }
                } else if (salient >> 6 == 2) {
                    for (int t = 0; t < n_tokens; t++) {
                        sum[t] = (int16_t) (sum[t] - line[t]);
                    }
                }
            }
        }
        int32_t * own = potential;
        for (int t = 0; t < SPIKE_TOKEN_LINE && t < n_tokens; t++) { // by one condition compilers would find the last address, with a product
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
    copy_lines, copy_half, integrate_schedule, NULL, integrate_half_schedule, spike_add_salient_tokens, 2, transpose_values, add_salient_lines, gather_lines, gather_inputs, spike_list_rare,
};
