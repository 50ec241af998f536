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

WIDE static bool code_values(const float * x, int64_t n, const spike_coding * coding, int8_t * fine, int8_t * coarse) {
    __mmask16 any_coarse = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __m512    u      = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(coding->inverse));
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

// Bit by bit, the largest value that at most rank keys lie below, as in the plain C encoder. n is a multiple of 16.
WIDE static int32_t select_rank(const int32_t * keys, int64_t n, int64_t rank, int32_t lower, int32_t upper) {
    const int bits = 32 - __builtin_clz((uint32_t) (lower ^ upper) | 1); // that the keys may differ in
    int32_t found = (int32_t) ((uint32_t) lower >> bits << bits);
    for (int bit = bits - 1; bit >= 0; bit--) {
        const int32_t trial = found | (int32_t) 1 << bit;
        int64_t below = 0;
        for (int64_t i = 0; i < n; i += 16) {
            below += __builtin_popcount(_mm512_cmplt_epi32_mask(_mm512_loadu_si512(keys + i), _mm512_set1_epi32(trial)));
        }
        found = below <= rank ? trial : found;
    }
    return found;
}

WIDE static int32_t median_of_magnitudes(const float * x, int64_t n, int32_t * keys) {
    __m512 a = _mm512_setzero_ps(), b = a;
    for (int64_t i = 0; i < n; i += 32) {
        a = _mm512_add_ps(a, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
        b = _mm512_add_ps(b, _mm512_abs_ps(_mm512_loadu_ps(x + i + 16)));
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(a, b))/(float) n; // of normal values the median of magnitudes is 0.845 of it
    const float bounds[2] = { 0.70f*mean, 0.98f*mean };
    int32_t lower, upper;
    memcpy(&lower, &bounds[0], sizeof(lower));
    memcpy(&upper, &bounds[1], sizeof(upper));
    int64_t below = 0, between = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __m512i   key  = _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + i)));
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

static const spike_wide_encoder AVX512 = { median_of_magnitudes, code_values };

const spike_wide_encoder * spike_wide_encoder_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("popcnt") ? &AVX512 : NULL;
}

#else

const spike_wide_encoder * spike_wide_encoder_avx512(void) {
    return NULL;
}

#endif
