#pragma once

#include "ggml.h"

typedef struct ggml_backend_buffer_type * ggml_backend_buffer_type_t;
