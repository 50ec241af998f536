// The calibrated quantizer: second moments of real inputs, and codes that minimize the error they see.
// Called by the converter through ctypes. Results do not depend on the number of threads or on the instruction set:
// every float keeps its own sequence of operations.
#pragma once

#include "ggml-backend.h"
#include "spike/spike.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- inputs of a layer and sums of their products (spike-inputs.cpp)

// Rows of n floats as the layer's weights meet them: times factors of the channels (NULL for none), rotated, times weights of the tokens.
GGML_BACKEND_API void spike_prepare_inputs(const float * x, int64_t n_tokens, int64_t n, const float * factors, const float * weights, float * y,
                                           int n_threads);

#define SPIKE_SLICE INT64_C(512) // tokens that are rounded alike

// Codes of 12 bits for each slice of the tokens, and the step of each of its channels: SPIKE_SLICE*n codes and n steps a slice,
// whether or not the last one is full.
GGML_BACKEND_API void spike_round_inputs(const float * x, int64_t n_tokens, int64_t n, int16_t * codes, float * steps, int n_threads);

// sum[i][j] += a[t][i]*b[t][j] over the tokens, n x n; if symmetric only for j <= i, rounded up to tiles of 64.
GGML_BACKEND_API void spike_add_products(const int16_t * a, const float * a_steps, const int16_t * b, const float * b_steps, int64_t n_tokens,
                                         int64_t n, bool symmetric, double * sum, int n_threads);

// ---- codes (spike-calibrated.cpp)

typedef struct {
    float   damping;        // added to the diagonal, as a share of its mean
    int32_t salient_weights; // per block, 0..4; the first of a row has two at most
    int32_t descent_sweeps; // of coordinate descent, per round; 0 for none
    int32_t rounds;         // of descent and threshold refit
    int32_t rotated;        // whether weights and moments are in the rotated basis: only sets the flag
    int32_t n_threads;
    float   correction;     // share of the predictable deviation of inputs that the weights make up for, 0..1
    float   output_damping; // added to the diagonal of the moments of the outputs, as a share of its mean
} spike_quantizer_options;

// weights: n_rows x n_inputs floats; moments: n_inputs x n_inputs, mean of x^ x^T over the inputs x^ that the layer will see,
// in the same basis; the diagonal is changed during the call. deviations: NULL, or the mean of x^ (x - x^)^T, x being the float model's inputs (row k belongs to x^_k).
// output_moments: NULL, or n_rows x n_rows, mean of g g^T over the gradients g of what the model loses by the layer's outputs: rows then
// make up for each other's errors. The rows of a layer whose outputs do not matter are quantized as without them.
// error: per row, the mean squared output error over the calibration tokens, relative to the mean squared output.
// Returns false if the moments are not positive definite after damping.
GGML_BACKEND_API bool spike_quantize_calibrated(const float * weights, float * moments, const float * deviations, const float * output_moments,
                                                int64_t n_rows, int64_t n_inputs, const spike_quantizer_options * options, block_spk4 * blocks,
                                                float * error);

#ifdef __cplusplus
}
#endif
