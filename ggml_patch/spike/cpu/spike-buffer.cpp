// The buffer type that repacks SPK4 matrices while they load, and the traits that send every SPK4 product to
// spike-matmul.cpp. Matrices with faults are kept as stored: their products are then NaN row by row, not garbage.
#include "spike-cpu.h"
#include "spike-layout.h"
#include "spike-matmul.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "traits.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#    include <sys/mman.h>
#endif

namespace spike {
namespace {

// tensor->extra says in which form the data is: tiles if it was found sound; as stored if faulty or not looked at
char not_checked;

bool is_ours(const ggml_tensor * tensor) {
    return tensor->buffer && tensor->buffer->buft == ggml_backend_cpu_spike_buffer_type();
}

bool can_repack(const ggml_tensor * tensor) {
    return tensor->type == GGML_TYPE_SPK4 && tensor->view_src == nullptr && ggml_is_contiguous(tensor)
        && tensor->ne[0] <= SPIKE_MAX_TILED_INPUTS;
}

size_t packed_size(const ggml_tensor * tensor) {
    return spike_layout_of(tensor->ne[0], tensor->ne[1]).size*(size_t) (tensor->ne[2]*tensor->ne[3]);
}

size_t stored_matrix_size(const ggml_tensor * tensor) {
    return ggml_row_size(tensor->type, tensor->ne[0])*(size_t) tensor->ne[1];
}

uint16_t rotation_of(const void * blocks) {
    return spike_header_of((const block_spk4 *) blocks) & SPK4_NOT_ROTATED;
}

constexpr uintptr_t LARGE_PAGE = 2 << 20;

uintptr_t round_up(uintptr_t x, uintptr_t unit) {
    return (x + unit - 1)/unit*unit;
}

// Lets several threads wait until all parts of a work are done, whoever did them.
class barrier {
public:
    explicit barrier(int64_t n_parts) : missing(n_parts) {}

    void wait_after(int64_t n_done) {
        std::unique_lock<std::mutex> lock(mutex);
        missing -= n_done;
        if (missing == 0) {
            complete.notify_all();
        }
        complete.wait(lock, [this] { return missing == 0; });
    }

private:
    std::mutex              mutex;
    std::condition_variable complete;
    int64_t                 missing;
};

// Makes the system give memory to new data, which will be overwritten, together with the other threads that count pages with
// next_page. Threads that wrote to the same large page for the first time would each wait for one, and all but one of them
// would go back. Linux clears a large page towards the address that was touched; touched at its end it is cleared from the
// front, which is faster where a host gives the memory bit by bit.
void touch_pages(char * data, size_t size, std::atomic<uintptr_t> & next_page) {
    const uintptr_t end = (uintptr_t) data + size;
    for (uintptr_t page; (page = (uintptr_t) data/LARGE_PAGE + next_page++) <= (end - 1)/LARGE_PAGE;) {
        *(volatile char *) (std::min((page + 1)*LARGE_PAGE, end) - 1) = 0;
    }
}

// Tiles of all matrices of a tensor, shared out over the CPU's cores if there are enough to pay for threads. Returns whether
// the data is sound.
bool pack(ggml_tensor * tensor, const void * data) {
    constexpr int64_t BYTES_PER_THREAD = 1 << 20;
    const spike_layout layout = spike_layout_of(tensor->ne[0], tensor->ne[1]);
    const int64_t n_units = layout.n_tiles*tensor->ne[2]*tensor->ne[3];
    const int64_t n_cores = std::max(1u, std::thread::hardware_concurrency());
    const int64_t n_parts = std::max<int64_t>(1, std::min({ n_cores, n_units, (int64_t) ggml_nbytes(tensor)/BYTES_PER_THREAD + 1 }));
    std::atomic<bool> sound { true };
    std::atomic<uintptr_t> next_page { 0 };
    barrier touched(n_parts);
    const auto pack_parts = [&](int64_t first_part, int64_t end_part) {
        touch_pages((char *) tensor->data, packed_size(tensor), next_page);
        touched.wait_after(end_part - first_part);
        const int64_t end = end_part*n_units/n_parts;
        for (int64_t unit = first_part*n_units/n_parts, next; unit < end; unit = next) {
            const int64_t m      = unit/layout.n_tiles;
            const int64_t tile0  = unit - m*layout.n_tiles;
            const char *  blocks = (const char *) data + (size_t) m*stored_matrix_size(tensor);
            next = std::min(end, (m + 1)*layout.n_tiles);
            if (!spike_pack_tiles(&layout, (const block_spk4 *) blocks, (uint8_t *) tensor->data + (size_t) m*layout.size, tile0, tile0 + next - unit)
                    || rotation_of(blocks) != rotation_of(data)) {
                sound = false;
            }
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve((size_t) n_parts);
    int64_t n_started = 0;
    try {
        for (; n_started < n_parts - 1; n_started++) {
            helpers.emplace_back(pack_parts, n_started, n_started + 1);
        }
    } catch (const std::exception &) {
        // no more threads to be had
    }
    pack_parts(n_started, n_parts);
    for (std::thread & helper : helpers) {
        helper.join();
    }
    return sound;
}

void store(ggml_tensor * tensor, const void * data) {
    if (can_repack(tensor) && pack(tensor, data)) {
        tensor->extra = (void *) &spike_found_sound;
        return;
    }
    tensor->extra = &not_checked;
    if (can_repack(tensor)) {
        spike_validate_tensor(tensor->name, data, tensor->ne[0], ggml_nrows(tensor)); // says what is wrong
        tensor->extra = (void *) &spike_found_faulty;
    }
    memcpy(tensor->data, data, ggml_nbytes(tensor));
}

void load(const ggml_tensor * tensor, void * data) {
    if (form_of(tensor) == weight_form::stored) {
        memcpy(data, tensor->data, ggml_nbytes(tensor));
        return;
    }
    const spike_layout layout = spike_layout_of(tensor->ne[0], tensor->ne[1]);
    for (int64_t m = 0; m < tensor->ne[2]*tensor->ne[3]; m++) {
        char * blocks = (char *) data + (size_t) m*stored_matrix_size(tensor);
        spike_unpack_matrix(&layout, (const uint8_t *) tensor->data + (size_t) m*layout.size, (block_spk4 *) blocks);
    }
}

ggml_status init_tensor(ggml_backend_buffer_t, ggml_tensor * tensor) {
    tensor->extra = &not_checked;
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    if (offset == 0 && size == ggml_nbytes(tensor)) {
        store(tensor, data);
        return;
    }
    std::vector<char> whole(ggml_nbytes(tensor));
    load(tensor, whole.data());
    memcpy(whole.data() + offset, data, size);
    store(tensor, whole.data());
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    if (offset == 0 && size == ggml_nbytes(tensor)) {
        load(tensor, data);
        return;
    }
    std::vector<char> whole(ggml_nbytes(tensor));
    load(tensor, whole.data());
    memcpy(data, whole.data() + offset, size);
}

void memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    std::vector<char> whole(ggml_nbytes(tensor));
    load(tensor, whole.data());
    memset(whole.data() + offset, value, size);
    store(tensor, whole.data());
}

const char * buffer_type_name(ggml_backend_buffer_type_t) {
    return "CPU_SPIKE";
}

// Lines are read here and there, so that small pages would cost a table walk every few of them. A buffer that is worth it
// starts at the border of a large page and is followed by room for the whole of its last one.
void * large_page_base(ggml_backend_buffer_t buffer) {
    return (void *) round_up((uintptr_t) buffer->context, LARGE_PAGE);
}

void ask_for_large_pages(void * base, size_t size) {
#if defined(MADV_HUGEPAGE)
    madvise(base, size, MADV_HUGEPAGE); // only advice: whether it is taken changes nothing but the speed
#else
    (void) base;
    (void) size;
#endif
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    const bool   large = size >= LARGE_PAGE/2;
    const size_t whole = large ? round_up(size, LARGE_PAGE) : size;
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), large ? whole + LARGE_PAGE : size);
    if (buffer == nullptr) {
        return nullptr;
    }
    if (large) {
        buffer->size           = size;
        buffer->iface.get_base = large_page_base;
        ask_for_large_pages(large_page_base(buffer), whole);
    }
    buffer->buft                = buft;
    buffer->iface.init_tensor   = init_tensor;
    buffer->iface.set_tensor    = set_tensor;
    buffer->iface.get_tensor    = get_tensor;
    buffer->iface.memset_tensor = memset_tensor;
    buffer->iface.cpy_tensor    = nullptr;
    return buffer;
}

size_t alignment(ggml_backend_buffer_type_t) {
    return 64;
}

size_t alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    return can_repack(tensor) ? std::max(packed_size(tensor), ggml_nbytes(tensor)) : ggml_nbytes(tensor);
}

class product_traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = spike::work_size(op, n_threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        spike::compute(params, op);
        return true;
    }
};

class extra_buffer_type : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        if (!computes(op) || !is_ours(op->src[0]) || op->src[0]->view_src || !ggml_is_contiguous(op->src[0])) {
            return false;
        }
        return !op->src[1]->buffer || ggml_backend_buft_is_host(op->src[1]->buffer->buft);
    }

    // every SPK4 product, wherever the weights lie: the encoder needs whole tokens and the tensor's settings,
    // which ggml's own loop does not give to from_float
    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static product_traits traits;
        return computes(op) ? &traits : nullptr;
    }
};

} // namespace

weight_form form_of(const ggml_tensor * weights) {
    // a view into tiles would not start at a row; supports_op refuses it
    GGML_ASSERT(!is_ours(weights) || !weights->view_src || weights->view_src->extra != &spike_found_sound);
    return is_ours(weights) && weights->extra == &spike_found_sound ? weight_form::tiles : weight_form::stored;
}

} // namespace spike

ggml_backend_buffer_type_t ggml_backend_cpu_spike_buffer_type(void) {
    static ggml_backend_buffer_type type = {
        /* .iface   = */ {
            /* .get_name       = */ spike::buffer_type_name,
            /* .alloc_buffer   = */ spike::alloc_buffer,
            /* .get_alignment  = */ spike::alignment,
            /* .get_max_size   = */ nullptr, // SIZE_MAX
            /* .get_alloc_size = */ spike::alloc_size,
            /* .is_host        = */ nullptr,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new spike::extra_buffer_type(),
    };
    return &type;
}
