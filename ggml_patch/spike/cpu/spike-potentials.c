#include "spike-potentials.h"
#include "spike-cpu.h"

#include <math.h>
#include <string.h>

void spike_potentials_of_row(const block_spk4 * weights, const block_spka * activations, int64_t n_blocks,
                             int32_t * fine, int32_t * coarse) {
    int32_t fine_sum = 0, coarse_sum = 0;
    for (int64_t b = 0; b < n_blocks; b++) {
        int8_t w[QK_SPK], q[QK_SPK], c[QK_SPK];
        spike_weight_values(weights, b, w);
        spike_activation_values(activations + b, q, c);
        int32_t block_fine = 0, block_coarse = 0;
        for (int i = 0; i < QK_SPK; i++) {
            block_fine   += w[i]*q[i];
            block_coarse += w[i]*c[i];
        }
        fine_sum   += block_fine;
        coarse_sum += block_coarse;
    }
    *fine   = fine_sum;
    *coarse = coarse_sum;
}

static bool same_token(const block_spka * a, const block_spka * b) {
    return memcmp(a, b, 8) == 0; // threshold, zero_point, salient_shift, flags, reserved
}

void ggml_vec_dot_spk4_spka(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    (void) bs; (void) bx; (void) by; (void) nrc;
    const block_spk4 * x = vx;
    const block_spka * y = vy;
    const int n_blocks = n/QK_SPK;

    const uint16_t header = spike_header_of(x);
    bool consistent = !(header & SPK4_NOT_ROTATED) == !(y->flags & SPKA_NOT_ROTATED);
    for (int b = 1; b < n_blocks; b++) {
        consistent = consistent && same_token(y + b, y);
    }
    if (!consistent) {
        *s = NAN;
        return;
    }
    int32_t fine, coarse;
    spike_potentials_of_row(x, y, n_blocks, &fine, &coarse);
    const float unit = (float) (1 << (y->salient_shift & SPIKE_MAX_SHIFT));
    *s = spike_readout(spike_threshold_from_header(header), y->threshold, fine, coarse, unit);
}
