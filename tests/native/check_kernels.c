// check_kernels NAME: the kernels NAME of this CPU give the integers of plain C, and of the dot product of stored rows.
// Prints what was compared and a digest of what the encoder gives, which is the same on every machine.
#include "spike/cpu/spike-kernels.h"
#include "spike/cpu/spike-potentials.h"

#include "made_up.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- products

typedef struct {
    int64_t       n_rows, n_inputs, n_matrices, n_tokens;
    enum salience salience;
    enum codes    codes;
    enum pattern  pattern;
    int64_t       coarse_share;
    bool          gathered; // lines of a tile copied together, as for many tokens, instead of read where they lie
} product_case;

// Potentials of a tile with codes counted from 8: [class][row].
static void tile_potentials(const spike_kernels * kernels, const spike_layout * layout, const uint8_t * packed, int64_t tile,
                            const spike_train * train, bool gathered, int32_t potential[SPIKE_CLASSES*SPIKE_TILE_ROWS]) {
    const int64_t          n_inputs = layout->n_inputs;
    const spike_tile_lines lines    = spike_lines_of_tile(layout, packed, tile);
    const bool             half     = spike_is_half_tile(layout, tile);
    const size_t      line_bytes    = half ? SPIKE_HALF_LINE : SPIKE_LINE_BYTES;
    uint32_t * scaled  = scaled_offsets(train, lines.stride);
    uint32_t * offsets = scaled_offsets(train, line_bytes);
    uint8_t  * copied  = allocate((size_t) (n_inputs + 1)*line_bytes);
    for (int64_t i = 0; i <= n_inputs; i++) {
        memcpy(copied + (size_t) i*line_bytes, lines.first + (size_t) i*lines.stride, line_bytes);
    }
    memset(potential, 0, SPIKE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        int32_t * own = potential + k*SPIKE_TILE_ROWS;
        for (int64_t c = 0; c < train->n_chunks; c++) {
            const spike_program * program = spike_train_program(train, k, c);
            const bool requests = kernels->integrate_ahead && !gathered; // a prefetch of the same lines changes nothing
            // with the neighbours on both sides, as far as the strip has any
            const int64_t before = tile > spike_start_of_strip(layout, tile), after = tile + 1 < spike_end_of_strip(layout, tile);
            // a run for every few places, and not one more
            const int64_t n_runs = SPIKE_AHEAD_FIRST + (before + 1 + after)*spike_program_places(train, k, c)/SPIKE_LIST_UNIT;
            const uint8_t ** runs = allocate((size_t) n_runs*sizeof(*runs));
            for (int64_t i = 0; i < n_runs; i++) {
                runs[i] = lines.first;
            }
            spike_ahead ahead = { runs, 2*SPIKE_LINE_BYTES, tile % 2 ? 4*SPIKE_LINE_BYTES : 0, SPIKE_AHEAD_FIRST << SPIKE_AHEAD_SHIFT, 1 << SPIKE_AHEAD_SHIFT };
            if (half) {
                kernels->integrate_half(gathered ? copied : lines.first, program, gathered ? offsets : scaled, own, requests ? &ahead : NULL);
            } else if (requests) {
                int32_t three[3*SPIKE_TILE_ROWS] = { 0 };
                kernels->integrate_ahead(lines.first - before*SPIKE_LINE_BYTES, before + 1 + after, program, scaled, three, SPIKE_TILE_ROWS, &ahead);
                for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
                    own[r] += three[before*SPIKE_TILE_ROWS + r];
                }
            } else {
                kernels->integrate(gathered ? copied : lines.first, program, gathered ? offsets : scaled, own);
            }
            free(runs);
        }
        int16_t sum[SPIKE_TILE_ROWS];
        kernels->add_salient(spike_salients_of_tile(layout, packed, tile, 0, 0), spike_train_values(train, n_inputs, k),
                             layout->n_blocks, sum, NULL);
        for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
            own[r] += 16*sum[r];
        }
    }
    free(scaled);
    free(offsets);
    free(copied);
}

// Whether a tile's potentials are those of the dot product, row by row.
static bool equals_dot_product(const int32_t * potential, const block_spk4 * rows, int64_t n_rows, const block_spka * token,
                               const spike_train * train, int64_t n_blocks) {
    for (int64_t r = 0; r < n_rows; r++) {
        int32_t fine, coarse;
        spike_potentials_of_row(rows + r*n_blocks, token, n_blocks, &fine, &coarse);
        const int32_t offset = (spike_header_of(rows + r*n_blocks) & SPK4_ZERO_POINT) - 8;
        if (fine != potential[r] - offset*train->sum[0] || coarse != potential[SPIKE_TILE_ROWS + r] - offset*train->sum[1]) {
            return false;
        }
    }
    return true;
}

static bool check_product(const spike_kernels * kernels, const product_case * c) {
    const spike_layout layout = spike_layout_of(c->n_inputs, c->n_rows);
    const size_t n_weight_blocks = (size_t) (c->n_rows*layout.n_blocks);
    block_spk4 * weights = allocate((size_t) c->n_matrices*n_weight_blocks*sizeof(block_spk4));
    uint8_t    * packed  = allocate((size_t) c->n_matrices*layout.size);
    bool right = true;
    for (int64_t m = 0; m < c->n_matrices; m++) {
        fill_weights(weights + (size_t) m*n_weight_blocks, c->n_rows, layout.n_blocks, c->salience, c->codes);
        spike_pack_matrix(&layout, weights + (size_t) m*n_weight_blocks, packed + (size_t) m*layout.size);
    }
    for (int64_t t = 0; t < c->n_tokens; t++) {
        block_spka * token = allocate((size_t) layout.n_blocks*sizeof(block_spka));
        fill_token(token, c->n_inputs, c->pattern, c->coarse_share, 3);
        spike_train * train = make_train(token, c->n_inputs, t % 2 ? 2 : SPIKE_CHUNK_BLOCKS);
        for (int64_t m = 0; m < c->n_matrices; m++) {
            const uint8_t * matrix = packed + (size_t) m*layout.size;
            for (int64_t tile = 0; tile < layout.n_tiles; tile++) {
                int32_t found[SPIKE_CLASSES*SPIKE_TILE_ROWS], expected[SPIKE_CLASSES*SPIKE_TILE_ROWS];
                tile_potentials(kernels, &layout, matrix, tile, train, c->gathered, found);
                tile_potentials(&spike_kernels_plain_c, &layout, matrix, tile, train, false, expected);
                right = right && memcmp(found, expected, sizeof(found)) == 0;
                if (tile == layout.n_tiles - 1) { // the slow sum for one tile, the most likely to be wrong
                    const block_spk4 * rows = weights + (size_t) m*n_weight_blocks + tile*SPIKE_TILE_ROWS*layout.n_blocks;
                    right = right && equals_dot_product(found, rows, c->n_rows - tile*SPIKE_TILE_ROWS, token, train, layout.n_blocks);
                }
            }
        }
        free(train);
        free(token);
    }
    free(packed);
    free(weights);
    if (!right) {
        fprintf(stderr, "%s differs: %d rows, %d inputs, salience %d, codes %d, pattern %d, coarse 1/%d, gathered %d\n", kernels->name,
                (int) c->n_rows, (int) c->n_inputs, c->salience, c->codes, c->pattern, (int) c->coarse_share, c->gathered);
    }
    return right;
}

static int check_products(const spike_kernels * kernels, int n_cases) {
    static const int64_t EDGES[]  = { 1, 2, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 383, 384, 385 };
    static const int64_t SHARES[] = { 0, 30, 2, 1 };
    // strips of 16 tiles and their edges, chunks of 4032 inputs and theirs: every lane at its limit
    static const int64_t LARGE[][2] = { { 2047, 64 }, { 2048, 64 }, { 2049, 128 }, { 2177, 64 }, { 128, 3968 }, { 129, 4032 },
                                        { 1, 4096 }, { 65, 8064 }, { 2, 8128 }, { 127, 12160 } };
    enum { N_LARGE = sizeof(LARGE)/sizeof(LARGE[0]) };
    int wrong = 0;
    random_state = 1;
    for (int i = 0; i < n_cases; i++) {
        product_case c = {
            EDGES[i % 15], QK_SPK*(1 + random_below(i % 4 == 0 ? 24 : 5)), 1 + random_below(3), 1 + random_below(3),
            (enum salience) (i % N_SALIENCES), (enum codes) (i/3 % N_CODES), (enum pattern) (i % N_PATTERNS), SHARES[i/2 % 4], (i & 1) != 0,
        };
        wrong += !check_product(kernels, &c);
    }
    for (int i = 0; i < N_LARGE*N_PATTERNS; i++) {
        product_case c = {
            LARGE[i % N_LARGE][0], LARGE[i % N_LARGE][1], 1, 1,
            (enum salience) (i % N_SALIENCES), (enum codes) (i/2 % N_CODES), (enum pattern) (i/N_LARGE), SHARES[i % 4], i/3 % 2 != 0,
        };
        wrong += !check_product(kernels, &c);
    }
    printf("products %d wrong %d\n", n_cases + N_LARGE*N_PATTERNS, wrong);
    return wrong;
}

// All bytes as salient weights, the invalid ones too, and sums at the limits of 16 bits.
static int check_salients(const spike_kernels * kernels) {
    static const int64_t BLOCKS[] = { 1, 2, 3, 4, 5, 7, 64, SPIKE_MAX_TILED_INPUTS/QK_SPK };
    enum { N_SIZES = sizeof(BLOCKS)/sizeof(BLOCKS[0]), KINDS = 4 };
    int wrong = 0;
    random_state = 2;
    for (int i = 0; i < N_SIZES*KINDS; i++) {
        const int64_t n_blocks = BLOCKS[i % N_SIZES];
        const int     kind     = i/N_SIZES; // random, all add -16, all subtract -16, all add 15
        const int64_t n        = n_blocks*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
        uint8_t * salients = allocate((size_t) n);
        int8_t  * values   = allocate((size_t) (n_blocks*QK_SPK));
        for (int64_t j = 0; j < n; j++) {
            const uint8_t any = (uint8_t) next_random();
            salients[j] = kind == 0 ? any : (uint8_t) ((any & 63) | (kind == 2 ? 2 : 1) << 6);
        }
        for (int64_t j = 0; j < n_blocks*QK_SPK; j++) {
            values[j] = (int8_t) (kind == 0 ? random_below(32) - 16 : kind == 3 ? 15 : -16);
        }
        int16_t found[SPIKE_TILE_ROWS], expected[SPIKE_TILE_ROWS];
        kernels->add_salient(salients, values, n_blocks, found, i % 2 ? salients : NULL); // what is requested changes nothing
        spike_kernels_plain_c.add_salient(salients, values, n_blocks, expected, NULL);
        wrong += memcmp(found, expected, sizeof(found)) != 0;
        free(salients);
        free(values);
    }
    printf("salients %d wrong %d\n", N_SIZES*KINDS, wrong);
    return wrong;
}

// Lists of chunks of all sizes: with all magnitudes, silent ones, and all the same.
static int check_lists(const spike_kernels * kernels) {
    enum { KINDS = 5, MOST = SPIKE_CHUNK_BLOCKS*QK_SPK, PLACES = MOST + 2*SPIKE_MAX_MAGNITUDE*(SPIKE_LIST_UNIT - 1) + SPIKE_LIST_SLACK };
    int wrong = 0;
    random_state = 4;
    for (int i = 0; i < KINDS*SPIKE_CHUNK_BLOCKS; i++) {
        const int64_t n = (1 + i/KINDS)*QK_SPK, first = (int64_t) random_below(SPIKE_MAX_TILED_INPUTS/QK_SPK - SPIKE_CHUNK_BLOCKS)*QK_SPK;
        const int     kind = i % KINDS, same = (int) random_below(32) - 16;
        int8_t * values = allocate((size_t) n);
        for (int64_t j = 0; j < n; j++) {
            values[j] = (int8_t) (kind == 0 ? random_below(32) - 16 : kind == 1 ? random_below(7) - 3 : kind == 2 ? same : kind == 3 ? 0
                                                                                                : random_below(40) ? 0 : random_below(32) - 16);
        }
        void (* const both[2])(const int8_t *, int64_t, int64_t, uint16_t, uint16_t *, uint16_t *, spike_lists *) = { kernels->list_spikes, spike_list_spikes };
        uint16_t  * lines[2];
        uint16_t  * active[2];
        spike_lists lists[2];
        for (int k = 0; k < 2; k++) {
            lines[k]  = allocate(PLACES*sizeof(uint16_t));
            active[k] = allocate((MOST + SPIKE_LIST_SLACK)*sizeof(uint16_t));
            both[k](values, n, first, SPIKE_MAX_TILED_INPUTS, lines[k], active[k], &lists[k]);
        }
        wrong += lists[0].n_places != lists[1].n_places || lists[0].n_active != lists[1].n_active
            || memcmp(lists[0].count + 2, lists[1].count + 2, (SPIKE_BUCKETS - 2)*sizeof(uint16_t)) != 0
            || memcmp(lines[0], lines[1], lists[1].n_places*sizeof(uint16_t)) != 0
            || memcmp(active[0], active[1], lists[1].n_active*sizeof(uint16_t)) != 0;
        for (int k = 0; k < 2; k++) {
            free(lines[k]);
            free(active[k]);
        }
        free(values);
    }
    printf("lists %d wrong %d\n", KINDS*SPIKE_CHUNK_BLOCKS, wrong);
    return wrong;
}

// All headers, all pairs of neighbouring salient weights beside any others, and four of any kind: the check without branches
// finds what the other one finds.
static int check_soundness(void) {
    enum { ALL = 1 << 16 };
    int wrong = 0, valid = 0;
    block_spk4 block;
    memset(&block, 0, sizeof(block));
    for (int i = 0; i < 6*ALL; i++) {
        const uint16_t bits = (uint16_t) i;
        for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) { // mostly as a quantizer leaves them
            const int used = slot <= (int) random_below(SPIKE_SALIENT_SLOTS + 1);
            block.salient[slot] = random_below(16) ? (uint8_t) (used ? (16*slot + (int) random_below(16)) | (1 + (int) random_below(2)) << 6 : 0)
                                                   : (uint8_t) next_random();
        }
        if (i < 4*ALL) {
            memcpy(block.salient + (i < ALL ? 0 : i/ALL - 1), &bits, sizeof(bits));
        }
        for (int first = 0; first < 2; first++) {
            const bool sound = spike_check_weights(&block, first) == NULL;
            wrong += spike_is_sound(&block, first) != sound;
            valid += sound;
        }
    }
    printf("blocks %d valid %d wrong %d\n", 2*6*ALL, valid, wrong);
    return wrong + (valid == 0);
}

// ---- encoder

static uint64_t digest_of(uint64_t digest, const void * data, size_t size) { // FNV-1a
    for (size_t i = 0; i < size; i++) {
        digest = (digest ^ ((const uint8_t *) data)[i])*0x100000001B3u;
    }
    return digest;
}

static float random_float(int kind) {
    float sum = 0.0f;
    for (int i = 0; i < 12; i++) {
        sum += (float) (next_random() >> 8)*(1.0f/16777216.0f);
    }
    const float normal = sum - 6.0f;
    uint32_t bits = next_random();
    float any;
    memcpy(&any, &bits, sizeof(any));
    switch (kind) {
        case 0:  return normal;
        case 1:  return random_below(50) ? normal : normal*40.0f; // outliers
        case 2:  return (float) random_below(5) - 2.0f;           // ties
        case 3:  return normal*1e-38f;                            // subnormal
        case 4:  return normal*1e37f;
        case 5:  return random_below(4) ? 0.0f : normal;
        case 6:  return 0.0f;
        default: return any; // any bits: NaN and infinity, too
    }
}

// Values halfway between integers, in steps of 1, on both sides of the ends of every standard range and of five bits.
static int check_halfway(void) {
    enum { N = 2*QK_SPK };
    int wrong = 0;
    for (int zero_point = 0; zero_point < 16; zero_point++) {
        const spike_encoder_params params = { 7.5f, 0.5f, zero_point, false };
        float      x[N], scratch[2*N];
        int8_t     values[2*N], alone[2*N];
        block_spka blocks[N/QK_SPK], header;
        for (int i = 0; i < N; i++) {
            x[i] = i < N/2 + 1 ? 1.0f : 0.5f*(float) (i - 98); // so that the median is 1; -16.5 to 14.5
        }
        x[0] = 15.5f;
        x[1] = 16.5f;
        spike_encode_token(x, blocks, N, &params, scratch, values);
        spike_encode_values(x, N, &params, scratch, alone, &header);
        const int hi = 15 - zero_point;
        const int8_t at_end = values[98 + 2*hi + 1]; // hi + 1/2, at most 14.5
        wrong += blocks[0].threshold != 1.0f || memcmp(alone, values, sizeof(values)) != 0;
        wrong += hi < 15 && at_end != hi;
    }
    return wrong;
}

// Tokens of all kinds and settings. Also whether the values given along with the blocks are theirs.
static int check_encoder(void) {
    static const int64_t BLOCKS[] = { 1, 2, 9, 24, 64 };
    uint64_t digest = 0xCBF29CE484222325u;
    int wrong = 0, n_tokens = 0;
    random_state = 3;
    for (int kind = 0; kind < 8; kind++) {
        for (int size = 0; size < 5; size++) {
            for (int setting = 0; setting < 4; setting++, n_tokens++) {
                const int64_t n_blocks = BLOCKS[size], n = n_blocks*QK_SPK;
                const spike_encoder_params params = { setting & 1 ? 2.3f : 1.7f, setting & 2 ? 0.5f : 0.9f, 8 - (setting == 3), setting != 1 };
                float      * x       = allocate((size_t) n*sizeof(float));
                float      * scratch = allocate(2*(size_t) n*sizeof(float));
                int8_t     * values  = allocate(2*(size_t) n);
                block_spka * blocks  = allocate((size_t) n_blocks*sizeof(block_spka));
                for (int64_t i = 0; i < n; i++) {
                    x[i] = random_float(kind);
                }
                spike_encode_token(x, blocks, n, &params, scratch, values);
                digest = digest_of(digest, blocks, (size_t) n_blocks*sizeof(block_spka));
                digest = digest_of(digest, values, 2*(size_t) n);
                int8_t * alone = allocate(2*(size_t) n);
                block_spka header;
                spike_encode_values(x, n, &params, scratch, alone, &header);
                const size_t header_size = offsetof(block_spka, salient_mask);
                wrong += memcmp(alone, values, 2*(size_t) n) != 0 || memcmp(&header, blocks, header_size) != 0;
                free(alone);
                for (int64_t b = 0; b < n_blocks; b++) {
                    int8_t fine[QK_SPK], coarse[QK_SPK];
                    spike_activation_values(blocks + b, fine, coarse);
                    wrong += memcmp(fine, values + b*QK_SPK, QK_SPK) != 0 || memcmp(coarse, values + n + b*QK_SPK, QK_SPK) != 0;
                }
                free(x);
                free(scratch);
                free(values);
                free(blocks);
            }
        }
    }
    wrong += check_halfway();
    printf("encoder %d wrong %d digest %016llx\n", n_tokens, wrong, (unsigned long long) digest);
    return wrong;
}

// Strips follow each other, none is too wide, and where their number is even two threads, each with half of the tiles, share none.
static int check_strips(const spike_kernels * kernels) {
    enum { MOST_ROWS = 12000, N_INPUTS = 64 };
    int wrong = 0;
    for (int64_t n_rows = 1; n_rows <= MOST_ROWS; n_rows++) {
        const spike_layout layout = spike_layout_of(N_INPUTS, n_rows);
        const int64_t of_second = layout.n_tiles/2; // the second thread's first tile
        bool right = true;
        for (int64_t tile = 0, start = 0; tile < layout.n_tiles; tile++) {
            const int64_t end = spike_end_of_strip(&layout, tile);
            const spike_tile_lines lines = spike_lines_of_tile(&layout, NULL, tile);
            const size_t width = spike_is_half_tile(&layout, tile) ? SPIKE_HALF_LINE : (size_t) (end - start)*SPIKE_LINE_BYTES;
            right = right && spike_start_of_strip(&layout, tile) == start && end > tile && end - start <= SPIKE_STRIP_TILES && lines.stride == width
                && (size_t) lines.first == (size_t) (start*(N_INPUTS + 1) + tile - start)*SPIKE_LINE_BYTES;
            right = right && (!kernels->even_strips || end <= of_second || start >= of_second);
            start = tile + 1 == end ? end : start;
        }
        wrong += !right;
    }
    printf("strips of %d matrices wrong %d\n", MOST_ROWS, wrong);
    return wrong;
}

int main(int argc, char ** argv) {
    const spike_kernels * kernels = spike_select_kernels();
    if (argc != 2 || strcmp(argv[1], kernels->name) != 0) {
        fprintf(stderr, "usage: SPIKEQUANT_FORCE_ISA=NAME check_kernels NAME (this CPU runs %s)\n", kernels->name);
        return 2;
    }
    int wrong = check_products(kernels, 600);
    wrong += check_salients(kernels);
    wrong += check_lists(kernels);
    wrong += check_soundness();
    wrong += check_encoder();
    wrong += check_strips(kernels);
    return wrong != 0;
}
