// AVX2: 256-bit byte and 16-bit additions.
#include "spike-requests.h"

#include <immintrin.h>
#include <string.h>

// A line is two vectors of 32 bytes; each byte holds two codes. Per vector and spike:
//   low  += y & 15       codes of rows j, in bytes (at most 16 spikes of 15)
//   high += y >> 4       in 16-bit lanes and without a mask: what the upper byte's low nibble adds is known from low
// After 16 spikes the sums move to 16-bit currents: even and odd rows of the low and of the high nibbles. The even
// ones still carry the odd ones times 256, which the spill takes away again.

typedef struct {
    __m256i low_even, low_odd, high_even, high_odd;
} lanes;

// The compiler would reorder the chain of additions and then run out of registers.
#define KEEP_ORDER(a, b, c, d) __asm__("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d))

static inline __attribute__((always_inline)) __m256i add16(__m256i a, __m256i b, int negative) {
    return negative ? _mm256_sub_epi16(a, b) : _mm256_add_epi16(a, b);
}

static inline __attribute__((always_inline)) void flush(__m256i low, __m256i high, lanes * current, int negative) {
    const __m256i low_odd  = _mm256_srli_epi16(low, 8);
    const __m256i high_own = _mm256_sub_epi16(high, _mm256_slli_epi16(low_odd, 4));
    current->low_even  = add16(current->low_even,  low, negative);
    current->low_odd   = add16(current->low_odd,   low_odd, negative);
    current->high_even = add16(current->high_even, high_own, negative);
    current->high_odd  = add16(current->high_odd,  _mm256_srli_epi16(high_own, 8), negative);
}

static inline __attribute__((always_inline)) const uint32_t * add_list(const uint8_t * lines, const uint32_t * offsets, int n,
                                                                       lanes * current0, lanes * current1, int negative,
                                                                       spike_ahead * ahead, int pairs) {
    const __m256i nibble = _mm256_set1_epi8(15);
    while (n > 0) {
        int group = n < 16 ? n : 16;
        n -= group;
        __m256i low0 = _mm256_setzero_si256(), low1 = low0, high0 = low0, high1 = low0;
        do {
            for (int e = 0; e < SPIKE_LIST_UNIT; e++) {
                const __m256i y0 = _mm256_loadu_si256((const __m256i *) (lines + offsets[e]));
                const __m256i y1 = _mm256_loadu_si256((const __m256i *) (lines + offsets[e] + 32));
                low0  = _mm256_add_epi8(low0, _mm256_and_si256(y0, nibble));
                high0 = _mm256_add_epi16(high0, _mm256_srli_epi16(y0, 4));
                low1  = _mm256_add_epi8(low1, _mm256_and_si256(y1, nibble));
                high1 = _mm256_add_epi16(high1, _mm256_srli_epi16(y1, 4));
                KEEP_ORDER(low0, high0, low1, high1);
            }
            if (ahead) {
                request(ahead, pairs);
            }
            offsets += SPIKE_LIST_UNIT;
            group   -= SPIKE_LIST_UNIT;
        } while (group > 0);
        flush(low0, high0, current0, negative);
        flush(low1, high1, current1, negative);
    }
    return offsets;
}

static inline __attribute__((always_inline)) void accumulate8(int32_t * potential, __m128i sums) {
    __m256i * p = (__m256i *) potential;
    _mm256_storeu_si256(p, _mm256_add_epi32(_mm256_loadu_si256(p), _mm256_cvtepi16_epi32(sums)));
}

// 32 rows, even and odd ones apart, to 32 bits.
static inline __attribute__((always_inline)) void spill32(__m256i even, __m256i odd, __m256i correction, int32_t * potential) {
    const __m256i e  = _mm256_sub_epi16(_mm256_sub_epi16(even, _mm256_slli_epi16(odd, 8)), correction);
    const __m256i o  = _mm256_sub_epi16(odd, correction);
    const __m256i lo = _mm256_unpacklo_epi16(e, o); // rows 0-7, 16-23
    const __m256i hi = _mm256_unpackhi_epi16(e, o); // rows 8-15, 24-31
    accumulate8(potential,      _mm256_castsi256_si128(lo));
    accumulate8(potential + 8,  _mm256_castsi256_si128(hi));
    accumulate8(potential + 16, _mm256_extracti128_si256(lo, 1));
    accumulate8(potential + 24, _mm256_extracti128_si256(hi, 1));
}

static inline __attribute__((always_inline)) void grow(lanes * sum, const lanes * current) {
    sum->low_even  = _mm256_add_epi16(sum->low_even,  current->low_even);
    sum->low_odd   = _mm256_add_epi16(sum->low_odd,   current->low_odd);
    sum->high_even = _mm256_add_epi16(sum->high_even, current->high_even);
    sum->high_odd  = _mm256_add_epi16(sum->high_odd,  current->high_odd);
}

// With ahead NULL nothing is prefetched. Whether it is, and pairs, are known when this is compiled.
static inline __attribute__((always_inline)) void run_program(const uint8_t * lines, const spike_program * program,
                                                              const uint32_t * offsets, int32_t potential[SPIKE_TILE_ROWS],
                                                              spike_ahead * ahead, int pairs) {
    const __m256i zero = _mm256_setzero_si256();
    const lanes silent = { zero, zero, zero, zero };
    lanes current0 = silent, current1 = silent, sum0 = silent, sum1 = silent;
    offsets += program->first;
    for (int s = 0; s < program->n_steps; s++) {
        const spike_step * step = &program->steps[s];
        offsets = add_list(lines, offsets, step->n_positive, &current0, &current1, 0, ahead, pairs);
        offsets = add_list(lines, offsets, step->n_negative, &current0, &current1, 1, ahead, pairs);
        grow(&sum0, &current0);
        grow(&sum1, &current1);
        if (step->spill) {
            const __m256i correction = _mm256_set1_epi16(step->correction);
            spill32(sum0.low_even,  sum0.low_odd,  correction, potential);
            spill32(sum1.low_even,  sum1.low_odd,  correction, potential + 32);
            spill32(sum0.high_even, sum0.high_odd, correction, potential + 64);
            spill32(sum1.high_even, sum1.high_odd, correction, potential + 96);
            sum0 = sum1 = silent;
        }
    }
}

static void integrate(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                      int32_t potential[SPIKE_TILE_ROWS]) {
    run_program(lines, program, offsets, potential, NULL, 0);
}

__attribute__((nonnull)) static void integrate_ahead(const uint8_t * lines, int64_t n_tiles, const spike_program * program,
                                                     const uint32_t * offsets, int32_t * potential, int64_t potential_stride,
                                                     spike_ahead * ahead) {
    spike_ahead own = *ahead; // in registers
    for (; n_tiles > 0; n_tiles--) {
        if (own.third) {
            run_program(lines, program, offsets, potential, &own, 3);
        } else {
            run_program(lines, program, offsets, potential, &own, 2);
        }
        lines     += SPIKE_LINE_BYTES;
        potential += potential_stride;
        KEEP_SUM(potential);
    }
    ahead->position = own.position;
}

// Looks 32 positions up in a block's 64 values: four tables of 16, chosen by position bits 4 and 5.
static inline __attribute__((always_inline)) __m256i look_up(const __m256i table[4], __m256i salient) {
    const __m256i bit4 = _mm256_slli_epi16(salient, 3), bit5 = _mm256_slli_epi16(salient, 2); // to the sign of their bytes
    const __m256i index = _mm256_and_si256(salient, _mm256_set1_epi8(15));
    const __m256i below = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], index), _mm256_shuffle_epi8(table[1], index), bit4);
    const __m256i above = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], index), _mm256_shuffle_epi8(table[3], index), bit4);
    return _mm256_blendv_epi8(below, above, bit5);
}

static void add_salient(const uint8_t * salients, const int8_t * values, int64_t n_blocks, int16_t sum[SPIKE_TILE_ROWS]) {
    const __m256i two_bits = _mm256_set1_epi8(3);
    // bits 6-7: nothing, add, subtract, nothing
    const __m256i sign_of = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    enum { BLOCKS_PER_BYTE_SUM = 127/(SPIKE_SALIENT_SLOTS*SPIKE_MAX_MAGNITUDE) };
    memset(sum, 0, SPIKE_TILE_ROWS*sizeof(int16_t));
    for (int64_t b0 = 0; b0 < n_blocks; b0 += BLOCKS_PER_BYTE_SUM) {
        const int64_t b1 = b0 + BLOCKS_PER_BYTE_SUM < n_blocks ? b0 + BLOCKS_PER_BYTE_SUM : n_blocks;
        __m256i bytes[4] = { _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256() };
        for (int64_t b = b0; b < b1; b++) {
            __m256i table[4];
            for (int q = 0; q < 4; q++) {
                table[q] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (values + b*QK_SPK + 16*q)));
            }
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                for (int v = 0; v < 4; v++) {
                    const __m256i salient = _mm256_loadu_si256((const __m256i *) (salients + 32*v));
                    const __m256i sign    = _mm256_shuffle_epi8(sign_of, _mm256_and_si256(_mm256_srli_epi16(salient, 6), two_bits));
                    bytes[v] = _mm256_add_epi8(bytes[v], _mm256_sign_epi8(look_up(table, salient), sign));
                }
                salients += SPIKE_TILE_ROWS;
            }
        }
        for (int v = 0; v < 4; v++) {
            __m256i * s = (__m256i *) (sum + 32*v);
            _mm256_storeu_si256(s,     _mm256_add_epi16(_mm256_loadu_si256(s),     _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes[v]))));
            _mm256_storeu_si256(s + 1, _mm256_add_epi16(_mm256_loadu_si256(s + 1), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes[v], 1))));
        }
    }
}

const spike_kernels spike_kernels_avx2 = { "avx2", integrate, add_salient, integrate_ahead, spike_list_spikes, &spike_prompt_kernels_avx2 };
