#pragma once

typedef struct ggml_backend_buffer_type * ggml_backend_buffer_type_t;
