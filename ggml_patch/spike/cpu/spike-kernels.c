#include "spike-kernels.h"
#include "spike-cpu.h"

#include "ggml-impl.h"

#include <stdlib.h>
#include <string.h>

#if defined(SPIKE_X86)
static bool runs_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2");
}

static bool runs_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

static bool runs_anywhere(void) {
    return true;
}

static const struct {
    const spike_kernels * kernels;
    bool (*runs)(void);
} CANDIDATES[] = { // fastest first
#if defined(SPIKE_X86)
    { &spike_kernels_avx512, runs_avx512 },
    { &spike_kernels_avx2, runs_avx2 },
#elif defined(SPIKE_AARCH64)
    { &spike_kernels_neon, runs_anywhere },
#endif
    { &spike_kernels_plain_c, runs_anywhere },
};
enum { N_CANDIDATES = sizeof(CANDIDATES)/sizeof(CANDIDATES[0]) };

static const spike_kernels * select_once(void) {
    const char * forced = getenv("SPIKEQUANT_FORCE_ISA");
    for (int i = 0; forced && *forced && i < N_CANDIDATES; i++) {
        if (strcmp(CANDIDATES[i].kernels->name, forced) == 0 && CANDIDATES[i].runs()) {
            return CANDIDATES[i].kernels;
        }
    }
    if (forced && *forced) {
        GGML_LOG_WARN("%s: this machine runs no kernel named '%s'\n", __func__, forced);
    }
    for (int i = 0; i < N_CANDIDATES; i++) {
        if (CANDIDATES[i].runs()) {
            return CANDIDATES[i].kernels;
        }
    }
    return &spike_kernels_plain_c;
}

const spike_kernels * spike_select_kernels(void) {
    static const spike_kernels * selected; // every thread would find the same
    if (!selected) {
        selected = select_once();
    }
    return selected;
}

const char * spikequant_kernel(void) {
    return spike_select_kernels()->name;
}

static void add_salient_class(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const int8_t * values, int shift, const uint8_t * next_tile,
                              int32_t * potential) {
    int16_t sum[SPIKE_TILE_ROWS];
    spike_select_kernels()->add_salient(salients, values, n_blocks, sum, next_tile);
    for (int64_t r = 0; r < n_rows; r++) {
        potential[r] = (int32_t) ((uint32_t) potential[r] + ((uint32_t) (16*sum[r]) << shift)); // may wrap on its way
    }
}

static bool has_coarse(const spike_salient_token * token, int64_t block) {
    return token->coarse_blocks[block/64] >> block % 64 & 1;
}

void spike_add_salient_token(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const spike_salient_token * token, const uint8_t * next_tile) {
    if (token->fine) {
        add_salient_class(salients, n_rows, n_blocks, token->fine, 0, next_tile, token->potential);
    }
    for (int64_t first = 0, end; token->coarse && first < n_blocks; first = end) { // one run of blocks with coarse values after the other
        for (end = first; end < n_blocks && has_coarse(token, end); end++) {}
        if (end == first) {
            end++;
            continue;
        }
        add_salient_class(salients + first*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS, n_rows, end - first, token->coarse + first*QK_SPK, token->shift,
                          NULL, token->potential);
    }
}

void spike_add_salient_tokens(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const spike_salient_token * tokens, int64_t n_tokens) {
    for (int64_t t = 0; t < n_tokens; t++) {
        spike_add_salient_token(salients, n_rows, n_blocks, tokens + t, NULL);
    }
}
