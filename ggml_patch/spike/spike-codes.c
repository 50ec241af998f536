// Which vector instructions the encoder uses.
#include "spike-codes.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)

static const spike_vector_encoder * select_once(void) {
    const spike_vector_encoder * candidates[] = { spike_vector_encoder_avx512(), spike_vector_encoder_avx2() }; // fastest first
    enum { N = sizeof(candidates)/sizeof(candidates[0]) };
    const char * forced = getenv("SPIKEQUANT_FORCE_ISA");
    for (int i = 0; i < N; i++) {
        if (candidates[i] && (!forced || !*forced || strcmp(candidates[i]->name, forced) == 0)) {
            return candidates[i];
        }
    }
    return NULL;
}

const spike_vector_encoder * spike_select_encoder(void) {
    static const spike_vector_encoder * selected;
    static bool decided; // every thread would find the same
    if (!__atomic_load_n(&decided, __ATOMIC_ACQUIRE)) {
        __atomic_store_n(&selected, select_once(), __ATOMIC_RELAXED);
        __atomic_store_n(&decided, true, __ATOMIC_RELEASE);
    }
    return __atomic_load_n(&selected, __ATOMIC_RELAXED);
}

#else

const spike_vector_encoder * spike_select_encoder(void) {
    return NULL;
}

#endif
