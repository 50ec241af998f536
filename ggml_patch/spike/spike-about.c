// What this build is: read by spikequant_gguf/runtime.py before any model loads.
#include "spike.h"

#if !defined(SPIKEQUANT_PIN) || !defined(SPIKEQUANT_PATCH_ID)
#    error "build through `spikequant build`, which states the pin and the patch id"
#endif


int spikequant_abi(void) {
    return 1;
}

const char * spikequant_pin(void) {
    return SPIKEQUANT_PIN;
}

const char * spikequant_patch_id(void) {
    return SPIKEQUANT_PATCH_ID;
}
