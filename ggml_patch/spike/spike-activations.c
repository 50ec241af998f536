// SPKA: activations as spikes. The scalar encoder defines the result; faster ones must give its bytes.
#include "spike.h"

#include "ggml-impl.h"
#include "spike-codes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const float SMALLEST_STEP = 7.8886090522101181e-31f; // 2^-100: below, everything is silence

static const int32_t INFINITE_BITS = 0x7F800000;

spike_encoder_params spike_encoder_defaults(void) {
    return (spike_encoder_params) { 2.3f, 0.5f, 8, true };
}

// The element of the given rank (from 0) among n keys below 2^31 of which all bits above `highest_bit` are those of `found`:
// bit by bit, the largest value that at most rank keys lie below. Sweeps without a branch, faster than a selection that
// has to move keys.
SPIKE_CLONES static int32_t select_rank(const int32_t * keys, int64_t n, int64_t rank, int32_t found, int highest_bit) {
    for (int32_t bit = 1 << highest_bit; bit > 0; bit >>= 1) {
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

enum { BOUNDS = 8 };

// How many keys lie below each of several bounds.
SPIKE_CLONES static void count_below(const int32_t * keys, int64_t n, const int32_t bounds[BOUNDS], int32_t below[BOUNDS]) {
    int32_t b0 = 0, b1 = 0, b2 = 0, b3 = 0, b4 = 0, b5 = 0, b6 = 0, b7 = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t key = keys[i];
        b0 += key < bounds[0];
        b1 += key < bounds[1];
        b2 += key < bounds[2];
        b3 += key < bounds[3];
        b4 += key < bounds[4];
        b5 += key < bounds[5];
        b6 += key < bounds[6];
        b7 += key < bounds[7];
    }
    const int32_t counts[BOUNDS] = { b0, b1, b2, b3, b4, b5, b6, b7 };
    memcpy(below, counts, sizeof(counts));
}

// Moves the keys in lower..upper - 1 to the front, in order; n is a multiple of 64. Returns how many: few, so that most groups
// of neighbours hold none.
SPIKE_CLONES static int64_t keep_between(int32_t * keys, int64_t n, int32_t lower, int32_t upper) {
    enum { GROUP = 16 };
    const uint32_t width = (uint32_t) upper - (uint32_t) lower;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += QK_SPK) {
        int32_t any[QK_SPK/GROUP];
        for (int g = 0; g < QK_SPK/GROUP; g++) {
            int32_t found = 0;
            for (int k = 0; k < GROUP; k++) {
                found |= (uint32_t) keys[i + g*GROUP + k] - (uint32_t) lower < width;
            }
            any[g] = found;
        }
        for (int g = 0; g < QK_SPK/GROUP; g++) {
            if (any[g]) {
                for (int k = 0; k < GROUP; k++) {
                    const int32_t key = keys[i + g*GROUP + k];
                    keys[kept] = key;
                    kept += (uint32_t) key - (uint32_t) lower < width;
                }
            }
        }
    }
    return kept;
}

SPIKE_CLONES static float sum_of_magnitudes(const float * x, int64_t n) {
    enum { LANES = 64 };
    float partial[LANES] = { 0.0f };
    for (int64_t i = 0; i < n; i += LANES) { // n is a multiple of 64
        for (int k = 0; k < LANES; k++) {
            partial[k] += fabsf(x[i + k]);
        }
    }
    float sum = 0.0f;
    for (int k = 0; k < LANES; k++) {
        sum += partial[k];
    }
    return sum;
}

static inline int32_t magnitude_bits(float x) {
    int32_t u;
    memcpy(&u, &x, sizeof(u));
    return u & 0x7FFFFFFF;
}

// v: the token, rotated if that is wanted.
SPIKE_INLINE spike_magnitudes rotate_token(const float * x, float * v, int64_t n, bool rotated) {
    spike_magnitudes found = { 0, 0.0f };
    memcpy(v, x, (size_t) n*sizeof(float));
    for (int64_t b = 0; rotated && b < n; b += QK_SPK) {
        spike_rotate_block(v + b);
    }
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = magnitude_bits(v[i]);
        found.top = bits > found.top ? bits : found.top;
    }
    found.mean = sum_of_magnitudes(v, n)/(float) n;
    return found;
}

// The bits of the median of the magnitudes of v. All but a few are first told apart by bounds around the likely median; any
// bounds give the same result, only not as fast. keys: room for n.
SPIKE_INLINE int32_t median_of_magnitudes(const float * v, int64_t n, float mean, int32_t * keys) {
    const int64_t rank = n/2;
    for (int64_t i = 0; i < n; i++) {
        keys[i] = magnitude_bits(v[i]);
    }
    // of normal values the median of magnitudes is 0.845 of their mean
    static const float FACTORS[BOUNDS] = { 0.70f, 0.79f, 0.81f, 0.83f, 0.85f, 0.87f, 0.90f, 0.98f };
    int32_t bounds[BOUNDS], below[BOUNDS];
    for (int k = 0; k < BOUNDS; k++) {
        const float bound = FACTORS[k]*mean;
        memcpy(&bounds[k], &bound, sizeof(bound));
    }
    count_below(keys, n, bounds, below);
    if (below[0] > rank || below[BOUNDS - 1] <= rank) { // among them a mean that is infinite
        return select_rank(keys, n, rank, 0, 30);
    }
    int k = 0;
    while (below[k + 1] <= rank) {
        k++;
    }
    const int32_t lower = bounds[k], last = bounds[k + 1] - 1;
    const int64_t n_between = keep_between(keys, n, lower, last + 1);
    int highest_bit = 30; // that the keys in between may differ in
    while (highest_bit > 0 && !((lower ^ last) >> highest_bit & 1)) {
        highest_bit--;
    }
    const int32_t common = (int32_t) ((uint32_t) lower >> (highest_bit + 1) << (highest_bit + 1));
    return select_rank(keys, n_between, rank - below[k], common, highest_bit);
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

// Without pack, of the blocks only the first one's header is written.
SPIKE_INLINE void encode(const float * x, block_spka * y, int64_t n, const spike_encoder_params * params, float * scratch,
                                        int8_t * values, bool pack) {
    const int64_t n_blocks = n/QK_SPK;
    float   * v    = scratch;
    int32_t  * keys = (int32_t *) (scratch + n);

    const spike_vector_encoder * vector = spike_select_encoder();
    const spike_magnitudes magnitudes = vector ? vector->rotate_token(x, v, n, params->rotated) : rotate_token(x, v, n, params->rotated);
    const int32_t top_bits = magnitudes.top;
    if (top_bits >= INFINITE_BITS) { // an input, or what the rotation made of inputs
        encode_nothing(y, pack ? n_blocks : 1, params, quiet_nan());
        if (values) {
            memset(values, 0, 2*(size_t) n);
        }
        return;
    }
    int32_t mad_bits = vector ? vector->median_of_magnitudes(v, n, magnitudes.mean, keys) : -1;
    if (mad_bits < 0) {
        mad_bits = median_of_magnitudes(v, n, magnitudes.mean, keys);
    }
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
    const float silence = params->silence;
    const int32_t zero_point = params->zero_point;
    if (vector && !pack) {
        const spike_coding coding = { inverse, coarser, coarse_unit, lo, hi, silence };
        const bool any = vector->code_values(v, n, &coding, values, values + n);
        encode_nothing(y, 1, params, step);
        y->salient_shift = (uint8_t) (any ? shift : 0);
        return;
    }
    uint64_t any_coarse = 0;
    int32_t  any_coarse_of[QK_SPK] = { 0 };
    for (int64_t b = 0; b < n_blocks; b++) {
        // Every value is coded as standard (at the end of the range if it lies outside) and as salient; the nearer one stays.
        int32_t code_of[QK_SPK], salient_of[QK_SPK], coarse_of[QK_SPK];
        for (int i = 0; i < QK_SPK; i++) {
            const float u = v[b*QK_SPK + i] * inverse;
            const float q = fabsf(u) < silence ? 0.0f : spike_round(u);
            const float above_lo = q < lo ? lo : q;
            const float edge     = above_lo > hi ? hi : above_lo;
            const float scaled   = spike_round(u*coarser);
            const float above_16 = scaled < -16.0f ? -16.0f : scaled;
            const float wide     = above_16 > 15.0f ? 15.0f : above_16;
            const float narrow   = q < -16.0f ? -16.0f : q > 15.0f ? 15.0f : q;
            const float code     = narrow == q ? q : wide;
            const float value    = narrow == q ? q : wide*coarse_unit;
            const int32_t salient = edge == q ? 0 : fabsf(edge - u) <= fabsf(value - u) ? 0 : 1;
            salient_of[i] = salient;
            coarse_of[i]  = narrow == q ? 0 : salient;
            code_of[i]    = (int32_t) (salient ? code : edge);
        }
        int8_t  fine[QK_SPK], coarse[QK_SPK];
        uint8_t stored[QK_SPK], is_salient[QK_SPK], is_coarse[QK_SPK], fifth[QK_SPK];
        for (int i = 0; i < QK_SPK; i++) {
            const int32_t salient_code = code_of[i] + 16;
            is_salient[i] = (uint8_t) salient_of[i];
            is_coarse[i]  = (uint8_t) coarse_of[i];
            fifth[i]      = (uint8_t) (salient_of[i] & salient_code >> 4);
            stored[i]     = (uint8_t) (salient_of[i] ? salient_code & 15 : code_of[i] + zero_point);
            fine[i]       = (int8_t) (coarse_of[i] ? 0 : code_of[i]);
            coarse[i]     = (int8_t) (coarse_of[i] ? code_of[i] : 0);
        }
        if (values) {
            memcpy(values + b*QK_SPK, fine, QK_SPK);
            memcpy(values + n + b*QK_SPK, coarse, QK_SPK);
        }
        if (!pack) {
            for (int i = 0; i < QK_SPK; i++) {
                any_coarse_of[i] |= coarse_of[i];
            }
            continue;
        }
        const uint64_t coarse_mask = mask_of(is_coarse);
        y[b].threshold    = step;
        y[b].zero_point   = (uint8_t) params->zero_point;
        y[b].flags        = params->rotated ? 0 : SPKA_NOT_ROTATED;
        y[b].reserved     = 0;
        y[b].salient_mask = mask_of(is_salient);
        y[b].fifth_bits   = mask_of(fifth);
        y[b].coarse_mask  = coarse_mask;
        for (int j = 0; j < QK_SPK/2; j++) {
            y[b].codes[j] = (uint8_t) (stored[j] | stored[j + QK_SPK/2] << 4);
        }
        any_coarse |= coarse_mask;
    }
    if (!pack) {
        encode_nothing(y, 1, params, step);
        for (int i = 0; i < QK_SPK; i++) {
            any_coarse |= (uint64_t) any_coarse_of[i];
        }
    }
    for (int64_t b = 0; b < (pack ? n_blocks : 1); b++) {
        y[b].salient_shift = (uint8_t) (any_coarse ? shift : 0);
    }
}

SPIKE_CLONES void spike_encode_token(const float * x, block_spka * y, int64_t n, const spike_encoder_params * params, float * scratch,
                                     int8_t * values) {
    encode(x, y, n, params, scratch, values, true);
}

SPIKE_CLONES void spike_encode_values(const float * x, int64_t n, const spike_encoder_params * params, float * scratch, int8_t * values,
                                      block_spka * header) {
    encode(x, header, n, params, scratch, values, false);
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
