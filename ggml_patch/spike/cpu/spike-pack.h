// Picking 16-bit lanes out of a vector, for instruction sets that have no instruction for it.
#pragma once

#include <stdint.h>

// For every set of eight lanes, the shuffle of bytes that moves those lanes together.
extern uint8_t spike_pack[256][16];
