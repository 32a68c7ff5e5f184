/* The end of a range request without the interpreter: receive, check, write. Its Python twin is in tests/test_take.py. */
#ifndef EOD_TAKE_H
#define EOD_TAKE_H

#include <stddef.h>
#include <stdint.h>

/* What became of an answer. */
enum eod_taken {
	EOD_ODD = 0,	 /* something is out of the ordinary, or it takes long: go on with the bytes that have come */
	EOD_WHOLE = 1,	 /* all has come, but is not what the digest says, or this processor cannot tell here */
	EOD_RIGHT = 2,	 /* all has come and is right, but was not written */
	EOD_WRITTEN = 3, /* and was */
};

/* Receive the answer to a request for bytes `first` to `last` from a connection, head and body, into `buffer`; compare
   its sha256 with `digest`; write it into `file` (if that is not negative) at `place`. Gives up after `patience`
   milliseconds, and a socket's own timeout more. out: bytes that have come, where in them the body begins (0: nobody knows
   yet), and when that was known, in nanoseconds of CLOCK_MONOTONIC. */
enum eod_taken eod_take(int connection, uint8_t *buffer, size_t room, uint64_t first, uint64_t last, uint32_t patience,
			const uint8_t *digest, int file, uint64_t place, uint64_t *out);

/* Whether `head` (up to and with its empty line) is that of a plain answer with just these bytes: status 206 of HTTP/1.1,
   their Content-Range and Content-Length, a connection that stays, and no other coding. */
int eod_is_plain(const uint8_t *head, size_t length, uint64_t first, uint64_t last);

#endif
