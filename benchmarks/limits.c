// What memory and adders can do at most, for limits.py: one thread's share of the work.
#include <stddef.h>
#include <stdint.h>

// As wide as the CPU's own vectors: the compiler takes wider ones apart in memory, which would be the limit then.
#if defined(__AVX512BW__)
enum { LANES = 64 };
#elif defined(__AVX2__)
enum { LANES = 32 };
#else
enum { LANES = 16 };
#endif
enum { CHAINS = 8 };

typedef uint8_t bytes __attribute__((vector_size(LANES)));

// Reads and adds up `size` bytes, a multiple of LANES*CHAINS, `repeats` times. In memory this is the read bandwidth; in the
// first-level cache the throughput of byte additions that load their operand.
uint8_t add_bytes(const uint8_t * data, size_t size, size_t repeats) {
    bytes sum[CHAINS] = { { 0 } };
    for (size_t r = 0; r < repeats; r++) {
        for (size_t i = 0; i < size; i += LANES*CHAINS) {
            for (int c = 0; c < CHAINS; c++) {
                sum[c] += *(const bytes *) (data + i + (size_t) c*LANES);
            }
        }
        __asm__ volatile("" : : : "memory"); // every repetition reads again
    }
    for (int c = 1; c < CHAINS; c++) {
        sum[0] += sum[c];
    }
    return sum[0][0];
}
