// Parts of the encoder with AVX2: 8 values at a time, with the results of plain C.
#include "spike-codes.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#define VECTORS __attribute__((target("avx2,popcnt")))

enum { LANES = 8 };

// For every set of eight lanes, their numbers: the shuffle that moves them together.
static uint8_t PACK[1 << LANES][LANES];

// Runs when the library is loaded, on CPUs without AVX, too.
__attribute__((constructor)) static void fill_pack(void) {
    for (int set = 0; set < 1 << LANES; set++) {
        int n = 0;
        for (int lane = 0; lane < LANES; lane++) {
            if (set >> lane & 1) {
                PACK[set][n++] = (uint8_t) lane;
            }
        }
    }
}

VECTORS static inline __m256 magnitudes_of(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

VECTORS static inline __m256i keys_of(__m256 x) {
    return _mm256_castps_si256(magnitudes_of(x));
}

// ---- rotation

// A stage within vectors: each value and its partner, whose order `swapped` gives. The upper of the two changes its sign, as in
// spike-rotation.c.
VECTORS static inline __m256 add_partner(__m256 v, __m256 swapped, __m256 signs) {
    return _mm256_add_ps(swapped, _mm256_xor_ps(v, signs));
}

VECTORS static inline void rotate_block(__m256 v[8]) {
    const __m256 odd   = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 pairs = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 half  = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    for (int i = 0; i < 8; i++) {
        v[i] = add_partner(v[i], _mm256_permute_ps(v[i], 0xB1), odd);
        v[i] = add_partner(v[i], _mm256_permute_ps(v[i], 0x4E), pairs);
        v[i] = add_partner(v[i], _mm256_permute2f128_ps(v[i], v[i], 0x01), half);
    }
    for (int h = 1; h < 8; h *= 2) {
        for (int i = 0; i < 8; i++) {
            if (!(i & h)) {
                const __m256 a = v[i], b = v[i + h];
                v[i]     = _mm256_add_ps(a, b);
                v[i + h] = _mm256_sub_ps(a, b);
            }
        }
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm256_mul_ps(v[i], _mm256_set1_ps(0.125f));
    }
}

VECTORS static inline int32_t largest_of(__m256i x) {
    int32_t lanes[LANES], largest = 0;
    _mm256_storeu_si256((__m256i *) lanes, x);
    for (int i = 0; i < LANES; i++) {
        largest = lanes[i] > largest ? lanes[i] : largest;
    }
    return largest;
}

VECTORS static spike_magnitudes rotate_token(const float * x, float * v, int64_t n, bool rotated) {
    __m256i largest_input = _mm256_setzero_si256(), top = largest_input;
    __m256  sum = _mm256_setzero_ps();
    for (int64_t b = 0; b < n; b += 64) {
        __m256 y[8];
        for (int i = 0; i < 8; i++) {
            y[i] = _mm256_loadu_ps(x + b + LANES*i);
            largest_input = _mm256_max_epi32(largest_input, keys_of(y[i]));
        }
        if (rotated) {
            rotate_block(y);
        }
        for (int i = 0; i < 8; i++) {
            _mm256_storeu_ps(v + b + LANES*i, y[i]);
            top = _mm256_max_epi32(top, keys_of(y[i]));
            sum = _mm256_add_ps(sum, magnitudes_of(y[i]));
        }
    }
    float lanes[LANES], total = 0.0f;
    _mm256_storeu_ps(lanes, sum);
    for (int i = 0; i < LANES; i++) {
        total += lanes[i];
    }
    const spike_magnitudes found = { largest_of(largest_input), largest_of(top), total/(float) n };
    return found;
}

// ---- median

VECTORS static inline unsigned set_of(__m256i mask) {
    return (unsigned) _mm256_movemask_ps(_mm256_castsi256_ps(mask));
}

// Puts the keys of a set of lanes at the front of a list. Returns how many; a whole vector is overwritten.
VECTORS static inline int64_t keep(__m256i key, unsigned set, int32_t * list) {
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) PACK[set]));
    _mm256_storeu_si256((__m256i *) list, _mm256_permutevar8x32_epi32(key, order));
    return __builtin_popcount(set);
}

// Fills the last vector up with keys larger than all others. Returns the new number.
static inline int64_t fill_up(int32_t * keys, int64_t n) {
    while (n % LANES) {
        keys[n++] = INT32_MAX;
    }
    return n;
}

// How many of n keys, a multiple of 8, lie below a bound.
VECTORS static inline int64_t count_below(const int32_t * keys, int64_t n, int32_t bound) {
    int64_t below = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        below += __builtin_popcount(set_of(_mm256_cmpgt_epi32(_mm256_set1_epi32(bound), _mm256_loadu_si256((const __m256i *) (keys + i)))));
    }
    return below;
}

// The key of a rank among n that lie in lower..upper, but for larger ones at the end: bit by bit, the largest value that at most
// rank keys lie below, as in the plain C encoder. Once a few bits are known, few keys are left that may be it.
VECTORS static int32_t select_rank(int32_t * keys, int64_t n, int64_t rank, int32_t lower, int32_t upper) {
    enum { BITS_BEFORE_SECOND_LOOK = 4 };
    int bit = 31 - __builtin_clz((uint32_t) (lower ^ upper) | 1); // the first that the keys may differ in
    int32_t found = (int32_t) ((uint32_t) lower >> bit >> 1 << bit << 1);
    for (const int second_look = bit - BITS_BEFORE_SECOND_LOOK; bit >= 0; bit--) {
        if (bit == second_look) {
            const __m256i before = _mm256_set1_epi32(found - 1), after = _mm256_set1_epi32(found | (int32_t) ((2u << bit) - 1));
            int64_t kept = 0;
            rank -= count_below(keys, n, found);
            for (int64_t i = 0; i < n; i += LANES) {
                const __m256i key = _mm256_loadu_si256((const __m256i *) (keys + i));
                kept += keep(key, set_of(_mm256_andnot_si256(_mm256_cmpgt_epi32(key, after), _mm256_cmpgt_epi32(key, before))), keys + kept);
            }
            n = fill_up(keys, kept);
        }
        const int32_t trial = found | (int32_t) 1 << bit;
        found = count_below(keys, n, trial) <= rank ? trial : found;
    }
    return found;
}

VECTORS static int32_t median_of_magnitudes(const float * v, int64_t n, float mean, int32_t * keys) {
    const float bounds[2] = { 0.70f*mean, 0.98f*mean }; // of normal values the median of magnitudes is 0.845 of their mean
    int32_t lower, upper;
    memcpy(&lower, &bounds[0], sizeof(lower));
    memcpy(&upper, &bounds[1], sizeof(upper));
    int64_t below = 0, between = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const __m256i  key  = keys_of(_mm256_loadu_ps(v + i));
        const unsigned low  = set_of(_mm256_cmpgt_epi32(_mm256_set1_epi32(lower), key));
        const unsigned both = set_of(_mm256_cmpgt_epi32(_mm256_set1_epi32(upper), key));
        between += keep(key, both & ~low, keys + between);
        below   += __builtin_popcount(low);
    }
    const int64_t rank = n/2;
    if (below > rank || below + between <= rank) {
        return -1;
    }
    return select_rank(keys, fill_up(keys, between), rank - below, lower, upper - 1);
}

// ---- codes

VECTORS static inline __m256 round_to_even(__m256 x) { // spike_round
    const __m256 shifter = _mm256_set1_ps(12582912.0f);
    return _mm256_sub_ps(_mm256_add_ps(x, shifter), shifter);
}

VECTORS static inline __m256 clamp(__m256 x, float lo, float hi) {
    return _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(lo)), _mm256_set1_ps(hi));
}

// 32 numbers that fit 8 bits.
VECTORS static inline void store_bytes(const __m256i x[4], int8_t * to) {
    const __m256i words[2] = { _mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]) };
    const __m256i order    = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing works within halves
    _mm256_storeu_si256((__m256i *) to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order));
}

VECTORS static bool code_values(const float * v, int64_t n, const spike_coding * how, int8_t * fine, int8_t * coarse) {
    const spike_coding coding = *how; // a copy that the results cannot overlap
    __m256 any_coarse = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 4*LANES) {
        __m256i fine_codes[4], coarse_codes[4];
        for (int k = 0; k < 4; k++) {
            const __m256 u      = _mm256_mul_ps(_mm256_loadu_ps(v + i + LANES*k), _mm256_set1_ps(coding.inverse));
            const __m256 heard  = _mm256_cmp_ps(magnitudes_of(u), _mm256_set1_ps(coding.silence), _CMP_NLT_UQ);
            const __m256 q      = _mm256_and_ps(heard, round_to_even(u));
            const __m256 edge   = clamp(q, coding.lo, coding.hi);
            const __m256 wide   = clamp(round_to_even(_mm256_mul_ps(u, _mm256_set1_ps(coding.coarser))), -16.0f, 15.0f);
            const __m256 narrow = _mm256_cmp_ps(clamp(q, -16.0f, 15.0f), q, _CMP_EQ_OQ);
            const __m256 code   = _mm256_blendv_ps(wide, q, narrow);
            const __m256 value  = _mm256_blendv_ps(_mm256_mul_ps(wide, _mm256_set1_ps(coding.coarse_unit)), q, narrow);
            // the nearer of the edge and the salient value
            const __m256 nearer  = _mm256_cmp_ps(magnitudes_of(_mm256_sub_ps(edge, u)), magnitudes_of(_mm256_sub_ps(value, u)), _CMP_NLE_UQ);
            const __m256 salient = _mm256_and_ps(_mm256_cmp_ps(edge, q, _CMP_NEQ_UQ), nearer);
            const __m256 is_coarse = _mm256_andnot_ps(narrow, salient);
            const __m256i stored = _mm256_cvttps_epi32(_mm256_blendv_ps(edge, code, salient));
            fine_codes[k]   = _mm256_andnot_si256(_mm256_castps_si256(is_coarse), stored);
            coarse_codes[k] = _mm256_and_si256(_mm256_castps_si256(is_coarse), stored);
            any_coarse      = _mm256_or_ps(any_coarse, is_coarse);
        }
        store_bytes(fine_codes, fine + i);
        store_bytes(coarse_codes, coarse + i);
    }
    return _mm256_movemask_ps(any_coarse) != 0;
}

static const spike_vector_encoder AVX2 = { "avx2", rotate_token, median_of_magnitudes, code_values };

const spike_vector_encoder * spike_vector_encoder_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") ? &AVX2 : NULL;
}

#else

const spike_vector_encoder * spike_vector_encoder_avx2(void) {
    return NULL;
}

#endif
