/* The keeper's way of an event, in C: from read(2) to the answer, or to the journal and the worker.
 *
 * Only what is plain goes this way; whatever else comes is left to the Python beside it (plane_fanotify.py), which does
 * the same in the same order. Not thread-safe. */
#ifndef KEEPER_EVENTS_H
#define KEEPER_EVENTS_H

#include <stddef.h>
#include <stdint.h>

/* What the C and the Python beside it agree on; tests/test_keeper_events.py compares. */
#define EOD_BLOCK 4096		/* presence.py */
#define EOD_JOURNAL_CAPACITY 65536 /* journal.py */
#define EOD_JOURNAL_START 4096
#define EOD_READERS_CAPACITY 65536 /* readers.py */
#define EOD_REQUEST 3		/* protocol.py */
#define EOD_TELL 9

#define EOD_SOON 2 /* milliseconds in which the next event comes while a reader is busy */

enum eod_kind {
	EOD_OTHER,   /* nothing was done about it */
	EOD_PRESENT, /* all of it is there: answered, and its descriptor closed */
	EOD_PENDING, /* journaled */
	EOD_SENT,    /* and the worker was asked */
	EOD_TOLD,    /* as EOD_PRESENT, and the worker was told: only counted */
	EOD_REPEAT,  /* as EOD_PRESENT, and the worker knows it to be read: only counted */
};

/* `offset` and `length` are of the event for EOD_OTHER, else clipped to what frames cover. `failed`: 0, or the errno
 * with which the kernel refused an answer (ENOENT: there was one before). */
struct eod_event {
	uint64_t mask, object, offset, length;
	int32_t fd, pid, kind, failed;
};

/* Where the first event lies that is not of the plain shape, and where the last one ends. Added up: events that were
 * EOD_TOLD, those that were EOD_REPEAT, and the bytes of these. */
struct eod_rest {
	uint32_t begin, end;
	uint64_t told, repeats, repeated;
};

struct eod_plane;

/* `journal` and `readers` are the maps of these, as journal.py and readers.py lay them out. NULL: no memory. */
struct eod_plane *eod_plane_new(int group, uint8_t *journal, uint8_t *readers);
void eod_plane_free(struct eod_plane *plane);

/* Make an object known, or change it; `bitmaps` are its two (presence.py) of `bytes` each, or NULL. -1: no memory. */
int eod_plane_put(struct eod_plane *plane, uint64_t device, uint64_t inode, uint64_t object, uint64_t size, int writer,
		  const uint8_t *bitmaps, uint64_t bytes);
void eod_plane_drop(struct eod_plane *plane, uint64_t device, uint64_t inode);

/* Say in which slot of the readers' table a thread has its last read. */
void eod_plane_reader(struct eod_plane *plane, uint32_t thread, uint32_t slot);

/* Read what events wait into `buffer`, and see to them in their order. Requests get numbers from `first` on, and once
 * journaled go to `worker`, a socket, unless it is negative, or something that comes before them is left to Python.
 *
 * The worker is told of what is present, unless it goes on where the last such event ended: that is left to Python, which
 * says more at once (notes.py). While all that comes is only counted, and nothing else is ready of what `epoll` (negative:
 * none) waits for, it goes on, for `longest` milliseconds: that is how one reads what is there, and Python would take as
 * long as all else of it.
 *
 * The number of `events` (of which there must be room / 48), without those that are only counted; -errno if nothing could be read. */
int eod_plane_take(struct eod_plane *plane, int worker, int epoll, uint32_t longest, uint64_t first, uint8_t *buffer,
		   size_t room, struct eod_event *events, struct eod_rest *rest);

/* Allow a journaled event, unless the file has a hole there: 1, or something is odd: 2 (nothing was done then); 0, or
 * -errno with which the kernel refused. */
int eod_plane_allow(struct eod_plane *plane, int fd, int writer, uint32_t thread, uint64_t object, uint64_t offset,
		    uint64_t length);

#endif
