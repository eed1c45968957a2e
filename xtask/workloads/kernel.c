/* What programs ask the kernel for. */
#define _GNU_SOURCE
#include "workloads.h"
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
static char buffer[PAGE];

static uint64_t get_pid(uint64_t n) {
    uint64_t same = 1;
    long pid = syscall(SYS_getppid);
    while (n--)
        same &= syscall(SYS_getppid) == pid;
    return same;
}

/* An open file of one page. */
static int a_file(void) {
    int file = open("/tmp/workload", O_RDWR | O_CREAT | O_TRUNC, 0600);
    memset(buffer, 'f', sizeof buffer);
    return write(file, buffer, sizeof buffer) == PAGE ? file : -1;
}
static uint64_t open_close(uint64_t n) {
    uint64_t good = 0;
    close(a_file());
    for (uint64_t i = 0; i < n; i++) {
        int file = open("/tmp/workload", O_RDONLY);
        good += file >= 0 && close(file) == 0;
    }
    return good == n;
}
static uint64_t read_page(uint64_t n) {
    uint64_t sum = 0, rounds = n;
    int file = a_file();
    while (n--)
        sum += pread(file, buffer, PAGE, 0);
    close(file);
    return sum == rounds * PAGE;
}
static uint64_t write_page(uint64_t n) {
    uint64_t sum = 0, rounds = n;
    int file = a_file();
    while (n--)
        sum += pwrite(file, buffer, PAGE, 0);
    close(file);
    return sum == rounds * PAGE;
}
static uint64_t access_file(uint64_t n) {
    uint64_t bad = 0;
    close(a_file());
    while (n--)
        bad += access("/tmp/workload", R_OK) != 0;
    return bad;
}
static uint64_t stat_file(uint64_t n) {
    uint64_t sum = 0, rounds = n;
    struct stat s;
    close(a_file());
    while (n--)
        sum += stat("/tmp/workload", &s) == 0 ? s.st_size : 0;
    return sum == rounds * PAGE;
}

/* To oneself and back. */
static uint64_t pipe_self(uint64_t n) {
    int ends[2];
    uint64_t sum = 0, rounds = n;
    if (pipe(ends))
        return 99;
    while (n--)
        sum += write(ends[1], buffer, 64) == 64 && read(ends[0], buffer, 64) == 64;
    close(ends[0]), close(ends[1]);
    return sum == rounds;
}
/* To another process and back. */
static uint64_t pipe_other(uint64_t n) {
    int there[2], back[2];
    uint64_t sum = 0, rounds = n;
    if (pipe(there) || pipe(back))
        return 99;
    pid_t child = fork();
    if (child == 0) {
        close(there[1]);
        while (read(there[0], buffer, 1) == 1 && write(back[1], buffer, 1) == 1)
            ;
        _exit(0);
    }
    while (n--)
        sum += write(there[1], buffer, 1) == 1 && read(back[0], buffer, 1) == 1;
    close(there[0]), close(there[1]), close(back[0]), close(back[1]);
    waitpid(child, 0, 0);
    return sum == rounds;
}

static uint64_t fork_exit(uint64_t n) {
    int status, sum = 0;
    while (n--) {
        pid_t child = fork();
        if (child == 0)
            _exit(3);
        waitpid(child, &status, 0);
        sum |= status;
    }
    return sum;
}
static uint64_t exec_self(uint64_t n) {
    int status;
    volatile int sum = 0;
    while (n--) {
        pid_t child = vfork();
        if (child == 0) {
            execl("/proc/self/exe", "workloads", "nothing", (char *)0);
            _exit(9);
        }
        waitpid(child, &status, 0);
        sum |= status;
    }
    return sum;
}

#define AREA (64 * PAGE)
/* Memory that appears when it is touched; one is a page. */
static uint64_t page_faults(uint64_t n) {
    uint64_t sum = 0;
    for (uint64_t done = 0; done < n; done += 64) {
        volatile char *p = mmap(0, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int i = 0; i < AREA; i += PAGE)
            sum += p[i]++;
        munmap((void *)p, AREA);
    }
    return sum;
}
static uint64_t protect(uint64_t n) {
    char *p = mmap(0, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t sum = 0;
    while (n--) {
        p[PAGE] = n;
        sum += mprotect(p, AREA, PROT_READ);
        sum += p[PAGE] != (char)n;
        sum += mprotect(p, AREA, PROT_READ | PROT_WRITE);
    }
    munmap(p, AREA);
    return sum;
}

static volatile sig_atomic_t signals;
static void on_signal(int number) { signals += number == SIGUSR1; }
static uint64_t send_signals(uint64_t n) {
    signal(SIGUSR1, on_signal);
    signals = 0;
    for (uint64_t i = 0; i < n; i++)
        raise(SIGUSR1);
    return signals == (sig_atomic_t)n;
}
static char *guarded;
static void on_fault(int number) {
    (void)number;
    mprotect(guarded, PAGE, PROT_READ | PROT_WRITE);
}
/* A store to a page that a handler makes writable. */
static uint64_t fault_signals(uint64_t n) {
    signal(SIGSEGV, on_fault);
    guarded = mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t sum = 0;
    while (n--) {
        mprotect(guarded, PAGE, PROT_READ);
        ((volatile char *)guarded)[5] = 1;
        sum |= guarded[5];
    }
    munmap(guarded, PAGE);
    signal(SIGSEGV, SIG_DFL);
    return sum;
}

static uint64_t yield(uint64_t n) {
    int sum = 0;
    while (n--)
        sum |= sched_yield();
    return sum;
}
static uint64_t clock_time(uint64_t n) {
    struct timespec t = {0}, last = {0};
    uint64_t back = 0;
    while (n--) {
        clock_gettime(CLOCK_MONOTONIC, &t);
        back += t.tv_sec < last.tv_sec || (t.tv_sec == last.tv_sec && t.tv_nsec < last.tv_nsec);
        last = t;
    }
    return back;
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t under_mutex, share;
static atomic_ulong shared;
static void *lock_often(void *unused) {
    (void)unused;
    for (uint64_t i = 0; i < share; i++) {
        pthread_mutex_lock(&mutex);
        under_mutex++;
        pthread_mutex_unlock(&mutex);
    }
    return 0;
}
static void *add_often(void *unused) {
    (void)unused;
    for (uint64_t i = 0; i < share; i++)
        atomic_fetch_add(&shared, 1);
    return 0;
}
static void two_threads(uint64_t n, void *(*work)(void *)) {
    pthread_t other;
    share = n;
    pthread_create(&other, 0, work, 0);
    work(0);
    pthread_join(other, 0);
}
static uint64_t mutexes(uint64_t n) {
    under_mutex = 0;
    two_threads(n, lock_often);
    return under_mutex == 2 * n;
}
static uint64_t atomics(uint64_t n) {
    shared = 0;
    two_threads(n, add_often);
    return shared == 2 * n;
}

const struct workload kernel[] = {
    {"system-call", "getppid", get_pid}, {"file", "open-close", open_close}, {"file", "read-4K", read_page},
    {"file", "write-4K", write_page}, {"file", "access", access_file}, {"file", "stat", stat_file},
    {"process", "pipe-self", pipe_self}, {"process", "pipe-ping-pong", pipe_other},
    {"process", "fork-exit", fork_exit}, {"process", "exec", exec_self}, {"process", "page-fault", page_faults},
    {"process", "mprotect", protect}, {"process", "signal", send_signals},
    {"process", "fault-signal", fault_signals}, {"system-call", "sched-yield", yield},
    {"system-call", "clock-gettime", clock_time}, {"threads", "mutex-2", mutexes},
    {"threads", "atomics-2", atomics}, {0},
};
