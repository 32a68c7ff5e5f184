/* One tar header block: checksum and numbers. Names stay where they are; only their lengths are returned. */
#include "hot.h"

#include <string.h>

enum { OK = 0, ZERO = 1, BAD_CHECKSUM = -1, BAD_NUMBER = -2 };

struct field {
	uint16_t offset, length;
};

static const struct field number_fields[] = {
	{100, 8}, {108, 8}, {116, 8}, {124, 12}, {136, 12}, {329, 8}, {337, 8},
};

/* Base-256 (first bit set; two's complement over the rest, big-endian), or octal between spaces and NULs. */
static int parse_number(const uint8_t *text, size_t length, int64_t *value)
{
	size_t at = 0;
	uint64_t result = 0;

	if (text[0] & 0x80) {
		uint8_t sign = text[0] & 0x40 ? 0xff : 0;

		for (size_t index = 0; index < length; index++) {
			uint8_t byte = text[index];

			if (index == 0)
				byte = sign ? byte : byte & 0x7f;
			if (index + 8 < length) {
				if (byte != sign)
					return -1;
				continue;
			}
			result = result << 8 | byte;
		}
		if (length >= 8 && ((result >> 63) != (sign ? 1u : 0u)))
			return -1;
		*value = (int64_t)result;
		return 0;
	}
	while (at < length && text[at] == ' ')
		at++;
	for (; at < length && text[at] >= '0' && text[at] <= '7'; at++)
		result = result << 3 | (uint64_t)(text[at] - '0');
	for (; at < length; at++)
		if (text[at] != ' ' && text[at] != 0)
			return -1;
	*value = (int64_t)result;
	return 0;
}

static int checksum_matches(const uint8_t *block)
{
	uint32_t plain = 8 * ' ';
	int32_t with_sign = 8 * ' ';
	int64_t stored;

	for (size_t at = 0; at < 512; at++) {
		if (at >= 148 && at < 156)
			continue;
		plain += block[at];
		with_sign += (int8_t)block[at];
	}
	if (parse_number(block + 148, 8, &stored))
		return 0;
	return stored == (int64_t)plain || stored == (int64_t)with_sign;
}

static int all_zero(const uint8_t *block)
{
	return block[0] == 0 && memcmp(block, block + 1, 511) == 0;
}

int eod_tar_header(const uint8_t *block, int64_t *out)
{
	const size_t numbers = sizeof(number_fields) / sizeof(number_fields[0]);
	int ustar = memcmp(block + 257, "ustar\0", 6) == 0;
	int gnu = memcmp(block + 257, "ustar ", 6) == 0;

	if (all_zero(block))
		return ZERO;
	if (!checksum_matches(block))
		return BAD_CHECKSUM;
	for (size_t index = 0; index < numbers; index++) {
		const struct field *field = &number_fields[index];

		out[index] = 0;
		/* V7 has no device numbers: whatever lies there is not ours. */
		if (index >= 5 && !ustar && !gnu)
			continue;
		if (parse_number(block + field->offset, field->length, &out[index]))
			return BAD_NUMBER - (int)index;
	}
	out[7] = (int64_t)strnlen((const char *)block, 100);
	out[8] = (int64_t)strnlen((const char *)block + 157, 100);
	out[9] = 0;
	if (ustar) /* star's own flavour keeps times behind a shorter prefix */
		out[9] = (int64_t)strnlen((const char *)block + 345, memcmp(block + 508, "tar", 4) == 0 ? 131 : 155);
	out[10] = block[156];
	return OK;
}

static int has_data(int64_t type)
{
	return type && strchr("07xgLKSD", (int)type) != NULL;
}

int eod_tar_scan(const uint8_t *data, size_t length, int64_t *out, int limit)
{
	size_t at = 0;
	int found = 0;

	while (found < limit && at <= length && length - at >= 512) {
		int64_t *record = out + (size_t)found++ * EOD_TAR_RECORD;
		uint64_t size;

		memset(record, 0, EOD_TAR_RECORD * sizeof(*record));
		record[0] = (int64_t)at;
		record[1] = eod_tar_header(data + at, record + 2);
		if (record[1] != OK)
			break;
		size = has_data(record[12]) || !record[12] ? (uint64_t)record[5] : 0;
		if (size > length)
			break;
		at += 512 + ((size + 511) & ~(uint64_t)511);
	}
	return found;
}
