// The encoder's codes with AVX-512 (F, BW): 16 at a time, every rounding that of the plain C encoder.
#include "spike-codes.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define WIDE __attribute__((target("avx512f,avx512bw")))

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

spike_code_function spike_codes_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? code_values : NULL;
}

#else

spike_code_function spike_codes_avx512(void) {
    return NULL;
}

#endif
