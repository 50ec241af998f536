// A token as a spike train: for each input at most one spike, its time the larger the earlier.
#pragma once

#include "spike/spike.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPIKE_MAX_MAGNITUDE 16

// Lists of inputs by class (0 fine, 1 coarse), spike time and sign. Magnitude m fires at time 16 - m.
typedef struct {
    float    step;
    float    coarse_unit;  // 2^salient_shift
    int32_t  sum[2];       // of all signed magnitudes, for the zero-point's share; 0 fine, 1 coarse
    int32_t  largest[2];   // magnitude of the first spike, 0 if none
    uint32_t count[2][SPIKE_MAX_MAGNITUDE + 1][2]; // [class][magnitude][0 positive, 1 negative]
} spike_train;

// The lists follow the struct: class 0 then 1, magnitudes descending, positive then negative.
static inline const uint32_t * spike_train_inputs(const spike_train * train) {
    return (const uint32_t *) (train + 1);
}

// Then the signed magnitudes of all inputs of class 0, and of class 1.
static inline const int8_t * spike_train_values(const spike_train * train, int64_t n_inputs, int spike_class) {
    return (const int8_t *) (spike_train_inputs(train) + n_inputs) + spike_class*n_inputs;
}

size_t spike_train_size(int64_t n_inputs);
void   spike_train_build(const block_spka * activations, int64_t n_inputs, spike_train * train);

#ifdef __cplusplus
}
#endif
