/* Code that is made or changed while it runs. */
#include "workloads.h"
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
typedef uint32_t (*function)(void);

/* mov eax, value; ret */
static void write_function(uint8_t *at, uint32_t value) {
    at[0] = 0xB8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xC3;
}
static uint8_t *code_pages(int pages) {
    return mmap(0, pages * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* The same function again and again with another constant. */
static uint64_t patch(uint64_t n) {
    uint8_t *p = code_pages(1);
    uint64_t sum = 0;
    while (n--) {
        write_function(p, n);
        sum += ((function)p)();
    }
    munmap(p, PAGE);
    return sum;
}

/* As a compiler does: a page of functions, then calls of them, then others in their place. */
static uint64_t generate(uint64_t n) {
    uint8_t *p = code_pages(1);
    uint64_t sum = 0;
    while (n--) {
        for (int i = 0; i < PAGE; i += 16)
            write_function(p + i, n + i);
        for (int round = 0; round < 50; round++)
            for (int i = 0; i < PAGE; i += 16)
                sum += ((function)(p + i))();
    }
    munmap(p, PAGE);
    return sum;
}

/* Data beside code: every store hits a page that is executed. */
static uint64_t data_beside(uint64_t n) {
    uint8_t *p = code_pages(1);
    uint64_t sum = 0;
    write_function(p, 5);
    while (n--) {
        ((volatile uint64_t *)p)[100] += ((function)p)();
        sum += ((volatile uint64_t *)p)[100];
    }
    munmap(p, PAGE);
    return sum;
}

const struct workload code[] = {
    {"code", "patch", patch}, {"code", "generate", generate}, {"code", "data-beside-code", data_beside}, {0},
};
