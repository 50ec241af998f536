// The two block types of SpikeQuant, as stored in GGUF files and in memory.
// spikequant_gguf/FORMAT.md is the specification; this header, format.py and that text say the same.
#pragma once

#include <assert.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#    error "SpikeQuant blocks are little-endian and no big-endian host has been tested"
#endif

#ifndef __cplusplus
#    ifndef static_assert
#        define static_assert _Static_assert
#    endif
#endif

#define SPIKE_FORMAT_VERSION 2 // spikequant.version in a file's metadata

#define QK_SPK 64            // inputs per block: also the size of the rotation
#define SPIKE_SALIENT_SLOTS 4 // salient weights per block, at most
#define SPIKE_HEADER_SLOTS  2 // of them whose bytes are the row's header in the first block of a row

// 64 weights of one row: 4.5 bits per weight.
// The value of element i is threshold * (code + extension - zero_point).
typedef struct {
    uint8_t salient[SPIKE_SALIENT_SLOTS]; // bits 0-5 position, bits 6-7: 0 none, 1 +16, 2 -16, 3 invalid
    uint8_t codes[QK_SPK / 2];            // low nibble element j, high nibble element j + 32
} block_spk4;
static_assert(sizeof(block_spk4) == SPIKE_SALIENT_SLOTS + QK_SPK / 2, "wrong spk4 block size/padding");

// A row's threshold, zero-point and rotation, see the masks below: u16 in place of the first salient slots of its first block.
static inline uint16_t spike_header_of(const block_spk4 * row) {
    return (uint16_t) (row->salient[0] | row->salient[1] << 8);
}

static inline int spike_first_slot(int64_t block_of_row) {
    return block_of_row == 0 ? SPIKE_HEADER_SLOTS : 0;
}

#define SPK4_NOT_ROTATED 0x8000
#define SPK4_THRESHOLD   0x7FF0 // an f16 magnitude whose four low mantissa bits are zero
#define SPK4_ZERO_POINT  0x000F

// 64 activations of one token, coded as spike times. Never stored in model files.
typedef struct {
    float    threshold;    // the step s; same in all blocks of a token, like the next three fields
    uint8_t  zero_point;   // standard codes are -zero_point .. 15 - zero_point
    uint8_t  salient_shift; // coarse salient values are multiples of s * 2^salient_shift
    uint8_t  flags;        // bit 0: not rotated
    uint8_t  reserved;     // zero
    uint64_t salient_mask; // bit i: value i carries a fifth bit
    uint8_t  codes[QK_SPK / 2]; // standard: q + zero_point; salient: low 4 bits of q + 16
    uint64_t fifth_bits;   // salient: bit 4 of q + 16; standard: 0
    uint64_t coarse_mask;  // bit i: the step of value i is s * 2^salient_shift; subset of salient_mask
} block_spka;
static_assert(sizeof(block_spka) == 64, "wrong spka block size/padding");

#define SPKA_NOT_ROTATED 0x01

#define SPIKE_MAX_SHIFT 15 // the largest salient_shift
