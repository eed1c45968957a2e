/* Moving bytes and waiting for them. */
#include "workloads.h"
#include <stddef.h>
#include <string.h>

#define MEBI (1 << 20)
static uint8_t a[MEBI], b[MEBI];

static uint64_t copy(uint64_t n) {
    a[77] = 5;
    while (n--) {
        memcpy(b, a, sizeof b);
        __asm__ volatile("" ::: "memory");
    }
    return b[77];
}

static uint64_t rep_movsb(uint64_t n) {
    a[99] = 6;
    while (n--) {
        void *to = b, *from = a;
        size_t left = 65536;
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(left) : : "memory");
    }
    return b[99];
}

static uint64_t rep_stosq(uint64_t n) {
    while (n--) {
        void *to = b;
        size_t left = 65536 / 8;
        __asm__ volatile("rep stosq" : "+D"(to), "+c"(left) : "a"(n * 0x0101010101010101) : "memory");
    }
    return b[500];
}

static uint64_t short_copies(uint64_t n) {
    uint64_t s = 2;
    while (n--)
        for (int i = 0; i < 100; i++) {
            uint64_t r = next_number(&s);
            memcpy(b + (r & 0xFFF), a + (r >> 12 & 0xFFF), r >> 24 & 63);
        }
    return b[1000];
}

static uint64_t strings(uint64_t n) {
    static char text[4096];
    memset(text, 'x', sizeof text - 1);
    uint64_t sum = 0;
    while (n--) {
        text[n & 2047] = 'y';
        sum += strlen(text) + (strchr(text, 'y') - text) + (memchr(text + 2048, 'z', 2047) != 0);
        text[n & 2047] = 'x';
    }
    return sum;
}

/* Word after word. */
static uint64_t sum_words(uint64_t n) {
    const volatile uint64_t *p = (const volatile uint64_t *)a;
    uint64_t sum = 0;
    while (n--)
        for (int i = 0; i < 8192; i++)
            sum += p[i];
    return sum;
}

/* A cycle through 16 MiB: DRAM, and every TLB misses. */
static uint64_t chase(uint64_t n) {
    static uint32_t next[4 << 20];
    static int ready;
    if (!ready) {
        uint32_t count = sizeof next / sizeof *next;
        for (uint32_t i = 0; i < count; i++)
            next[i] = (i * 1664525u + 1013904223u) % count;
        ready = 1;
    }
    uint32_t at = 0;
    n *= 1000;
    while (n--)
        at = next[at];
    return at;
}

const struct workload memory[] = {
    {"memory", "memcpy-1M", copy}, {"memory", "rep-movsb-64K", rep_movsb}, {"memory", "rep-stosq-64K", rep_stosq},
    {"memory", "short-copies", short_copies}, {"memory", "strings", strings},
    {"memory", "sum-words", sum_words}, {"memory", "chase-16M", chase}, {0},
};
