// Any bytes as rows of SPK4 and as tokens of SPKA: validated, decoded, repacked and back, and multiplied as stored.
#include "fuzz.h"

#include "spike/cpu/spike-cpu.h"
#include "spike/cpu/spike-layout.h"
#include "spike/cpu/spike-potentials.h"

#include <math.h>

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input input = fuzz_open(data, size);
    const int64_t n_blocks = 1 + fuzz_byte(&input) % 4;
    const int64_t n_rows   = 1 + fuzz_byte(&input) % 3;
    const bool    alike    = fuzz_byte(&input) & 1; // blocks of a token as an encoder makes them, but for the rest of their bytes
    const size_t  n_weights = (size_t) (n_rows*n_blocks);
    block_spk4 * weights = allocate_unset(n_weights*sizeof(block_spk4));
    block_spka * token   = allocate_unset((size_t) n_blocks*sizeof(block_spka));
    float      * values  = allocate_unset((size_t) n_blocks*QK_SPK*sizeof(float));
    fuzz_fill(&input, weights, n_weights*sizeof(block_spk4));
    fuzz_fill(&input, token, (size_t) n_blocks*sizeof(block_spka));
    if (alike) {
        for (int64_t b = 1; b < n_blocks; b++) {
            memcpy(token + b, token, 8);
        }
    }

    const bool valid = spike_validate_tensor("weights", weights, n_blocks*QK_SPK, n_rows);
    for (size_t i = 0; i < n_weights; i++) {
        const bool first = spike_check_weights(weights + i, true) == NULL, other = spike_check_weights(weights + i, false) == NULL;
        fuzz_require((i % (size_t) n_blocks == 0 ? first : other) || !valid, "a valid tensor has valid blocks");
        fuzz_require((first || other) == spike_validate_weights(weights + i, 1) && first == spike_is_sound(weights + i, true)
                     && other == spike_is_sound(weights + i, false), "all checks of a block agree");
    }
    for (int64_t b = 0; b < n_blocks; b++) {
        fuzz_require((spike_check_activations(token + b) == NULL) == spike_validate_activations(token + b, 1), "both checks of a token agree");
    }

    for (int64_t r = 0; r < n_rows; r++) {
        dequantize_row_spk4(weights + r*n_blocks, values, n_blocks*QK_SPK);
        for (int64_t i = 0; valid && i < n_blocks*QK_SPK; i++) {
            fuzz_require(isfinite(values[i]), "valid weights are finite");
        }
        float product = 0.0f;
        ggml_vec_dot_spk4_spka((int) (n_blocks*QK_SPK), &product, 0, weights + r*n_blocks, 0, token, 0, 1);
    }
    dequantize_row_spka(token, values, n_blocks*QK_SPK);

    const spike_layout layout = spike_layout_of(n_blocks*QK_SPK, n_rows);
    uint8_t    * packed = allocate_unset(layout.size);
    block_spk4 * back   = allocate_unset(n_weights*sizeof(block_spk4));
    fuzz_require(spike_pack_tiles(&layout, weights, packed, 0, layout.n_tiles) == valid, "repacking finds what the check of a tensor finds");
    spike_unpack_matrix(&layout, packed, back);
    fuzz_require(memcmp(weights, back, n_weights*sizeof(block_spk4)) == 0, "repacked weights come back");
    free(back);
    free(packed);
    free(values);
    free(token);
    free(weights);
    return 0;
}
