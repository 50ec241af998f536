// One token: tiles side by side, chunk by chunk, the next chunk's lines on their way from memory.
#include "spike-tiles.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

// What a thread keeps while it serves one token.
struct decode_scratch {
    int32_t *  potential; // [tile][class][row]
    uint32_t * offsets;   // [spike], of lines in a strip
    uint32_t * ahead;     // [place], of lines to prefetch while the programs of a chunk run
    size_t     size;

    // what offsets belong to
    int64_t job    = -1, token = -1;
    size_t  stride = 0;

    decode_scratch(char * memory, int64_t n_inputs, int64_t n_chunks) {
        scratch_arrays arrays(memory);
        arrays.take(potential, SPIKE_STRIP_TILES*SPIKE_CLASSES*SPIKE_TILE_ROWS);
        arrays.take(offsets, spike_max_spikes(n_inputs, n_chunks));
        arrays.take(ahead, SPIKE_STRIP_TILES*(spike_max_spikes(DECODE_CHUNK_BLOCKS*QK_SPK, 1) + 1));
        size = arrays.size();
    }
};

void prefetch(const uint8_t * line) {
#if defined(__GNUC__)
    __builtin_prefetch(line, 0, 2);
#else
    (void) line;
#endif
}

// Offsets of the active lines of a chunk in the order of their addresses, which memory serves fastest.
// Returns how many; up to 16 more places are overwritten.
uint32_t list_active_lines(const spike_train * train, int64_t n_inputs, int64_t chunk, size_t stride, int64_t n_tiles, uint32_t * list) {
    const int8_t * fine   = spike_train_values(train, n_inputs, 0);
    const int8_t * coarse = spike_train_values(train, n_inputs, 1);
    uint32_t active[DECODE_CHUNK_BLOCKS*QK_SPK], n_active = 0;
    for (int64_t i = spike_chunk_start(n_inputs, train->n_chunks, chunk); i < spike_chunk_start(n_inputs, train->n_chunks, chunk + 1); i++) {
        active[n_active] = (uint32_t) i;
        n_active += (fine[i] | coarse[i]) != 0;
    }
    for (uint32_t e = 0; e < n_active; e++) {
        for (uint32_t t = 0; t < SPIKE_STRIP_TILES; t++) {
            list[t] = active[e]*(uint32_t) stride + t*SPIKE_LINE_BYTES;
        }
        list += n_tiles;
    }
    return n_active*(uint32_t) n_tiles;
}

void integrate_single_token(const spike_layout & layout, const spike_tile_lines & lines, int64_t n_tiles, const spike_train * train, decode_scratch & s) {
    const spike_kernels * kernels = spike_select_kernels();
    if (s.stride != lines.stride) {
        scale_offsets(train, lines.stride, s.offsets);
        s.stride = lines.stride;
    }
    memset(s.potential, 0, (size_t) n_tiles*SPIKE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
    uint32_t n_ahead = kernels->integrate_ahead ? list_active_lines(train, layout.n_inputs, 0, lines.stride, n_tiles, s.ahead) : 0;
    for (uint32_t e = 0; e < n_ahead; e++) {
        prefetch(lines.first + s.ahead[e]);
    }
    for (int64_t c = 0; c < train->n_chunks; c++) {
        const bool last = c + 1 == train->n_chunks;
        n_ahead = last || !kernels->integrate_ahead ? 0 : list_active_lines(train, layout.n_inputs, c + 1, lines.stride, n_tiles, s.ahead);
        uint32_t n_places = 0;
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            n_places += spike_program_places(train, k, c);
        }
        n_places *= (uint32_t) n_tiles;
        for (uint32_t e = n_ahead; n_ahead > 0 && e < n_places; e++) {
            s.ahead[e] = s.ahead[n_ahead - 1];
        }
        const uint32_t * ahead = s.ahead;
        for (int64_t t = 0; t < n_tiles; t++) {
            for (int k = 0; k < SPIKE_CLASSES; k++) {
                const uint8_t *       first     = lines.first + t*SPIKE_LINE_BYTES;
                const spike_program * program   = spike_train_program(train, k, c);
                int32_t *             potential = s.potential + (t*SPIKE_CLASSES + k)*SPIKE_TILE_ROWS;
                if (n_ahead > 0) {
                    kernels->integrate_ahead(first, program, s.offsets, potential, lines.first, ahead);
                    ahead += spike_program_places(train, k, c);
                } else {
                    kernels->integrate(first, program, s.offsets, potential);
                }
            }
        }
        for (uint32_t e = n_places; e < n_ahead; e++) {
            prefetch(lines.first + s.ahead[e]);
        }
    }
}

void compute_single_token(const product & product, int64_t j, int64_t t, int64_t tile0, int64_t n_tiles, const spike_layout & layout, const char * trains,
                          size_t train_size, decode_scratch & s) {
    const uint8_t * packed = (const uint8_t *) product.get_job(j).matrix;
    const token     tok    = product.get_token(j, t);
    const spike_train * train = (const spike_train *) (trains + (size_t) tok.column*train_size);
    if (s.job != j || s.token != t) {
        s.job    = j;
        s.token  = t;
        s.stride = 0;
    }
    integrate_single_token(layout, spike_lines_of_tile(&layout, packed, tile0), n_tiles, train, s);
    for (int64_t i = 0; i < n_tiles; i++) {
        int32_t *       potential = s.potential + i*SPIKE_CLASSES*SPIKE_TILE_ROWS;
        const uint8_t * salients  = spike_salients_of_tile(&layout, packed, tile0 + i, 0, 0);
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            add_salient_of_token(salients, layout, k, train, potential + k*SPIKE_TILE_ROWS);
        }
        read_out(1, &train, &tok.output, layout, packed, tile0 + i, potential);
    }
}

// Tiles that one thread takes at a time: a whole strip, or less where threads would go without. A group lies in one strip.
int64_t tiles_per_group(int64_t n_tiles, int n_threads) {
    if (n_tiles <= SPIKE_STRIP_TILES) {
        return (n_tiles + n_threads - 1)/n_threads;
    }
    int64_t group = SPIKE_STRIP_TILES;
    while (n_threads > 1 && group > 4 && n_tiles < 4*n_threads*group) {
        group /= 2;
    }
    return group;
}

} // namespace

size_t decode_scratch_size(int64_t n_inputs, int64_t n_chunks) {
    return decode_scratch(nullptr, n_inputs, n_chunks).size;
}

void compute_single_tokens(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w) {
    const spike_layout layout = spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1]);
    decode_scratch scratch(work + w.scratch + (size_t) params->ith*w.scratch_per_thread, layout.n_inputs, w.n_chunks);
    const int64_t group = tiles_per_group(layout.n_tiles, params->nth);
    for_each_unit(params, product, 1, (layout.n_tiles + group - 1)/group, [&](int64_t j, int64_t g, int64_t t, int64_t) {
        compute_single_token(product, j, t, g*group, std::min(group, layout.n_tiles - g*group), layout, work + w.trains, w.train_size, scratch);
    });
}

} // namespace spike
