// NEON (AdvSIMD of aarch64): 128-bit byte and 16-bit additions.
#include "spike/cpu/spike-kernels.h"

#include <arm_neon.h>
#include <string.h>

// A line is four vectors of 16 bytes, or two of half a tile; each byte holds two codes. Per vector and spike two instructions:
//   both += y         whole bytes, modulo 256
//   high += y >> 4    in bytes, shift and addition fused (usra)
// 16 spikes of 15 fit in a byte, so that low = both - (high << 4) is the true sum of the low codes, whatever overflowed.
// After 16 spikes the sums move to 16-bit currents, one per row and in the order of rows.
enum { VECTORS = SPIKE_LINE_BYTES/16, SPIKES_PER_BYTE_SUM = 16 };

// 16-bit lanes of a tile: vector v holds rows 8*v .. 8*v + 7.
typedef struct {
    uint16x8_t rows[SPIKE_TILE_ROWS/8];
} lanes;

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER(a, b) __asm__("" : "+w"(a), "+w"(b))

SPIKE_INLINE void flush16(uint8x16_t sums, uint16x8_t current[2], int negative) {
    if (negative) {
        current[0] = vsubw_u8(current[0], vget_low_u8(sums));
        current[1] = vsubw_high_u8(current[1], sums);
    } else {
        current[0] = vaddw_u8(current[0], vget_low_u8(sums));
        current[1] = vaddw_high_u8(current[1], sums);
    }
}

// vectors: of a line, known when this is compiled.
SPIKE_INLINE const uint32_t * add_list(const uint8_t * lines, int vectors, const uint32_t * offsets, int n,
                                       lanes * current, int negative) {
    while (n > 0) {
        int group = n < SPIKES_PER_BYTE_SUM ? n : SPIKES_PER_BYTE_SUM;
        n -= group;
        uint8x16_t both[VECTORS], high[VECTORS];
        for (int v = 0; v < vectors; v++) {
            both[v] = high[v] = vdupq_n_u8(0);
        }
        do {
            for (int e = 0; e < SPIKE_LIST_UNIT; e++) {
                const uint8_t * line = lines + offsets[e];
                for (int v = 0; v < vectors; v++) {
                    const uint8x16_t y = vld1q_u8(line + 16*v);
                    both[v] = vaddq_u8(both[v], y);
                    high[v] = vsraq_n_u8(high[v], y, 4);
                    KEEP_ORDER(both[v], high[v]);
                }
            }
            offsets += SPIKE_LIST_UNIT;
            group   -= SPIKE_LIST_UNIT;
        } while (group > 0);
        for (int v = 0; v < vectors; v++) {
            flush16(vsubq_u8(both[v], vshlq_n_u8(high[v], 4)), &current->rows[2*v], negative);
            flush16(high[v], &current->rows[2*(vectors + v)], negative);
        }
    }
    return offsets;
}

SPIKE_INLINE void spill8(uint16x8_t sum, uint16x8_t correction, int32_t * potential) {
    const int16x8_t true_sum = vreinterpretq_s16_u16(vsubq_u16(sum, correction));
    vst1q_s32(potential,     vaddw_s16(vld1q_s32(potential), vget_low_s16(true_sum)));
    vst1q_s32(potential + 4, vaddw_high_s16(vld1q_s32(potential + 4), true_sum));
}

SPIKE_INLINE void run_program(const uint8_t * lines, int vectors, const spike_program * program, const uint32_t * offsets, int32_t * potential) {
    lanes current, sum;
    memset(&current, 0, sizeof(current));
    memset(&sum, 0, sizeof(sum));
    offsets += program->first;
    for (int s = 0; s < program->n_steps; s++) {
        const spike_step * step = &program->steps[s];
        offsets = add_list(lines, vectors, offsets, step->n_positive, &current, 0);
        offsets = add_list(lines, vectors, offsets, step->n_negative, &current, 1);
        for (int v = 0; v < 4*vectors; v++) {
            sum.rows[v] = vaddq_u16(sum.rows[v], current.rows[v]);
        }
        if (step->spill) {
            const uint16x8_t correction = vdupq_n_u16((uint16_t) step->correction);
            for (int v = 0; v < 4*vectors; v++) {
                spill8(sum.rows[v], correction, potential + 8*v);
                sum.rows[v] = vdupq_n_u16(0);
            }
        }
    }
}

static void integrate(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                      int32_t potential[SPIKE_TILE_ROWS]) {
    run_program(lines, VECTORS, program, offsets, potential);
}

static void integrate_half(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                           int32_t potential[SPIKE_HALF_TILE], spike_ahead * ahead) {
    (void) ahead; // nothing is requested
    run_program(lines, VECTORS/2, program, offsets, potential);
}

static void add_salient(const uint8_t * salients, const int8_t * values, int64_t n_blocks, int16_t sum[SPIKE_TILE_ROWS],
                        const uint8_t * next_tile) {
    (void) next_tile; // nothing is requested
    enum { BLOCKS_PER_BYTE_SUM = 127/(SPIKE_SALIENT_SLOTS*SPIKE_MAX_MAGNITUDE), ROW_VECTORS = SPIKE_TILE_ROWS/16 };
    memset(sum, 0, SPIKE_TILE_ROWS*sizeof(int16_t));
    for (int64_t b0 = 0; b0 < n_blocks; b0 += BLOCKS_PER_BYTE_SUM) {
        const int64_t b1 = b0 + BLOCKS_PER_BYTE_SUM < n_blocks ? b0 + BLOCKS_PER_BYTE_SUM : n_blocks;
        int8x16_t bytes[ROW_VECTORS];
        for (int v = 0; v < ROW_VECTORS; v++) {
            bytes[v] = vdupq_n_s8(0);
        }
        for (int64_t b = b0; b < b1; b++) {
            int8x16x4_t table; // a block's 64 values, found by position
            for (int q = 0; q < 4; q++) {
                table.val[q] = vld1q_s8(values + b*QK_SPK + 16*q);
            }
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                for (int v = 0; v < ROW_VECTORS; v++) {
                    const uint8x16_t salient = vld1q_u8(salients + 16*v);
                    const uint8x16_t sign    = vshrq_n_u8(salient, 6); // nothing, add, subtract, nothing
                    const int8x16_t  value   = vqtbl4q_s8(table, vandq_u8(salient, vdupq_n_u8(63)));
                    const int8x16_t  add     = vreinterpretq_s8_u8(vceqq_u8(sign, vdupq_n_u8(1)));
                    const int8x16_t  subtract = vreinterpretq_s8_u8(vceqq_u8(sign, vdupq_n_u8(2)));
                    bytes[v] = vaddq_s8(bytes[v], vandq_s8(value, add));
                    bytes[v] = vsubq_s8(bytes[v], vandq_s8(value, subtract));
                    __asm__ volatile("" : "+w"(bytes[v]) : : "memory"); // or all loads move up and spill the table
                }
                salients += SPIKE_TILE_ROWS;
            }
        }
        for (int v = 0; v < ROW_VECTORS; v++) {
            int16_t * s = sum + 16*v;
            vst1q_s16(s,     vaddw_s8(vld1q_s16(s), vget_low_s8(bytes[v])));
            vst1q_s16(s + 8, vaddw_high_s8(vld1q_s16(s + 8), bytes[v]));
        }
    }
}

const spike_kernels spike_kernels_neon = { "neon", integrate, integrate_half, add_salient, false, false, NULL, spike_list_spikes, &spike_prompt_kernels_neon };
