// What the kernels and the encoder use of ggml, so that they compile alone and for any machine.
#pragma once

#define GGML_API         extern
#define GGML_BACKEND_API extern

struct ggml_cgraph;
struct ggml_tensor;
struct gguf_context;
