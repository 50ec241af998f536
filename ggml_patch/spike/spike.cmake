# SpikeQuant's own sources. Included by ggml/src/CMakeLists.txt.

set(SPIKE_DIR ${CMAKE_CURRENT_LIST_DIR})

if (NOT SPIKEQUANT_PIN OR NOT SPIKEQUANT_PATCH_ID)
    message(FATAL_ERROR "SpikeQuant: build through `spikequant build`, which sets SPIKEQUANT_PIN and SPIKEQUANT_PATCH_ID")
endif()

# Potentials are integers and readouts a fixed sequence of roundings: a contracted multiply-add would change bits.
if (NOT MSVC)
    # Nobody asks which floating-point exceptions occurred; a compiler that had to keep them could not vectorize choices.
    set(SPIKE_COMPILE_OPTIONS -ffp-contract=off -fno-trapping-math)
endif()

function(spike_add_sources target)
    target_sources(${target} PRIVATE ${ARGN})
    set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS "${SPIKE_COMPILE_OPTIONS}")
endfunction()

function(spike_add_reference target)
    spike_add_sources(${target}
        ${SPIKE_DIR}/spike-about.c
        ${SPIKE_DIR}/spike-activations.c
        ${SPIKE_DIR}/spike-codes.c
        ${SPIKE_DIR}/spike-codes-avx2.c
        ${SPIKE_DIR}/spike-codes-avx512.c
        ${SPIKE_DIR}/spike-rotation.c
        ${SPIKE_DIR}/spike-settings.c
        ${SPIKE_DIR}/spike-validate.c
        ${SPIKE_DIR}/spike-weights.c)
    set_source_files_properties(${SPIKE_DIR}/spike-about.c PROPERTIES COMPILE_DEFINITIONS
        "SPIKEQUANT_PIN=\"${SPIKEQUANT_PIN}\";SPIKEQUANT_PATCH_ID=\"${SPIKEQUANT_PATCH_ID}\"")
endfunction()

# Potentials from repacked weights and spike trains: needs nothing of ggml but macros, so that tests compile it alone.
function(spike_add_kernels target)
    spike_add_sources(${target}
        ${SPIKE_DIR}/cpu/spike-kernels.c
        ${SPIKE_DIR}/cpu/spike-layout.c
        ${SPIKE_DIR}/cpu/spike-pack.c
        ${SPIKE_DIR}/cpu/spike-plain.c
        ${SPIKE_DIR}/cpu/spike-plain-prompt.c
        ${SPIKE_DIR}/cpu/spike-potentials.c
        ${SPIKE_DIR}/cpu/spike-schedule.c
        ${SPIKE_DIR}/cpu/spike-train.c)
    # kernels for one instruction set each, whatever the rest is compiled for; chosen at run time
    if (NOT MSVC AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
        foreach(part "" "-prompt")
            set(avx2 ${SPIKE_DIR}/cpu/arch/x86/spike-avx2${part}.c)
            set(avx512 ${SPIKE_DIR}/cpu/arch/x86/spike-avx512${part}.c)
            spike_add_sources(${target} ${avx2} ${avx512})
            set_property(SOURCE ${avx2} APPEND PROPERTY COMPILE_OPTIONS -mavx2 -mpopcnt)
            set_property(SOURCE ${avx512} APPEND PROPERTY COMPILE_OPTIONS
                -mavx2 -mpopcnt -mavx512f -mavx512bw -mavx512vl -mavx512vbmi -mavx512vbmi2)
        endforeach()
    elseif (NOT MSVC AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
        spike_add_sources(${target} ${SPIKE_DIR}/cpu/arch/arm/spike-neon.c ${SPIKE_DIR}/cpu/arch/arm/spike-neon-prompt.c)
    endif()
endfunction()

function(spike_add_cpu_backend target)
    spike_add_kernels(${target})
    spike_add_sources(${target}
        ${SPIKE_DIR}/cpu/spike-buffer.cpp
        ${SPIKE_DIR}/cpu/spike-counters.c
        ${SPIKE_DIR}/cpu/spike-decode.cpp
        ${SPIKE_DIR}/cpu/spike-encoding.cpp
        ${SPIKE_DIR}/cpu/spike-matmul.cpp
        ${SPIKE_DIR}/cpu/spike-products.cpp
        ${SPIKE_DIR}/cpu/spike-prompt.cpp
        ${SPIKE_DIR}/cpu/spike-tiles.cpp
        ${SPIKE_DIR}/cpu/spike-work.cpp
        # here rather than in ggml-base: this library is compiled for the machine's instruction set
        ${SPIKE_DIR}/quantizer/spike-calibrated.cpp
        ${SPIKE_DIR}/quantizer/spike-inputs.cpp)
endfunction()
