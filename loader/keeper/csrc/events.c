/* See events.h. */
#include "events.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "kabi.h"

#define FEWEST 64
#define LOST 1 /* readers.py */

_Static_assert(sizeof(off_t) == 8, "offsets are of 64 bits");

struct slot { /* of both tables; the journal's begins with object + 1, the readers' with the thread */
	uint64_t first, second, third, fourth;
};

struct object {
	uint64_t device, inode, object, size, bytes;
	const uint8_t *present, *known;
	int writer;
	uint8_t used;
};

struct eod_plane {
	int group;
	uint64_t *high; /* of the journal */
	struct slot *journal, *readers;
	struct object *objects; /* by device and inode: open addressing, a power of two, at most half full */
	size_t room, count;
	uint64_t last_object, last_end; /* of what was present, and not known to be read, last */
	int last_pid, others; /* who read last, and whether that was not who did before */
	uint32_t known[8192]; /* slots of readers, by the low bits of the thread's number; the slot itself says whose it is */
};

struct range_event {
	struct fanotify_event_metadata event;
	struct eod_event_info_range range;
};

struct request {
	uint8_t kind;
	uint64_t id;
	uint32_t object;
	uint64_t offset, length;
} __attribute__((packed));

struct eod_plane *eod_plane_new(int group, uint8_t *journal, uint8_t *readers)
{
	struct eod_plane *plane = calloc(1, sizeof(*plane));

	if (!plane)
		return NULL;
	plane->objects = calloc(FEWEST, sizeof(*plane->objects));
	if (!plane->objects) {
		free(plane);
		return NULL;
	}
	plane->room = FEWEST;
	plane->group = group;
	plane->high = (uint64_t *)journal;
	plane->journal = (struct slot *)(journal + EOD_JOURNAL_START);
	plane->readers = (struct slot *)readers;
	return plane;
}

void eod_plane_free(struct eod_plane *plane)
{
	free(plane->objects);
	free(plane);
}

/* Objects by inode */

static size_t home(const struct eod_plane *plane, uint64_t device, uint64_t inode)
{
	return ((inode ^ device << 40) * 0x9e3779b97f4a7c15u >> 20) & (plane->room - 1);
}

/* Where an object is, or would be. */
static struct object *place(const struct eod_plane *plane, uint64_t device, uint64_t inode)
{
	size_t at = home(plane, device, inode);

	while (plane->objects[at].used && (plane->objects[at].inode != inode || plane->objects[at].device != device))
		at = (at + 1) & (plane->room - 1);
	return &plane->objects[at];
}

static int grow(struct eod_plane *plane)
{
	struct object *old = plane->objects, *objects = calloc(2 * plane->room, sizeof(*objects));
	size_t room = plane->room;

	if (!objects)
		return -1;
	plane->objects = objects;
	plane->room = 2 * room;
	for (size_t at = 0; at < room; at++)
		if (old[at].used)
			*place(plane, old[at].device, old[at].inode) = old[at];
	free(old);
	return 0;
}

int eod_plane_put(struct eod_plane *plane, uint64_t device, uint64_t inode, uint64_t object, uint64_t size, int writer,
		  const uint8_t *bitmaps, uint64_t bytes)
{
	struct object *found = place(plane, device, inode);

	if (!found->used) {
		if (2 * (plane->count + 1) > plane->room) {
			if (grow(plane))
				return -1;
			found = place(plane, device, inode);
		}
		plane->count++;
	}
	*found = (struct object){
		.device = device, .inode = inode, .object = object, .size = size,
		.bytes = bitmaps ? bytes : 0, .present = bitmaps, .known = bitmaps ? bitmaps + bytes : NULL,
		.writer = writer, .used = 1,
	};
	return 0;
}

void eod_plane_drop(struct eod_plane *plane, uint64_t device, uint64_t inode)
{
	struct object *found = place(plane, device, inode);
	size_t mask = plane->room - 1, hole = (size_t)(found - plane->objects);

	if (!found->used)
		return;
	plane->count--;
	/* Whoever was pushed on past the hole moves up, or a search for him would end there. */
	for (size_t at = (hole + 1) & mask; plane->objects[at].used; at = (at + 1) & mask) {
		size_t wanted = home(plane, plane->objects[at].device, plane->objects[at].inode);

		if (((at - wanted) & mask) >= ((at - hole) & mask)) {
			plane->objects[hole] = plane->objects[at];
			hole = at;
		}
	}
	plane->objects[hole].used = 0;
}

/* Threads that are let through */

void eod_plane_reader(struct eod_plane *plane, uint32_t thread, uint32_t slot)
{
	if (slot < EOD_READERS_CAPACITY)
		plane->known[thread & (sizeof(plane->known) / sizeof(*plane->known) - 1)] = slot;
}

/* Where a thread's last read is to be written; slot 0 if nobody keeps that any more, NULL if it is not known here. */
static struct slot *reader(const struct eod_plane *plane, uint32_t thread)
{
	uint32_t slot = plane->known[thread & (sizeof(plane->known) / sizeof(*plane->known) - 1)];

	if (plane->readers[0].second == LOST)
		return &plane->readers[0];
	return thread && slot && plane->readers[slot].first == thread ? &plane->readers[slot] : NULL;
}

/* Events */

/* Whether all blocks of a range are in a bitmap of so many bytes. */
static int all(const uint8_t *bitmap, uint64_t bytes, uint64_t offset, uint64_t length)
{
	const uint64_t first = offset / EOD_BLOCK, last = (offset + length - 1) / EOD_BLOCK;

	if (last >> 3 >= bytes)
		return 0;
	for (uint64_t at = first; at <= last; at++)
		if (!(__atomic_load_n(&bitmap[at >> 3], __ATOMIC_ACQUIRE) >> (at & 7) & 1))
			return 0;
	return 1;
}

/* Whether [offset, offset + length) of a file has a hole; negative if that cannot be told. */
static int has_hole(int writer, uint64_t offset, uint64_t length)
{
	off_t hole = lseek(writer, (off_t)offset, SEEK_HOLE);

	if (hole < 0)
		return errno == ENXIO ? 1 : -1;
	return (uint64_t)hole < offset + length;
}

/* Say who reads what, write the one answer, then free the number: in this order, so that a read that is let through
 * is never unknown, and a number never names two events. */
static int allow(struct eod_plane *plane, int fd, struct slot *read, uint64_t object, uint64_t offset, uint64_t length)
{
	const struct fanotify_response response = { .fd = fd, .response = FAN_ALLOW };
	const struct slot before = *read;
	const int kept = read != &plane->readers[0];
	int failed = 0;

	if (kept)
		*read = (struct slot){ before.first, object, offset, length };
	__atomic_thread_fence(__ATOMIC_RELEASE);
	if (write(plane->group, &response, sizeof(response)) < 0)
		failed = errno;
	if (kept && failed == ENOENT) /* answered by the keeper before this one: it has gone on to another read since */
		*read = before;
	if (fd < EOD_JOURNAL_CAPACITY)
		__atomic_store_n(&plane->journal[fd].first, 0, __ATOMIC_RELEASE);
	close(fd);
	return failed;
}

static void journal(struct eod_plane *plane, const struct eod_event *event)
{
	struct slot *slot = &plane->journal[event->fd];

	if ((uint64_t)event->fd >= *plane->high)
		*plane->high = (uint64_t)event->fd + 1;
	slot->second = event->offset;
	slot->third = event->length;
	slot->fourth = (uint64_t)event->pid;
	__atomic_store_n(&slot->first, event->object + 1, __ATOMIC_RELEASE);
}

static int say(int worker, uint8_t kind, uint64_t id, const struct eod_event *event)
{
	const struct request request = { /* little endian, as all machines are that this runs on: else none is sent */
		kind, id, (uint32_t)event->object, event->offset, event->length,
	};

	if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || event->object > UINT32_MAX)
		return 0;
	return send(worker, &request, sizeof(request), MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof(request);
}

static int is_plain(const struct range_event *at)
{
	return at->event.event_len == sizeof(*at) && at->event.vers == FANOTIFY_METADATA_VERSION &&
	       at->event.metadata_len == sizeof(at->event) && at->event.fd >= 0 &&
	       at->range.hdr.info_type == FAN_EVENT_INFO_TYPE_RANGE && at->range.hdr.len == sizeof(at->range) &&
	       !(at->event.mask & FAN_Q_OVERFLOW);
}

static enum eod_kind see_to(struct eod_plane *plane, struct eod_event *event)
{
	const struct object *object;
	struct stat status;
	struct slot *read;
	uint64_t length;

	if (event->pid <= 0 || event->fd >= EOD_JOURNAL_CAPACITY || fstat(event->fd, &status))
		return EOD_OTHER;
	object = place(plane, status.st_dev, status.st_ino);
	if (!object->used || !event->length || event->offset >= object->size)
		return EOD_OTHER;
	length = object->size - event->offset < event->length ? object->size - event->offset : event->length;
	if (all(object->present, object->bytes, event->offset, length)) {
		int hole = has_hole(object->writer, event->offset, length);

		if (hole < 0)
			return EOD_OTHER;
		if (!hole) {
			read = reader(plane, (uint32_t)event->pid);
			if (!read)
				return EOD_OTHER;
			event->object = object->object;
			event->length = length;
			event->failed = allow(plane, event->fd, read, event->object, event->offset, length);
			return !event->failed && all(object->known, object->bytes, event->offset, length) ? EOD_REPEAT : EOD_PRESENT;
		}
	}
	event->object = object->object;
	event->length = length;
	journal(plane, event);
	return EOD_PENDING;
}

/* Whether an event is where the last one of its kind ended. */
static int goes_on(struct eod_plane *plane, const struct eod_event *event)
{
	const int found = plane->last_object == event->object && plane->last_end == event->offset;

	plane->last_object = event->object;
	plane->last_end = event->offset + event->length;
	return found;
}

/* Tell the worker of an event, if that is what it is for, and nothing else comes before it. */
static enum eod_kind told(struct eod_plane *plane, int worker, uint64_t id, const struct eod_event *event)
{
	if (event->kind == EOD_PENDING)
		return worker >= 0 && say(worker, EOD_REQUEST, id, event) ? EOD_SENT : EOD_PENDING;
	if (event->kind != EOD_PRESENT || goes_on(plane, event) || worker < 0 || event->failed)
		return event->kind;
	return say(worker, EOD_TELL, 1, event) ? EOD_TOLD : EOD_PRESENT;
}

static int take_once(struct eod_plane *plane, int worker, uint64_t first, uint8_t *buffer, size_t room,
		     struct eod_event *events, struct eod_rest *rest)
{
	const ssize_t have = read(plane->group, buffer, room);
	size_t at = 0;
	int count = 0;

	if (have < 0)
		return -errno;
	for (; (size_t)have - at >= sizeof(struct range_event); at += sizeof(struct range_event)) {
		struct eod_event *event = &events[count];
		struct range_event plain;

		memcpy(&plain, buffer + at, sizeof(plain));
		if (!is_plain(&plain))
			break;
		*event = (struct eod_event){
			.mask = plain.event.mask, .offset = plain.range.offset, .length = plain.range.count,
			.fd = plain.event.fd, .pid = plain.event.pid,
		};
		plane->others = event->pid != plane->last_pid;
		plane->last_pid = event->pid;
		event->kind = see_to(plane, event);
		event->kind = told(plane, worker, first + (uint64_t)count, event);
		if (event->kind == EOD_REPEAT) {
			rest->repeats++;
			rest->repeated += event->length;
		} else if (event->kind == EOD_TOLD) {
			rest->told++;
		} else {
			count++;
			if (event->kind != EOD_SENT)
				worker = -1; /* what Python is to tell of this one comes before all others */
		}
	}
	rest->begin = (uint32_t)at;
	rest->end = (uint32_t)have;
	return count;
}

static uint64_t milliseconds(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

/* Whether events come soon, and nothing else of what Python waits for. */
static int only_events(const struct eod_plane *plane, int epoll)
{
	struct epoll_event ready[2];

	/* Of several readers one may wait for this very processor: then his next event is there without a sleep. With one,
	 * the next is there sooner if we sleep, for who is woken goes before whoever decodes meanwhile. */
	if (plane->others)
		sched_yield();
	return epoll_wait(epoll, ready, 2, EOD_SOON) == 1 && ready[0].data.fd == plane->group;
}

int eod_plane_take(struct eod_plane *plane, int worker, int epoll, uint32_t longest, uint64_t first, uint8_t *buffer,
		   size_t room, struct eod_event *events, struct eod_rest *rest)
{
	const uint64_t until = milliseconds() + longest;
	int count;

	do
		count = take_once(plane, worker, first, buffer, room, events, rest);
	while (!count && rest->begin == rest->end && epoll >= 0 && milliseconds() < until &&
	       only_events(plane, epoll));
	return count;
}

int eod_plane_allow(struct eod_plane *plane, int fd, int writer, uint32_t thread, uint64_t object, uint64_t offset,
		    uint64_t length)
{
	const int hole = has_hole(writer, offset, length);
	struct slot *read = reader(plane, thread);

	if (hole || !read)
		return hole > 0 ? 1 : 2;
	return -allow(plane, fd, read, object, offset, length);
}
