// What the encoder has for CPUs with wide vectors.
#pragma once

#include <stdbool.h>
#include <stdint.h>

// How a token's activations become codes, see spike_encode_token.
typedef struct {
    float inverse;     // of the step
    float coarser;     // 2^-shift
    float coarse_unit; // 2^shift
    float lo, hi;      // the standard range
    float silence;
} spike_coding;

// Parts of the encoder that are worth more than what a compiler makes of plain C. n is a multiple of 64.
typedef struct {
    // The bits of the median of the magnitudes of n finite values, or -1 if it lies where this function does not look.
    // keys: room for n.
    int32_t (*median_of_magnitudes)(const float * x, int64_t n, int32_t * keys);

    // Fine and coarse values of n activations. Returns whether any is coarse.
    bool (*code_values)(const float * x, int64_t n, const spike_coding * coding, int8_t * fine, int8_t * coarse);
} spike_wide_encoder;

// NULL where this CPU has no AVX-512.
const spike_wide_encoder * spike_wide_encoder_avx512(void);
