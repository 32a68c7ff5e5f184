/* The end of a range request without the interpreter: receive, check, decode, write, frame by frame. Its Python twins are in
   tests/test_take.py and tests/test_take_frames.py. */
#ifndef EOD_TAKE_H
#define EOD_TAKE_H

#include <stddef.h>
#include <stdint.h>

#include <zstd.h>

/* The longest head that is understood here; `room` has to be that much larger than the longest frame. */
#define EOD_LONGEST_HEAD 16384

/* What became of a frame. */
enum eod_taken {
	EOD_ODD = 0,	 /* something is out of the ordinary, or it takes long: go on with the bytes that have come */
	EOD_WHOLE = 1,	 /* all has come, but is not what the digest says, or does not decode, or nobody can tell here */
	EOD_RIGHT = 2,	 /* all has come and is right, but was not written */
	EOD_WRITTEN = 3, /* and was */
};

/* An answer that comes, and a thread's memory for it: `buffer` gets the head and one frame after another, `plain` what a
   frame decodes to. */
struct eod_answer {
	uint8_t *buffer;
	size_t room;
	uint8_t *plain;
	size_t plain_room;
	ZSTD_DCtx *decoder; /* NULL: nothing is decoded here */

	int connection;
	uint64_t first, last; /* the bytes that were asked for */
	uint64_t until;	      /* when to give up, as all times in nanoseconds of CLOCK_MONOTONIC */

	uint64_t have;	 /* bytes in the buffer */
	uint64_t body;	 /* where in it those of the body begin; 0: the head has not come */
	uint64_t passed; /* bytes of the body that were there before them */
	uint64_t taken;	 /* bytes of the frame that was taken last: the next one gets its place */
	uint64_t began;	 /* when the head had come */
	uint64_t came;	 /* when the frame had come that was taken last */
};

/* Have the answer to a request for bytes `first` to `last` come from a connection. It is given up after `patience`
   milliseconds, and a socket's own timeout more. */
void eod_begin(struct eod_answer *answer, int connection, uint64_t first, uint64_t last, uint32_t patience);

/* Receive the next `length` bytes of the body, a frame; compare their sha256 with `digest`; decode them, if `decoded` is not
   0, to just so many bytes; write the frame into `file` (if that is not negative) at `place`. Not more is received than its
   bytes, but for a few that come along with the head. */
enum eod_taken eod_take(struct eod_answer *answer, uint64_t length, const uint8_t *digest, uint64_t decoded, int file,
			uint64_t place);

/* Whether `head` (up to and with its empty line) is that of a plain answer with just these bytes: status 206 of HTTP/1.1,
   their Content-Range and Content-Length, a connection that stays, and no other coding. */
int eod_is_plain(const uint8_t *head, size_t length, uint64_t first, uint64_t last);

#endif
