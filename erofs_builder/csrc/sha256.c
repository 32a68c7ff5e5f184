/* SHA-256 (FIPS 180-4) of many messages, two at a time: the processor's instructions take four cycles each, but a new one
   can start every other cycle, so that two messages that do not depend on each other take little longer than one. */
#include "hot.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>

enum { BLOCK = 64, LANES = 2 };

static const uint32_t round_constants[64] __attribute__((aligned(16))) = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static const uint32_t initial_state[8] = {
	0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

#define WITH_SHA __attribute__((target("sha,sse4.1,ssse3")))

/* The state as the instructions want it: words A, B, E, F and C, D, G, H, the first one highest. */
struct state {
	__m128i abef, cdgh;
};

static inline WITH_SHA struct state load_state(const uint32_t *words)
{
	__m128i dcba = _mm_loadu_si128((const __m128i *)words);
	__m128i hgfe = _mm_loadu_si128((const __m128i *)(words + 4));
	__m128i cdab = _mm_shuffle_epi32(dcba, 0xb1);
	__m128i efgh = _mm_shuffle_epi32(hgfe, 0x1b);

	return (struct state){_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xf0)};
}

static inline WITH_SHA void store_state(uint32_t *words, struct state state)
{
	__m128i feba = _mm_shuffle_epi32(state.abef, 0x1b);
	__m128i dchg = _mm_shuffle_epi32(state.cdgh, 0xb1);

	_mm_storeu_si128((__m128i *)words, _mm_blend_epi16(feba, dchg, 0xf0));
	_mm_storeu_si128((__m128i *)(words + 4), _mm_alignr_epi8(dchg, feba, 8));
}

/* Four rounds, `group` of 16; `w` has the last 16 words of the message schedule, four a register. */
static inline __attribute__((always_inline)) WITH_SHA void four_rounds(struct state *state, __m128i *w, int group,
								      const uint8_t *data)
{
	const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
	__m128i message;

	if (group < 4) {
		w[group] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)data + group), big_endian);
	} else {
		__m128i recent = w[(group + 3) & 3];
		__m128i seven_back = _mm_alignr_epi8(recent, w[(group + 2) & 3], 4);
		__m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[group & 3], w[(group + 1) & 3]), seven_back);

		w[group & 3] = _mm_sha256msg2_epu32(sum, recent);
	}
	message = _mm_add_epi32(w[group & 3], _mm_load_si128((const __m128i *)round_constants + group));
	state->cdgh = _mm_sha256rnds2_epu32(state->cdgh, state->abef, message);
	state->abef = _mm_sha256rnds2_epu32(state->abef, state->cdgh, _mm_shuffle_epi32(message, 0x0e));
}

static WITH_SHA void one_lane(uint32_t *words, const uint8_t *data, size_t blocks)
{
	struct state state = load_state(words);

	for (; blocks; blocks--, data += BLOCK) {
		struct state before = state;
		__m128i w[4];

#pragma GCC unroll 16
		for (int group = 0; group < 16; group++)
			four_rounds(&state, w, group, data);
		state.abef = _mm_add_epi32(state.abef, before.abef);
		state.cdgh = _mm_add_epi32(state.cdgh, before.cdgh);
	}
	store_state(words, state);
}

static WITH_SHA void two_lanes(uint32_t *words_a, const uint8_t *a, uint32_t *words_b, const uint8_t *b, size_t blocks)
{
	struct state state_a = load_state(words_a), state_b = load_state(words_b);

	for (; blocks; blocks--, a += BLOCK, b += BLOCK) {
		struct state before_a = state_a, before_b = state_b;
		__m128i w_a[4], w_b[4];

#pragma GCC unroll 16
		for (int group = 0; group < 16; group++) {
			four_rounds(&state_a, w_a, group, a);
			four_rounds(&state_b, w_b, group, b);
		}
		state_a.abef = _mm_add_epi32(state_a.abef, before_a.abef);
		state_a.cdgh = _mm_add_epi32(state_a.cdgh, before_a.cdgh);
		state_b.abef = _mm_add_epi32(state_b.abef, before_b.abef);
		state_b.cdgh = _mm_add_epi32(state_b.cdgh, before_b.cdgh);
	}
	store_state(words_a, state_a);
	store_state(words_b, state_b);
}

enum { NONE = -1, STREAM = -2 };

/* A message on its way: whole blocks of it first, then its rest with the padding. */
struct lane {
	uint32_t state[8];
	const uint8_t *at;
	size_t blocks;
	int64_t message; /* its number, STREAM or NONE */
	int in_tail;
	uint8_t tail[2 * BLOCK];
	size_t tail_blocks;
};

static void start(struct lane *lane, int64_t message, const uint8_t *data, uint64_t length)
{
	size_t rest = length % BLOCK;
	uint64_t bits = length << 3;

	memcpy(lane->state, initial_state, sizeof(initial_state));
	lane->at = data;
	lane->blocks = length / BLOCK;
	lane->message = message;
	lane->in_tail = 0;
	lane->tail_blocks = rest + 9 > BLOCK ? 2 : 1;
	memset(lane->tail, 0, sizeof(lane->tail));
	memcpy(lane->tail, data + (length - rest), rest);
	lane->tail[rest] = 0x80;
	for (int byte = 0; byte < 8; byte++)
		lane->tail[lane->tail_blocks * BLOCK - 1 - (size_t)byte] = (uint8_t)(bits >> (8 * byte));
}

static void write_digest(uint8_t *digest, const uint32_t *state)
{
	for (int word = 0; word < 8; word++)
		for (int byte = 0; byte < 4; byte++)
			digest[4 * word + byte] = (uint8_t)(state[word] >> (24 - 8 * byte));
}

static int find_lanes(void)
{
	unsigned int a, b, c, d;

	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSSE3) || !(c & bit_SSE4_1))
		return 0;
	return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA) ? LANES : 0;
}

/* Found out once: in a virtual machine the host answers for the processor, which takes half as long as 64 KiB's sha256. */
int eod_sha256_lanes(void)
{
	static _Atomic int lanes = -1;

	if (lanes < 0)
		lanes = find_lanes();
	return lanes;
}

/* Begin with whole blocks of a stream, whose state is kept elsewhere between calls. */
static void resume(struct lane *lane, const uint32_t *words, const uint8_t *data, size_t blocks)
{
	memcpy(lane->state, words, sizeof(lane->state));
	lane->at = data;
	lane->blocks = blocks;
	lane->message = STREAM;
}

static __attribute__((target("avx"))) void clean_registers(void)
{
	_mm256_zeroupper();
}

/* A library that leaves the upper halves of the vector registers in use (ISA-L's inflate) has every instruction below wait
   for them: half the speed, until somebody clears them. */
static void clean_up(void)
{
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx"))
		clean_registers();
}

void eod_sha256_beside(uint32_t *words, const uint8_t *stream, size_t stream_blocks, const uint8_t *data,
		       const uint64_t *places, size_t count, uint8_t *digests)
{
	struct lane lanes[LANES] = {{.message = NONE}, {.message = NONE}};
	size_t next = 0;

	clean_up();
	if (stream_blocks)
		resume(&lanes[0], words, stream, stream_blocks);
	for (;;) {
		int busy = 0;

		for (int index = 0; index < LANES; index++) {
			struct lane *lane = &lanes[index];

			while (!lane->blocks) {
				if (lane->message >= 0 && !lane->in_tail) {
					lane->in_tail = 1;
					lane->at = lane->tail;
					lane->blocks = lane->tail_blocks;
					break;
				}
				if (lane->message >= 0)
					write_digest(digests + 32 * lane->message, lane->state);
				else if (lane->message == STREAM)
					memcpy(words, lane->state, sizeof(lane->state));
				lane->message = NONE;
				if (next == count)
					break;
				start(lane, (int64_t)next, data + places[2 * next], places[2 * next + 1]);
				next++;
			}
			busy += lane->message != NONE;
		}
		if (!busy)
			return;
		if (busy == LANES) {
			struct lane *a = &lanes[0], *b = &lanes[1];
			size_t blocks = a->blocks < b->blocks ? a->blocks : b->blocks;

			two_lanes(a->state, a->at, b->state, b->at, blocks);
			for (int index = 0; index < LANES; index++) {
				lanes[index].at += blocks * BLOCK;
				lanes[index].blocks -= blocks;
			}
		} else {
			struct lane *lane = lanes[0].message != NONE ? &lanes[0] : &lanes[1];

			one_lane(lane->state, lane->at, lane->blocks);
			lane->at += lane->blocks * BLOCK;
			lane->blocks = 0;
		}
	}
}

#else

int eod_sha256_lanes(void)
{
	return 0;
}

void eod_sha256_beside(uint32_t *words, const uint8_t *stream, size_t stream_blocks, const uint8_t *data,
		       const uint64_t *places, size_t count, uint8_t *digests)
{
	(void)words, (void)stream, (void)stream_blocks, (void)data, (void)places, (void)count, (void)digests;
}

#endif

void eod_sha256_many(const uint8_t *data, const uint64_t *places, size_t count, uint8_t *digests)
{
	eod_sha256_beside(NULL, NULL, 0, data, places, count, digests);
}
