/* See take.h. Whatever is not exactly as expected is left to Python, which knows what to make of it. */
#include "take.h"

#include <errno.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "hot.h"

#define DIGEST 32

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* A decimal number that ends at `stop` or where `end` is; NULL if there is none, or one that is too long. */
static const uint8_t *number(const uint8_t *at, const uint8_t *stop, uint64_t *value)
{
	const uint8_t *start = at;

	for (*value = 0; at < stop && *at >= '0' && *at <= '9'; at++) {
		if (at - start >= 18)
			return NULL;
		*value = 10 * *value + (uint64_t)(*at - '0');
	}
	return at > start ? at : NULL;
}

static int is_named(const uint8_t *at, size_t length, const char *name)
{
	return length == strlen(name) && !strncasecmp((const char *)at, name, length);
}

static int is_length(const uint8_t *at, const uint8_t *stop, uint64_t length)
{
	uint64_t value;

	return number(at, stop, &value) == stop && value == length;
}

/* "bytes FIRST-LAST/" and a size, or "*". */
static int is_range(const uint8_t *at, const uint8_t *stop, uint64_t first, uint64_t last)
{
	uint64_t value;

	if (stop - at < 6 || memcmp(at, "bytes ", 6))
		return 0;
	at = number(at + 6, stop, &value);
	if (!at || value != first || at == stop || *at++ != '-')
		return 0;
	at = number(at, stop, &value);
	if (!at || value != last || at == stop || *at++ != '/')
		return 0;
	return (stop - at == 1 && *at == '*') || number(at, stop, &value) == stop;
}

/* One field; 1 if it is as it should be. `seen`: bit 0 for the length, bit 1 for the range. */
static int is_plain_field(const uint8_t *line, const uint8_t *stop, uint64_t first, uint64_t last, int *seen)
{
	const uint8_t *colon = memchr(line, ':', (size_t)(stop - line));
	const uint8_t *value;
	size_t length;
	int bit;

	if (!colon || colon == line)
		return 0;
	for (const uint8_t *at = line; at < stop; at++)
		if (at < colon ? *at <= ' ' || *at > '~' : *at < ' ' && *at != '\t')
			return 0;
	length = (size_t)(colon - line);
	for (value = colon + 1; value < stop && (*value == ' ' || *value == '\t');)
		value++;
	while (stop > value && (stop[-1] == ' ' || stop[-1] == '\t'))
		stop--;
	if (is_named(line, length, "transfer-encoding") || is_named(line, length, "content-encoding"))
		return 0;
	if (is_named(line, length, "connection"))
		return is_named(value, (size_t)(stop - value), "keep-alive");
	bit = is_named(line, length, "content-length") ? 1 : is_named(line, length, "content-range") ? 2 : 0;
	if (*seen & bit)
		return 0;
	*seen |= bit;
	if (bit == 1)
		return is_length(value, stop, last - first + 1);
	return bit != 2 || is_range(value, stop, first, last);
}

int eod_is_plain(const uint8_t *head, size_t length, uint64_t first, uint64_t last)
{
	static const char status[] = "HTTP/1.1 206";
	const uint8_t *end = head + length, *line, *stop;
	int seen = 0;

	if (length < sizeof(status) + 3 || memcmp(head, status, sizeof(status) - 1))
		return 0;
	if (head[sizeof(status) - 1] != ' ' && head[sizeof(status) - 1] != '\r')
		return 0;
	for (line = head; (stop = memchr(line, '\r', (size_t)(end - line))) != NULL; line = stop + 2) {
		if (stop + 1 == end || stop[1] != '\n')
			return 0;
		if (stop == line)
			return stop + 2 == end && seen == 3;
		if (line != head && !is_plain_field(line, stop, first, last, &seen))
			return 0;
	}
	return 0;
}

static int is_written(int file, const uint8_t *data, size_t length, uint64_t place)
{
	while (length) {
		ssize_t count = pwrite(file, data, length, (off_t)place);

		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			return 0;
		data += count;
		place += (uint64_t)count;
		length -= (size_t)count;
	}
	return 1;
}

void eod_begin(struct eod_answer *answer, int connection, uint64_t first, uint64_t last, uint32_t patience)
{
	answer->connection = connection;
	answer->first = first;
	answer->last = last;
	answer->until = now() + patience * 1000000ull;
	answer->have = answer->body = answer->passed = answer->taken = answer->began = answer->came = 0;
}

/* The frame that was taken last makes room: each comes into the same memory, which the processor has at hand. */
static void pass(struct eod_answer *answer)
{
	uint8_t *body = answer->buffer + answer->body;

	if (!answer->taken)
		return;
	answer->have -= answer->taken;
	memmove(body, body + answer->taken, answer->have - answer->body);
	answer->passed += answer->taken;
	answer->taken = 0;
}

/* Look for the end of the head in what has come: 0 if this is no plain answer, or has more bytes than were asked for. */
static int is_good_head(struct eod_answer *answer)
{
	const uint8_t *end = memmem(answer->buffer, answer->have, "\r\n\r\n", 4);
	size_t length;

	if (!end)
		return 1;
	length = (size_t)(end - answer->buffer) + 4;
	if (length > EOD_LONGEST_HEAD || !eod_is_plain(answer->buffer, length, answer->first, answer->last))
		return 0;
	answer->began = now();
	answer->body = length;
	return answer->have - length <= answer->last - answer->first + 1;
}

/* Receive until so many bytes of the body are in the buffer: 1; 0 for what is odd or slow. */
static int receive(struct eod_answer *answer, uint64_t length)
{
	while (!answer->body || answer->have < answer->body + length) {
		const uint64_t wanted = (answer->body ? answer->body : EOD_LONGEST_HEAD) + length - answer->have;
		ssize_t count;

		if (!answer->body && answer->have > EOD_LONGEST_HEAD)
			return 0;
		count = recv(answer->connection, answer->buffer + answer->have, wanted, answer->body ? MSG_WAITALL : 0);
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			return 0;
		answer->have += (size_t)count;
		if (!answer->body && !is_good_head(answer))
			return 0;
		if ((!answer->body || answer->have < answer->body + length) && now() > answer->until)
			return 0;
	}
	answer->came = now();
	return 1;
}

static int is_right(const uint8_t *data, uint64_t length, const uint8_t *digest)
{
	const uint64_t part[2] = {0, length};
	uint8_t found[DIGEST];

	if (!eod_sha256_lanes())
		return 0;
	eod_sha256_many(data, part, 1, found);
	return !memcmp(found, digest, DIGEST);
}

/* Decode a frame, as Python does: the zstd frame that it begins with, which has to say that it is of this size. What it is
   padded with is not looked at. No other magic: a libzstd may know formats of old, which nobody has tried as hard. */
static int is_decoded(struct eod_answer *answer, const uint8_t *data, uint64_t length, uint64_t size)
{
	static const uint8_t magic[] = {0x28, 0xb5, 0x2f, 0xfd};
	size_t end;

	if (!answer->decoder || size > answer->plain_room || length < sizeof(magic) || memcmp(data, magic, sizeof(magic)))
		return 0;
	if (ZSTD_getFrameContentSize(data, length) != size)
		return 0;
	end = ZSTD_findFrameCompressedSize(data, length);
	return !ZSTD_isError(end) && ZSTD_decompressDCtx(answer->decoder, answer->plain, size, data, end) == size;
}

enum eod_taken eod_take(struct eod_answer *answer, uint64_t length, const uint8_t *digest, uint64_t decoded, int file,
			uint64_t place)
{
	const uint64_t first = answer->first, last = answer->last;
	const uint8_t *data;

	pass(answer);
	if (last < first || !length || length > last - first + 1 - answer->passed ||
	    answer->room < EOD_LONGEST_HEAD || length > answer->room - EOD_LONGEST_HEAD || !receive(answer, length))
		return EOD_ODD;
	answer->taken = length;
	data = answer->buffer + answer->body;
	if (!is_right(data, length, digest))
		return EOD_WHOLE;
	if (decoded) {
		if (!is_decoded(answer, data, length, decoded))
			return EOD_WHOLE;
		data = answer->plain;
		length = decoded;
	}
	return file >= 0 && is_written(file, data, length, place) ? EOD_WRITTEN : EOD_RIGHT;
}
