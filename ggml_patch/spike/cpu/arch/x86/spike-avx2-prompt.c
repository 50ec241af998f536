// AVX2 for many tokens.
#include "spike-token-lines.h"

#include <string.h>

// A line is two vectors of 32 bytes; each byte holds two codes. Per vector and spike three instructions:
//   both  += y        whole bytes
//   upper += y >> 4   shifted in 16-bit lanes and added in bytes: high codes, and in even bytes 16 times the low one of the next byte
// both modulo 256. 16 spikes of 15 fit in a byte, and the lower four bits of each sum are true: those of low and of high
// codes. They tell what the sums' upper four bits hold too much: low = both - 16*(upper % 16) and, in even bytes,
// high = upper - 16*(both of the next byte % 16). After 16 spikes the sums move to 16-bit currents of even and odd bytes.
// The even ones still carry the odd ones times 256, which the spill takes away again.
enum { VECTORS = SPIKE_LINE_BYTES/32, SPIKES_PER_BYTE_SUM = 16, FULL_UNITS = SPIKES_PER_BYTE_SUM/SPIKE_SCHEDULE_UNIT };

#define INLINE static inline __attribute__((always_inline))

INLINE void copy_masked(const uint8_t * from, size_t stride, int64_t n, __m256i mask, uint8_t * to) {
    const uint8_t * ahead = from + (stride << 4); // lines of a strip come from afar, and no prefetcher sees their order
    for (const uint8_t * end = to + n*(2*SPIKE_LINE_BYTES); to < end; to += 2*SPIKE_LINE_BYTES) {
        _mm_prefetch((const char *) ahead, _MM_HINT_T0);
        for (int v = 0; v < VECTORS; v++) {
            const __m256i y = _mm256_loadu_si256((const __m256i *) from + v);
            _mm256_storeu_si256((__m256i *) to + v, _mm256_and_si256(y, mask));
            _mm256_storeu_si256((__m256i *) to + VECTORS + v, _mm256_andnot_si256(y, mask));
        }
        from  += stride;
        ahead += stride;
    }
    memset(to, 0, SPIKE_LINE_BYTES);
}

static void copy_lines(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy_masked(from, stride, n, _mm256_set1_epi8(-1), to);
}

static void copy_half(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy_masked(from, stride, n, _mm256_set1_epi8(15), to);
}

// 16-bit sums of 32 rows.
typedef struct {
    __m256i even, odd;
} lanes;

// Of the rows of each vector's low codes, and of its high ones.
typedef struct {
    lanes low[VECTORS], high[VECTORS];
} tile_lanes;

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER(a, b) __asm__("" : "+x"(a), "+x"(b))

// SPIKE_SCHEDULE_UNIT spikes to the sums in bytes.
INLINE void add_unit(const uint8_t * lines, bool half, const uint16_t * spikes, __m256i both[VECTORS], __m256i upper[VECTORS]) {
    for (int e = 0; e < SPIKE_SCHEDULE_UNIT; e++) {
        const __m256i * line = (const __m256i *) spike_schedule_line(lines, spikes[e]);
        __m256i y0 = _mm256_loadu_si256(line), y1 = _mm256_loadu_si256(line + 1);
        __asm__("" : "+x"(y0), "+x"(y1)); // loaded once, not by each of their two uses
        both[0] = _mm256_add_epi8(both[0], y0);
        both[1] = _mm256_add_epi8(both[1], y1);
        KEEP_ORDER(both[0], both[1]);
        if (!half) {
            upper[0] = _mm256_add_epi8(upper[0], _mm256_srli_epi16(y0, 4));
            upper[1] = _mm256_add_epi8(upper[1], _mm256_srli_epi16(y1, 4));
            KEEP_ORDER(upper[0], upper[1]);
        }
    }
}

INLINE void widen(__m256i bytes, lanes * current) {
    current->even = _mm256_add_epi16(current->even, bytes);
    current->odd  = _mm256_add_epi16(current->odd,  _mm256_srli_epi16(bytes, 8));
}

// Up to 16 spikes of a step to the currents.
INLINE void add_group(const uint8_t * lines, bool half, const uint16_t * spikes, int n_units, tile_lanes * current) {
    __m256i both[VECTORS] = { _mm256_setzero_si256(), _mm256_setzero_si256() }, upper[VECTORS] = { both[0], both[0] };
    if (n_units == FULL_UNITS) {
        for (int u = 0; u < FULL_UNITS; u++) {
            add_unit(lines, half, spikes + u*SPIKE_SCHEDULE_UNIT, both, upper);
        }
    } else {
        do {
            add_unit(lines, half, spikes, both, upper);
            spikes += SPIKE_SCHEDULE_UNIT;
        } while (--n_units > 0);
    }
    for (int v = 0; v < VECTORS; v++) {
        if (half) {
            widen(both[v], &current->low[v]);
        } else {
            const __m256i high_spilled = _mm256_slli_epi16(_mm256_and_si256(upper[v], _mm256_set1_epi8(15)), 4);
            const __m256i low_spilled  = _mm256_and_si256(_mm256_srli_epi16(both[v], 4), _mm256_set1_epi16(0xF0));
            widen(_mm256_sub_epi8(both[v],  high_spilled), &current->low[v]);
            widen(_mm256_sub_epi8(upper[v], low_spilled),  &current->high[v]);
        }
    }
}

INLINE void grow_lanes(lanes * sum, const lanes * by) {
    sum->even = _mm256_add_epi16(sum->even, by->even);
    sum->odd  = _mm256_add_epi16(sum->odd,  by->odd);
}

INLINE void grow(tile_lanes * sum, bool half, const tile_lanes * by) {
    for (int v = 0; v < VECTORS; v++) {
        grow_lanes(&sum->low[v], &by->low[v]);
        if (!half) {
            grow_lanes(&sum->high[v], &by->high[v]);
        }
    }
}

INLINE void accumulate8(int32_t * potential, __m128i sums, __m128i shift) {
    __m256i * p = (__m256i *) potential;
    _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), _mm256_sll_epi32(_mm256_cvtepi16_epi32(sums), shift)));
}

// 32 rows, even and odd ones apart, to 32 bits.
INLINE void spill(lanes * sum, const spike_schedule_step * step, int32_t * potential) {
    const __m256i correction = _mm256_set1_epi16((int16_t) step->correction);
    const __m128i shift = _mm_cvtsi32_si128(step->shift);
    const __m256i e  = _mm256_sub_epi16(_mm256_sub_epi16(sum->even, _mm256_slli_epi16(sum->odd, 8)), correction);
    const __m256i o  = _mm256_sub_epi16(sum->odd, correction);
    const __m256i lo = _mm256_unpacklo_epi16(e, o); // rows 0-7, 16-23
    const __m256i hi = _mm256_unpackhi_epi16(e, o); // rows 8-15, 24-31
    accumulate8(potential,      _mm256_castsi256_si128(lo), shift);
    accumulate8(potential + 8,  _mm256_castsi256_si128(hi), shift);
    accumulate8(potential + 16, _mm256_extracti128_si256(lo, 1), shift);
    accumulate8(potential + 24, _mm256_extracti128_si256(hi, 1), shift);
    sum->even = sum->odd = _mm256_setzero_si256();
}

// With half known when this is compiled.
INLINE void run_schedule(const uint8_t * lines, bool half, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential) {
    const lanes silent = { _mm256_setzero_si256(), _mm256_setzero_si256() };
    tile_lanes current = { { silent, silent }, { silent, silent } }, sum = current;
    spikes += program->first;
    const spike_schedule_step * step = program->steps;
    for (const spike_schedule_step * end = step + program->n_steps; step < end; step++) {
        int left = step->n_spikes;
        for (; left >= SPIKES_PER_BYTE_SUM; left -= SPIKES_PER_BYTE_SUM) {
            add_group(lines, half, spikes, FULL_UNITS, &current);
            spikes += SPIKES_PER_BYTE_SUM;
        }
        if (left > 0) {
            add_group(lines, half, spikes, left/SPIKE_SCHEDULE_UNIT, &current);
            spikes += left;
        }
        grow(&sum, half, &current);
        if (step->action == SPIKE_DOUBLE) {
            grow(&sum, half, &sum);
        } else if (step->action == SPIKE_SPILL) {
            for (int v = 0; v < VECTORS; v++) {
                spill(&sum.low[v], step, potential + 32*v);
                if (!half) {
                    spill(&sum.high[v], step, potential + SPIKE_HALF_TILE + 32*v);
                }
            }
        }
    }
}

static void integrate_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t potential[SPIKE_TILE_ROWS]) {
    run_schedule(lines, false, program, spikes, potential);
}

static void integrate_half(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                           int32_t potential[SPIKE_HALF_TILE]) {
    run_schedule(lines, true, program, spikes, potential);
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

// By SPIKE_SCHEDULE_SCALE.
INLINE __m128i scaled(__m128i lines) {
    return _mm_slli_epi16(lines, 3);
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
            _mm_storeu_si128((__m128i *) next, scaled(_mm_add_epi16(first, _mm_shuffle_epi8(eight, pack))));
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
    copy_lines, copy_half, integrate_schedule, integrate_half, 16, transpose_values, add_salient_lines, gather_lines, gather_inputs,
};
