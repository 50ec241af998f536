// SPK4 and SPKA in ggml-base: reference quantizer, encoder, decoder and validation.
// All float arithmetic is IEEE single precision in the written order, without contraction, so that every build
// gives the bytes of the NumPy reference (spikequant_gguf/codec.py).
#pragma once

#include "ggml.h"
#include "spike-format.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- what this build is

GGML_API int          spikequant_abi(void);      // changes with any incompatible change of this header
GGML_API const char * spikequant_pin(void);      // llama-cpp-python release that the patch was applied to
GGML_API const char * spikequant_patch_id(void); // hash of pin, patch series and sources

// A function that each of its callers compiles for its own instruction set and arguments.
#if defined(__GNUC__)
#    define SPIKE_INLINE static inline __attribute__((always_inline))
#else
#    define SPIKE_INLINE static inline
#endif

// Compiles a function for several instruction sets and picks one when the library loads. The clones round alike:
// the sources are built without contraction, and no loop reorders a float sum. Not under ThreadSanitizer: the choice would
// be made before the sanitizer has started, by code that already calls it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#    define SPIKE_CLONES      __attribute__((target_clones("avx2", "default")))
#    define SPIKE_CLONES_WIDE __attribute__((target_clones("avx512f", "avx2", "default"))) // what needs 32 registers; bytes are slow in it
#else
#    define SPIKE_CLONES
#    define SPIKE_CLONES_WIDE
#endif

// Nearest integer, ties to even, for |x| < 2^22. Unlike rintf it needs no SSE4.1 and no call.
static inline float spike_round(float x) {
    const float shifter = 12582912.0f; // 1.5 * 2^23
    return (x + shifter) - shifter;
}

// Of a mask that is not 0.
static inline int spike_lowest_bit(uint64_t mask) {
#if defined(__GNUC__)
    return __builtin_ctzll(mask);
#else
    int bit = 0;
    while (!(mask >> bit & 1)) {
        bit++;
    }
    return bit;
#endif
}

// ---- rotation

// Walsh-Hadamard transform of 64 values in place, normalized by 1/8: its own inverse.
GGML_API void spike_rotate_block(float * x);

// ---- weights (spike-weights.c)

// Rows of k weights; k is a multiple of 64 and one call is one row.
GGML_API void quantize_row_spk4_ref(const float * x, block_spk4 * y, int64_t k);
GGML_API void dequantize_row_spk4(const block_spk4 * x, float * y, int64_t k);

// importance: n_per_row weights of the squared error, per input channel of the *unrotated* basis, or NULL.
// Returns the number of bytes written.
GGML_API size_t quantize_spk4(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * importance);

// Nearest value of the threshold grid (what the header of a block can hold).
GGML_API float spike_threshold_on_grid(float threshold);
GGML_API float spike_threshold_from_header(uint16_t header);
GGML_API uint16_t spike_threshold_to_header(float threshold_on_grid);

// The threshold (on the grid) and zero-point of least squared error for a row in its stored basis, each element's error
// weighted by importance, with the n_salient largest magnitudes of every block (of the first, two at most) free to use extended codes.
GGML_API void spike_search_row(const float * weights, const float * importance, int64_t n, int n_salient,
                               float * threshold, float * zero_point);

// Packs n integer weights, those of a row, into its blocks. At most two of the first 64 and four of each 64 after them may be
// outside 0..15 above -zero_point; these become salient.
GGML_API void spike_store_row(const float * values, int64_t n, float threshold_on_grid, int zero_point, bool rotated, block_spk4 * row);

// Unpacks a block of a row to its signed integer weights, code + extension - zero_point (-31..31).
GGML_API void spike_weight_values(const block_spk4 * row, int64_t block, int8_t values[QK_SPK]);

// ---- activations (spike-activations.c)

typedef struct {
    float   salience;   // c: the step is c * MAD / 7.5
    float   silence;    // values below silence * step are silent
    int32_t zero_point; // of the standard 4-bit range
    bool    rotated;
} spike_encoder_params;

GGML_API spike_encoder_params spike_encoder_defaults(void);

// One token of n values. scratch: room for 2*n floats. values: NULL, or room for what spike_activation_values would give,
// first n fine and then n coarse ones.
GGML_API void spike_encode_token(const float * x, block_spka * y, int64_t n, const spike_encoder_params * params, float * scratch,
                                 int8_t * values);
// The same without the blocks, for who only needs the values. header: a block with the token's threshold, zero-point, shift
// and flags.
GGML_API void spike_encode_values(const float * x, int64_t n, const spike_encoder_params * params, float * scratch, int8_t * values,
                                  block_spka * header);
GGML_API void spike_encode_activations(const float * x, block_spka * y, int64_t n, float salience, float silence, int zero_point, int rotated);

GGML_API void quantize_row_spka_ref(const float * x, block_spka * y, int64_t k); // the defaults
GGML_API void dequantize_row_spka(const block_spka * x, float * y, int64_t k);

// Unpacks a block to integer values in units of the step (fine) and of step * 2^shift (coarse); one of the two is 0.
GGML_API void spike_activation_values(const block_spka * x, int8_t fine[QK_SPK], int8_t coarse[QK_SPK]);

// Whether the metadata names SPIKE_FORMAT_VERSION as the version of the spike data, or none.
struct gguf_context;
GGML_API bool spike_version_is_known(const struct gguf_context * metadata);

// Puts the thresholds that the metadata names for a weight tensor into its op_params: salience, silence (f32).
GGML_API void spike_apply_encoder_settings(const struct gguf_context * metadata, struct ggml_tensor * weights);

// ---- validation (spike-validate.c): every bit pattern is valid or rejected

// Whether spike_check_weights finds nothing, without a branch on the data: in a header, in the salient slots of a block, in all
// of it.
static inline bool spike_header_is_sound(uint16_t header) {
    return ((header & 0x7C00) != 0x7C00) & ((header & SPK4_THRESHOLD) != 0);
}

// The salient slots of a block as one number, those of the header as unused.
static inline uint32_t spike_slots_of(const block_spk4 * x, bool first_of_row) {
    uint32_t slots;
    memcpy(&slots, x->salient, sizeof(slots));
    return slots & (first_of_row ? UINT32_MAX << 8*SPIKE_HEADER_SLOTS : UINT32_MAX);
}

static inline bool spike_slots_are_sound(uint32_t slots, bool first_of_row) {
    slots >>= first_of_row ? 8*SPIKE_HEADER_SLOTS : 0;
    const uint32_t high = 0x80808080, places = slots & 0x3F3F3F3F;
    const uint32_t used      = (slots | slots << 1) & high; // an extension
    const uint32_t invalid   = (slots & slots << 1) & high;
    const uint32_t not_zero  = (places + 0x3F3F3F3F) << 1 & high;
    const uint32_t next_used = used >> 8;
    const uint32_t ascending = (((places >> 8) | high) - places - 0x01010101) & high; // places are below 64: no borrow
    return (invalid | (not_zero & ~used) | (next_used & ~used) | (next_used & ~ascending)) == 0;
}

static inline bool spike_is_sound(const block_spk4 * x, bool first_of_row) {
    return (spike_header_is_sound(spike_header_of(x)) | !first_of_row) & spike_slots_are_sound(spike_slots_of(x, first_of_row), first_of_row);
}

// NULL if a block alone is valid, as the first of a row or as another one; else what is wrong with it.
GGML_API const char * spike_check_weights(const block_spk4 * x, bool first_of_row);
GGML_API const char * spike_check_activations(const block_spka * x);

// The hook of ggml_validate_row_data, which knows no row length: blocks one by one, each valid as the first of a row or as another.
GGML_API bool spike_validate_weights(const void * data, size_t n_blocks);
GGML_API bool spike_validate_activations(const void * data, size_t n_blocks);

// A whole tensor: headers, blocks, one rotation flag. Reports the first fault by row and block.
GGML_API bool spike_validate_tensor(const char * name, const void * data, int64_t n_per_row, int64_t n_rows);

// A buffer that looks at all weights while it repacks them leaves the address of one of these in tensor->extra, so that
// nobody needs to look again. What is faulty was reported.
GGML_API const char spike_found_sound;
GGML_API const char spike_found_faulty;

#ifdef __cplusplus
}
#endif
