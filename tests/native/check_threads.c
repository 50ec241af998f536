// check_threads NAME: threads that share a matrix and its tokens, as in a product, give the integers of one thread. Each
// encodes and sorts its share of the tokens, all wait, and each integrates its share of the tiles. For ThreadSanitizer.
#include "made_up.h"

#include <pthread.h>

enum { N_INPUTS = 5*QK_SPK, N_ROWS = 17*SPIKE_TILE_ROWS - 3, N_TOKENS = 6, N_THREADS = 4, N_ROUNDS = 20 };

static spike_layout layout;
static uint8_t    * packed;
static float        inputs[N_TOKENS][N_INPUTS];

typedef struct {
    spike_train * trains[N_TOKENS];
    int32_t     * potentials; // [token][tile][class][row]
} product;

typedef struct {
    const spike_kernels * kernels;
    product             * shared;
    pthread_barrier_t   * barrier;
    int                   index, n_threads;
} worker;

static void encode_token(int token, spike_train * train) {
    const spike_encoder_params params = spike_encoder_defaults();
    block_spka blocks[N_INPUTS/QK_SPK];
    float scratch[2*N_INPUTS];
    spike_encode_token(inputs[token], blocks, N_INPUTS, &params, scratch, spike_train_values_to_fill(train, N_INPUTS));
    spike_train_build(blocks, N_INPUTS, train);
}

static void integrate_tile(const spike_kernels * kernels, const spike_train * train, int64_t tile, int32_t * potential) {
    const spike_tile_lines lines = spike_lines_of_tile(&layout, packed, tile);
    uint32_t * scaled = scaled_offsets(train, lines.stride);
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        int32_t * own = potential + k*SPIKE_TILE_ROWS;
        for (int64_t c = 0; c < train->n_chunks; c++) {
            const spike_program * program = spike_train_program(train, k, c);
            if (spike_is_half_tile(&layout, tile)) {
                kernels->integrate_half(lines.first, program, scaled, own, NULL);
            } else {
                kernels->integrate(lines.first, program, scaled, own);
            }
        }
        int16_t sum[SPIKE_TILE_ROWS];
        kernels->add_salient(spike_salients_of_tile(&layout, packed, tile, 0, 0), spike_train_values(train, N_INPUTS, k),
                             layout.n_blocks, sum, NULL);
        for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
            own[r] += 16*sum[r];
        }
    }
    free(scaled);
}

static void * work(void * argument) {
    const worker * self = argument;
    for (int t = self->index; t < N_TOKENS; t += self->n_threads) {
        encode_token(t, self->shared->trains[t]);
    }
    pthread_barrier_wait(self->barrier);
    for (int64_t tile = self->index; tile < layout.n_tiles; tile += self->n_threads) {
        for (int t = 0; t < N_TOKENS; t++) {
            int32_t * potential = self->shared->potentials + (t*layout.n_tiles + tile)*SPIKE_CLASSES*SPIKE_TILE_ROWS;
            integrate_tile(self->kernels, self->shared->trains[t], tile, potential);
        }
    }
    return NULL;
}

static size_t potentials_size(void) {
    return (size_t) (N_TOKENS*layout.n_tiles*SPIKE_CLASSES*SPIKE_TILE_ROWS)*sizeof(int32_t);
}

static product compute(const spike_kernels * kernels, int n_threads) {
    const int64_t n_chunks = spike_chunks(N_INPUTS, 2);
    product made = { .potentials = allocate(potentials_size()) };
    for (int t = 0; t < N_TOKENS; t++) {
        made.trains[t] = allocate(spike_train_size(N_INPUTS, n_chunks));
        made.trains[t]->n_chunks = (int32_t) n_chunks;
    }
    pthread_barrier_t barrier;
    pthread_t threads[N_THREADS];
    worker    workers[N_THREADS];
    pthread_barrier_init(&barrier, NULL, (unsigned) n_threads);
    for (int i = 0; i < n_threads; i++) {
        workers[i] = (worker) { kernels, &made, &barrier, i, n_threads };
        if (pthread_create(&threads[i], NULL, work, &workers[i]) != 0) {
            fprintf(stderr, "cannot start a thread\n");
            exit(2);
        }
    }
    for (int i = 0; i < n_threads; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_barrier_destroy(&barrier);
    for (int t = 0; t < N_TOKENS; t++) {
        free(made.trains[t]);
    }
    return made;
}

static void fill(void) {
    uint32_t state = 1;
    block_spk4 * blocks = allocate((size_t) N_ROWS*N_INPUTS/QK_SPK*sizeof(block_spk4));
    for (int64_t i = 0; i < (int64_t) N_ROWS*(N_INPUTS/QK_SPK); i++) {
        uint8_t * bytes = (uint8_t *) (blocks + i);
        for (size_t j = 0; j < sizeof(block_spk4); j++) {
            state = state*1664525u + 1013904223u;
            bytes[j] = (uint8_t) (state >> 24);
        }
    }
    for (int t = 0; t < N_TOKENS; t++) {
        for (int i = 0; i < N_INPUTS; i++) {
            state = state*1664525u + 1013904223u;
            inputs[t][i] = ((float) (state >> 8)*(1.0f/8388608.0f) - 1.0f)*(state % 61 ? 1.0f : 50.0f);
        }
    }
    layout = spike_layout_of(N_INPUTS, N_ROWS);
    packed = allocate(layout.size);
    spike_pack_matrix(&layout, blocks, packed);
    free(blocks);
}

int main(int argc, char ** argv) {
    const spike_kernels * kernels = spike_select_kernels();
    if (argc != 2 || strcmp(argv[1], kernels->name) != 0) {
        fprintf(stderr, "usage: SPIKEQUANT_FORCE_ISA=NAME check_threads NAME (this CPU runs %s)\n", kernels->name);
        return 2;
    }
    fill();
    const product alone = compute(kernels, 1);
    int wrong = 0;
    for (int round = 0; round < N_ROUNDS; round++) {
        const product together = compute(kernels, 2 + round % (N_THREADS - 1));
        wrong += memcmp(alone.potentials, together.potentials, potentials_size()) != 0;
        free(together.potentials);
    }
    free(alone.potentials);
    free(packed);
    printf("threads %d wrong %d\n", N_ROUNDS, wrong);
    return wrong != 0;
}
