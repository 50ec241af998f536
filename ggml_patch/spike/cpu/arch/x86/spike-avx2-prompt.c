// AVX2 for many tokens.
#include "spike-token-lines.h"

#include <string.h>

// A line is two vectors of 32 bytes; each byte holds two codes. Per vector and spike:
//   low  += y & 15       codes of rows j, in bytes (at most 16 spikes of 15)
//   high += y >> 4       in 16-bit lanes and without a mask: what the upper byte's low nibble adds is known from low
// After 16 spikes the sums move to 16-bit currents: even and odd rows of the low and of the high nibbles. The even
// ones still carry the odd ones times 256, which the spill takes away again.

static void copy_lines(const uint8_t * from, size_t stride, int64_t width, int64_t n, uint8_t * to) {
    const __m256i ones = _mm256_set1_epi8(-1);
    const int64_t bytes = (int64_t) 1 << spike_line_shift(width);
    const uint8_t * ahead = from + (stride << 4); // lines of a strip come from afar, and no prefetcher sees their order
    for (const uint8_t * end = to + (n << (spike_line_shift(width) + 1)); to < end;) {
        for (int64_t j = 0; j < bytes; j += 32) {
            _mm_prefetch((const char *) ahead + j, _MM_HINT_T0);
            const __m256i y = _mm256_loadu_si256((const __m256i *) (from + j));
            _mm256_storeu_si256((__m256i *) (to + j), y);
            _mm256_storeu_si256((__m256i *) (to + bytes + j), _mm256_xor_si256(y, ones));
        }
        from  += stride;
        ahead += stride;
        to    += 2*bytes;
    }
    memset(to, 0, (size_t) bytes);
}

typedef struct {
    __m256i low_even, low_odd, high_even, high_odd;
} lanes;

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER(a, b, c, d) __asm__("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d))

#define INLINE static inline __attribute__((always_inline))

// SPIKE_SCHEDULE_UNIT spikes to the sums in bytes.
INLINE void add_unit(const uint8_t * lines, int line_shift, const uint16_t * spikes, __m256i low[2], __m256i high[2]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int e = 0; e < SPIKE_SCHEDULE_UNIT; e++) {
        const uint8_t * line = lines + ((size_t) spikes[e] << line_shift);
        const __m256i y0 = _mm256_loadu_si256((const __m256i *) line), y1 = _mm256_loadu_si256((const __m256i *) (line + 32));
        low[0]  = _mm256_add_epi8(low[0], _mm256_and_si256(y0, nibble));
        high[0] = _mm256_add_epi16(high[0], _mm256_srli_epi16(y0, 4));
        low[1]  = _mm256_add_epi8(low[1], _mm256_and_si256(y1, nibble));
        high[1] = _mm256_add_epi16(high[1], _mm256_srli_epi16(y1, 4));
        KEEP_ORDER(low[0], high[0], low[1], high[1]);
    }
}

INLINE void flush(__m256i low, __m256i high, lanes * current) {
    const __m256i low_odd  = _mm256_srli_epi16(low, 8);
    const __m256i high_own = _mm256_sub_epi16(high, _mm256_slli_epi16(low_odd, 4));
    current->low_even  = _mm256_add_epi16(current->low_even,  low);
    current->low_odd   = _mm256_add_epi16(current->low_odd,   low_odd);
    current->high_even = _mm256_add_epi16(current->high_even, high_own);
    current->high_odd  = _mm256_add_epi16(current->high_odd,  _mm256_srli_epi16(high_own, 8));
}

INLINE void grow(lanes * sum, const lanes * by) {
    sum->low_even  = _mm256_add_epi16(sum->low_even,  by->low_even);
    sum->low_odd   = _mm256_add_epi16(sum->low_odd,   by->low_odd);
    sum->high_even = _mm256_add_epi16(sum->high_even, by->high_even);
    sum->high_odd  = _mm256_add_epi16(sum->high_odd,  by->high_odd);
}

INLINE void accumulate8(int32_t * potential, __m128i sums, __m128i shift) {
    __m256i * p = (__m256i *) potential;
    _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), _mm256_sll_epi32(_mm256_cvtepi16_epi32(sums), shift)));
}

// 32 rows, even and odd ones apart, to 32 bits.
INLINE void spill32(__m256i even, __m256i odd, const spike_schedule_step * step, int32_t * potential) {
    const __m256i correction = _mm256_set1_epi16((int16_t) step->correction);
    const __m128i shift = _mm_cvtsi32_si128(step->shift);
    const __m256i e  = _mm256_sub_epi16(_mm256_sub_epi16(even, _mm256_slli_epi16(odd, 8)), correction);
    const __m256i o  = _mm256_sub_epi16(odd, correction);
    const __m256i lo = _mm256_unpacklo_epi16(e, o); // rows 0-7, 16-23
    const __m256i hi = _mm256_unpackhi_epi16(e, o); // rows 8-15, 24-31
    accumulate8(potential,      _mm256_castsi256_si128(lo), shift);
    accumulate8(potential + 8,  _mm256_castsi256_si128(hi), shift);
    accumulate8(potential + 16, _mm256_extracti128_si256(lo, 1), shift);
    accumulate8(potential + 24, _mm256_extracti128_si256(hi, 1), shift);
}

// One tile.
INLINE void run_schedule(const uint8_t * lines, int line_shift, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential) {
    enum { SPIKES_PER_BYTE_SUM = 16, FULL_UNITS = SPIKES_PER_BYTE_SUM/SPIKE_SCHEDULE_UNIT };
    const __m256i zero = _mm256_setzero_si256();
    const lanes silent = { zero, zero, zero, zero };
    lanes current[2] = { silent, silent }, sum[2] = { silent, silent };
    spikes += program->first;
    const spike_schedule_step * step = program->steps;
    for (const spike_schedule_step * end = step + program->n_steps; step < end; step++) {
        int left = step->n_spikes;
        for (; left >= SPIKES_PER_BYTE_SUM; left -= SPIKES_PER_BYTE_SUM) {
            __m256i low[2] = { zero, zero }, high[2] = { zero, zero };
            for (int u = 0; u < FULL_UNITS; u++) {
                add_unit(lines, line_shift, spikes + u*SPIKE_SCHEDULE_UNIT, low, high);
            }
            spikes += SPIKES_PER_BYTE_SUM;
            flush(low[0], high[0], &current[0]);
            flush(low[1], high[1], &current[1]);
        }
        if (left > 0) {
            __m256i low[2] = { zero, zero }, high[2] = { zero, zero };
            do {
                add_unit(lines, line_shift, spikes, low, high);
                spikes += SPIKE_SCHEDULE_UNIT;
                left   -= SPIKE_SCHEDULE_UNIT;
            } while (left > 0);
            flush(low[0], high[0], &current[0]);
            flush(low[1], high[1], &current[1]);
        }
        grow(&sum[0], &current[0]);
        grow(&sum[1], &current[1]);
        if (step->action == SPIKE_DOUBLE) {
            grow(&sum[0], &sum[0]);
            grow(&sum[1], &sum[1]);
        } else if (step->action == SPIKE_SPILL) {
            for (int h = 0; h < 2; h++) {
                spill32(sum[h].low_even,  sum[h].low_odd,  step, potential + 32*h);
                spill32(sum[h].high_even, sum[h].high_odd, step, potential + 32*h + 64);
                sum[h] = silent;
            }
        }
    }
}

static void integrate_schedule(const uint8_t * lines, int64_t width, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t * potential) {
    if (width == 1) {
        run_schedule(lines, SPIKE_LINE_SHIFT, program, spikes, potential);
        return;
    }
    for (int w = 0; w < 2; w++) {
        run_schedule(lines + SPIKE_LINE_BYTES*w, SPIKE_LINE_SHIFT + 1, program, spikes, potential + SPIKE_TILE_ROWS*w);
    }
}

// For every set of eight lanes, the shuffle that moves its 16-bit lanes together.
static uint8_t PACK[256][16];

// Runs when the library is loaded, on CPUs without AVX, too: the flags of this file are not for it.
__attribute__((constructor, target("no-avx"))) static void fill_pack(void) {
    for (int set = 0; set < 256; set++) {
        int n = 0;
        for (int lane = 0; lane < 8; lane++) {
            if (set >> lane & 1) {
                PACK[set][n++] = (uint8_t) (2*lane);
                PACK[set][n++] = (uint8_t) (2*lane + 1);
            }
        }
    }
}

static uint32_t gather_lines(const uint8_t * key, const uint16_t * line, int64_t n, uint8_t wanted, uint16_t * list) {
    const __m256i w = _mm256_set1_epi8((char) wanted);
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += 32) {
        uint32_t found = (uint32_t) _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *) (key + i)), w));
        for (int k = 0; k < 4; k++) {
            const __m128i eight = _mm_loadu_si128((const __m128i *) (line + i + 8*k));
            const __m128i pack  = _mm_loadu_si128((const __m128i *) PACK[found & 255]);
            _mm_storeu_si128((__m128i *) next, _mm_shuffle_epi8(eight, pack));
            next  += __builtin_popcount(found & 255);
            found >>= 8;
        }
    }
    return (uint32_t) (next - list);
}

static uint32_t gather_inputs(const uint8_t * key, const uint8_t * line_in_block, int64_t n, uint8_t wanted, uint16_t * list) {
    const __m256i w = _mm256_set1_epi8((char) wanted);
    uint16_t * next = list;
    for (int64_t i = 0; i < n; i += 32) {
        uint32_t found = (uint32_t) _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *) (key + i)), w));
        const __m128i first = _mm_set1_epi16((int16_t) (i >> 6 << 7)); // line of the block
        for (int k = 0; k < 4; k++) {
            const __m128i eight = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *) (line_in_block + i + 8*k)));
            const __m128i pack  = _mm_loadu_si128((const __m128i *) PACK[found & 255]);
            _mm_storeu_si128((__m128i *) next, _mm_add_epi16(first, _mm_shuffle_epi8(eight, pack)));
            next  += __builtin_popcount(found & 255);
            found >>= 8;
        }
    }
    return (uint32_t) (next - list);
}

// A single instruction applies a sign to 16 values.
static inline __attribute__((always_inline)) void add_slots(const uint8_t * salient, const int16_t * values, int n_blocks, int16_t sums[SPIKE_TOKEN_LINE]) {
    static const int32_t SIGNS[4] = { 0, 0x00010001, -1, 0 }; // bits 6-7: nothing, add, subtract, nothing
    __m256i sum[4];
    for (int q = 0; q < 4; q++) {
        sum[q] = _mm256_load_si256((const __m256i *) (sums + 16*q));
    }
    for (int k = 0; k < n_blocks; k++) {
        for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
            const __m256i * line = (const __m256i *) (values + (*salient & 63)*SPIKE_TOKEN_LINE);
            const __m256i   sign = _mm256_set1_epi32(SIGNS[*salient >> 6]);
            for (int q = 0; q < 4; q++) {
                sum[q] = _mm256_add_epi16(sum[q], _mm256_sign_epi16(_mm256_loadu_si256(line + q), sign));
            }
            salient += SPIKE_TILE_ROWS;
        }
        values += QK_SPK*SPIKE_TOKEN_LINE;
    }
    for (int q = 0; q < 4; q++) {
        _mm256_store_si256((__m256i *) (sums + 16*q), sum[q]);
    }
}

const spike_prompt_kernels spike_prompt_kernels_avx2 = {
    1, copy_lines, integrate_schedule, 16, transpose_values, add_salient_lines, gather_lines, gather_inputs,
};
