/* Measures every workload, or those that the arguments name, and prints a line for each:
 *     WORKLOAD class name nanoseconds-for-one sum
 * As process 1 of a guest it sets the scene first and turns the machine off at the end. */
#include "workloads.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* A measurement takes at least this long, in nanoseconds. */
#define SPAN 20000000.0
/* The least of so many counts: the first ones warm caches, and those of translators. */
#define MEASURED 5
/* How often a workload runs for its sum. */
#define CHECKED 3

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static double run_for(const struct workload *w, uint64_t n) {
    double start = now();
    w->run(n);
    return now() - start;
}

/* Nanoseconds for one. */
static double measure(const struct workload *w) {
    double took, least = 0;
    uint64_t n = 1;
    while ((took = run_for(w, n)) < SPAN) {
        double more = took > 0 ? SPAN * 1.2 / took : 16;
        n = n * (more < 2 ? 2 : more > 16 ? 16 : more) + 1;
    }
    for (int i = 0; i < MEASURED; i++) {
        took = run_for(w, n) / n;
        if (i == 0 || took < least)
            least = took;
    }
    return least;
}

static void row(const struct workload *w, int names, char **name) {
    int wanted = names == 0;
    for (int i = 0; i < names; i++)
        wanted |= !strcmp(name[i], w->name) || !strcmp(name[i], w->class);
    if (!wanted)
        return;
    if (w->possible && !w->possible()) {
        printf("WORKLOAD %s %s - -\n", w->class, w->name);
    } else {
        uint64_t sum = w->run(CHECKED);
        printf("WORKLOAD %s %s %.2f %016llx\n", w->class, w->name, measure(w), (unsigned long long)sum);
    }
    fflush(stdout);
}

int main(int arguments, char **argument) {
    /* The child of the workload `exec`. */
    if (arguments == 2 && !strcmp(argument[1], "nothing"))
        return 0;
    int alone = getpid() == 1;
    if (alone) {
        mkdir("/proc", 0755);
        mkdir("/tmp", 0755);
        mount("proc", "/proc", "proc", 0, 0);
        mount("tmpfs", "/tmp", "tmpfs", 0, 0);
        mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    }
    const struct workload *all[] = {integer, memory, application, floating, vector, kernel, code};
    printf("WORKLOADS BEGIN\n");
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
        for (const struct workload *w = all[i]; w->name; w++)
            row(w, arguments - 1, argument + 1);
    printf("WORKLOADS END\n");
    fflush(stdout);
    if (alone) {
        sync();
        reboot(RB_POWER_OFF);
    }
    return 0;
}
