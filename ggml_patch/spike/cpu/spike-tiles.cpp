#include "spike-tiles.h"

#include "spike-potentials.h"
#include "spike-prompt-kernels.h"

#include <algorithm>
#include <cstring>

namespace spike {

void add_salient_of_token(const uint8_t * salients, const spike_layout & layout, const spike_train * train, int32_t * potential,
                          const uint8_t * next_tile) {
    const spike_salient_token fine = { spike_train_values(train, layout.n_inputs, 0), nullptr, nullptr, 0, potential };
    const spike_salient_token coarse = { nullptr, spike_train_values(train, layout.n_inputs, 1), train->coarse_blocks, 0, potential + SPIKE_TILE_ROWS };
    if (train->fires[0]) {
        spike_add_salient_token(salients, SPIKE_TILE_ROWS, layout.n_blocks, &fine, next_tile);
    }
    if (train->fires[1]) {
        spike_add_salient_token(salients, SPIKE_TILE_ROWS, layout.n_blocks, &coarse, nullptr);
    }
}

void find_offsets(const spike_train * train, size_t stride, uint32_t * offsets) {
    const uint16_t * lines  = spike_train_lines(train);
    const uint32_t   n      = train->n_spikes; // which offsets could overlap, for all that the compiler knows
    const uint32_t   factor = (uint32_t) stride;
    for (uint32_t e = 0; e < n; e++) {
        offsets[e] = lines[e]*factor;
    }
}

namespace {

// As spike_threshold_from_header, without a branch: repacked headers are finite.
float finite_threshold(uint16_t header) {
    const uint32_t significant = header & 0x7FF0u;
    const uint32_t bits        = (significant << 13) + (112u << 23);
    float normal;
    memcpy(&normal, &bits, sizeof(normal));
    const float subnormal = (float) (int32_t) significant * 5.9604644775390625e-8f; // 2^-24
    return significant < 0x400u ? subnormal : normal;
}

} // namespace

void read_out(const spike_train * train, float * output, const spike_layout & layout, const uint8_t * packed, int64_t tile, const int32_t * potential) {
    const int64_t    row0    = tile*SPIKE_TILE_ROWS;
    const int64_t    n_rows  = std::min<int64_t>(SPIKE_TILE_ROWS, layout.n_rows - row0);
    const uint16_t * headers = spike_headers(&layout, packed) + row0; // of whole tiles
    const int32_t *  fine    = potential;
    const int32_t *  coarse  = potential + SPIKE_TILE_ROWS;
    const float      step = train->threshold, unit = train->coarse_unit;
    const int32_t    fine_sum = train->sum[0], coarse_sum = train->sum[1];
    float read[SPIKE_TILE_ROWS];
    for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
        const int32_t offset = (headers[r] & SPK4_ZERO_POINT) - 8;
        read[r] = spike_readout(finite_threshold(headers[r]), step, fine[r] - offset*fine_sum, coarse[r] - offset*coarse_sum, unit);
    }
    memcpy(output + row0, read, (size_t) n_rows*sizeof(float));
}

} // namespace spike
