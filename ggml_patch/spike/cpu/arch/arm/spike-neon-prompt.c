// NEON (AdvSIMD of aarch64) for many tokens.
#include "spike/cpu/spike-pack.h"
#include "spike/cpu/spike-salient-lines.h"

#include <arm_neon.h>
#include <string.h>

// A line is four vectors of 16 bytes, or two of half a tile; each byte holds two codes. Per vector and spike two instructions:
//   both += y         whole bytes, modulo 256
//   high += y >> 4    in bytes, shift and addition fused (usra)
// 16 spikes of 15 fit in a byte, so that low = both - (high << 4) is the true sum of the low codes, whatever overflowed.
// After 16 spikes the sums move to 16-bit currents, one per row and in the order of rows.
enum { VECTORS = SPIKE_LINE_BYTES/16, SPIKES_PER_BYTE_SUM = 16, ROW_VECTORS = SPIKE_TILE_ROWS/8 };

// vectors: of a line, here and below; known when this is compiled.
SPIKE_INLINE void copy(const uint8_t * from, size_t stride, int vectors, int64_t n, uint8_t * to) {
    for (int64_t i = 0; i < n; i++) {
        for (int v = 0; v < vectors; v++) {
            const uint8x16_t y = vld1q_u8(from + 16*v);
            vst1q_u8(to + 16*v, y);
            vst1q_u8(to + 16*(vectors + v), vmvnq_u8(y));
        }
        from += stride;
        to   += 32*vectors;
    }
    memset(to, 0, 16*(size_t) vectors);
}

static void copy_lines(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy(from, stride, VECTORS, n, to);
}

static void copy_half(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy(from, stride, VECTORS/2, n, to);
}

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER(a, b) __asm__("" : "+w"(a), "+w"(b))

SPIKE_INLINE void widen(uint8x16_t bytes, uint16x8_t current[2]) {
    current[0] = vaddw_u8(current[0], vget_low_u8(bytes));
    current[1] = vaddw_high_u8(current[1], bytes);
}

SPIKE_INLINE void run_schedule(const uint8_t * lines, int vectors, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential) {
    const int row_vectors = 4*vectors;
    uint16x8_t current[ROW_VECTORS], sum[ROW_VECTORS]; // vector v holds rows 8*v .. 8*v + 7
    for (int v = 0; v < row_vectors; v++) {
        current[v] = sum[v] = vdupq_n_u16(0);
    }
    spikes += program->first;
    const spike_schedule_step * step = program->steps;
    for (const spike_schedule_step * end = step + program->n_steps; step < end; step++) {
        for (int left = step->n_spikes; left > 0;) {
            int group = left < SPIKES_PER_BYTE_SUM ? left : SPIKES_PER_BYTE_SUM;
            left -= group;
            uint8x16_t both[VECTORS], high[VECTORS];
            for (int v = 0; v < vectors; v++) {
                both[v] = high[v] = vdupq_n_u8(0);
            }
            do {
                for (int e = 0; e < SPIKE_SCHEDULE_UNIT; e++) {
                    const uint8_t * line = spike_schedule_line(lines, 16*(size_t) vectors, spikes[e]);
                    for (int v = 0; v < vectors; v++) {
                        const uint8x16_t y = vld1q_u8(line + 16*v);
                        both[v] = vaddq_u8(both[v], y);
                        high[v] = vsraq_n_u8(high[v], y, 4);
                        KEEP_ORDER(both[v], high[v]);
                    }
                }
                spikes += SPIKE_SCHEDULE_UNIT;
                group  -= SPIKE_SCHEDULE_UNIT;
            } while (group > 0);
            for (int v = 0; v < vectors; v++) {
                widen(vsubq_u8(both[v], vshlq_n_u8(high[v], 4)), current + 2*v);
                widen(high[v], current + 2*(vectors + v));
            }
        }
        for (int v = 0; v < row_vectors; v++) {
            sum[v] = vaddq_u16(sum[v], current[v]);
        }
        if (step->action == SPIKE_DOUBLE) {
            for (int v = 0; v < row_vectors; v++) {
                sum[v] = vaddq_u16(sum[v], sum[v]);
            }
        } else if (step->action == SPIKE_SPILL) {
            const uint16x8_t correction = vdupq_n_u16(step->correction);
            const int32x4_t  shift      = vdupq_n_s32(step->shift);
            for (int v = 0; v < row_vectors; v++) {
                const int16x8_t true_sum = vreinterpretq_s16_u16(vsubq_u16(sum[v], correction));
                int32_t * p = potential + 8*v;
                vst1q_s32(p,     vaddq_s32(vld1q_s32(p),     vshlq_s32(vmovl_s16(vget_low_s16(true_sum)), shift)));
                vst1q_s32(p + 4, vaddq_s32(vld1q_s32(p + 4), vshlq_s32(vmovl_high_s16(true_sum), shift)));
                sum[v] = vdupq_n_u16(0);
            }
        }
    }
}

static void integrate_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t potential[SPIKE_TILE_ROWS]) {
    run_schedule(lines, VECTORS, program, spikes, potential);
}

static void integrate_half_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                                    int32_t potential[SPIKE_HALF_TILE], spike_line_requests * requests) {
    (void) requests;
    run_schedule(lines, VECTORS/2, program, spikes, potential);
}

SPIKE_INLINE void transpose8(int16x8_t x[8]) {
    int16x8_t pairs[8];
    int32x4_t fours[8];
    for (int i = 0; i < 4; i++) {
        pairs[2*i]     = vtrn1q_s16(x[2*i], x[2*i + 1]); // even columns of rows 2*i, 2*i + 1
        pairs[2*i + 1] = vtrn2q_s16(x[2*i], x[2*i + 1]);
    }
    for (int h = 0; h < 2; h++) {
        for (int odd = 0; odd < 2; odd++) {
            const int32x4_t a = vreinterpretq_s32_s16(pairs[4*h + odd]), b = vreinterpretq_s32_s16(pairs[4*h + 2 + odd]);
            fours[4*h + odd]     = vtrn1q_s32(a, b); // columns odd and 4 + odd
            fours[4*h + 2 + odd] = vtrn2q_s32(a, b); // columns 2 + odd and 6 + odd
        }
    }
    for (int c = 0; c < 4; c++) {
        const int64x2_t a = vreinterpretq_s64_s32(fours[c]), b = vreinterpretq_s64_s32(fours[4 + c]);
        x[c]     = vreinterpretq_s16_s64(vtrn1q_s64(a, b));
        x[4 + c] = vreinterpretq_s16_s64(vtrn2q_s64(a, b));
    }
}

static void transpose_values(const int8_t * const fine[8], const int8_t * const coarse[8], const int shift[8], int64_t n, int16_t * lines) {
    for (int64_t i = 0; i < n; i += 8) {
        int16x8_t x[8];
        for (int t = 0; t < 8; t++) {
            x[t] = vdupq_n_s16(0);
            if (fine[t]) {
                const int16x8_t coarse_part = vshlq_s16(vmovl_s8(vld1_s8(coarse[t] + i)), vdupq_n_s16((int16_t) shift[t]));
                x[t] = vaddw_s8(coarse_part, vld1_s8(fine[t] + i));
            }
        }
        transpose8(x);
        for (int k = 0; k < 8; k++) {
            vst1q_s16(lines + k*SPIKE_TOKEN_LINE, x[k]);
        }
        lines += 8*SPIKE_TOKEN_LINE;
    }
}

// Bits 6-7 of a salient weight: nothing, add, subtract, nothing. A value enters as (value & USED) ^ FLIPPED; a flipped one is short by 1.
static const int16_t USED[4]    = { 0, -1, -1, 0 };
static const int16_t FLIPPED[4] = { 0, 0, -1, 0 };

SPIKE_INLINE void add_lines_of(const uint8_t * salients, int64_t n_rows, const int16_t * values, int64_t n_blocks, int n_tokens, int64_t stride,
                               int32_t * potential) {
    const int vectors = n_tokens/8;
    for (int row = 0; row < n_rows; row += 8) {
        int16x8_t sums[8][SPIKE_TOKEN_LINE/8];
        for (int r = 0; r < 8; r++) {
            const uint8_t * salient = salients + row + r;
            const int16_t * block   = values;
            int16x8_t sum[SPIKE_TOKEN_LINE/8];
            for (int q = 0; q < vectors; q++) {
                sum[q] = vdupq_n_s16(0);
            }
            int16_t n_flipped = 0;
            for (int64_t k = 0; k < n_blocks; k++) {
                for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                    const int16_t * line = block + ((*salient & 63) << 6);
                    const int       sign = *salient >> 6;
                    const int16x8_t used = vdupq_n_s16(USED[sign]), flipped = vdupq_n_s16(FLIPPED[sign]);
                    for (int q = 0; q < vectors; q++) {
                        sum[q] = vaddq_s16(sum[q], veorq_s16(vandq_s16(vld1q_s16(line + 8*q), used), flipped));
                    }
                    n_flipped = (int16_t) (n_flipped + (sign == 2));
                    salient  += SPIKE_TILE_ROWS;
                }
                block += QK_SPK*SPIKE_TOKEN_LINE;
            }
            for (int q = 0; q < vectors; q++) {
                sums[r][q] = vaddq_s16(sum[q], vdupq_n_s16(n_flipped));
            }
        }
        int32_t * own = potential + row;
        for (int q = 0; q < vectors; q++) {
            int16x8_t x[8];
            for (int r = 0; r < 8; r++) {
                x[r] = sums[r][q];
            }
            transpose8(x);
            for (int k = 0; k < 8; k++) {
                vst1q_s32(own,     vaddq_s32(vld1q_s32(own),     vshll_n_s16(vget_low_s16(x[k]), 4)));
                vst1q_s32(own + 4, vaddq_s32(vld1q_s32(own + 4), vshll_high_n_s16(x[k], 4)));
                own += stride;
            }
        }
    }
}

// Appends the lines whose keys are equal.
SPIKE_INLINE uint16_t * append(uint16_t * next, uint16x8_t lines, uint8x8_t equal) {
    static const uint8_t BITS[8] = { 1, 2, 4, 8, 16, 32, 64, 128 };
    const uint8x16_t pack = vld1q_u8(spike_pack[vaddv_u8(vand_u8(equal, vld1_u8(BITS)))]);
    vst1q_u16(next, vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(lines), pack)));
    return next - (int8_t) vaddv_u8(equal); // a byte that is equal is -1
}

static uint32_t gather_lines(const uint8_t * key, const uint16_t * line, int64_t n, uint8_t wanted, uint16_t * list) {
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += 8) {
        next = append(next, vld1q_u16(line + i), vceq_u8(vld1_u8(key + i), vdup_n_u8(wanted)));
    }
    return (uint32_t) (next - list);
}

static uint32_t gather_inputs(const uint8_t * key, const uint8_t * line_in_block, int64_t n, uint8_t wanted, uint16_t * list) {
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += 8) {
        const uint16x8_t first = vdupq_n_u16((uint16_t) (i >> 6 << 7)); // line of the block; times SPIKE_SCHEDULE_SCALE in the list
        next = append(next, vshlq_n_u16(vaddw_u8(first, vld1_u8(line_in_block + i)), 3), vceq_u8(vld1_u8(key + i), vdup_n_u8(wanted)));
    }
    return (uint32_t) (next - list);
}

const spike_prompt_kernels spike_prompt_kernels_neon = {
    copy_lines, copy_half, integrate_schedule, NULL, integrate_half_schedule, spike_add_salient_tokens, 16, transpose_values, add_salient_lines, gather_lines, gather_inputs, spike_list_rare,
};
