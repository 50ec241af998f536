// SPK4 in the CPU backend: the hooks that the patch series calls.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// The dot product of stored rows: the path of every caller that knows nothing of spikes. Exact, and slow.
// A row whose blocks disagree, or operands of which only one is rotated, give NaN.
GGML_BACKEND_API void ggml_vec_dot_spk4_spka(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

// Name of the kernel that integrates spikes on this machine.
GGML_BACKEND_API const char * spikequant_kernel(void);

// Buffer type that keeps SPK4 matrices as tiles of neurons, and computes every SPK4 product (repacked or not).
ggml_backend_buffer_type_t ggml_backend_cpu_spike_buffer_type(void);

// The calling thread is about to compute this node of the graph; a null graph: it has left the last one.
void spike_enter_node(const struct ggml_cgraph * graph, int node);

#ifdef __cplusplus
}
#endif
