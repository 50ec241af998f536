// Integrate-and-fire neurons in tiles of 128: additions only.
#pragma once

#include "spike-layout.h"
#include "spike-train.h"

#ifdef __cplusplus
extern "C" {
#endif

// Potentials of the tile's neurons from the 4-bit codes alone, for one class of spikes (0 fine, 1 coarse):
// sum of code * value, before zero-points and salient weights. Walks the spike train from the first spike to the last.
// lines: the tile's lines one after the other, input by input.
void spike_integrate_tile(const uint8_t * lines, const spike_train * train, int spike_class, int32_t potential[SPIKE_TILE_ROWS]);

#ifdef __cplusplus
}
#endif
