// Validation: every bit pattern of SPK4 and SPKA is either valid or rejected here.
#include "spike.h"

#include "ggml-impl.h"

#include <inttypes.h>
#include <string.h>

enum { SALIENT_NONE = 0, SALIENT_INVALID = 3 };

// objects of different addresses
const char spike_found_sound  = 1;
const char spike_found_faulty = 2;

const char * spike_check_weights(const block_spk4 * x) {
    if ((x->header & 0x7C00) == 0x7C00) {
        return "threshold is not finite";
    }
    if ((x->header & SPK4_THRESHOLD) == 0) {
        return "threshold is zero";
    }
    const int first  = x->salient[0] >> 6;
    const int second = x->salient[1] >> 6;
    if (first == SALIENT_INVALID || second == SALIENT_INVALID) {
        return "salient weight has no valid extension";
    }
    if ((first == SALIENT_NONE && x->salient[0] != 0) || (second == SALIENT_NONE && x->salient[1] != 0)) {
        return "unused salient slot is not zero";
    }
    if (first == SALIENT_NONE && second != SALIENT_NONE) {
        return "unused salient slot before a used one";
    }
    if (second != SALIENT_NONE && (x->salient[0] & 63) >= (x->salient[1] & 63)) {
        return "salient positions are not ascending";
    }
    return NULL;
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
        const char * fault = spike_check_weights(x + b);
        if (fault) {
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

// NULL, or what is wrong with a block of a row, given the first header of the row and the rotation of the tensor.
static const char * check_block_of_row(const block_spk4 * x, uint16_t header, uint16_t rotation) {
    const char * fault = spike_check_weights(x);
    if (fault) {
        return fault;
    }
    if (x->header != header) {
        return "header differs from the first block of its row";
    }
    return (x->header & SPK4_NOT_ROTATED) != rotation ? "rotation differs from the first row" : NULL;
}

bool spike_validate_tensor(const char * name, const void * data, int64_t n_per_row, int64_t n_rows) {
    const int64_t n_blocks = n_per_row/QK_SPK;
    const block_spk4 * x = data;
    const uint16_t rotation = n_rows*n_blocks > 0 ? x[0].header & SPK4_NOT_ROTATED : 0;
    for (int64_t r = 0; r < n_rows; r++) {
        const block_spk4 * row = x + r*n_blocks;
        bool sound = true;
        for (int64_t b = 0; b < n_blocks; b++) {
            sound &= spike_is_sound_in_row(row + b, row[0].header, rotation);
        }
        for (int64_t b = 0; !sound && b < n_blocks; b++) {
            const char * fault = check_block_of_row(row + b, row[0].header, rotation);
            if (fault) {
                GGML_LOG_ERROR("%s: tensor '%s', row %" PRId64 ", block %" PRId64 ": %s\n", __func__, name, r, b, fault);
                return false;
            }
        }
    }
    return true;
}
