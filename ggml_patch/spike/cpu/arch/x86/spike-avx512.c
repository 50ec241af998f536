// AVX-512 (F, BW, VL, VBMI): a line of 128 neurons in one vector. The arithmetic is that of spike-avx2.c.
#include "spike/cpu/spike-kernels.h"

#include <immintrin.h>
#include <string.h>

typedef struct {
    __m512i low_even, low_odd, high_even, high_odd;
} lanes;

#define KEEP_ORDER(a, b) __asm__("" : "+v"(a), "+v"(b))
// It would also make one product of a loop's steps.
#define KEEP_SUM(a) __asm__("" : "+r"(a))

static inline __attribute__((always_inline)) __m512i add16(__m512i a, __m512i b, int negative) {
    return negative ? _mm512_sub_epi16(a, b) : _mm512_add_epi16(a, b);
}

static inline __attribute__((always_inline)) void prefetch_run(const uint8_t * run, size_t second) {
    _mm_prefetch((const char *) run, _MM_HINT_T1);
    _mm_prefetch((const char *) run + SPIKE_LINE_BYTES, _MM_HINT_T1);
    _mm_prefetch((const char *) run + second, _MM_HINT_T1);
    _mm_prefetch((const char *) run + second + SPIKE_LINE_BYTES, _MM_HINT_T1);
}

// A run for the first time, and one again.
static inline __attribute__((always_inline)) void request(spike_ahead * ahead) {
    const uint8_t * const * next = ahead->runs + (ahead->position >> SPIKE_AHEAD_SHIFT);
    prefetch_run(next[0], ahead->second);
    prefetch_run(next[-SPIKE_AHEAD_AGAIN], ahead->second);
    ahead->position += ahead->step;
    KEEP_SUM(ahead->position);
}

// With ahead NULL, known when this is compiled, nothing is prefetched.
static inline __attribute__((always_inline)) const uint32_t * add_list(const uint8_t * lines, const uint32_t * offsets, int n, lanes * current,
                                                                       int negative, spike_ahead * ahead) {
    const __m512i nibble = _mm512_set1_epi8(15);
    while (n > 0) {
        int group = n < 16 ? n : 16;
        n -= group;
        __m512i low = _mm512_setzero_si512(), high = low;
        do {
            for (int e = 0; e < SPIKE_LIST_UNIT; e++) {
                __m512i y = _mm512_loadu_si512(lines + offsets[e]);
                __asm__("" : "+v"(y)); // loaded once, not by each of its two uses
                low  = _mm512_add_epi8(low, _mm512_and_si512(y, nibble));
                high = _mm512_add_epi16(high, _mm512_srli_epi16(y, 4));
                KEEP_ORDER(low, high);
            }
            if (ahead) {
                request(ahead);
            }
            offsets += SPIKE_LIST_UNIT;
            group   -= SPIKE_LIST_UNIT;
        } while (group > 0);
        const __m512i low_odd  = _mm512_srli_epi16(low, 8);
        const __m512i high_own = _mm512_sub_epi16(high, _mm512_slli_epi16(low_odd, 4));
        current->low_even  = add16(current->low_even,  low, negative);
        current->low_odd   = add16(current->low_odd,   low_odd, negative);
        current->high_even = add16(current->high_even, high_own, negative);
        current->high_odd  = add16(current->high_odd,  _mm512_srli_epi16(high_own, 8), negative);
    }
    return offsets;
}

static inline __attribute__((always_inline)) void accumulate16(int32_t * potential, __m256i sums) {
    _mm512_storeu_si512(potential, _mm512_add_epi32(_mm512_loadu_si512(potential), _mm512_cvtepi16_epi32(sums)));
}

// 64 rows, even and odd ones apart, to 32 bits.
static inline __attribute__((always_inline)) void spill64(__m512i even, __m512i odd, __m512i correction, int32_t * potential) {
    const __m512i e = _mm512_sub_epi16(_mm512_sub_epi16(even, _mm512_slli_epi16(odd, 8)), correction);
    const __m512i o = _mm512_sub_epi16(odd, correction);
    const __m512i lo = _mm512_unpacklo_epi16(e, o); // rows 0-7, 16-23, 32-39, 48-55
    const __m512i hi = _mm512_unpackhi_epi16(e, o); // rows 8-15, 24-31, 40-47, 56-63
    const __m512i first_half  = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), hi);
    const __m512i second_half = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), hi);
    accumulate16(potential,      _mm512_castsi512_si256(first_half));
    accumulate16(potential + 16, _mm512_extracti64x4_epi64(first_half, 1));
    accumulate16(potential + 32, _mm512_castsi512_si256(second_half));
    accumulate16(potential + 48, _mm512_extracti64x4_epi64(second_half, 1));
}

static inline __attribute__((always_inline)) void run_program(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                                                              int32_t potential[SPIKE_TILE_ROWS], spike_ahead * ahead) {
    const __m512i zero = _mm512_setzero_si512();
    const lanes silent = { zero, zero, zero, zero };
    lanes current = silent, sum = silent;
    offsets += program->first;
    for (int s = 0; s < program->n_steps; s++) {
        const spike_step * step = &program->steps[s];
        offsets = add_list(lines, offsets, step->n_positive, &current, 0, ahead);
        offsets = add_list(lines, offsets, step->n_negative, &current, 1, ahead);
        sum.low_even  = _mm512_add_epi16(sum.low_even,  current.low_even);
        sum.low_odd   = _mm512_add_epi16(sum.low_odd,   current.low_odd);
        sum.high_even = _mm512_add_epi16(sum.high_even, current.high_even);
        sum.high_odd  = _mm512_add_epi16(sum.high_odd,  current.high_odd);
        if (step->spill) {
            const __m512i correction = _mm512_set1_epi16(step->correction);
            spill64(sum.low_even,  sum.low_odd,  correction, potential);
            spill64(sum.high_even, sum.high_odd, correction, potential + 64);
            sum = silent;
        }
    }
}

static void integrate(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                      int32_t potential[SPIKE_TILE_ROWS]) {
    run_program(lines, program, offsets, potential, NULL);
}

// One tile after the other: two at a time are no faster, and their requests come in pairs.
__attribute__((nonnull)) static void integrate_ahead(const uint8_t * lines, int64_t n_tiles, const spike_program * program,
                                                     const uint32_t * offsets, int32_t * potential, int64_t potential_stride,
                                                     spike_ahead * ahead) {
    spike_ahead own = *ahead; // in registers
    for (; n_tiles > 0; n_tiles--) {
        run_program(lines, program, offsets, potential, &own);
        lines     += SPIKE_LINE_BYTES;
        potential += potential_stride;
        KEEP_SUM(potential);
    }
    ahead->position = own.position;
}

static void add_salient(const uint8_t * salients, const int8_t * values, int64_t n_blocks, int16_t sum[SPIKE_TILE_ROWS]) {
    enum { BLOCKS_PER_BYTE_SUM = 127/(SPIKE_SALIENT_SLOTS*SPIKE_MAX_MAGNITUDE) };
    memset(sum, 0, SPIKE_TILE_ROWS*sizeof(int16_t));
    for (int64_t b0 = 0; b0 < n_blocks; b0 += BLOCKS_PER_BYTE_SUM) {
        const int64_t b1 = b0 + BLOCKS_PER_BYTE_SUM < n_blocks ? b0 + BLOCKS_PER_BYTE_SUM : n_blocks;
        __m512i bytes[2] = { _mm512_setzero_si512(), _mm512_setzero_si512() };
        for (int64_t b = b0; b < b1; b++) {
            const __m512i plus  = _mm512_loadu_si512(values + b*QK_SPK);
            const __m512i minus = _mm512_sub_epi8(_mm512_setzero_si512(), plus);
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                for (int v = 0; v < 2; v++) {
                    // bits 7-6 become 10 to add, 11 to subtract, and 01 or 00 for no weight or an invalid one
                    const __m512i salient = _mm512_add_epi8(_mm512_loadu_si512(salients + 64*v), _mm512_set1_epi8(0x40));
                    bytes[v] = _mm512_add_epi8(bytes[v], _mm512_maskz_permutex2var_epi8(_mm512_movepi8_mask(salient), plus, salient, minus));
                }
                salients += SPIKE_TILE_ROWS;
            }
        }
        for (int v = 0; v < 2; v++) {
            int16_t * s = sum + 64*v;
            _mm512_storeu_si512(s,      _mm512_add_epi16(_mm512_loadu_si512(s),      _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes[v]))));
            _mm512_storeu_si512(s + 32, _mm512_add_epi16(_mm512_loadu_si512(s + 32), _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes[v], 1))));
        }
    }
}

const spike_kernels spike_kernels_avx512 = { "avx512", integrate, add_salient, integrate_ahead, &spike_prompt_kernels_avx512 };
