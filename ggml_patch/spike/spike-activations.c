// SPKA: activations as spikes. The scalar encoder defines the result; faster ones must give its bytes.
#include "spike.h"

#include "ggml-impl.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const float SMALLEST_STEP = 7.8886090522101181e-31f; // 2^-100: below, everything is silence

static const int32_t INFINITE_BITS = 0x7F800000;

spike_encoder_params spike_encoder_defaults(void) {
    return (spike_encoder_params) { 2.3f, 0.5f, 8, true };
}

// The element of the given rank (from 0) among n keys below 2^31: bit by bit, the largest value that at most
// rank keys lie below. 31 sweeps without a branch, faster than a selection that has to move keys.
SPIKE_CLONES static int32_t select_rank(const int32_t * keys, int64_t n, int64_t rank) {
    int32_t found = 0;
    for (int32_t bit = 1 << 30; bit > 0; bit >>= 1) {
        const int32_t trial = found | bit;
        int32_t below = 0;
        for (int64_t i = 0; i < n; i++) {
            below += keys[i] < trial;
        }
        if (below <= rank) {
            found = trial;
        }
    }
    return found;
}

// The same for the bits of non-negative finite floats, of which all but a few are first told apart by two bounds around
// the likely median; the keys are lost. Any bounds give the same result, only not as fast.
SPIKE_CLONES static int32_t select_median(int32_t * keys, int64_t n) {
    enum { LANES = 16 };
    float partial[LANES] = { 0.0f };
    for (int64_t i = 0; i < n; i += LANES) { // n is a multiple of 64
        for (int k = 0; k < LANES; k++) {
            float x;
            memcpy(&x, &keys[i + k], sizeof(x));
            partial[k] += x;
        }
    }
    float sum = 0.0f;
    for (int k = 0; k < LANES; k++) {
        sum += partial[k];
    }
    const float mean = sum/(float) n; // of normal values the median of magnitudes is 0.845 of their mean
    const float lower_bound = 0.79f*mean, upper_bound = 0.90f*mean;
    int32_t lower, upper;
    memcpy(&lower, &lower_bound, sizeof(lower));
    memcpy(&upper, &upper_bound, sizeof(upper));

    int32_t below_lower = 0, below_upper = 0;
    for (int64_t i = 0; i < n; i++) {
        below_lower += keys[i] < lower;
        below_upper += keys[i] < upper;
    }
    const int64_t rank = n/2;
    if (below_lower > rank || below_upper <= rank) {
        return select_rank(keys, n, rank);
    }
    int64_t n_between = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t key = keys[i];
        keys[n_between] = key;
        n_between += (key >= lower) & (key < upper);
    }
    return select_rank(keys, n_between, rank - below_lower);
}

// The bits of 64 bytes that are 0 or 1.
static inline uint64_t mask_of(const uint8_t flags[QK_SPK]) {
    uint64_t mask = 0;
    for (int i = 0; i < QK_SPK; i += 8) {
        uint64_t eight;
        memcpy(&eight, flags + i, sizeof(eight));
        mask |= (eight * UINT64_C(0x0102040810204080) >> 56) << i; // byte k moves to bit 56 + k
    }
    return mask;
}

static inline int32_t magnitude_bits(float x) {
    int32_t u;
    memcpy(&u, &x, sizeof(u));
    return u & 0x7FFFFFFF;
}

static void encode_nothing(block_spka * y, int64_t n_blocks, const spike_encoder_params * params, float threshold) {
    const uint8_t code = (uint8_t) (params->zero_point | params->zero_point << 4);
    for (int64_t b = 0; b < n_blocks; b++) {
        memset(&y[b], 0, sizeof(y[b]));
        y[b].threshold  = threshold;
        y[b].zero_point = (uint8_t) params->zero_point;
        y[b].flags      = params->rotated ? 0 : SPKA_NOT_ROTATED;
        memset(y[b].codes, code, sizeof(y[b].codes));
    }
}

static float quiet_nan(void) {
    const uint32_t u = 0x7FC00000u;
    float x;
    memcpy(&x, &u, sizeof(x));
    return x;
}

SPIKE_CLONES void spike_encode_token(const float * x, block_spka * y, int64_t n, const spike_encoder_params * params, float * scratch,
                                     int8_t * values) {
    const int64_t n_blocks = n/QK_SPK;
    float   * v    = scratch;
    int32_t  * keys = (int32_t *) (scratch + n);

    memcpy(v, x, (size_t) n*sizeof(float));
    int32_t largest_input = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = magnitude_bits(v[i]);
        largest_input = bits > largest_input ? bits : largest_input;
    }
    if (params->rotated) {
        for (int64_t b = 0; b < n_blocks; b++) {
            spike_rotate_block(v + b*QK_SPK);
        }
    }
    int32_t top_bits = 0;
    for (int64_t i = 0; i < n; i++) {
        keys[i]  = magnitude_bits(v[i]); // of floats without sign the bits sort as the values do
        top_bits = keys[i] > top_bits ? keys[i] : top_bits;
    }
    if (largest_input >= INFINITE_BITS || top_bits >= INFINITE_BITS) { // the rotation may overflow, too
        encode_nothing(y, n_blocks, params, quiet_nan());
        if (values) {
            memset(values, 0, 2*(size_t) n);
        }
        return;
    }
    const int32_t mad_bits = select_median(keys, n);
    float mad, top;
    memcpy(&mad, &mad_bits, sizeof(mad));
    memcpy(&top, &top_bits, sizeof(top));

    const float standard = mad * (params->salience / 7.5f);
    const float widest   = (top * 3.0517578125e-5f) / 15.0f; // 2^-15: a smaller step could not cover the largest value
    float step = standard;
    step = widest        > step ? widest        : step;
    step = SMALLEST_STEP > step ? SMALLEST_STEP : step;
    const float inverse = 1.0f / step;

    int shift = 1;
    float coarser = 0.5f;
    while (spike_round((top*inverse)*coarser) > 15.0f) {
        shift++;
        coarser *= 0.5f;
    }
    const float coarse_unit = (float) (1 << shift);

    const float lo = (float) -params->zero_point;
    const float hi = (float) (15 - params->zero_point);
    uint64_t any_coarse = 0;
    for (int64_t b = 0; b < n_blocks; b++) {
        // first all values as if standard, the ends of the range for those outside it
        float   units[QK_SPK], rounded[QK_SPK];
        int32_t standard_code[QK_SPK];
        for (int i = 0; i < QK_SPK; i++) {
            const float u = v[b*QK_SPK + i] * inverse;
            const float q = spike_round(u);
            units[i]   = u;
            rounded[i] = fabsf(u) < params->silence ? 0.0f : q;
            const float above_lo = rounded[i] < lo ? lo : rounded[i];
            const float edge     = above_lo > hi ? hi : above_lo;
            standard_code[i] = (int32_t) (edge - lo);
        }
        uint8_t nibble[QK_SPK], outside[QK_SPK];
        for (int i = 0; i < QK_SPK; i++) {
            nibble[i]  = (uint8_t) standard_code[i];
            outside[i] = (uint8_t) ((rounded[i] < lo) | (rounded[i] > hi));
        }
        if (values) {
            for (int i = 0; i < QK_SPK; i++) {
                values[b*QK_SPK + i] = (int8_t) (standard_code[i] - params->zero_point);
            }
            memset(values + n + b*QK_SPK, 0, QK_SPK);
        }
        // then those that a fifth bit brings nearer
        uint64_t salient_mask = 0, fifth_bits = 0, coarse_mask = 0;
        for (uint64_t left = mask_of(outside); left != 0; left &= left - 1) {
            const int   i = spike_lowest_bit(left);
            const float u = units[i];
            const float q = rounded[i];
            const float edge = q < lo ? lo : hi;
            const bool  fine = q >= -16.0f && q <= 15.0f;
            float code = q;
            if (!fine) {
                code = spike_round(u*coarser);
                code = code < -16.0f ? -16.0f : code > 15.0f ? 15.0f : code;
            }
            const float value = fine ? code : code*coarse_unit;
            if (fabsf(edge - u) <= fabsf(value - u)) {
                continue;
            }
            const int      stored = (int) code + 16;
            const uint64_t bit    = (uint64_t) 1 << i;
            nibble[i]     = (uint8_t) (stored & 15);
            salient_mask |= bit;
            fifth_bits   |= stored & 16 ? bit : 0;
            coarse_mask  |= fine ? 0 : bit;
            if (values) {
                values[b*QK_SPK + i]     = (int8_t) (fine ? (int) code : 0);
                values[n + b*QK_SPK + i] = (int8_t) (fine ? 0 : (int) code);
            }
        }
        y[b].threshold    = step;
        y[b].zero_point   = (uint8_t) params->zero_point;
        y[b].flags        = params->rotated ? 0 : SPKA_NOT_ROTATED;
        y[b].reserved     = 0;
        y[b].salient_mask = salient_mask;
        y[b].fifth_bits   = fifth_bits;
        y[b].coarse_mask  = coarse_mask;
        for (int j = 0; j < QK_SPK/2; j++) {
            y[b].codes[j] = (uint8_t) (nibble[j] | nibble[j + QK_SPK/2] << 4);
        }
        any_coarse |= coarse_mask;
    }
    for (int64_t b = 0; b < n_blocks; b++) {
        y[b].salient_shift = (uint8_t) (any_coarse ? shift : 0);
    }
}

void spike_encode_activations(const float * x, block_spka * y, int64_t n, float salience, float silence, int zero_point, int rotated) {
    GGML_ASSERT(n % QK_SPK == 0 && zero_point >= 0 && zero_point <= 15);
    const spike_encoder_params params = { salience, silence, zero_point, rotated != 0 };
    float * scratch = malloc(2*(size_t) n*sizeof(float));
    GGML_ASSERT(scratch != NULL);
    spike_encode_token(x, y, n, &params, scratch, NULL);
    free(scratch);
}

void quantize_row_spka_ref(const float * x, block_spka * y, int64_t k) {
    const spike_encoder_params params = spike_encoder_defaults();
    spike_encode_activations(x, y, k, params.salience, params.silence, params.zero_point, params.rotated);
}

void spike_activation_values(const block_spka * x, int8_t fine[QK_SPK], int8_t coarse[QK_SPK]) {
    const int zero_point = x->zero_point & 15;
    for (int i = 0; i < QK_SPK; i++) {
        const int  nibble  = i < QK_SPK/2 ? x->codes[i] & 15 : x->codes[i - QK_SPK/2] >> 4;
        const bool salient = x->salient_mask >> i & 1;
        const int  value   = salient ? nibble + (int) (x->fifth_bits >> i & 1)*16 - 16 : nibble - zero_point;
        const bool is_coarse = salient && (x->coarse_mask >> i & 1);
        fine[i]   = (int8_t) (is_coarse ? 0 : value);
        coarse[i] = (int8_t) (is_coarse ? value : 0);
    }
}

void dequantize_row_spka(const block_spka * x, float * y, int64_t k) {
    for (int64_t b = 0; b < k/QK_SPK; b++) {
        int8_t fine[QK_SPK], coarse[QK_SPK];
        spike_activation_values(x + b, fine, coarse);
        const float unit = (float) (1 << (x[b].salient_shift & 15));
        for (int i = 0; i < QK_SPK; i++) {
            y[b*QK_SPK + i] = x[b].threshold * ((float) fine[i] + (float) coarse[i]*unit);
        }
        if (!(x[b].flags & SPKA_NOT_ROTATED)) {
            spike_rotate_block(y + b*QK_SPK);
        }
    }
}
