#include "hot.h"

static uint32_t crc_table[8][256];

static void __attribute__((constructor)) fill_crc_table(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t state = byte;

		for (int bit = 0; bit < 8; bit++)
			state = (state >> 1) ^ (state & 1 ? 0x82F63B78u : 0);
		crc_table[0][byte] = state;
	}
	for (uint32_t byte = 0; byte < 256; byte++)
		for (int slice = 1; slice < 8; slice++)
			crc_table[slice][byte] = (crc_table[slice - 1][byte] >> 8) ^
						 crc_table[0][crc_table[slice - 1][byte] & 0xff];
}

uint32_t eod_crc32c(uint32_t state, const uint8_t *data, size_t length)
{
	for (; length >= 8; length -= 8, data += 8) {
		uint32_t low = state ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 |
					(uint32_t)data[3] << 24);

		state = crc_table[7][low & 0xff] ^ crc_table[6][(low >> 8) & 0xff] ^
			crc_table[5][(low >> 16) & 0xff] ^ crc_table[4][low >> 24] ^ crc_table[3][data[4]] ^
			crc_table[2][data[5]] ^ crc_table[1][data[6]] ^ crc_table[0][data[7]];
	}
	for (; length; length--, data++)
		state = (state >> 8) ^ crc_table[0][(state ^ *data) & 0xff];
	return state;
}
