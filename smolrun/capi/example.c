/* example.c: continue a prompt given as ids, greedily, and print ids and text.
 *
 *   cc -std=c99 -O2 example.c -I app -L app -l:libsmolrun-avx2.so -Wl,-rpath,'$ORIGIN/app' -pthread -o example
 *   ./example app 2 32 504 2920 314        # folder, threads, ids to add, the prompt's ids
 */
#include <stdio.h>
#include <stdlib.h>

#include "smolrun.h"

static int failed(const char *what, int64_t code)
{
    fprintf(stderr, "%s: %s\n", what, smolrun_strerror(code));
    return 1;
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "usage: %s FOLDER THREADS COUNT ID...\n", argv[0]);
        return 2;
    }
    if (smolrun_abi_version() != SMOLRUN_ABI)
        return failed("libsmolrun", SMOLRUN_VERSION);

    int64_t n = argc - 4, count = atoll(argv[3]);
    int32_t *prompt = malloc((size_t)n * sizeof *prompt);
    if (!prompt)
        return failed("prompt", SMOLRUN_MEMORY);
    for (int64_t i = 0; i < n; i++)
        prompt[i] = (int32_t)atol(argv[4 + i]);

    smolrun *llm;
    int64_t code = smolrun_open(argv[1], NULL, 0, atoll(argv[2]), &llm);
    if (code) {
        free(prompt);
        return failed(argv[1], code);
    }
    int64_t id = smolrun_prefill(llm, prompt, n, NULL);
    for (int64_t i = 0; i < count && id >= 0; i++) {
        int64_t length;
        const char *text = smolrun_text(llm, id, &length);
        printf("%d ", (int)id);
        fwrite(text, 1, (size_t)length, stderr);
        if (smolrun_ends(llm, id))
            break;
        if (i + 1 < count)
            id = smolrun_decode(llm, id, NULL);
    }
    printf("\n");
    smolrun_free(llm);
    free(prompt);
    return id < 0 ? failed("generate", id) : 0;
}
