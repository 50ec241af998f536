// The key of a rank, for vectors of any width. The including file has VECTORS (a function's target), LANES, count_below,
// keep_between and select_of_few.
#pragma once

// The key of a rank among n, a multiple of LANES, that lie in lower..upper, but for larger ones at the end: bit by bit, the
// largest value that at most rank keys lie below, as in the plain C encoder, until few keys are left that may be it.
VECTORS static int32_t select_rank(int32_t * keys, int64_t n, int64_t rank, int32_t lower, int32_t upper) {
    enum { BITS_BETWEEN_LOOKS = 4 };
    int bit = 31 - __builtin_clz((uint32_t) (lower ^ upper) | 1); // the first that the keys may differ in
    int32_t found = (int32_t) ((uint32_t) lower >> bit >> 1 << bit << 1);
    while (n > LANES && bit >= 0) {
        for (const int look = bit - BITS_BETWEEN_LOOKS; bit >= 0 && bit > look; bit--) {
            const int32_t trial = found | (int32_t) 1 << bit;
            found = count_below(keys, n, trial) <= rank ? trial : found;
        }
        rank -= count_below(keys, n, found);
        n = keep_between(keys, n, found, found | (int32_t) ((1u << (bit + 1)) - 1));
    }
    return n > LANES ? found : select_of_few(keys, rank); // more are alike
}
