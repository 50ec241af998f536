// AVX-512 (F, BW, VL, VBMI): a line of 128 neurons in one vector.
#include "spike-program-256.h"
#include "spike-sums-512.h"

#include <string.h>

static const uint8_t NUMBERS[QK_SPK] __attribute__((aligned(64))) = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63,
};

// With ahead NULL nothing is requested. Whether it is, negative and pairs are known when this is compiled.
SPIKE_INLINE const uint32_t * add_list(const uint8_t * lines, const uint32_t * offsets, int n, bool negative, tile512 * current,
                                       spike_ahead * ahead, int pairs) {
    while (n > 0) {
        int group = n < SPIKES_PER_BYTE_SUM ? n : SPIKES_PER_BYTE_SUM;
        n -= group;
        __m512i both = _mm512_setzero_si512(), upper = both;
        do {
            for (int e = 0; e < SPIKE_LIST_UNIT; e++) {
                add_line512(lines + offsets[e], &both, &upper);
            }
            if (ahead) {
                request(ahead, pairs);
            }
            offsets += SPIKE_LIST_UNIT;
            group   -= SPIKE_LIST_UNIT;
        } while (group > 0);
        flush512(both, upper, negative, current);
    }
    return offsets;
}

SPIKE_INLINE void run_program(const uint8_t * lines, const spike_program * program, const uint32_t * offsets, int32_t potential[SPIKE_TILE_ROWS],
                              spike_ahead * ahead, int pairs) {
    const lanes512 silent = { _mm512_setzero_si512(), _mm512_setzero_si512() };
    tile512 current = { silent, silent }, sum = current;
    offsets += program->first;
    for (int s = 0; s < program->n_steps; s++) {
        const spike_step * step = &program->steps[s];
        offsets = add_list(lines, offsets, step->n_positive, false, &current, ahead, pairs);
        offsets = add_list(lines, offsets, step->n_negative, true,  &current, ahead, pairs);
        grow512(&sum, &current);
        if (step->spill) {
            spill512(&sum, step->correction, 0, potential);
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

// 64 rows at a time, whose sums stay in registers.
static void add_salient(const uint8_t * salients, const int8_t * values, int64_t n_blocks, int16_t sum[SPIKE_TILE_ROWS],
                        const uint8_t * next_tile) {
    (void) next_tile; // nothing is requested
    _Static_assert(SPIKE_SALIENT_SLOTS*SPIKE_MAX_MAGNITUDE <= INT8_MAX, "bytes hold the sum of a block");
    for (int row = 0; row < SPIKE_TILE_ROWS; row += 64) {
        __m512i first = _mm512_setzero_si512(), second = _mm512_setzero_si512();
        const uint8_t * next = salients + row;
        for (int64_t b = 0; b < n_blocks; b++) {
            const __m512i plus  = _mm512_loadu_si512(values + b*QK_SPK);
            const __m512i minus = _mm512_sub_epi8(_mm512_setzero_si512(), plus);
            __m512i bytes = _mm512_setzero_si512();
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                // bits 7-6 become 10 to add, 11 to subtract, and 01 or 00 for no weight or an invalid one
                const __m512i salient = _mm512_add_epi8(_mm512_loadu_si512(next), _mm512_set1_epi8(0x40));
                bytes = _mm512_add_epi8(bytes, _mm512_maskz_permutex2var_epi8(_mm512_movepi8_mask(salient), plus, salient, minus));
                next += SPIKE_TILE_ROWS;
            }
            first  = _mm512_add_epi16(first,  _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)));
            second = _mm512_add_epi16(second, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1)));
        }
        _mm512_storeu_si512(sum + row,      first);
        _mm512_storeu_si512(sum + row + 32, second);
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

// The inputs that fire, numbered from `first` on. Returns where the list ends. largest: of their magnitudes.
SPIKE_INLINE uint16_t * list_active(const int8_t * values, int64_t n, int64_t first, uint16_t * list, int * largest) {
    __m512i top = _mm512_setzero_si512(), number = _mm512_set1_epi16((short) first);
    for (int64_t i = 0; i < n; i += QK_SPK) {
        const __m512i v = _mm512_loadu_si512(values + i);
        list  += list_numbers(_mm512_test_epi8_mask(v, v), number, list);
        number = _mm512_add_epi16(number, _mm512_set1_epi16(QK_SPK));
        top    = _mm512_max_epu8(top, _mm512_abs_epi8(v));
    }
    *largest = SPIKE_MAX_MAGNITUDE;
    while (*largest > 0 && !_mm512_cmpeq_epi8_mask(top, _mm512_set1_epi8((char) *largest))) {
        --*largest;
    }
    return list;
}

// The same of one value.
SPIKE_INLINE uint16_t * list_value(const int8_t * values, int64_t n, int64_t first, int wanted, uint16_t * list) {
    const __m512i w = _mm512_set1_epi8((char) wanted);
    __m512i number = _mm512_set1_epi16((short) first);
    for (int64_t i = 0; i < n; i += QK_SPK) {
        list  += list_numbers(_mm512_cmpeq_epi8_mask(_mm512_loadu_si512(values + i), w), number, list);
        number = _mm512_add_epi16(number, _mm512_set1_epi16(QK_SPK));
    }
    return list;
}

// By a pass for every magnitude and sign: the counting sort of the plain C kernel needs a counter soon after it was written.
static void list_spikes(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                        spike_lists * lists) {
    int largest;
    lists->n_active = (uint32_t) (list_active(values, n, first, active, &largest) - active);
    memset(lists->count, 0, sizeof(lists->count));
    const __m128i padding = _mm_set1_epi16((short) zero_line);
    uint16_t * next = lines;
    for (int m = largest; m > 0; m--) {
        for (int negative = 0; negative < 2; negative++) {
            uint16_t * end = list_value(values, n, first, negative ? -m : m, next);
            const uint32_t count = (uint32_t) (end - next);
            _mm_storel_epi64((__m128i *) end, padding);
            next += spike_padded(count);
            lists->count[2*m + negative] = (uint16_t) count;
        }
    }
    lists->n_places = (uint32_t) (next - lines);
}

const spike_kernels spike_kernels_avx512 = {
    "avx512", integrate, integrate_half, add_salient, false, false, integrate_ahead, list_spikes, &spike_prompt_kernels_avx512,
};
