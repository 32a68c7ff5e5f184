/* Hot loops of the format code. Every function has a Python twin that a property test holds it against. */
#ifndef EOD_HOT_H
#define EOD_HOT_H

#include <stddef.h>
#include <stdint.h>

/* CRC-32C (Castagnoli, reflected) without initial and final inversion: the caller passes and gets the raw state. */
uint32_t eod_crc32c(uint32_t state, const uint8_t *data, size_t length);

#endif
