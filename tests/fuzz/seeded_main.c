// TARGET SEED COUNT: a fuzz target on pseudo-random inputs of 0 to 1023 bytes, where there is no libFuzzer.
#include "fuzz.h"

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s SEED COUNT\n", argv[0]);
        return 2;
    }
    const uint64_t seed  = strtoull(argv[1], NULL, 10);
    const long     count = strtol(argv[2], NULL, 10);
    for (long i = 0; i < count; i++) {
        fuzz_input random = { NULL, 0, seed*0x9E3779B97F4A7C15u + (uint64_t) i*0xD1B54A32D192ED03u };
        const size_t size = (size_t) fuzz_below(&random, 1024);
        uint8_t * data = malloc(size + 1);
        fuzz_fill(&random, data, size);
        // half of the bytes in runs, which random ones never are
        if (fuzz_byte(&random) & 1 && size > 0) {
            const size_t start = (size_t) fuzz_below(&random, (int64_t) size);
            memset(data + start, fuzz_byte(&random), (size - start)/2);
        }
        uint8_t * exact = malloc(size ? size : 1);
        memcpy(exact, data, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
        free(data);
    }
    printf("inputs %ld seed %llu\n", count, (unsigned long long) seed);
    return 0;
}
