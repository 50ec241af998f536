// check_prompts NAME: the kernels NAME for many tokens give the integers of plain C, and of the dot product of stored rows.
// Prints what was compared.
#include "spike/cpu/spike-kernels.h"
#include "spike/cpu/spike-potentials.h"
#include "spike/cpu/spike-train.h"

#include "made_up.h"

static const spike_prompt_kernels * kernels, * const plain = &spike_prompt_kernels_plain_c;

// ---- programs

typedef struct {
    int64_t       n_rows, n_inputs, n_tokens;
    enum codes    codes;
    enum pattern  pattern;
    int64_t       coarse_share;
    int           shift; // of coarse values
    int64_t       chunk_blocks;
} prompt_case;

// Whether potentials are those of the dot product, row by row; the made-up weights have no salient ones here.
static bool equals_dot_product(const int32_t * potential, const block_spk4 * rows, int64_t n_rows, const block_spka * token,
                               const spike_schedule * schedule, int64_t n_blocks) {
    for (int64_t r = 0; r < n_rows; r++) {
        int32_t fine, coarse;
        spike_potentials_of_row(rows + r*n_blocks, token, n_blocks, &fine, &coarse);
        const int64_t offset = (spike_header_of(rows + r*n_blocks) & SPK4_ZERO_POINT) - 8;
        const int64_t unit   = (int64_t) 1 << schedule->shift;
        const int64_t sum[2] = { offset*schedule->sum[0], offset*schedule->sum[1] };
        if (schedule->merged) {
            // in 32 bits, where the kernels wrap; the true sum fits them
            const int64_t expected = fine + unit*coarse;
            const int32_t found    = (int32_t) ((uint32_t) potential[r] - (uint32_t) (sum[0] + unit*sum[1]));
            if (expected != found || (float) found != (float) fine + (float) coarse*(float) unit) {
                return false;
            }
        } else if (fine != potential[r] - sum[0] || coarse != potential[SPIKE_TILE_ROWS + r] - sum[1]) {
            return false;
        }
    }
    return true;
}

static int n_merged, n_apart;

static bool check_prompt(const prompt_case * c) {
    const spike_layout layout = spike_layout_of(c->n_inputs, c->n_rows);
    block_spk4 * weights = allocate((size_t) (c->n_rows*layout.n_blocks)*sizeof(block_spk4));
    uint8_t    * packed  = allocate(layout.size);
    fill_weights(weights, c->n_rows, layout.n_blocks, NO_SALIENT, c->codes);
    spike_pack_matrix(&layout, weights, packed);
    bool right = true;
    for (int64_t t = 0; t < c->n_tokens; t++) {
        block_spka * token = allocate((size_t) layout.n_blocks*sizeof(block_spka));
        fill_token(token, c->n_inputs, c->pattern, c->coarse_share, c->shift);
        spike_schedule * schedule = make_schedule(token, c->n_inputs, c->chunk_blocks);
        n_merged += schedule->merged;
        n_apart  += !schedule->merged;
        for (int64_t tile = 0; tile < layout.n_tiles; tile++) {
            const int64_t row0 = tile*SPIKE_TILE_ROWS, left = c->n_rows - row0;
            int32_t found[SPIKE_SCHEDULE_CLASSES*SPIKE_TILE_ROWS], expected[SPIKE_SCHEDULE_CLASSES*SPIKE_TILE_ROWS];
            schedule_potentials(kernels, &layout, packed, tile, schedule, found);
            schedule_potentials(plain, &layout, packed, tile, schedule, expected);
            right = right && memcmp(found, expected, sizeof(found)) == 0
                && equals_dot_product(found, weights + row0*layout.n_blocks, left < SPIKE_TILE_ROWS ? left : SPIKE_TILE_ROWS, token, schedule,
                                      layout.n_blocks);
        }
        free(schedule);
        free(token);
    }
    free(packed);
    free(weights);
    if (!right) {
        fprintf(stderr, "differs: %d rows, %d inputs, codes %d, pattern %d, coarse 1/%d at 2^%d, %d blocks in a chunk\n", (int) c->n_rows,
                (int) c->n_inputs, c->codes, c->pattern, (int) c->coarse_share, c->shift, (int) c->chunk_blocks);
    }
    return right;
}

static int check_prompts(int n_cases) {
    static const int64_t EDGES[]  = { 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 384, 385 };
    static const int64_t SHARES[] = { 0, 30, 2, 1 };
    static const int64_t CHUNKS[] = { SPIKE_SCHEDULE_CHUNK_BLOCKS, 24, 1, 3 };
    static const int64_t LARGE[][2] = { { 2049, 64 }, { 128, 1920 }, { 129, 1984 }, { 1, 2048 }, { 65, 3968 }, { 256, 4032 } };
    enum { N_EDGES = sizeof(EDGES)/sizeof(EDGES[0]), N_LARGE = sizeof(LARGE)/sizeof(LARGE[0]) };
    int wrong = 0;
    random_state = 1;
    for (int i = 0; i < n_cases; i++) {
        prompt_case c = {
            EDGES[i % N_EDGES], QK_SPK*(1 + random_below(i % 4 == 0 ? 24 : 5)), 1 + random_below(3), (enum codes) (i/3 % N_CODES),
            (enum pattern) (i % N_PATTERNS), SHARES[i/2 % 4], (int) random_below(SPIKE_MAX_SHIFT + 1), CHUNKS[i/5 % 4],
        };
        wrong += !check_prompt(&c);
    }
    // every lane at its limit: whole chunks in one step, at every unit
    for (int i = 0; i < N_LARGE*N_PATTERNS*2; i++) {
        prompt_case c = {
            LARGE[i % N_LARGE][0], LARGE[i % N_LARGE][1], 1, (enum codes) (1 + i/2 % (N_CODES - 1)),
            (enum pattern) (i/N_LARGE % N_PATTERNS), SHARES[i % 4], (int) random_below(SPIKE_MAX_SHIFT + 1), SPIKE_SCHEDULE_CHUNK_BLOCKS,
        };
        wrong += !check_prompt(&c);
    }
    wrong += n_merged < n_cases || n_apart == 0; // both ways must have been gone
    printf("prompts %d wrong %d\n", n_cases + N_LARGE*N_PATTERNS*2, wrong);
    return wrong;
}

// ---- lines of tokens

// All bytes as salient weights, the invalid ones too, and sums at the limits of 16 bits.
static int check_salient_lines(void) {
    static const int64_t BLOCKS[] = { 1, 2, 3, 7, 24, 63 };
    enum { N_SIZES = sizeof(BLOCKS)/sizeof(BLOCKS[0]), KINDS = 4, LENGTHS = SPIKE_TOKEN_LINE/SPIKE_TOKENS_AT_ONCE, STRIDE = SPIKE_TILE_ROWS + 8 };
    int wrong = 0;
    random_state = 2;
    for (int i = 0; i < N_SIZES*KINDS*LENGTHS; i++) {
        const int64_t n_blocks = BLOCKS[i % N_SIZES];
        const int     kind     = i/N_SIZES % KINDS; // random, all add, all subtract, all add the negative
        const int64_t n        = n_blocks*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
        const int     largest  = INT16_MAX/(SPIKE_SALIENT_SLOTS*(int) n_blocks);
        uint8_t * salients = allocate((size_t) n);
        int16_t * values   = allocate((size_t) (n_blocks*QK_SPK*SPIKE_TOKEN_LINE)*sizeof(int16_t));
        int32_t * found = allocate(SPIKE_TOKEN_LINE*STRIDE*sizeof(int32_t)), * expected = allocate(SPIKE_TOKEN_LINE*STRIDE*sizeof(int32_t));
        for (int64_t j = 0; j < n; j++) {
            const uint8_t any = (uint8_t) next_random();
            salients[j] = kind == 0 ? any : (uint8_t) ((any & 63) | (kind == 2 ? 2 : 1) << 6);
        }
        for (int64_t j = 0; j < n_blocks*QK_SPK*SPIKE_TOKEN_LINE; j++) {
            values[j] = (int16_t) (kind == 0 ? random_below(2*largest + 1) - largest : kind == 3 ? -largest : largest);
        }
        for (int64_t j = 0; j < SPIKE_TOKEN_LINE*STRIDE; j++) {
            found[j] = expected[j] = (int32_t) random_below(1000);
        }
        const int64_t n_rows = i/2 % 2 ? SPIKE_HALF_TILE : SPIKE_TILE_ROWS;
        const int64_t n_tokens = SPIKE_TOKENS_AT_ONCE*(1 + i/(N_SIZES*KINDS));
        kernels->add_salient_lines(salients, n_rows, values, n_blocks, n_tokens, STRIDE, found);
        plain->add_salient_lines(salients, n_rows, values, n_blocks, n_tokens, STRIDE, expected);
        wrong += memcmp(found, expected, SPIKE_TOKEN_LINE*STRIDE*sizeof(int32_t)) != 0;
        free(salients);
        free(values);
        free(found);
        free(expected);
    }
    printf("salients %d wrong %d\n", N_SIZES*KINDS*LENGTHS, wrong);
    return wrong;
}

// All bytes as salient weights once more, for tokens that are looked up: with values at their limits, coarse ones in no, some or
// all blocks, and as many blocks as there may be.
static int check_salient_tokens(void) {
    static const int64_t BLOCKS[] = { 1, 2, 3, 9, 60, 61, 200, SPIKE_MAX_TILED_INPUTS/QK_SPK };
    enum { N_SIZES = sizeof(BLOCKS)/sizeof(BLOCKS[0]), KINDS = 5, MOST = 20 };
    int wrong = 0;
    random_state = 4;
    for (int i = 0; i < N_SIZES*KINDS; i++) {
        const int64_t n_blocks = BLOCKS[i % N_SIZES], n = n_blocks*QK_SPK;
        const int     kind     = i/N_SIZES; // random, all add the largest, all subtract it, all add the smallest, all subtract it
        const int64_t n_rows   = i/2 % 2 ? SPIKE_HALF_TILE : SPIKE_TILE_ROWS, n_tokens = 1 + i % MOST;
        const int64_t n_salients = n_blocks*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
        uint8_t * salients = allocate((size_t) n_salients);
        int8_t  * values   = allocate((size_t) (n_tokens*2*n));
        spike_salient_token tokens[MOST];
        uint64_t coarse_blocks[MOST][SPIKE_BLOCK_WORDS] = { { 0 } };
        int32_t found[MOST][SPIKE_TILE_ROWS], expected[MOST][SPIKE_TILE_ROWS];
        for (int64_t j = 0; j < n_salients; j++) {
            const uint8_t any = (uint8_t) next_random();
            salients[j] = kind == 0 ? any : (uint8_t) ((any & 63) | (kind % 2 ? 1 : 2) << 6);
        }
        for (int64_t t = 0; t < n_tokens; t++) {
            int8_t * fine = values + t*2*n, * coarse = fine + n;
            for (int64_t j = 0; j < n; j++) {
                const bool loud = t % 3 == 2 || (t % 3 == 1 && random_below(100) == 0);
                fine[j]   = (int8_t) (kind == 0 ? random_below(32) - 16 : kind > 2 ? -16 : 15);
                coarse[j] = (int8_t) (!loud ? 0 : kind == 0 ? random_below(32) - 16 : kind > 2 ? -16 : 15);
                coarse_blocks[t][j/QK_SPK/64] |= (uint64_t) (coarse[j] != 0) << j/QK_SPK % 64;
            }
            tokens[t] = (spike_salient_token) { fine, t == 3 ? NULL : coarse, coarse_blocks[t], (int32_t) random_below(SPIKE_MAX_SHIFT + 1), found[t] };
            for (int64_t r = 0; r < SPIKE_TILE_ROWS; r++) {
                uint32_t sum = (uint32_t) (found[t][r] = (int32_t) next_random());
                for (int64_t s = r; r < n_rows && s < n_salients; s += SPIKE_TILE_ROWS) {
                    const int64_t  input = s/(SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS)*QK_SPK + (salients[s] & 63);
                    const uint32_t value = (uint32_t) fine[input] + (tokens[t].coarse ? (uint32_t) coarse[input] << tokens[t].shift : 0);
                    sum += salients[s] >> 6 == 1 ? 16*value : salients[s] >> 6 == 2 ? 0 - 16*value : 0;
                }
                expected[t][r] = (int32_t) sum;
            }
        }
        kernels->add_salient_tokens(salients, n_rows, n_blocks, tokens, n_tokens);
        wrong += memcmp(found, expected, (size_t) n_tokens*sizeof(found[0])) != 0;
        free(salients);
        free(values);
    }
    printf("looks %d wrong %d\n", N_SIZES*KINDS, wrong);
    return wrong;
}

static int check_transposition(void) {
    enum { N_CASES = 40, TOKENS = 8 };
    int wrong = 0;
    random_state = 3;
    for (int i = 0; i < N_CASES; i++) {
        const int64_t n = QK_SPK*(1 + random_below(5));
        int8_t * memory = allocate((size_t) (2*TOKENS*n));
        int16_t * found = allocate((size_t) (n*SPIKE_TOKEN_LINE)*sizeof(int16_t)), * expected = allocate((size_t) (n*SPIKE_TOKEN_LINE)*sizeof(int16_t));
        const int8_t * fine[TOKENS], * coarse[TOKENS];
        int shift[TOKENS];
        for (int t = 0; t < TOKENS; t++) {
            const bool absent = random_below(8) == 0;
            fine[t]   = absent ? NULL : memory + 2*t*n;
            coarse[t] = absent ? NULL : memory + (2*t + 1)*n;
            shift[t]  = (int) random_below(9);
            for (int64_t j = 0; j < n; j++) {
                memory[(2*t + (random_below(4) == 0))*n + j] = (int8_t) (random_below(32) - 16);
            }
        }
        const int64_t t0 = 8*random_below(SPIKE_TOKEN_LINE/8);
        kernels->transpose_values(fine, coarse, shift, n, found + t0);
        plain->transpose_values(fine, coarse, shift, n, expected + t0);
        wrong += memcmp(found, expected, (size_t) (n*SPIKE_TOKEN_LINE)*sizeof(int16_t)) != 0;
        free(memory);
        free(found);
        free(expected);
    }
    printf("transpositions %d wrong %d\n", N_CASES, wrong);
    return wrong;
}

// ---- lists

static int check_lists(void) {
    enum { N_CASES = 200 };
    int wrong = 0;
    random_state = 4;
    for (int i = 0; i < N_CASES; i++) {
        const int64_t n = QK_SPK*(1 + random_below(SPIKE_SCHEDULE_CHUNK_BLOCKS)), kinds = 1 + random_below(9);
        uint8_t  * key = allocate((size_t) n), * in_block = allocate((size_t) n);
        uint16_t * line = allocate((size_t) n*sizeof(uint16_t));
        const size_t size = (size_t) (n + SPIKE_SCHEDULE_SLACK)*sizeof(uint16_t);
        uint16_t * found = allocate(size), * expected = allocate(size);
        for (int64_t j = 0; j < n; j++) {
            key[j]      = (uint8_t) (random_below(kinds) - 1); // 0xFF, 0, 1, ...
            in_block[j] = (uint8_t) random_below(2*QK_SPK);
            line[j]     = (uint16_t) random_below(2*SPIKE_SCHEDULE_CHUNK_BLOCKS*QK_SPK);
        }
        const uint8_t wanted = (uint8_t) (random_below(kinds + 1) - 1); // the last one is in nothing
        const uint32_t n_lines = plain->gather_lines(key, line, n, wanted, expected);
        wrong += kernels->gather_lines(key, line, n, wanted, found) != n_lines || memcmp(found, expected, n_lines*sizeof(uint16_t)) != 0;
        const uint32_t n_inputs = plain->gather_inputs(key, in_block, n, wanted, expected);
        wrong += kernels->gather_inputs(key, in_block, n, wanted, found) != n_inputs || memcmp(found, expected, n_inputs*sizeof(uint16_t)) != 0;
        wrong += n_inputs != n_lines;
        free(key);
        free(in_block);
        free(line);
        free(found);
        free(expected);
    }
    printf("lists %d wrong %d\n", 2*N_CASES, wrong);
    return wrong;
}

int main(int argc, char ** argv) {
    const char * selected = spike_select_kernels()->name;
    if (argc != 2 || strcmp(argv[1], selected) != 0) {
        fprintf(stderr, "usage: SPIKEQUANT_FORCE_ISA=NAME check_prompts NAME (this CPU runs %s)\n", selected);
        return 2;
    }
    kernels = spike_select_kernels()->prompt;
    int wrong = check_prompts(600);
    wrong += check_salient_tokens();
    if (kernels->tokens_for_lines < INT64_MAX) {
        wrong += check_salient_lines();
        wrong += check_transposition();
    }
    wrong += check_lists();
    return wrong != 0;
}
