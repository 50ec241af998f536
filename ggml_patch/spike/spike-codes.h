// Values of scaled activations, for the encoder.
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

// n activations (a multiple of 64) to fine and coarse values, as the plain C encoder codes them. Returns whether any is coarse.
typedef bool (*spike_code_function)(const float * x, int64_t n, const spike_coding * coding, int8_t * fine, int8_t * coarse);

// NULL where this CPU has no AVX-512.
spike_code_function spike_codes_avx512(void);
