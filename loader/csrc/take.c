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
#define LONGEST_HEAD 16384

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

/* Receive until head and body are there: 1, and out as take.h says; 0 for what is odd or slow. */
static int receive(int connection, uint8_t *buffer, size_t room, uint64_t first, uint64_t last, uint64_t until,
		   uint64_t *out)
{
	size_t have = 0, whole = room;
	const uint8_t *end;

	out[0] = out[1] = out[2] = 0;
	while (have < whole) {
		ssize_t count = recv(connection, buffer + have, whole - have, out[1] ? MSG_WAITALL : 0);

		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			return 0;
		out[0] = have += (size_t)count;
		if (!out[1] && (end = memmem(buffer, have, "\r\n\r\n", 4)) != NULL) {
			out[2] = now();
			whole = (size_t)(end - buffer) + 4;
			if (!eod_is_plain(buffer, whole, first, last))
				return 0;
			out[1] = whole;
			whole += last - first + 1;
			if (whole > room)
				return 0;
		}
		if ((!out[1] && have > LONGEST_HEAD) || (have < whole && now() > until))
			return 0;
	}
	return out[1] && have == whole;
}

enum eod_taken eod_take(int connection, uint8_t *buffer, size_t room, uint64_t first, uint64_t last, uint32_t patience,
			const uint8_t *digest, int file, uint64_t place, uint64_t *out)
{
	const uint64_t length = last - first + 1;
	uint8_t found[DIGEST];
	uint64_t part[2];

	if (last < first || length > room || !receive(connection, buffer, room, first, last, now() + patience * 1000000ull, out))
		return EOD_ODD;
	if (!eod_sha256_lanes())
		return EOD_WHOLE;
	part[0] = out[1];
	part[1] = length;
	eod_sha256_many(buffer, part, 1, found);
	if (memcmp(found, digest, DIGEST))
		return EOD_WHOLE;
	return file >= 0 && is_written(file, buffer + out[1], length, place) ? EOD_WRITTEN : EOD_RIGHT;
}
