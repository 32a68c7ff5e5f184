/* Where there is no libFuzzer: mutate each file COUNT times, always the same way, and give it to the fuzzer's entry. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LONGEST = 1 << 14 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t next_number(uint64_t *state) /* xorshift64 */
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static size_t mutate(uint8_t *data, size_t size, uint64_t *state)
{
	for (uint64_t count = next_number(state) % 8; count && size; count--) {
		size_t at = next_number(state) % size;

		switch (next_number(state) % 4) {
		case 0:
			data[at] ^= (uint8_t)(1u << next_number(state) % 8);
			break;
		case 1:
			data[at] = (uint8_t)next_number(state);
			break;
		case 2: /* in a number of a header */
			at = at / 512 * 512 + 100 + next_number(state) % 57;
			if (at < size)
				data[at] = (uint8_t)("01234567 \x80\xff"[next_number(state) % 12]);
			break;
		default:
			size = at;
		}
	}
	return size;
}

int main(int count, char **arguments)
{
	long rounds = count > 1 ? atol(arguments[1]) : 0;
	uint64_t state = 0x9E3779B97F4A7C15u;
	long done = 0;

	for (int number = 2; number < count; number++) {
		static uint8_t original[LONGEST], copy[LONGEST];
		FILE *file = fopen(arguments[number], "rb");
		size_t size;

		if (!file)
			return 2;
		size = fread(original, 1, LONGEST, file);
		fclose(file);
		for (long round = 0; round < rounds; round++, done++) {
			memcpy(copy, original, size);
			LLVMFuzzerTestOneInput(copy, mutate(copy, size, &state));
		}
	}
	printf("%ld inputs\n", done);
	return 0;
}
