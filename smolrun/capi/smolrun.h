/* smolrun.h: run a compiled SmolLM2 from C, ids in, ids out. ABI 1. Linux and Android, 64-bit.
 *
 *   smolrun compile MODEL -o app/    makes a folder: program.bin, the weights, and libsmolrun-TIER.so, a library for each
 *                                    kind of CPU; link with -pthread, or load it with dlopen
 *
 * Ids are those of the model's tokenizer; text becomes ids outside of this library. The logits are those of smolrun in
 * Python, bit for bit, for every number of threads and every way to cut a prompt into calls.
 *
 * Threads. There is no global state: a handle owns its memory and its threads, handles are independent, and those of one
 * folder share the weights' pages. A handle serves one call at a time, from whichever thread; smolrun_cancel alone may
 * come while another call runs. A handle does not survive fork. Its idle threads sleep after a millisecond.
 *
 * Files. They are mapped, checked whole when a handle is opened, and must not change before it is freed. They are as
 * trusted as the library: the check finds damage, not malice.
 *
 * Errors. What fails returns one of the negative codes and changes nothing.
 */
#ifndef SMOLRUN_H
#define SMOLRUN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SMOLRUN_ABI 1 /* compare with smolrun_abi_version() */

typedef struct smolrun smolrun;

enum {
    SMOLRUN_OK = 0,
    SMOLRUN_ARGUMENT = -1,   /* an argument is null or out of range */
    SMOLRUN_FILE = -2,       /* a file of the model cannot be opened or mapped */
    SMOLRUN_FORMAT = -3,     /* program.bin is damaged or no program */
    SMOLRUN_VERSION = -4,    /* program.bin is of another ABI */
    SMOLRUN_WEIGHTS = -5,    /* the weights are damaged, or another model's */
    SMOLRUN_LIBRARY = -6,    /* this library was compiled for another model */
    SMOLRUN_CPU = -7,        /* this CPU lacks instructions: load the library of another tier */
    SMOLRUN_MEMORY = -8,     /* no memory: choose a smaller context */
    SMOLRUN_THREADS = -9,    /* the system starts no more threads */
    SMOLRUN_CONTEXT = -10,   /* more ids than the context holds */
    SMOLRUN_ID = -11,        /* an id outside the vocabulary */
    SMOLRUN_LOGITS = -12,    /* logits that are not finite: the weights are damaged */
    SMOLRUN_CANCELLED = -13
};

/* Open the model in a folder.
 * kv: elements of the KV cache, "f16" or "q8_0" say, one of those that the folder was compiled for; null: the first.
 * context: positions; 0: as many as the model was trained for. Their keys and values take memory as they fill.
 * threads: 1..256, the caller's among them; best are as many as there are fast cores. */
int64_t smolrun_open(const char *folder, const char *kv, int64_t context, int64_t threads, smolrun **handle);

/* End the threads and give all memory back. Null is allowed. */
void smolrun_free(smolrun *handle);

/* Append n ids to the sequence; returns the likeliest next id (greedy: the lowest of equals), or a code.
 * logits: SMOLRUN_VOCABULARY floats for the next id, or null. */
int64_t smolrun_prefill(smolrun *handle, const int32_t *ids, int64_t n, float *logits);

/* Append one id: the same as smolrun_prefill of one. */
int64_t smolrun_decode(smolrun *handle, int64_t id, float *logits);

/* Keep the first n positions. To reuse the prefix of an earlier prompt, truncate to its length and prefill the rest. */
int64_t smolrun_truncate(smolrun *handle, int64_t n);

/* From any thread: the call that runs, or else the next one, ends with SMOLRUN_CANCELLED within one phase of a layer. */
void smolrun_cancel(smolrun *handle);

enum { SMOLRUN_VOCABULARY = 0, SMOLRUN_CONTEXT_SIZE = 1, SMOLRUN_LENGTH = 2, SMOLRUN_THREAD_COUNT = 3 };
int64_t smolrun_get(const smolrun *handle, int64_t what);

/* 1 if an id ends an answer, else 0. */
int64_t smolrun_ends(const smolrun *handle, int64_t id);

/* The bytes of an id's text, not terminated and not always whole UTF-8; null for an id that is none. */
const char *smolrun_text(const smolrun *handle, int64_t id, int64_t *length);

int64_t smolrun_abi_version(void);
const char *smolrun_strerror(int64_t code);

#ifdef __cplusplus
}
#endif
#endif
