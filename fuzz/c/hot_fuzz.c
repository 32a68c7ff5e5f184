/* The C loops on any bytes, each input in a buffer of exactly its size: libFuzzer's entry point. */
#include "hot.h"
#include "take.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LIMIT = 64 };

/* A header with a right checksum, as a forger would write it. */
static void seal(uint8_t *block)
{
	unsigned int sum = 8 * ' ';

	for (int at = 0; at < 512; at++)
		if (at < 148 || at >= 156)
			sum += block[at];
	for (int digit = 5; digit >= 0; digit--, sum >>= 3)
		block[148 + digit] = (uint8_t)('0' + (sum & 7));
	block[154] = 0;
	block[155] = ' ';
}

/* Parts that overlap, taken together, have the digests that they have alone; so has a stream beside them. */
static void check_digests(const uint8_t *data, size_t size)
{
	const uint64_t places[] = {0, size / 3, size / 5, size / 2, size / 2, 0, size - size / 7, size / 7, 0, size};
	const size_t count = sizeof(places) / sizeof(places[0]) / 2;
	uint8_t together[32 * sizeof(places) / sizeof(places[0]) / 2], alone[32];

	uint32_t stream[8] = {0}, other[8] = {0};

	if (!eod_sha256_lanes())
		return;
	eod_sha256_beside(stream, data, size / 64, data, places, count, together);
	eod_sha256_beside(other, data, size / 128, NULL, NULL, 0, NULL);
	eod_sha256_beside(other, data + size / 128 * 64, size / 64 - size / 128, NULL, NULL, 0, NULL);
	if (memcmp(stream, other, sizeof(stream)))
		abort();
	for (size_t part = 0; part < count; part++) {
		eod_sha256_many(data, places + 2 * part, 1, alone);
		if (memcmp(together + 32 * part, alone, 32))
			abort();
	}
}

/* The bytes as a registry's head, whole and behind a status line that makes the fields be looked at. */
static void check_head(const uint8_t *data, size_t size)
{
	static const char begin[] = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 4096-8191/9000\r\nContent-Length: 4096\r\n";
	const size_t length = sizeof(begin) - 1;
	uint8_t *head = malloc(length + size);

	memcpy(head, begin, length);
	memcpy(head + length, data, size);
	if (eod_is_plain(data, size, 4096, 8191) && memcmp(data + size - 4, "\r\n\r\n", 4))
		abort();
	if (eod_is_plain(head, length + size, 4096, 8191) && memcmp(head + length + size - 4, "\r\n\r\n", 4))
		abort();
	if (eod_is_plain(head, length + size, 4096, 8192) || eod_is_plain(head, length + size, 0, 8191))
		abort();
	free(head);
}

static void check(const uint8_t *data, size_t size)
{
	int64_t *records = malloc(LIMIT * EOD_TAR_RECORD * sizeof(*records));
	int limit = size ? data[0] % (LIMIT + 1) : LIMIT;
	int count = eod_tar_scan(data, size, records, limit);
	uint32_t state = eod_crc32c(0, data, size / 3);

	if (count < 0 || count > limit)
		abort();
	for (int index = 0; index < count; index++) {
		const int64_t *record = records + index * EOD_TAR_RECORD;

		if (record[0] < 0 || (uint64_t)record[0] + 512 > size)
			abort();
		if (record[1] == 0 && (record[9] > 100 || record[10] > 100 || record[11] > 155))
			abort();
	}
	if (eod_crc32c(state, data + size / 3, size - size / 3) != eod_crc32c(0, data, size))
		abort();
	free(records);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size ? size : 1);

	if (size)
		memcpy(copy, data, size);
	check(copy, size);
	check_digests(copy, size);
	check_head(copy, size);
	for (size_t at = 0; size - at >= 512; at += 512)
		seal(copy + at);
	check(copy, size);
	free(copy);
	return 0;
}
