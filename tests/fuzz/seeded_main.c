// TARGET SEED COUNT: a fuzz target on pseudo-random inputs of 0 to 1023 bytes, where there is no libFuzzer.
// TARGET FILE: on the inputs of a file of kept.py.
#include "fuzz.h"

#include <ctype.h>

static void run_exactly(const uint8_t * data, size_t size) {
    uint8_t * exact = malloc(size ? size : 1);
    if (size > 0) {
        memcpy(exact, data, size);
    }
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

static int replay(const char * path) {
    FILE * file = fopen(path, "r");
    if (!file) {
        perror(path);
        return 2;
    }
    static char line[1 << 20];
    static uint8_t data[sizeof(line)/2];
    long count = 0;
    for (; fgets(line, sizeof(line), file); count++) {
        size_t size = 0;
        for (const char * at = line; isxdigit((unsigned char) at[0]) && isxdigit((unsigned char) at[1]); at += 2) {
            const char digits[3] = { at[0], at[1], 0 };
            data[size++] = (uint8_t) strtoul(digits, NULL, 16);
        }
        run_exactly(data, size);
    }
    fclose(file);
    printf("inputs %ld\n", count);
    return 0;
}

int main(int argc, char ** argv) {
    if (argc == 2) {
        return replay(argv[1]);
    }
    if (argc != 3) {
        fprintf(stderr, "usage: %s SEED COUNT, or %s FILE\n", argv[0], argv[0]);
        return 2;
    }
    const uint64_t seed  = strtoull(argv[1], NULL, 10);
    const long     count = strtol(argv[2], NULL, 10);
    for (long i = 0; i < count; i++) {
        fuzz_input random = { NULL, 0, seed*0x9E3779B97F4A7C15u + (uint64_t) i*0xD1B54A32D192ED03u };
        const size_t size = (size_t) fuzz_below(&random, 1024);
        uint8_t data[1024];
        fuzz_fill(&random, data, size);
        // half of the bytes in runs, which random ones never are
        if (fuzz_byte(&random) & 1 && size > 0) {
            const size_t start = (size_t) fuzz_below(&random, (int64_t) size);
            memset(data + start, fuzz_byte(&random), (size - start)/2);
        }
        run_exactly(data, size);
    }
    printf("inputs %ld seed %llu\n", count, (unsigned long long) seed);
    return 0;
}
