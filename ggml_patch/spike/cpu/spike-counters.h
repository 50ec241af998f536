// Counts of what spike products do, by weight tensor. Off by default; then a product pays one test.
#pragma once

#include "../spike-format.h"
#include "ggml-backend.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Sums over all tokens that went through one weight tensor.
typedef struct {
    char     name[64];
    int64_t  n_inputs;
    int64_t  n_rows;
    uint64_t products;   // calls, whatever their number of tokens
    uint64_t tokens;
    uint64_t spikes;     // inputs that fire: each fires once
    uint64_t silent;     // inputs whose code is 0
    uint64_t salient;    // inputs with a fifth bit
    uint64_t rate_spikes; // sum of |q|: what a rate code would fire
    uint64_t adds;       // rows x (standard spikes + time steps)
    uint64_t shift_adds; // rows x salient spikes
    uint64_t readouts;   // rows
    uint64_t bytes;      // weights read, coded inputs read, outputs written
} spike_counter;

// One token that went through one weight tensor. Silent inputs, readouts: see its counter.
typedef struct {
    int64_t  counter;    // index of the tensor
    int64_t  token;      // index within the product's inputs
    uint64_t spikes;
    uint64_t salient;
    uint64_t rate_spikes;
    uint64_t adds;
    uint64_t shift_adds;
    uint64_t bytes;      // without the weights that all tokens of a product share
} spike_token_counter;

// One thread of one graph counts; do not read or reset while a graph computes.
GGML_BACKEND_API void spikequant_count(bool on);
GGML_BACKEND_API void spikequant_counters_reset(void);
GGML_BACKEND_API int64_t spikequant_counters(const spike_counter ** counters); // number of tensors; -1 if there were too many
// Single tokens are kept only if that is asked for, beside the sums. Their number; -1 if memory ran out.
GGML_BACKEND_API void spikequant_count_tokens(bool on);
GGML_BACKEND_API int64_t spikequant_token_counters(const spike_token_counter ** tokens);

bool spike_counting(void);
// One product. Its tokens follow.
spike_counter * spike_count_product(const char * name, int64_t n_inputs, int64_t n_rows, int64_t n_tokens);
void spike_count_token(spike_counter * counter, int64_t token, const block_spka * blocks, bool alone);

#ifdef __cplusplus
}
#endif
