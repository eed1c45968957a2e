/* What `cargo xtask bench cpu` measures: small pieces of work, each one function that does its work n times. */
#include <stdint.h>

/* One row. `run` returns a sum that depends on everything it computed, so that a wrong processor shows. */
struct workload {
    const char *class, *name;
    uint64_t (*run)(uint64_t n);
    /* 0, or whether this processor can do it. */
    int (*possible)(void);
};

/* Each file's rows, ended by one without a name. */
extern const struct workload integer[], memory[], application[], floating[], vector[], kernel[], code[];

/* SplitMix64: the numbers that all workloads are fed with. */
static inline uint64_t next_number(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}
