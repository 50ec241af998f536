// SPK4: quantization with a searched threshold and zero-point per row, and dequantization.
#include "spike.h"

#include "ggml-impl.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- thresholds: f16 magnitudes with six mantissa bits

#define THRESHOLD_MIN 9.5367431640625e-7f // 2^-20, the smallest subnormal of the grid
#define THRESHOLD_MAX 65024.0f
#define SMALLEST_NORMAL_F16 6.103515625e-5f // 2^-14

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    return u;
}

static float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof(x));
    return x;
}

static inline float clamp(float x, float lo, float hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

float spike_threshold_on_grid(float threshold) {
    if (!(threshold > THRESHOLD_MIN)) { // also catches NaN
        return THRESHOLD_MIN;
    }
    if (threshold >= THRESHOLD_MAX) {
        return THRESHOLD_MAX;
    }
    if (threshold < SMALLEST_NORMAL_F16) {
        return spike_round(threshold * 1048576.0f) * THRESHOLD_MIN; // multiples of 2^-20
    }
    // keep 6 of 23 mantissa bits, ties to even; a carry moves into the exponent as it should
    const uint32_t u    = bits_of(threshold);
    const uint32_t tie  = (u >> 17) & 1;
    const float    near = float_of((u + 0xFFFF + tie) & ~0x1FFFFu);
    return near > THRESHOLD_MAX ? THRESHOLD_MAX : near;
}

float spike_threshold_from_header(uint16_t header) {
    const uint32_t exponent = (header >> 10) & 31;
    const uint32_t mantissa = header & 0x3F0;
    if (exponent == 0) {
        return (float) mantissa * 5.9604644775390625e-8f; // 2^-24
    }
    if (exponent == 31) { // rejected by validation: infinity and NaN poison the row
        return float_of(mantissa ? 0x7FC00000u : 0x7F800000u);
    }
    return float_of((exponent + 112) << 23 | mantissa << 13);
}

uint16_t spike_threshold_to_header(float threshold) {
    if (threshold < SMALLEST_NORMAL_F16) {
        return (uint16_t) ((int) (threshold * 1048576.0f) << 4);
    }
    const uint32_t u = bits_of(threshold);
    return (uint16_t) ((((u >> 23) - 112) << 10) | ((u >> 13) & 0x3F0));
}

// ---- quantization of a row

enum { SCALE_STEPS = 20, CANDIDATES = SCALE_STEPS*3, PADDED_CANDIDATES = 64 };

typedef struct {
    float threshold;
    float zero_point;
} row_scale;

static int slots_of_block(int64_t block_of_row) {
    return SPIKE_SALIENT_SLOTS - spike_first_slot(block_of_row);
}

// Marks what the search treats as salient: the n_salient largest magnitudes of a block, the first of equals.
static void mark_largest(const float * w, int64_t block_of_row, int n_salient, float reach[QK_SPK]) {
    n_salient = n_salient < slots_of_block(block_of_row) ? n_salient : slots_of_block(block_of_row);
    memset(reach, 0, QK_SPK*sizeof(float));
    for (int s = 0; s < n_salient; s++) {
        int largest = -1;
        for (int i = 0; i < QK_SPK; i++) {
            if (reach[i] == 0.0f && (largest < 0 || fabsf(w[i]) > fabsf(w[largest]))) {
                largest = i;
            }
        }
        reach[largest] = 16.0f;
    }
}

// The least weighted squared error among 60 candidates.
SPIKE_CLONES void spike_search_row(const float * w, const float * importance, int64_t n, int n_salient, float * best_threshold, float * best_zero_point) {
    float reach[QK_SPK];
    float smallest = INFINITY;
    float largest  = -INFINITY;
    for (int64_t b = 0; b < n; b += QK_SPK) {
        mark_largest(w + b, b/QK_SPK, n_salient, reach);
        for (int i = 0; i < QK_SPK; i++) {
            if (reach[i] == 0.0f) {
                const float x = w[b + i];
                smallest = x < smallest ? x : smallest;
                largest  = x > largest  ? x : largest;
            }
        }
    }
    const float widest = (largest - smallest) / 15.0f;
    const float middle = 0.5f*(smallest + largest);

    // one lane per candidate, so that the sums keep their order and still vectorize
    float threshold[PADDED_CANDIDATES], inverse[PADDED_CANDIDATES], zero_point[PADDED_CANDIDATES], error[PADDED_CANDIDATES];
    for (int k = 0; k < PADDED_CANDIDATES; k++) {
        const int   c = k < CANDIDATES ? k / 3 : 0;
        const float t = spike_threshold_on_grid(widest * (1.08f - 0.04f*(float) c));
        const float inv    = 1.0f / t;
        const float centre = spike_round(clamp(7.5f - middle*inv, -1.0f, 16.0f));
        threshold[k]  = t;
        inverse[k]    = inv;
        zero_point[k] = clamp(centre + (float) (k % 3 - 1), 0.0f, 15.0f);
        error[k]      = 0.0f;
    }
    for (int64_t b = 0; b < n; b += QK_SPK) {
        mark_largest(w + b, b/QK_SPK, n_salient, reach);
        for (int i = 0; i < QK_SPK; i++) {
            const float x = w[b + i];
            const float m = importance[b + i];
            for (int k = 0; k < PADDED_CANDIDATES; k++) {
                const float lo = -zero_point[k] - reach[i];
                const float hi = 15.0f - zero_point[k] + reach[i];
                const float q  = spike_round(clamp(x*inverse[k], lo, hi));
                const float e  = threshold[k]*q - x;
                error[k] += (e*e)*m;
            }
        }
    }
    int best = 0;
    for (int k = 1; k < CANDIDATES; k++) {
        if (error[k] < error[best]) {
            best = k;
        }
    }
    *best_threshold  = threshold[best];
    *best_zero_point = zero_point[best];
}

static void store_header(block_spk4 * row, uint16_t header) {
    row->salient[0] = (uint8_t) header;
    row->salient[1] = (uint8_t) (header >> 8);
}

void spike_store_row(const float * values, int64_t n, float threshold, int zero_point, bool rotated, block_spk4 * row) {
    for (int64_t b = 0; b < n/QK_SPK; b++) {
        block_spk4 * y = row + b;
        memset(y->salient, 0, sizeof(y->salient));
        uint8_t nibble[QK_SPK];
        int slot = spike_first_slot(b);
        for (int i = 0; i < QK_SPK; i++) {
            int code = (int) values[b*QK_SPK + i] + zero_point;
            if (code < 0 || code > 15) {
                GGML_ASSERT(slot < SPIKE_SALIENT_SLOTS && code >= -16 && code <= 31);
                y->salient[slot++] = (uint8_t) (i | (code > 15 ? 1 : 2) << 6);
                code += code > 15 ? -16 : 16;
            }
            nibble[i] = (uint8_t) code;
        }
        for (int j = 0; j < QK_SPK/2; j++) {
            y->codes[j] = (uint8_t) (nibble[j] | nibble[j + QK_SPK/2] << 4);
        }
    }
    const uint16_t header = (uint16_t) (spike_threshold_to_header(threshold) | zero_point | (rotated ? 0 : SPK4_NOT_ROTATED));
    store_header(row, header);
}

// Codes of one block at a given scale in place of its weights; those that gain most by it become salient.
static void encode_block(float * w, row_scale scale, int n_salient) {
    const float inverse = 1.0f / scale.threshold;
    const float lo = -scale.zero_point;
    const float hi = 15.0f - scale.zero_point;

    float code[QK_SPK], wide[QK_SPK], gain[QK_SPK];
    for (int i = 0; i < QK_SPK; i++) {
        wide[i] = spike_round(clamp(w[i]*inverse, lo - 16.0f, hi + 16.0f));
        code[i] = clamp(wide[i], lo, hi);
        const float clamped  = scale.threshold*code[i] - w[i];
        const float extended = scale.threshold*wide[i] - w[i];
        const float gained   = clamped*clamped - extended*extended;
        gain[i] = wide[i] != code[i] && gained > 0.0f ? gained : 0.0f; // not NaN, of huge weights
    }
    for (int s = 0; s < n_salient; s++) {
        int best = 0;
        for (int i = 1; i < QK_SPK; i++) {
            if (gain[i] > gain[best]) {
                best = i;
            }
        }
        if (gain[best] > 0.0f) {
            code[best] = wide[best];
            gain[best] = 0.0f;
        }
    }
    memcpy(w, code, sizeof(code));
}

// scratch: 2*n floats
static void quantize_row(const float * x, const float * importance, block_spk4 * y, int64_t n, float * scratch) {
    float * w = scratch;
    float * m = scratch + n;
    bool finite = true;
    for (int64_t b = 0; b < n; b += QK_SPK) {
        memcpy(w + b, x + b, QK_SPK*sizeof(float));
        spike_rotate_block(w + b);
        float mean = 1.0f;
        if (importance) {
            // the rotation mixes the channels of a block evenly, and so their importance
            float sum = 0.0f;
            for (int i = 0; i < QK_SPK; i++) {
                sum += importance[b + i];
            }
            mean = sum * (1.0f/64.0f);
        }
        for (int i = 0; i < QK_SPK; i++) {
            m[b + i] = mean;
            finite   = finite && isfinite(w[b + i]);
        }
    }
    if (!finite) {
        // no code can hold it: an infinite threshold makes validation refuse the row
        memset(y, 0, (size_t) (n/QK_SPK)*sizeof(block_spk4));
        store_header(y, SPK4_THRESHOLD);
        return;
    }
    row_scale scale;
    spike_search_row(w, m, n, SPIKE_SALIENT_SLOTS, &scale.threshold, &scale.zero_point);
    for (int64_t b = 0; b < n; b += QK_SPK) {
        encode_block(w + b, scale, slots_of_block(b/QK_SPK));
    }
    spike_store_row(w, n, scale.threshold, (int) scale.zero_point, true, y);
}

size_t quantize_spk4(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * importance) {
    GGML_ASSERT(n_per_row % QK_SPK == 0);
    const int64_t n_blocks = n_per_row/QK_SPK;
    float * scratch = malloc(2*(size_t) n_per_row*sizeof(float));
    GGML_ASSERT(scratch != NULL);
    block_spk4 * y = dst;
    for (int64_t r = 0; r < nrows; r++) {
        quantize_row(src + r*n_per_row, importance, y + r*n_blocks, n_per_row, scratch);
    }
    free(scratch);
    return (size_t) (nrows*n_blocks)*sizeof(block_spk4);
}

void quantize_row_spk4_ref(const float * x, block_spk4 * y, int64_t k) {
    quantize_spk4(x, y, 1, k, NULL);
}

// ---- dequantization

void spike_weight_values(const block_spk4 * row, int64_t block, int8_t values[QK_SPK]) {
    static const int8_t extension[4] = { 0, 16, -16, 0 };
    const block_spk4 * x = row + block;
    const int zero_point = spike_header_of(row) & SPK4_ZERO_POINT;
    for (int j = 0; j < QK_SPK/2; j++) {
        values[j]            = (int8_t) ((x->codes[j] & 15) - zero_point);
        values[j + QK_SPK/2] = (int8_t) ((x->codes[j] >> 4) - zero_point);
    }
    for (int slot = spike_first_slot(block); slot < SPIKE_SALIENT_SLOTS; slot++) {
        int8_t * value = &values[x->salient[slot] & 63];
        *value = (int8_t) (*value + extension[x->salient[slot] >> 6]);
    }
}

void dequantize_row_spk4(const block_spk4 * x, float * y, int64_t k) {
    const uint16_t header    = k > 0 ? spike_header_of(x) : 0;
    const float    threshold = spike_threshold_from_header(header);
    for (int64_t b = 0; b < k/QK_SPK; b++) {
        int8_t values[QK_SPK];
        spike_weight_values(x, b, values);
        for (int i = 0; i < QK_SPK; i++) {
            y[b*QK_SPK + i] = threshold * (float) values[i];
        }
        if (!(header & SPK4_NOT_ROTATED)) {
            spike_rotate_block(y + b*QK_SPK);
        }
    }
}
