// What the model's metadata says: the version of the format, and encoder settings of a tensor. These are carried in the weight
// tensor's op_params, which no operation uses for a weight. Zero there means the default.
#include "spike.h"

#include "gguf.h"

#include <string.h>

bool spike_version_is_known(const struct gguf_context * metadata) {
    const int64_t id = metadata ? gguf_find_key(metadata, "spikequant.version") : -1;
    return id < 0 || (gguf_get_kv_type(metadata, id) == GGUF_TYPE_UINT32 && gguf_get_val_u32(metadata, id) == SPIKE_FORMAT_VERSION);
}

static float setting_at(const struct gguf_context * metadata, const char * key, size_t index) {
    const int64_t id = gguf_find_key(metadata, key);
    if (id < 0 || gguf_get_kv_type(metadata, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(metadata, id) != GGUF_TYPE_FLOAT32
            || index >= gguf_get_arr_n(metadata, id)) {
        return 0.0f;
    }
    const float value = ((const float *) gguf_get_arr_data(metadata, id))[index];
    return value > 0.0f && value < 7.5f ? value : 0.0f; // also no NaN
}

void spike_apply_encoder_settings(const struct gguf_context * metadata, struct ggml_tensor * weights) {
    if (weights->type != GGML_TYPE_SPK4 || metadata == NULL) {
        return;
    }
    const int64_t id = gguf_find_key(metadata, "spikequant.encoder.tensors");
    if (id < 0 || gguf_get_kv_type(metadata, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(metadata, id) != GGUF_TYPE_STRING) {
        return;
    }
    for (size_t i = 0; i < gguf_get_arr_n(metadata, id); i++) {
        if (strcmp(gguf_get_arr_str(metadata, id, i), weights->name) == 0) {
            const float settings[2] = {
                setting_at(metadata, "spikequant.encoder.salience", i),
                setting_at(metadata, "spikequant.encoder.silence", i),
            };
            memcpy(weights->op_params, settings, sizeof(settings));
            return;
        }
    }
}
