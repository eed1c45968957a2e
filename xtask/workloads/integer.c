/* Work on general registers. */
#include "workloads.h"
#include <stdlib.h>
#include <string.h>

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* The compression function of SHA-256 with made-up round constants. */
static uint64_t sha256(uint64_t n) {
    uint32_t h[8] = {1, 2, 3, 4, 5, 6, 7, 8}, k[64], w[64];
    uint64_t s = 1;
    for (int i = 0; i < 64; i++)
        k[i] = next_number(&s);
    while (n--) {
        for (int i = 0; i < 16; i++)
            w[i] = h[i & 7] + i;
        for (int i = 16; i < 64; i++) {
            uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + w[i - 7] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) +
                   (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
        }
        uint32_t v[8];
        memcpy(v, h, sizeof v);
        for (int i = 0; i < 64; i++) {
            uint32_t t1 = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) +
                          ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            uint32_t t2 = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22)) +
                          ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            memmove(v + 1, v, 7 * sizeof *v);
            v[4] += t1;
            v[0] = t1 + t2;
        }
        for (int i = 0; i < 8; i++)
            h[i] += v[i];
    }
    return (uint64_t)h[0] << 32 | h[1];
}

static __attribute__((noinline)) uint64_t fib(uint64_t x) { return x < 2 ? x : fib(x - 1) + fib(x - 2); }
static uint64_t calls(uint64_t n) {
    uint64_t sum = 0;
    while (n--)
        sum += fib(18 + (n & 1));
    return sum;
}

static uint64_t sieve(uint64_t n) {
    static uint8_t composite[1 << 16];
    uint64_t found = 0;
    while (n--) {
        memset(composite, 0, sizeof composite);
        for (uint32_t i = 2; i < sizeof composite; i++) {
            if (composite[i])
                continue;
            found++;
            for (uint32_t j = i * 2; j < sizeof composite; j += i)
                composite[j] = 1;
        }
    }
    return found;
}

static int order(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}
/* Calls through a pointer. */
static uint64_t sort(uint64_t n) {
    static uint32_t v[4096];
    uint64_t s = 7, sum = 0;
    while (n--) {
        for (int i = 0; i < 4096; i++)
            v[i] = next_number(&s);
        qsort(v, 4096, sizeof *v, order);
        sum = sum * 31 + v[2048];
    }
    return sum;
}

static uint64_t hash_table(uint64_t n) {
    static uint64_t keys[8192], values[8192];
    uint64_t s = 3, sum = 0;
    memset(keys, 0, sizeof keys);
    while (n--)
        for (int i = 0; i < 1000; i++) {
            uint64_t key = next_number(&s) % 6000 + 1, at = key * 0x9E3779B97F4A7C15 >> 51;
            while (keys[at] && keys[at] != key)
                at = (at + 1) & 8191;
            keys[at] = key;
            sum += values[at]++;
        }
    memset(values, 0, sizeof values);
    return sum;
}

/* A register machine by computed goto. */
static uint64_t interpreter(uint64_t n) {
    static const uint8_t program[] = {0, 1, 2, 3, 1, 4, 2, 0, 5, 1, 3, 2, 4, 6};
    static const void *const labels[] = {&&add, &&xor, &&rotate_it, &&multiply, &&store, &&load, &&again};
    uint64_t a = 1, b = 2, slots[8] = {0}, left = n * 200;
    const uint8_t *ip = program;
#define NEXT goto *labels[*ip++]
    NEXT;
add: a += b; NEXT;
xor: b ^= a; NEXT;
rotate_it: a = a << 7 | a >> 57; NEXT;
multiply: b = b * 5 + 1; NEXT;
store: slots[a & 7] = b; NEXT;
load: a += slots[b & 7]; NEXT;
again:
    ip = program;
    if (left--)
        NEXT;
    return a ^ b;
}

static uint64_t divisions(uint64_t n) {
    uint64_t sum = 0, s = 5, x = next_number(&s);
    while (n--)
        for (uint32_t i = 1; i < 500; i++)
            sum += x / (i + (sum & 7)) + (uint32_t)x % i;
    return sum;
}

static uint64_t collatz(uint64_t n) {
    uint64_t steps = 0;
    while (n--)
        for (uint64_t x = 1000 + (n & 127); x != 1; steps++)
            x = x & 1 ? 3 * x + 1 : x / 2;
    return steps;
}

/* A linked list that is walked, reversed and searched, and a state machine over text. */
static uint64_t list_and_states(uint64_t n) {
    static struct node { struct node *next; uint32_t key, value; } pool[512];
    static const char text[] = "12,-7.5e3,0x1F,,99.9,abc,+4,5e-2,x12,.5,";
    struct node *head = 0;
    for (int i = 0; i < 512; i++) {
        pool[i] = (struct node){head, i * 2654435761u, i};
        head = &pool[i];
    }
    uint64_t sum = 0;
    while (n--) {
        struct node *back = 0;
        for (struct node *p = head, *next; p; p = next) {
            next = p->next;
            p->next = back;
            back = p;
            sum += (p->key >> 7 & 3) == (n & 3) ? p->value++ : 1;
        }
        head = back;
        int state = 0;
        for (const char *p = text; *p; p++) {
            switch (state) {
            case 0: state = *p == '-' || *p == '+' ? 1 : *p >= '0' && *p <= '9' ? 2 : *p == '.' ? 3 : 4; break;
            case 1: case 2: state = *p >= '0' && *p <= '9' ? 2 : *p == '.' ? 3 : *p == 'e' ? 5 : *p == ',' ? 0 : 4; break;
            case 3: state = *p >= '0' && *p <= '9' ? 3 : *p == 'e' ? 5 : *p == ',' ? 0 : 4; break;
            case 4: state = *p == ',' ? 0 : 4; break;
            default: state = *p == ',' ? 0 : 5;
            }
            sum = sum * 3 + state;
        }
    }
    return sum;
}

const struct workload integer[] = {
    {"integer", "sha256", sha256}, {"integer", "calls", calls}, {"integer", "sieve", sieve},
    {"integer", "qsort", sort}, {"integer", "hash-table", hash_table},
    {"integer", "interpreter", interpreter}, {"integer", "divisions", divisions},
    {"integer", "collatz", collatz}, {"integer", "list-and-states", list_and_states}, {0},
};
