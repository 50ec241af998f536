#include "spike-pack.h"

uint8_t spike_pack[256][16];

#if defined(__GNUC__) // as the kernels that need it
__attribute__((constructor)) static void fill_pack(void) {
    for (int set = 0; set < 256; set++) {
        int n = 0;
        for (int lane = 0; lane < 8; lane++) {
            if (set >> lane & 1) {
                spike_pack[set][n++] = (uint8_t) (2*lane);
                spike_pack[set][n++] = (uint8_t) (2*lane + 1);
            }
        }
    }
}
#endif
