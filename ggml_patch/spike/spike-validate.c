// Validation: every bit pattern of SPK4 and SPKA is either valid or rejected here.
#include "spike.h"

#include "ggml-impl.h"

#include <inttypes.h>
#include <string.h>

enum { SALIENT_NONE = 0, SALIENT_INVALID = 3 };

// objects of different addresses
const char spike_found_sound  = 1;
const char spike_found_faulty = 2;

const char * spike_check_weights(const block_spk4 * x, bool first_of_row) {
    const uint16_t header = spike_header_of(x);
    if (first_of_row && (header & 0x7C00) == 0x7C00) {
        return "threshold is not finite";
    }
    if (first_of_row && (header & SPK4_THRESHOLD) == 0) {
        return "threshold is zero";
    }
    bool invalid = false, not_zero = false, gap = false, not_ascending = false;
    const int first_slot = first_of_row ? SPIKE_HEADER_SLOTS : 0;
    for (int slot = first_slot; slot < SPIKE_SALIENT_SLOTS; slot++) {
        const uint8_t salient   = x->salient[slot];
        const int     extension = salient >> 6;
        invalid  |= extension == SALIENT_INVALID;
        not_zero |= extension == SALIENT_NONE && salient != 0;
        if (slot > first_slot && extension != SALIENT_NONE) {
            const uint8_t before = x->salient[slot - 1];
            gap           |= before >> 6 == SALIENT_NONE;
            not_ascending |= (before & 63) >= (salient & 63);
        }
    }
    return invalid ? "salient weight has no valid extension"
        : not_zero ? "unused salient slot is not zero"
        : gap ? "unused salient slot before a used one"
        : not_ascending ? "salient positions are not ascending" : NULL;
}

const char * spike_check_activations(const block_spka * x) {
    uint32_t threshold;
    memcpy(&threshold, &x->threshold, sizeof(threshold));
    if (x->reserved != 0 || (x->flags & ~SPKA_NOT_ROTATED) != 0) {
        return "reserved bits are not zero";
    }
    if (x->zero_point > 15) {
        return "zero-point is above 15";
    }
    if (x->salient_shift > SPIKE_MAX_SHIFT) {
        return "salient shift is above 15";
    }
    if (x->coarse_mask & ~x->salient_mask) {
        return "coarse value that is not salient";
    }
    if (x->fifth_bits & ~x->salient_mask) {
        return "fifth bit of a value that is not salient";
    }
    if (x->coarse_mask != 0 && x->salient_shift == 0) {
        return "coarse value without a shift";
    }
    if (threshold == 0x7FC00000u) { // a token that held NaN or infinity: nothing may fire
        const uint8_t silent = (uint8_t) (x->zero_point | x->zero_point << 4);
        for (int j = 0; j < QK_SPK/2; j++) {
            if (x->codes[j] != silent) {
                return "spike in a token without a threshold";
            }
        }
        return x->salient_mask || x->salient_shift ? "spike in a token without a threshold" : NULL;
    }
    if (threshold == 0 || threshold >= 0x7F800000u) {
        return "threshold is not positive and finite";
    }
    return NULL;
}

bool spike_validate_weights(const void * data, size_t n_blocks) {
    const block_spk4 * x = data;
    for (size_t b = 0; b < n_blocks; b++) {
        const char * fault = spike_check_weights(x + b, false);
        if (fault && spike_check_weights(x + b, true) != NULL) {
            GGML_LOG_ERROR("%s: spk4 block %zu: %s\n", __func__, b, fault);
            return false;
        }
    }
    return true;
}

bool spike_validate_activations(const void * data, size_t n_blocks) {
    const block_spka * x = data;
    for (size_t b = 0; b < n_blocks; b++) {
        const char * fault = spike_check_activations(x + b);
        if (fault) {
            GGML_LOG_ERROR("%s: spka block %zu: %s\n", __func__, b, fault);
            return false;
        }
    }
    return true;
}

bool spike_validate_tensor(const char * name, const void * data, int64_t n_per_row, int64_t n_rows) {
    const int64_t n_blocks = n_per_row/QK_SPK;
    const block_spk4 * x = data;
    const uint16_t rotation = n_rows*n_blocks > 0 ? spike_header_of(x) & SPK4_NOT_ROTATED : 0;
    for (int64_t r = 0; r < n_rows; r++) {
        const block_spk4 * row = x + r*n_blocks;
        const bool rotation_differs = n_blocks > 0 && (spike_header_of(row) & SPK4_NOT_ROTATED) != rotation;
        bool sound = !rotation_differs;
        for (int64_t b = 0; b < n_blocks; b++) {
            sound &= spike_is_sound(row + b, b == 0);
        }
        for (int64_t b = 0; !sound && b < n_blocks; b++) {
            const char * fault = spike_check_weights(row + b, b == 0);
            if (fault == NULL && b == 0 && rotation_differs) {
                fault = "rotation differs from the first row";
            }
            if (fault) {
                GGML_LOG_ERROR("%s: tensor '%s', row %" PRId64 ", block %" PRId64 ": %s\n", __func__, name, r, b, fault);
                return false;
            }
        }
    }
    return true;
}
