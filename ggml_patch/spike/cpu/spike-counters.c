#include "spike-counters.h"

#include <stdlib.h>
#include <string.h>

#define MAX_COUNTERS 8192
#define FIRST_TOKENS 4096

static spike_counter table[MAX_COUNTERS];
static int64_t       n_counters;
static bool          overflow;
static bool          counting;

static spike_token_counter * tokens;
static int64_t               n_kept, max_kept;
static bool                  counting_tokens;

void spikequant_count(bool on) {
    counting = on;
}

void spikequant_counters_reset(void) {
    n_counters = 0;
    overflow   = false;
    n_kept     = 0;
}

int64_t spikequant_counters(const spike_counter ** counters) {
    *counters = table;
    return overflow ? -1 : n_counters;
}

void spikequant_count_tokens(bool on) {
    counting_tokens = on;
    if (!on) {
        free(tokens);
        tokens   = NULL;
        n_kept   = max_kept = 0;
    }
}

int64_t spikequant_token_counters(const spike_token_counter ** counters) {
    *counters = tokens;
    return n_kept;
}

bool spike_counting(void) {
    return counting;
}

static spike_counter * find(const char * name, int64_t n_inputs, int64_t n_rows) {
    for (int64_t i = 0; i < n_counters; i++) {
        if (strcmp(table[i].name, name) == 0 && table[i].n_inputs == n_inputs && table[i].n_rows == n_rows) {
            return table + i;
        }
    }
    if (n_counters == MAX_COUNTERS) {
        overflow = true;
        return NULL;
    }
    spike_counter * counter = table + n_counters++;
    memset(counter, 0, sizeof(*counter));
    strncpy(counter->name, name, sizeof(counter->name) - 1);
    counter->n_inputs = n_inputs;
    counter->n_rows   = n_rows;
    return counter;
}

spike_counter * spike_count_product(const char * name, int64_t n_inputs, int64_t n_rows, int64_t n_tokens) {
    spike_counter * counter = n_tokens ? find(name, n_inputs, n_rows) : NULL;
    if (counter) {
        const uint64_t codes = n_tokens > 1 ? (uint64_t) n_inputs*(uint64_t) n_rows/2 : 0;
        const uint64_t rest  = (uint64_t) n_rows*(2 + SPIKE_SALIENT_SLOTS*(uint64_t) (n_inputs/QK_SPK));
        counter->products += 1;
        counter->bytes    += codes + rest; // header and salient weights are read whatever fires
    }
    return counter;
}

static void keep_token(const spike_token_counter * token) {
    if (n_kept < 0) {
        return; // memory has run out
    }
    if (n_kept == max_kept) {
        const int64_t size = max_kept ? 2*max_kept : FIRST_TOKENS;
        spike_token_counter * larger = realloc(tokens, (size_t) size*sizeof(*tokens));
        if (!larger) {
            n_kept = -1;
            return;
        }
        tokens     = larger;
        max_kept = size;
    }
    tokens[n_kept++] = *token;
}

void spike_count_token(spike_counter * counter, int64_t token, const block_spka * blocks, bool alone) {
    if (!counter) {
        return;
    }
    const int64_t n_blocks = counter->n_inputs/QK_SPK;
    uint64_t standard = 0, salient_spikes = 0, salient = 0, rate = 0;
    int steps[2] = { 0, 0 }; // of the fine and the coarse values: time runs from the largest down to 1
    for (int64_t b = 0; b < n_blocks; b++) {
        const block_spka * x = blocks + b;
        for (int i = 0; i < QK_SPK; i++) {
            const int is_salient = (int) (x->salient_mask >> i & 1), is_coarse = (int) (x->coarse_mask >> i & 1);
            const int code  = i < QK_SPK/2 ? x->codes[i] & 15 : x->codes[i - QK_SPK/2] >> 4;
            const int value = is_salient ? code + 16*(int) (x->fifth_bits >> i & 1) - 16 : code - x->zero_point;
            const int size  = value < 0 ? -value : value;
            salient        += (uint64_t) is_salient;
            standard       += !is_salient && size;
            salient_spikes += is_salient && size;
            // a rate code has one unit: that of the fine values
            rate += (uint64_t) size << (is_coarse ? x->salient_shift & SPIKE_MAX_SHIFT : 0);
            if (size > steps[is_coarse]) {
                steps[is_coarse] = size;
            }
        }
    }
    const uint64_t rows = (uint64_t) counter->n_rows, spikes = standard + salient_spikes;
    const spike_token_counter t = {
        .counter     = counter - table,
        .token       = token,
        .spikes      = spikes,
        .salient     = salient,
        .rate_spikes = rate,
        .adds        = rows*(standard + (uint64_t) (steps[0] + steps[1])),
        .shift_adds  = rows*salient_spikes,
        .bytes       = (uint64_t) n_blocks*sizeof(block_spka) + rows*sizeof(float) + (alone ? spikes*rows/2 : 0),
    };
    counter->tokens      += 1;
    counter->spikes      += t.spikes;
    counter->silent      += (uint64_t) counter->n_inputs - t.spikes;
    counter->salient     += t.salient;
    counter->rate_spikes += t.rate_spikes;
    counter->adds        += t.adds;
    counter->shift_adds  += t.shift_adds;
    counter->readouts    += rows;
    counter->bytes       += t.bytes;
    if (counting_tokens) {
        keep_token(&t);
    }
}
