// Potentials and readout: the two quantities that every path must agree on to the bit.
#pragma once

#include "spike/spike.h"

#ifdef __cplusplus
extern "C" {
#endif

// Membrane potentials of one neuron, plain integer dot products: sum of weight * value over standard and finely
// salient inputs, and over coarse ones. |potential| <= 31*16*n stays in 32 bits up to n = 4329604.
void spike_potentials_of_row(const block_spk4 * weights, const block_spka * activations, int64_t n_blocks,
                             int32_t * fine, int32_t * coarse);

// The output of a neuron. The only place where scales meet potentials.
static inline float spike_readout(float row_threshold, float step, int32_t fine, int32_t coarse, float coarse_unit) {
    const float scale     = row_threshold * step;
    const float potential = (float) fine + (float) coarse * coarse_unit;
    return scale * potential;
}

#ifdef __cplusplus
}
#endif
