// AVX2: 256-bit byte and 16-bit additions.
#include "spike-pack-256.h"
#include "spike-program-256.h"

#include <string.h>

static void integrate(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                      int32_t potential[SPIKE_TILE_ROWS]) {
    run_program256(lines, SPIKE_LINE_BYTES/32, program, offsets, potential, NULL, 0);
}

__attribute__((nonnull)) static void integrate_ahead(const uint8_t * lines, int64_t n_tiles, const spike_program * program,
                                                     const uint32_t * offsets, int32_t * potential, int64_t potential_stride,
                                                     spike_ahead * ahead) {
    spike_ahead own = *ahead; // in registers
    for (; n_tiles > 0; n_tiles--) {
        if (own.third) {
            run_program256(lines, SPIKE_LINE_BYTES/32, program, offsets, potential, &own, 3);
        } else {
            run_program256(lines, SPIKE_LINE_BYTES/32, program, offsets, potential, &own, 2);
        }
        lines     += SPIKE_LINE_BYTES;
        potential += potential_stride;
        KEEP_SUM(potential);
    }
    ahead->position = own.position;
}

// Looks 32 positions up in a block's 64 values: four tables of 16, chosen by position bits 4 and 5.
SPIKE_INLINE __m256i look_up(const __m256i table[4], __m256i salient) {
    const __m256i bit4 = _mm256_slli_epi16(salient, 3), bit5 = _mm256_slli_epi16(salient, 2); // to the sign of their bytes
    const __m256i index = _mm256_and_si256(salient, _mm256_set1_epi8(15));
    const __m256i below = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], index), _mm256_shuffle_epi8(table[1], index), bit4);
    const __m256i above = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], index), _mm256_shuffle_epi8(table[3], index), bit4);
    return _mm256_blendv_epi8(below, above, bit5);
}

// Bits 6-7: nothing, add, subtract, nothing; as bytes of 0, 64, -64 and 0. No shuffle and no shift: look_up has enough of them, and they wait
// for the same two units.
SPIKE_INLINE __m256i sign_of(__m256i salient) {
    const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), salient);
    return _mm256_add_epi8(_mm256_and_si256(salient, _mm256_set1_epi8((char) 0xC0)), _mm256_and_si256(negative, _mm256_set1_epi8(64)));
}

// 32 rows at a time, whose sums stay in registers. For each of their blocks two lines of the next tile: all lines for 128 rows.
static void add_salient(const uint8_t * salients, const int8_t * values, int64_t n_blocks, int16_t sum[SPIKE_TILE_ROWS],
                        const uint8_t * next_tile) {
    _Static_assert(SPIKE_SALIENT_SLOTS*SPIKE_MAX_MAGNITUDE <= INT8_MAX, "bytes hold the sum of a block");
    for (int row = 0; row < SPIKE_TILE_ROWS; row += 32) {
        __m256i first = _mm256_setzero_si256(), second = _mm256_setzero_si256();
        const uint8_t * next = salients + row;
        for (int64_t b = 0; b < n_blocks; b++) {
            __m256i table[4], bytes = _mm256_setzero_si256();
            for (int q = 0; q < 4; q++) {
                table[q] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (values + b*QK_SPK + 16*q)));
            }
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                const __m256i salient = _mm256_loadu_si256((const __m256i *) next);
                bytes = _mm256_add_epi8(bytes, _mm256_sign_epi8(look_up(table, salient), sign_of(salient)));
                next += SPIKE_TILE_ROWS;
            }
            if (next_tile) {
                prefetch_pair(next_tile);
                next_tile += 2*SPIKE_LINE_BYTES;
            }
            first  = _mm256_add_epi16(first,  _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)));
            second = _mm256_add_epi16(second, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
        }
        _mm256_storeu_si256((__m256i *) (sum + row),      first);
        _mm256_storeu_si256((__m256i *) (sum + row + 16), second);
    }
}

// The inputs that fire, numbered from `first` on. Returns where the list ends. largest: of their magnitudes.
SPIKE_INLINE uint16_t * list_active(const int8_t * values, int64_t n, int64_t first, uint16_t * list, int * largest) {
    __m128i numbers = _mm_add_epi16(_mm_set1_epi16((short) first), _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i top = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += QK_SPK) {
        const uint64_t fires = ~find_bytes(values + i, _mm256_setzero_si256());
        for (int k = 0; k < QK_SPK/8; k++) {
            pack_eight(numbers, fires, k, list);
            numbers = _mm_add_epi16(numbers, _mm_set1_epi16(8));
        }
        list += __builtin_popcountll(fires);
        for (int k = 0; k < QK_SPK; k += 32) {
            top = _mm256_max_epu8(top, _mm256_abs_epi8(_mm256_loadu_si256((const __m256i *) (values + i + k))));
        }
    }
    *largest = SPIKE_MAX_MAGNITUDE;
    while (*largest > 0 && !_mm256_movemask_epi8(_mm256_cmpeq_epi8(top, _mm256_set1_epi8((char) *largest)))) {
        --*largest;
    }
    return list;
}

// A value's inputs in a block, and the place in the lists before that of the first one (modulo 2^64).
typedef struct {
    uint64_t inputs; // bit by bit
    uint64_t place_before;
} value_in_block;

// An input's place follows from its value and how many inputs up to it share the value in the block. So no input waits for
// another; a counting sort needs a counter soon after it was written, which takes some CPUs three times as long as others.
static void list_spikes(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                        spike_lists * lists) {
    enum { N_VALUES = 2*SPIKE_MAX_MAGNITUDE + 1 };
    value_in_block table[SPIKE_CHUNK_BLOCKS][N_VALUES]; // [block][value + 16]
    int largest;
    lists->n_active = (uint32_t) (list_active(values, n, first, active, &largest) - active);
    memset(lists->count, 0, sizeof(lists->count));
    const int64_t n_blocks = n/QK_SPK;
    const __m128i padding = _mm_set1_epi16((short) zero_line);
    uint64_t next = 0;
    for (int m = largest; m > 0; m--) {
        for (int negative = 0; negative < 2; negative++) {
            const int      value = negative ? -m : m;
            const __m256i  all   = _mm256_set1_epi8((char) value);
            const uint64_t start = next;
            for (int64_t b = 0; b < n_blocks; b++) {
                const uint64_t found = find_bytes(values + b*QK_SPK, all);
                table[b][SPIKE_MAX_MAGNITUDE + value] = (value_in_block) { found, next - 1 };
                next += (uint64_t) __builtin_popcountll(found);
            }
            lists->count[2*m + negative] = (uint16_t) (next - start);
            _mm_storel_epi64((__m128i *) (lines + next), padding);
            next = start + spike_padded((uint32_t) (next - start));
        }
    }
    lists->n_places = (uint32_t) next;
    for (int64_t b = 0; b < n_blocks; b++) {
        value_in_block * of_value = table[b] + SPIKE_MAX_MAGNITUDE;
        of_value[0] = (value_in_block) { 0, next }; // what is silent goes beyond the end
        const uint16_t number = (uint16_t) (first + b*QK_SPK);
#pragma GCC unroll 64
        for (int i = 0; i < QK_SPK; i++) {
            const value_in_block * own = of_value + values[b*QK_SPK + i];
            const uint64_t alike = (uint64_t) __builtin_popcountll(own->inputs << (QK_SPK - 1 - i));
            lines[own->place_before + alike] = (uint16_t) (number + i);
        }
    }
}

const spike_kernels spike_kernels_avx2 = {
    "avx2", integrate, integrate_half, add_salient, true, true, integrate_ahead, list_spikes, &spike_prompt_kernels_avx2,
};
