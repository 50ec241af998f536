// AVX-512 (F, BW, VL, VBMI): a line of 128 neurons in one vector. The arithmetic is that of spike-program-256.h.
#include "spike-program-256.h"

#include <immintrin.h>
#include <string.h>

static const uint8_t NUMBERS[QK_SPK] __attribute__((aligned(64))) = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63,
};

// 16-bit sums of 64 rows.
typedef struct {
    __m512i even, odd;
} lanes;

#define KEEP_ORDER(a, b) __asm__("" : "+v"(a), "+v"(b))

SPIKE_INLINE __m512i add16(__m512i a, __m512i b, bool negative) {
    return negative ? _mm512_sub_epi16(a, b) : _mm512_add_epi16(a, b);
}

SPIKE_INLINE void widen(__m512i bytes, bool negative, lanes * current) {
    current->even = add16(current->even, bytes, negative);
    current->odd  = add16(current->odd,  _mm512_srli_epi16(bytes, 8), negative);
}

// With ahead NULL nothing is requested. Whether it is, negative and pairs are known when this is compiled.
SPIKE_INLINE const uint32_t * add_list(const uint8_t * lines, const uint32_t * offsets, int n, bool negative, lanes * low, lanes * high,
                                 spike_ahead * ahead, int pairs) {
    while (n > 0) {
        int group = n < SPIKES_PER_BYTE_SUM ? n : SPIKES_PER_BYTE_SUM;
        n -= group;
        __m512i both = _mm512_setzero_si512(), upper = both;
        do {
            for (int e = 0; e < SPIKE_LIST_UNIT; e++) {
                __m512i y = _mm512_loadu_si512(lines + offsets[e]);
                __asm__("" : "+v"(y)); // loaded once, not by each of its two uses
                both  = _mm512_add_epi8(both,  y);
                upper = _mm512_add_epi8(upper, _mm512_srli_epi16(y, 4));
                KEEP_ORDER(both, upper);
            }
            if (ahead) {
                request(ahead, pairs);
            }
            offsets += SPIKE_LIST_UNIT;
            group   -= SPIKE_LIST_UNIT;
        } while (group > 0);
        const __m512i high_spilled = _mm512_slli_epi16(_mm512_and_si512(upper, _mm512_set1_epi8(15)), 4);
        const __m512i low_spilled  = _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi16(0xF0));
        widen(_mm512_sub_epi8(both,  high_spilled), negative, low);
        widen(_mm512_sub_epi8(upper, low_spilled),  negative, high);
    }
    return offsets;
}

SPIKE_INLINE void accumulate16(int32_t * potential, __m256i sums) {
    _mm512_storeu_si512(potential, _mm512_add_epi32(_mm512_loadu_si512(potential), _mm512_cvtepi16_epi32(sums)));
}

// 64 rows, even and odd ones apart, to 32 bits.
SPIKE_INLINE void spill(lanes * sum, __m512i correction, int32_t * potential) {
    const __m512i e = _mm512_sub_epi16(_mm512_sub_epi16(sum->even, _mm512_slli_epi16(sum->odd, 8)), correction);
    const __m512i o = _mm512_sub_epi16(sum->odd, correction);
    const __m512i lo = _mm512_unpacklo_epi16(e, o); // rows 0-7, 16-23, 32-39, 48-55
    const __m512i hi = _mm512_unpackhi_epi16(e, o); // rows 8-15, 24-31, 40-47, 56-63
    const __m512i first_half  = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), hi);
    const __m512i second_half = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), hi);
    accumulate16(potential,      _mm512_castsi512_si256(first_half));
    accumulate16(potential + 16, _mm512_extracti64x4_epi64(first_half, 1));
    accumulate16(potential + 32, _mm512_castsi512_si256(second_half));
    accumulate16(potential + 48, _mm512_extracti64x4_epi64(second_half, 1));
    sum->even = sum->odd = _mm512_setzero_si512();
}

SPIKE_INLINE void grow(lanes * sum, const lanes * by) {
    sum->even = _mm512_add_epi16(sum->even, by->even);
    sum->odd  = _mm512_add_epi16(sum->odd,  by->odd);
}

SPIKE_INLINE void run_program(const uint8_t * lines, const spike_program * program, const uint32_t * offsets, int32_t potential[SPIKE_TILE_ROWS],
                        spike_ahead * ahead, int pairs) {
    const lanes silent = { _mm512_setzero_si512(), _mm512_setzero_si512() };
    lanes low = silent, high = silent, low_sum = silent, high_sum = silent;
    offsets += program->first;
    for (int s = 0; s < program->n_steps; s++) {
        const spike_step * step = &program->steps[s];
        offsets = add_list(lines, offsets, step->n_positive, false, &low, &high, ahead, pairs);
        offsets = add_list(lines, offsets, step->n_negative, true,  &low, &high, ahead, pairs);
        grow(&low_sum,  &low);
        grow(&high_sum, &high);
        if (step->spill) {
            const __m512i correction = _mm512_set1_epi16(step->correction);
            spill(&low_sum,  correction, potential);
            spill(&high_sum, correction, potential + 64);
        }
    }
}

static void integrate(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                      int32_t potential[SPIKE_TILE_ROWS]) {
    run_program(lines, program, offsets, potential, NULL, 0);
}

// One tile after the other: two at a time are no faster, and their requests come in pairs.
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

// Numbers of the bits that are set, from `first` on, to a list. Returns how many.
static inline uint32_t list_numbers(__mmask64 found, __m512i first, uint16_t * list) {
    const __m512i  numbers = _mm512_maskz_compress_epi8(found, _mm512_load_si512(NUMBERS));
    const uint32_t n       = (uint32_t) __builtin_popcountll(found);
    _mm256_storeu_si256((__m256i *) list, _mm256_add_epi16(_mm512_castsi512_si256(first), _mm256_cvtepu8_epi16(_mm512_castsi512_si128(numbers))));
    if (__builtin_expect(n > 16, 0)) {
        _mm512_storeu_si512(list,      _mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(numbers))));
        _mm512_storeu_si512(list + 32, _mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(numbers, 1))));
    }
    return n;
}

static void list_spikes(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                        spike_lists * lists) {
    const __m512i block = _mm512_set1_epi16(QK_SPK);
    __m512i top = _mm512_setzero_si512(), number = _mm512_set1_epi16((short) first);
    uint16_t * next_active = active;
    for (int64_t i = 0; i < n; i += QK_SPK) {
        const __m512i v = _mm512_loadu_si512(values + i);
        next_active += list_numbers(_mm512_test_epi8_mask(v, v), number, next_active);
        number = _mm512_add_epi16(number, block);
        top    = _mm512_max_epu8(top, _mm512_abs_epi8(v));
    }
    int largest = SPIKE_MAX_MAGNITUDE;
    while (largest > 0 && !_mm512_cmpeq_epi8_mask(top, _mm512_set1_epi8((char) largest))) {
        largest--;
    }
    const __m128i padding = _mm_set1_epi16((short) zero_line);
    uint16_t * next = lines;
    memset(lists->count, 0, sizeof(lists->count));
    for (int m = largest; m > 0; m--) {
        for (int negative = 0; negative < 2; negative++) {
            const __m512i wanted = _mm512_set1_epi8((char) (negative ? -m : m));
            uint32_t count = 0;
            number = _mm512_set1_epi16((short) first);
            for (int64_t i = 0; i < n; i += QK_SPK) {
                count += list_numbers(_mm512_cmpeq_epi8_mask(_mm512_loadu_si512(values + i), wanted), number, next + count);
                number = _mm512_add_epi16(number, block);
            }
            _mm_storel_epi64((__m128i *) (next + count), padding);
            next += (count + SPIKE_LIST_UNIT - 1) & ~(uint32_t) (SPIKE_LIST_UNIT - 1);
            lists->count[2*m + negative] = (uint16_t) count;
        }
    }
    lists->n_places = (uint32_t) (next - lines);
    lists->n_active = (uint32_t) (next_active - active);
}

const spike_kernels spike_kernels_avx512 = { "avx512", integrate, integrate_half, add_salient, integrate_ahead, list_spikes, &spike_prompt_kernels_avx512 };
