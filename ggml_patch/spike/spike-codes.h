// What the encoder has for some instruction sets.
#pragma once

#include "spike.h"

#include <math.h>
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

// What the encoder wants to know of a token's magnitudes. Of floats without sign the bits sort as the values do.
typedef struct {
    int32_t top;  // bits of the largest, those of an infinity or a NaN if any input is one
    float   mean; // about: any value leads to the same codes
} spike_magnitudes;

// Codes within five bits are the nearest integers, with one exception: as near as the end of the standard range that is odd,
// a value halfway beyond it takes that end and not the even integer outside, which would have to be salient.
typedef struct {
    float   value;
    int32_t code; // the end
} spike_halfway;

static inline spike_halfway spike_halfway_of(const spike_coding * coding) {
    const int32_t lo = (int32_t) coding->lo, hi = (int32_t) coding->hi; // one of them is odd
    const spike_halfway above = { coding->hi + 0.5f, hi }, below = { coding->lo - 0.5f, lo };
    return hi % 2 ? above : below;
}

// The code of a value beyond five bits (in steps): the coarse one or the end of the standard range, whichever is nearer. Returns
// whether it is coarse.
static inline bool spike_code_beyond(float u, const spike_coding * coding, int8_t * fine, int8_t * coarse) {
    const float edge   = u < 0.0f ? coding->lo : coding->hi;
    const float scaled = spike_round(u*coding->coarser);
    const float code   = scaled < -16.0f ? -16.0f : scaled > 15.0f ? 15.0f : scaled;
    const bool  is_coarse = !(fabsf(edge - u) <= fabsf(code*coding->coarse_unit - u));
    *fine   = (int8_t) (is_coarse ? 0.0f : edge);
    *coarse = (int8_t) (is_coarse ? code : 0.0f);
    return is_coarse;
}

// Parts of the encoder that are worth more than what a compiler makes of plain C. n is a multiple of 64.
typedef struct {
    const char * name; // of the kernels that it goes with

    // v: the token, rotated if that is wanted.
    spike_magnitudes (*rotate_token)(const float * x, float * v, int64_t n, bool rotated);

    // The bits of the median of the magnitudes of n finite values, or -1 if it lies where this function does not look: far from
    // what the mean makes likely. keys: room for n.
    int32_t (*median_of_magnitudes)(const float * v, int64_t n, float mean, int32_t * keys);

    // Fine and coarse values of n activations. Returns whether any is coarse.
    bool (*code_values)(const float * v, int64_t n, const spike_coding * coding, int8_t * fine, int8_t * coarse);
} spike_vector_encoder;

// NULL where this CPU cannot run it.
const spike_vector_encoder * spike_vector_encoder_avx2(void);
const spike_vector_encoder * spike_vector_encoder_avx512(void);

// The fastest, or the one that the environment variable SPIKEQUANT_FORCE_ISA names (see spike-kernels.h); NULL for plain C.
const spike_vector_encoder * spike_select_encoder(void);
