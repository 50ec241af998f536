// What the fuzz targets share: an input as a source of bytes.
#pragma once

#include "../native/made_up.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

// Bytes of the input; when it ends, pseudo-random ones that depend on it. So a short input fills a large matrix.
typedef struct {
    const uint8_t * data;
    size_t          left;
    uint64_t        state;
} fuzz_input;

static inline fuzz_input fuzz_open(const uint8_t * data, size_t size) {
    fuzz_input input = { data, size, 0xCBF29CE484222325u };
    for (size_t i = 0; i < size; i++) {
        input.state = (input.state ^ data[i])*0x100000001B3u;
    }
    return input;
}

static inline void fuzz_fill(fuzz_input * input, void * to, size_t n) {
    uint8_t * bytes = (uint8_t *) to;
    const size_t given = input->left < n ? input->left : n;
    if (given > 0) {
        memcpy(bytes, input->data, given);
        input->data += given;
        input->left -= given;
    }
    for (size_t i = given; i < n; i += 8) { // splitmix64
        uint64_t z = input->state += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30)*0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27)*0x94D049BB133111EBu;
        z ^= z >> 31;
        memcpy(bytes + i, &z, n - i < 8 ? n - i : 8);
    }
}

static inline uint8_t fuzz_byte(fuzz_input * input) {
    uint8_t byte;
    fuzz_fill(input, &byte, 1);
    return byte;
}

static inline int64_t fuzz_below(fuzz_input * input, int64_t n) {
    return (fuzz_byte(input) | fuzz_byte(input) << 8) % n;
}

// A broken promise ends the program, as a finding of a sanitizer does.
static inline void fuzz_require(int holds, const char * promise) {
    if (!holds) {
        fprintf(stderr, "broken: %s\n", promise);
        abort();
    }
}
