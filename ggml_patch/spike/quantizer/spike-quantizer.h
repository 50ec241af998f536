// The calibrated quantizer: second moments of real inputs, and codes that minimize the error they see.
// Called by the converter through ctypes. Results do not depend on the number of threads or on the instruction set:
// every float keeps its own sequence of operations.
#pragma once

#include "ggml-backend.h"
#include "spike/spike.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- second moments (spike-moments.cpp)

typedef struct spike_moments spike_moments;

// names: weight tensors whose inputs are collected; sizes: their numbers of inputs, multiples of 64.
// diagonal: only the squares, size floats instead of size x size.
GGML_BACKEND_API spike_moments * spike_moments_new(const char * const * names, const int64_t * sizes, int n, bool diagonal, int n_threads);
GGML_BACKEND_API void            spike_moments_free(spike_moments * moments);

// A ggml_backend_sched_eval_callback, with the collector as user data: adds x x^T of every token to the named weights.
GGML_BACKEND_API bool spike_moments_callback(struct ggml_tensor * node, bool ask, void * moments);

// The sum over tokens, size x size floats, symmetric (or size floats); and how many tokens it holds.
GGML_BACKEND_API void    spike_moments_read(const spike_moments * moments, int index, float * matrix);
GGML_BACKEND_API int64_t spike_moments_tokens(const spike_moments * moments, int index);

// ---- codes (spike-calibrated.cpp)

typedef struct {
    float   damping;        // added to the diagonal, as a share of its mean
    int32_t salient_weights; // per block, 0..2
    int32_t descent_sweeps; // of coordinate descent, per round; 0 for none
    int32_t rounds;         // of descent and threshold refit
    int32_t rotated;        // whether weights and moments are in the rotated basis: only sets the flag
    int32_t n_threads;
} spike_quantizer_options;

// weights: n_rows x n_inputs floats; moments: n_inputs x n_inputs, in the same basis.
// error: per row, the mean squared output error over the calibration tokens, relative to the mean squared output.
// Returns false if the moments are not positive definite after damping.
GGML_BACKEND_API bool spike_quantize_calibrated(const float * weights, const float * moments, int64_t n_rows, int64_t n_inputs,
                                                const spike_quantizer_options * options, block_spk4 * blocks, float * error);

#ifdef __cplusplus
}
#endif
