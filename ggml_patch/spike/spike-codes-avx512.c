// Parts of the encoder with AVX-512 (F, BW): 16 values at a time, with the results of plain C.
#include "spike-codes.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#define WIDE __attribute__((target("avx512f,avx512bw,popcnt")))

WIDE static inline __m512 round_to_even(__m512 x) { // spike_round
    const __m512 shifter = _mm512_set1_ps(12582912.0f);
    return _mm512_sub_ps(_mm512_add_ps(x, shifter), shifter);
}

WIDE static inline __m512 clamp(__m512 x, float lo, float hi) {
    return _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(lo)), _mm512_set1_ps(hi));
}

WIDE static bool code_values(const float * v, int64_t n, const spike_coding * how, int8_t * fine, int8_t * coarse) {
    const spike_coding copy = *how, * coding = &copy; // not what the results could overlap
    __mmask16 any_coarse = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __m512    u      = _mm512_mul_ps(_mm512_loadu_ps(v + i), _mm512_set1_ps(coding->inverse));
        const __mmask16 heard  = _mm512_cmp_ps_mask(_mm512_abs_ps(u), _mm512_set1_ps(coding->silence), _CMP_NLT_UQ);
        const __m512    q      = _mm512_maskz_mov_ps(heard, round_to_even(u));
        const __m512    edge   = clamp(q, coding->lo, coding->hi);
        const __m512    wide   = clamp(round_to_even(_mm512_mul_ps(u, _mm512_set1_ps(coding->coarser))), -16.0f, 15.0f);
        const __mmask16 narrow = _mm512_cmp_ps_mask(clamp(q, -16.0f, 15.0f), q, _CMP_EQ_OQ);
        const __m512    code   = _mm512_mask_mov_ps(wide, narrow, q);
        const __m512    value  = _mm512_mask_mov_ps(_mm512_mul_ps(wide, _mm512_set1_ps(coding->coarse_unit)), narrow, q);
        // the nearer of the edge and the salient value
        const __mmask16 outside = _mm512_cmp_ps_mask(edge, q, _CMP_NEQ_UQ);
        const __mmask16 salient = _mm512_mask_cmp_ps_mask(outside, _mm512_abs_ps(_mm512_sub_ps(edge, u)),
                                                          _mm512_abs_ps(_mm512_sub_ps(value, u)), _CMP_NLE_UQ);
        const __mmask16 is_coarse = (__mmask16) (salient & ~narrow);
        const __m512i   stored    = _mm512_cvttps_epi32(_mm512_mask_mov_ps(edge, salient, code));
        _mm_storeu_si128((__m128i *) (fine + i),   _mm512_maskz_cvtepi32_epi8((__mmask16) ~is_coarse, stored));
        _mm_storeu_si128((__m128i *) (coarse + i), _mm512_maskz_cvtepi32_epi8(is_coarse, stored));
        any_coarse |= is_coarse;
    }
    return any_coarse != 0;
}

// A stage of the rotation within vectors: each value and its partner, whose order `swapped` gives; see spike-rotation.c.
WIDE static inline __m512 add_partner(__m512 v, __m512 swapped, __mmask16 upper) {
    const __m512 sum = _mm512_add_ps(swapped, v);
    return _mm512_mask_sub_ps(sum, upper, swapped, v);
}

WIDE static inline void rotate_block(__m512 v[4]) {
    for (int i = 0; i < 4; i++) {
        v[i] = add_partner(v[i], _mm512_permute_ps(v[i], 0xB1), 0xAAAA);
        v[i] = add_partner(v[i], _mm512_permute_ps(v[i], 0x4E), 0xCCCC);
        v[i] = add_partner(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0xB1), 0xF0F0);
        v[i] = add_partner(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0x4E), 0xFF00);
    }
    const __m512 a = _mm512_add_ps(v[0], v[1]), b = _mm512_sub_ps(v[0], v[1]);
    const __m512 c = _mm512_add_ps(v[2], v[3]), d = _mm512_sub_ps(v[2], v[3]);
    const __m512 eighth = _mm512_set1_ps(0.125f);
    v[0] = _mm512_mul_ps(_mm512_add_ps(a, c), eighth);
    v[1] = _mm512_mul_ps(_mm512_add_ps(b, d), eighth);
    v[2] = _mm512_mul_ps(_mm512_sub_ps(a, c), eighth);
    v[3] = _mm512_mul_ps(_mm512_sub_ps(b, d), eighth);
}

WIDE static spike_magnitudes rotate_token(const float * x, float * v, int64_t n, bool rotated) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i largest_input = _mm512_setzero_si512(), top = largest_input;
    __m512  sum = _mm512_setzero_ps();
    for (int64_t b = 0; b < n; b += 64) {
        __m512 y[4];
        for (int i = 0; i < 4; i++) {
            y[i] = _mm512_loadu_ps(x + b + 16*i);
            largest_input = _mm512_max_epi32(largest_input, _mm512_and_si512(_mm512_castps_si512(y[i]), magnitude));
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
    const spike_magnitudes found = { _mm512_reduce_max_epi32(largest_input), _mm512_reduce_max_epi32(top), _mm512_reduce_add_ps(sum)/(float) n };
    return found;
}

// How many of n keys, a multiple of 16, lie below a bound.
WIDE static inline int64_t count_below(const int32_t * keys, int64_t n, int32_t bound) {
    int64_t below = 0;
    for (int64_t i = 0; i < n; i += 16) {
        below += __builtin_popcount(_mm512_cmplt_epi32_mask(_mm512_loadu_si512(keys + i), _mm512_set1_epi32(bound)));
    }
    return below;
}

// Moves the keys in lower..upper to the front, in order, and fills the last vector up with keys that are larger.
// Returns how many vectors there are, times 16.
WIDE static inline int64_t keep_between(int32_t * keys, int64_t n, int32_t lower, int32_t upper) {
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

// The key of a rank among n that lie in lower..upper, but for larger ones at the end: bit by bit, the largest value that at most
// rank keys lie below, as in the plain C encoder. Once a few bits are known, few keys are left that may be it.
WIDE static int32_t select_rank(int32_t * keys, int64_t n, int64_t rank, int32_t lower, int32_t upper) {
    enum { BITS_BEFORE_SECOND_LOOK = 4 };
    int bit = 31 - __builtin_clz((uint32_t) (lower ^ upper) | 1); // the first that the keys may differ in
    int32_t found = (int32_t) ((uint32_t) lower >> bit >> 1 << bit << 1);
    for (const int second_look = bit - BITS_BEFORE_SECOND_LOOK; bit >= 0; bit--) {
        if (bit == second_look) {
            rank -= count_below(keys, n, found);
            n = keep_between(keys, n, found, found | (int32_t) ((2u << bit) - 1));
        }
        const int32_t trial = found | (int32_t) 1 << bit;
        found = count_below(keys, n, trial) <= rank ? trial : found;
    }
    return found;
}

WIDE static int32_t median_of_magnitudes(const float * v, int64_t n, float mean, int32_t * keys) {
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
