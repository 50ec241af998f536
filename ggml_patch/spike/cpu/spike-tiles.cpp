#include "spike-tiles.h"

#include "spike-potentials.h"

#include <algorithm>

namespace spike {

void add_salient_of_token(const uint8_t * salients, const spike_layout & layout, int spike_class, const spike_train * train, int32_t * potential) {
    if (!train->fires[spike_class]) {
        return;
    }
    int16_t sum[SPIKE_TILE_ROWS];
    spike_select_kernels()->add_salient(salients, spike_train_values(train, layout.n_inputs, spike_class), layout.n_blocks, sum);
    for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
        potential[r] += 16*sum[r];
    }
}

void scale_offsets(const spike_train * train, size_t stride, uint32_t * scaled) {
    const uint32_t   width   = (uint32_t) (stride/SPIKE_LINE_BYTES);
    const uint32_t * offsets = spike_train_offsets(train);
    for (uint32_t e = 0; e < train->n_spikes; e++) {
        scaled[e] = offsets[e]*width;
    }
}

void read_out(int64_t n_tokens, const spike_train * const * trains, float * const * outputs, const spike_layout & layout,
              const uint8_t * packed, int64_t tile, const int32_t * potential) {
    const int64_t    row0    = tile*SPIKE_TILE_ROWS;
    const int64_t    n_rows  = std::min<int64_t>(SPIKE_TILE_ROWS, layout.n_rows - row0);
    const uint16_t * headers = spike_headers(&layout, packed) + row0;
    float   threshold[SPIKE_TILE_ROWS];
    int32_t offset[SPIKE_TILE_ROWS];
    for (int64_t r = 0; r < n_rows; r++) {
        threshold[r] = spike_threshold_from_header(headers[r]);
        offset[r]    = (headers[r] & SPK4_ZERO_POINT) - 8;
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        const spike_train * train  = trains[t];
        const int32_t *     fine   = potential + t*SPIKE_CLASSES*SPIKE_TILE_ROWS;
        const int32_t *     coarse = fine + SPIKE_TILE_ROWS;
        float *             output = outputs[t] + row0;
        for (int64_t r = 0; r < n_rows; r++) {
            output[r] = spike_readout(threshold[r], train->threshold, fine[r] - offset[r]*train->sum[0],
                                      coarse[r] - offset[r]*train->sum[1], train->coarse_unit);
        }
    }
}

} // namespace spike
