// Parts of the encoder with AVX-512 (F, BW): 16 values at a time, with the results of plain C.
#include "spike-codes.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#define VECTORS __attribute__((target("avx512f,avx512bw,popcnt")))

enum { LANES = 16 };

VECTORS static bool code_values(const float * v, int64_t n, const spike_coding * how, int8_t * fine, int8_t * coarse) {
    const spike_coding copy = *how, * coding = &copy; // not what the results could overlap
    const spike_halfway halfway = spike_halfway_of(coding);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); // packing works within lanes
    bool any_coarse = false;
    for (int64_t b = 0; b < n; b += 64) {
        __m512i q[4];
        uint64_t beyond = 0; // -16..15
        for (int k = 0; k < 4; k++) {
            const __m512    u     = _mm512_mul_ps(_mm512_loadu_ps(v + b + 16*k), _mm512_set1_ps(coding->inverse));
            const __mmask16 heard = _mm512_cmp_ps_mask(_mm512_abs_ps(u), _mm512_set1_ps(coding->silence), _CMP_NLT_UQ);
            const __mmask16 tied  = _mm512_mask_cmp_ps_mask(heard, u, _mm512_set1_ps(halfway.value), _CMP_EQ_OQ);
            q[k] = _mm512_mask_mov_epi32(_mm512_maskz_cvtps_epi32(heard, u), tied, _mm512_set1_epi32(halfway.code));
            beyond |= (uint64_t) _mm512_cmpgt_epu32_mask(_mm512_add_epi32(q[k], _mm512_set1_epi32(16)), _mm512_set1_epi32(31)) << 16*k;
        }
        const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
        _mm512_storeu_si512(fine + b,   _mm512_permutexvar_epi32(order, bytes));
        _mm512_storeu_si512(coarse + b, _mm512_setzero_si512());
        for (; beyond; beyond &= beyond - 1) { // few
            const int64_t i = b + __builtin_ctzll(beyond);
            any_coarse |= spike_code_beyond(v[i]*coding->inverse, coding, fine + i, coarse + i);
        }
    }
    return any_coarse;
}

// A stage of the rotation within vectors: each value and its partner, whose order `swapped` gives. The upper of the two changes
// its sign; see spike-rotation.c and spike-codes-avx2.c.
VECTORS static inline __m512 add_partner(__m512 v, __m512 swapped, __m512 signs) {
    return _mm512_fmadd_ps(v, signs, swapped);
}

VECTORS static inline __m512 signs_of(__mmask16 upper) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), upper, _mm512_set1_ps(-1.0f));
}

VECTORS static inline void rotate_block(__m512 v[4]) {
    for (int i = 0; i < 4; i++) {
        v[i] = add_partner(v[i], _mm512_permute_ps(v[i], 0xB1), signs_of(0xAAAA));
        v[i] = add_partner(v[i], _mm512_permute_ps(v[i], 0x4E), signs_of(0xCCCC));
        v[i] = add_partner(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0xB1), signs_of(0xF0F0));
        v[i] = add_partner(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0x4E), signs_of(0xFF00));
    }
    const __m512 a = _mm512_add_ps(v[0], v[1]), b = _mm512_sub_ps(v[0], v[1]);
    const __m512 c = _mm512_add_ps(v[2], v[3]), d = _mm512_sub_ps(v[2], v[3]);
    const __m512 eighth = _mm512_set1_ps(0.125f);
    v[0] = _mm512_mul_ps(_mm512_add_ps(a, c), eighth);
    v[1] = _mm512_mul_ps(_mm512_add_ps(b, d), eighth);
    v[2] = _mm512_mul_ps(_mm512_sub_ps(a, c), eighth);
    v[3] = _mm512_mul_ps(_mm512_sub_ps(b, d), eighth);
}

VECTORS static spike_magnitudes rotate_token(const float * x, float * v, int64_t n, bool rotated) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i top = _mm512_setzero_si512();
    __m512  sum = _mm512_setzero_ps();
    for (int64_t b = 0; b < n; b += 64) {
        __m512 y[4];
        for (int i = 0; i < 4; i++) {
            y[i] = _mm512_loadu_ps(x + b + 16*i);
        }
        if (rotated) {
            rotate_block(y);
        }
        for (int i = 0; i < 4; i++) {
            _mm512_storeu_ps(v + b + 16*i, y[i]);
            top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(y[i]), magnitude));
            sum = _mm512_add_ps(sum, _mm512_abs_ps(y[i]));
        }
    }
    const spike_magnitudes found = { _mm512_reduce_max_epi32(top), _mm512_reduce_add_ps(sum)/(float) n };
    return found;
}

// How many of n keys, a multiple of 16, lie below a bound.
VECTORS static inline int64_t count_below(const int32_t * keys, int64_t n, int32_t bound) {
    int64_t below = 0;
    for (int64_t i = 0; i < n; i += 16) {
        below += __builtin_popcount(_mm512_cmplt_epi32_mask(_mm512_loadu_si512(keys + i), _mm512_set1_epi32(bound)));
    }
    return below;
}

// Moves the keys in lower..upper to the front, in order, and fills the last vector up with keys that are larger.
// Returns how many vectors there are, times 16.
VECTORS static inline int64_t keep_between(int32_t * keys, int64_t n, int32_t lower, int32_t upper) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __m512i   key   = _mm512_loadu_si512(keys + i);
        const __mmask16 found = _mm512_mask_cmple_epi32_mask(_mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(lower)), key, _mm512_set1_epi32(upper));
        _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi32(found, key));
        kept += __builtin_popcount(found);
    }
    while (kept % 16) {
        keys[kept++] = INT32_MAX;
    }
    return kept;
}

// The key of a rank among LANES, of which INT32_MAX are none: the largest that at most rank keys are smaller than.
VECTORS static inline int32_t select_of_few(const int32_t keys[LANES], int64_t rank) {
    const __m512i key = _mm512_loadu_si512(keys);
    const __m512i one = _mm512_set1_epi32(1);
    __m512i others = key, smaller = _mm512_setzero_si512();
    for (int k = 1; k < 16; k++) {
        others  = _mm512_alignr_epi32(others, others, 1);
        smaller = _mm512_mask_add_epi32(smaller, _mm512_cmplt_epi32_mask(others, key), smaller, one);
    }
    const __mmask16 fitting = _mm512_cmple_epi32_mask(smaller, _mm512_set1_epi32((int) rank));
    return _mm512_mask_reduce_max_epi32(fitting, key);
}

#include "spike-codes-rank.h"

VECTORS static int32_t median_of_magnitudes(const float * v, int64_t n, float mean, int32_t * keys) {
    const float bounds[2] = { 0.70f*mean, 0.98f*mean }; // of normal values the median of magnitudes is 0.845 of their mean
    int32_t lower, upper;
    memcpy(&lower, &bounds[0], sizeof(lower));
    memcpy(&upper, &bounds[1], sizeof(upper));
    int64_t below = 0, between = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __m512i   key  = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(v + i)));
        const __mmask16 low  = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(lower));
        const __mmask16 kept = _mm512_mask_cmplt_epi32_mask((__mmask16) ~low, key, _mm512_set1_epi32(upper));
        _mm512_storeu_si512(keys + between, _mm512_maskz_compress_epi32(kept, key));
        between += __builtin_popcount(kept);
        below   += __builtin_popcount(low);
    }
    const int64_t rank = n/2;
    if (below > rank || below + between <= rank) {
        return -1;
    }
    while (between % 16) {
        keys[between++] = INT32_MAX;
    }
    return select_rank(keys, between, rank - below, lower, upper - 1);
}

static const spike_vector_encoder AVX512 = { "avx512", rotate_token, median_of_magnitudes, code_values };

const spike_vector_encoder * spike_vector_encoder_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("popcnt") ? &AVX512 : NULL;
}

#else

const spike_vector_encoder * spike_vector_encoder_avx512(void) {
    return NULL;
}

#endif
