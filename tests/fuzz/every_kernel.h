// All kernels that this CPU runs, plain C first.
#pragma once

#include "spike/cpu/spike-kernels.h"

enum { MAX_KERNELS = 3 };

static inline int every_kernel(const spike_kernels * found[MAX_KERNELS]) {
    int n = 0;
    found[n++] = &spike_kernels_plain_c;
#if defined(SPIKE_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        found[n++] = &spike_kernels_avx2;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
            && __builtin_cpu_supports("avx512vbmi")) {
        found[n++] = &spike_kernels_avx512;
    }
#elif defined(SPIKE_AARCH64)
    found[n++] = &spike_kernels_neon;
#endif
    return n;
}
