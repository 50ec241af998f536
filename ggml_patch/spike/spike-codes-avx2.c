// Parts of the encoder with AVX2: 8 values at a time, with the results of plain C.
#include "spike-codes.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#define VECTORS __attribute__((target("avx2,fma,popcnt")))

enum { LANES = 8 };

// For every set of eight lanes, their numbers: the shuffle that moves them together.
static uint8_t PACK[1 << LANES][LANES];

// Runs when the library is loaded, on CPUs without AVX, too.
__attribute__((constructor)) static void fill_pack(void) {
    for (int set = 0; set < 1 << LANES; set++) {
        int n = 0;
        for (int lane = 0; lane < LANES; lane++) {
            if (set >> lane & 1) {
                PACK[set][n++] = (uint8_t) lane;
            }
        }
    }
}

VECTORS static inline __m256 magnitudes_of(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

VECTORS static inline __m256i keys_of(__m256 x) {
    return _mm256_castps_si256(magnitudes_of(x));
}

// ---- rotation

// A stage within vectors: each value and its partner, whose order `swapped` gives. The upper of the two changes its sign, as in
// spike-rotation.c. A product with 1 or -1 is exact, so that the multiply-add rounds as an addition does.
VECTORS static inline __m256 add_partner(__m256 v, __m256 swapped, __m256 signs) {
    return _mm256_fmadd_ps(v, signs, swapped);
}

VECTORS static inline void rotate_block(__m256 v[8]) {
    const __m256 odd   = _mm256_setr_ps(1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f);
    const __m256 pairs = _mm256_setr_ps(1.0f, 1.0f, -1.0f, -1.0f, 1.0f, 1.0f, -1.0f, -1.0f);
    const __m256 half  = _mm256_setr_ps(1.0f, 1.0f, 1.0f, 1.0f, -1.0f, -1.0f, -1.0f, -1.0f);
    for (int i = 0; i < 8; i++) {
        v[i] = add_partner(v[i], _mm256_permute_ps(v[i], 0xB1), odd);
        v[i] = add_partner(v[i], _mm256_permute_ps(v[i], 0x4E), pairs);
        v[i] = add_partner(v[i], _mm256_permute2f128_ps(v[i], v[i], 0x01), half);
    }
    for (int h = 1; h < 8; h *= 2) {
        for (int i = 0; i < 8; i++) {
            if (!(i & h)) {
                const __m256 a = v[i], b = v[i + h];
                v[i]     = _mm256_add_ps(a, b);
                v[i + h] = _mm256_sub_ps(a, b);
            }
        }
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm256_mul_ps(v[i], _mm256_set1_ps(0.125f));
    }
}

VECTORS static inline int32_t largest_of(__m256i x) {
    int32_t lanes[LANES], largest = 0;
    _mm256_storeu_si256((__m256i *) lanes, x);
    for (int i = 0; i < LANES; i++) {
        largest = lanes[i] > largest ? lanes[i] : largest;
    }
    return largest;
}

VECTORS static spike_magnitudes rotate_token(const float * x, float * v, int64_t n, bool rotated) {
    __m256i top = _mm256_setzero_si256();
    __m256  sum = _mm256_setzero_ps();
    for (int64_t b = 0; b < n; b += 64) {
        __m256 y[8];
        for (int i = 0; i < 8; i++) {
            y[i] = _mm256_loadu_ps(x + b + LANES*i);
        }
        if (rotated) {
            rotate_block(y);
        }
        for (int i = 0; i < 8; i++) {
            _mm256_storeu_ps(v + b + LANES*i, y[i]);
            top = _mm256_max_epi32(top, keys_of(y[i]));
            sum = _mm256_add_ps(sum, magnitudes_of(y[i]));
        }
    }
    float lanes[LANES], total = 0.0f;
    _mm256_storeu_ps(lanes, sum);
    for (int i = 0; i < LANES; i++) {
        total += lanes[i];
    }
    const spike_magnitudes found = { largest_of(top), total/(float) n };
    return found;
}

// ---- median

VECTORS static inline unsigned set_of(__m256i mask) {
    return (unsigned) _mm256_movemask_ps(_mm256_castsi256_ps(mask));
}

// Puts the keys of a set of lanes at the front of a list. Returns how many; a whole vector is overwritten.
VECTORS static inline int64_t keep(__m256i key, unsigned set, int32_t * list) {
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) PACK[set]));
    _mm256_storeu_si256((__m256i *) list, _mm256_permutevar8x32_epi32(key, order));
    return __builtin_popcount(set);
}

// Fills the last vector up with keys larger than all others. Returns the new number.
static inline int64_t fill_up(int32_t * keys, int64_t n) {
    while (n % LANES) {
        keys[n++] = INT32_MAX;
    }
    return n;
}

// How many of n keys, a multiple of 8, lie below a bound.
VECTORS static inline int64_t count_below(const int32_t * keys, int64_t n, int32_t bound) {
    int64_t below = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        below += __builtin_popcount(set_of(_mm256_cmpgt_epi32(_mm256_set1_epi32(bound), _mm256_loadu_si256((const __m256i *) (keys + i)))));
    }
    return below;
}

// Moves the keys in lower..upper to the front, in order, and fills the last vector up. Returns how many there are then.
VECTORS static inline int64_t keep_between(int32_t * keys, int64_t n, int32_t lower, int32_t upper) {
    const __m256i before = _mm256_set1_epi32(lower - 1), after = _mm256_set1_epi32(upper);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const __m256i key = _mm256_loadu_si256((const __m256i *) (keys + i));
        kept += keep(key, set_of(_mm256_andnot_si256(_mm256_cmpgt_epi32(key, after), _mm256_cmpgt_epi32(key, before))), keys + kept);
    }
    return fill_up(keys, kept);
}

// The key of a rank among LANES, of which INT32_MAX are none: the largest that at most rank keys are smaller than.
VECTORS static inline int32_t select_of_few(const int32_t keys[LANES], int64_t rank) {
    const __m256i key  = _mm256_loadu_si256((const __m256i *) keys);
    const __m256i next = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0);
    __m256i others = key, smaller = _mm256_setzero_si256();
    for (int k = 1; k < LANES; k++) {
        others  = _mm256_permutevar8x32_epi32(others, next);
        smaller = _mm256_sub_epi32(smaller, _mm256_cmpgt_epi32(key, others));
    }
    const __m256i fitting = _mm256_cmpgt_epi32(_mm256_set1_epi32((int) rank + 1), smaller);
    return largest_of(_mm256_and_si256(fitting, key));
}

#include "spike-codes-rank.h"

VECTORS static int32_t median_of_magnitudes(const float * v, int64_t n, float mean, int32_t * keys) {
    const float bounds[2] = { 0.70f*mean, 0.98f*mean }; // of normal values the median of magnitudes is 0.845 of their mean
    int32_t lower, upper;
    memcpy(&lower, &bounds[0], sizeof(lower));
    memcpy(&upper, &bounds[1], sizeof(upper));
    int64_t below = 0, between = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const __m256i  key  = keys_of(_mm256_loadu_ps(v + i));
        const unsigned low  = set_of(_mm256_cmpgt_epi32(_mm256_set1_epi32(lower), key));
        const unsigned both = set_of(_mm256_cmpgt_epi32(_mm256_set1_epi32(upper), key));
        between += keep(key, both & ~low, keys + between);
        below   += __builtin_popcount(low);
    }
    const int64_t rank = n/2;
    if (below > rank || below + between <= rank) {
        return -1;
    }
    return select_rank(keys, fill_up(keys, between), rank - below, lower, upper - 1);
}

// ---- codes

VECTORS static bool code_values(const float * v, int64_t n, const spike_coding * how, int8_t * fine, int8_t * coarse) {
    const spike_coding copy = *how, * coding = &copy; // not what the results could overlap
    const spike_halfway halfway = spike_halfway_of(coding);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing works within halves
    bool any_coarse = false;
    for (int64_t b = 0; b < n; b += 4*LANES) {
        __m256i q[4];
        unsigned outside = 0;
        for (int k = 0; k < 4; k++) {
            const __m256  u     = _mm256_mul_ps(_mm256_loadu_ps(v + b + LANES*k), _mm256_set1_ps(coding->inverse));
            const __m256  heard = _mm256_cmp_ps(magnitudes_of(u), _mm256_set1_ps(coding->silence), _CMP_NLT_UQ);
            const __m256  tied  = _mm256_cmp_ps(u, _mm256_set1_ps(halfway.value), _CMP_EQ_OQ);
            const __m256i near  = _mm256_blendv_epi8(_mm256_cvtps_epi32(u), _mm256_set1_epi32(halfway.code), _mm256_castps_si256(tied));
            q[k] = _mm256_and_si256(near, _mm256_castps_si256(heard));
            const __m256i beyond = _mm256_cmpgt_epi32(_mm256_xor_si256(q[k], _mm256_srai_epi32(q[k], 31)), _mm256_set1_epi32(15)); // -16..15
            outside |= set_of(beyond) << LANES*k;
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        _mm256_storeu_si256((__m256i *) (fine + b),   _mm256_permutevar8x32_epi32(bytes, order));
        _mm256_storeu_si256((__m256i *) (coarse + b), _mm256_setzero_si256());
        for (; outside; outside &= outside - 1) { // few
            const int64_t i = b + __builtin_ctz(outside);
            any_coarse |= spike_code_beyond(v[i]*coding->inverse, coding, fine + i, coarse + i);
        }
    }
    return any_coarse;
}

static const spike_vector_encoder AVX2 = { "avx2", rotate_token, median_of_magnitudes, code_values };

const spike_vector_encoder * spike_vector_encoder_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") ? &AVX2 : NULL;
}

#else

const spike_vector_encoder * spike_vector_encoder_avx2(void) {
    return NULL;
}

#endif
