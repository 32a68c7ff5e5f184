/* Hot loops of the format code. Every function has a Python twin that a property test holds it against. */
#ifndef EOD_HOT_H
#define EOD_HOT_H

#include <stddef.h>
#include <stdint.h>

/* CRC-32C (Castagnoli, reflected) without initial and final inversion: the caller passes and gets the raw state. */
uint32_t eod_crc32c(uint32_t state, const uint8_t *data, size_t length);

/* Parse one 512-byte tar header. Returns 0, 1 (all zeros), -1 (checksum), or -2-i (number i is malformed).
   out: mode, uid, gid, size, mtime, devmajor, devminor, then the lengths of name, linkname and prefix, then the type. */
int eod_tar_header(const uint8_t *block, int64_t *out);

/* Parse the headers in a part of a tar that begins with one: each is sought behind the data that the one before declares.
   Per header EOD_TAR_RECORD numbers: offset, status, then as above. Stops after `limit` headers, at one that is none, and
   at the end of the data. Returns the number of records. */
#define EOD_TAR_RECORD 13
int eod_tar_scan(const uint8_t *data, size_t length, int64_t *out, int limit);

/* How many messages the next two take at a time; 0 where the processor cannot, and they must not be called. */
int eod_sha256_lanes(void);

/* The SHA-256 of `count` messages of `data`; `places` has offset and length of each, `digests` gets 32 bytes for each. */
void eod_sha256_many(const uint8_t *data, const uint64_t *places, size_t count, uint8_t *digests);

/* The same beside a stream that comes in parts: `words` is its state (FIPS 180-4's a to h; at first the initial one), which
   takes in `stream_blocks` blocks of 64 bytes more. */
void eod_sha256_beside(uint32_t *words, const uint8_t *stream, size_t stream_blocks, const uint8_t *data,
		       const uint64_t *places, size_t count, uint8_t *digests);

/* Have the allocator keep what is freed: a stream of 1 MiB chunks would otherwise map, fault in and unmap each of them. */
void eod_keep_memory(void);

#endif
