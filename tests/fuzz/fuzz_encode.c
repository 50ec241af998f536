// Any floats and settings: what encoder and quantizer make of them is valid, and what they say beside it is the same.
#include "fuzz.h"

#include "spike/spike.h"

#include <math.h>

static float fuzz_float(fuzz_input * input) {
    float value;
    fuzz_fill(input, &value, sizeof(value));
    return value;
}

static bool all_finite(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

static void check_encoder(fuzz_input * input, const float * x, int64_t n) {
    const spike_encoder_params params = {
        (float) (1 + fuzz_byte(input) % 59)/8.0f, (float) (fuzz_byte(input) % 33)/8.0f, fuzz_byte(input) & 15, (fuzz_byte(input) & 1) != 0,
    };
    block_spka * blocks  = allocate_unset((size_t) (n/QK_SPK)*sizeof(block_spka));
    float      * scratch = allocate_unset(2*(size_t) n*sizeof(float));
    int8_t     * values  = allocate_unset(2*(size_t) n);
    spike_encode_token(x, blocks, n, &params, scratch, values);
    for (int64_t b = 0; b < n/QK_SPK; b++) {
        int8_t fine[QK_SPK], coarse[QK_SPK];
        fuzz_require(spike_check_activations(blocks + b) == NULL, "encoded tokens are valid");
        spike_activation_values(blocks + b, fine, coarse);
        fuzz_require(memcmp(fine, values + b*QK_SPK, QK_SPK) == 0, "the encoder's fine values are those of its blocks");
        fuzz_require(memcmp(coarse, values + n + b*QK_SPK, QK_SPK) == 0, "the encoder's coarse values are those of its blocks");
    }
    dequantize_row_spka(blocks, scratch, n);
    free(values);
    free(scratch);
    free(blocks);
}

static void check_quantizer(fuzz_input * input, const float * x, int64_t n) {
    float      * importance = allocate_unset((size_t) n*sizeof(float));
    block_spk4 * blocks     = allocate_unset((size_t) (n/QK_SPK)*sizeof(block_spk4));
    float      * decoded    = allocate_unset((size_t) n*sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        importance[i] = (float) fuzz_byte(input);
    }
    const size_t written = quantize_spk4(x, blocks, 1, n, fuzz_byte(input) & 1 ? importance : NULL);
    fuzz_require(written == (size_t) (n/QK_SPK)*sizeof(block_spk4), "the quantizer fills a row");
    const bool valid = spike_validate_tensor("row", blocks, n, 1);
    fuzz_require(valid || !all_finite(x, n) || (spike_header_of(blocks) & SPK4_THRESHOLD) == SPK4_THRESHOLD,
                 "quantized rows are valid, or marked as too large");
    dequantize_row_spk4(blocks, decoded, n);
    free(decoded);
    free(blocks);
    free(importance);
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input input = fuzz_open(data, size);
    const int64_t n    = QK_SPK*(1 + fuzz_byte(&input) % 3);
    const int     kind = fuzz_byte(&input) % 4;
    float * x = allocate_unset((size_t) n*sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        const float any = fuzz_float(&input);
        const float small = (float) (int8_t) fuzz_byte(&input);
        x[i] = kind == 0 ? any : kind == 1 ? small : kind == 2 ? small*1e-38f : small*(fuzz_byte(&input) == 0 ? any : 1e-3f);
    }
    check_encoder(&input, x, n);
    if (kind != 0 || all_finite(x, n)) {
        check_quantizer(&input, x, n);
    }
    free(x);
    return 0;
}
