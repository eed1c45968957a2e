/* What `cargo xtask lab costs` boots in each VMM: does N operations between two readings of the TSC and prints
 * "COST name N ticks" on the first serial port. In the laboratory under -icount a tick is an instruction of the
 * host's processor, so what lies between is the guest's own few and all that the operation costs the host.
 *
 * The registers of virtio: OASIS Virtual I/O Device 1.2, 4.1.4 (PCI), 4.2.2 (MMIO), 5.2 (block). */
#include <stdint.h>

#define COM1 0x3F8
#define SCRATCH (COM1 + 7)
#define VECTOR 0x40
#define LAPIC ((volatile uint32_t *)0xFEE00000)
#define CALLS 2000
#define REQUESTS 500
#define WARM_UP 50

extern uint64_t pml4[512], spare_pdpt[512], spare_pd[512];

static inline uint64_t tsc(void) {
    uint32_t low, high;
    asm volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}
static inline void out8(uint16_t port, uint8_t v) { asm volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static inline void out32(uint16_t port, uint32_t v) { asm volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }
static inline uint8_t in8(uint16_t port) {
    uint8_t v;
    asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline uint32_t in32(uint16_t port) {
    uint32_t v;
    asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

static void say(const char *text) {
    for (; *text; text++) {
        while (!(in8(COM1 + 5) & 0x20)) {}
        out8(COM1, *text);
    }
}
static void say_number(uint64_t n) {
    char digits[21], *at = digits + 20;
    *at = 0;
    do *--at = '0' + n % 10;
    while (n /= 10);
    say(at);
}
static void cost(const char *name, uint64_t count, uint64_t ticks) {
    say("COST "), say(name), say(" "), say_number(count), say(" "), say_number(ticks), say("\r\n");
}

/* Runs `what` over and over, once to warm up. */
#define MEASURE(name, what)                              \
    do {                                                 \
        for (int i = 0; i < WARM_UP; i++) { what; }      \
        uint64_t start = tsc();                          \
        for (int i = 0; i < CALLS; i++) { what; }        \
        cost(name, CALLS, tsc() - start);                \
    } while (0)

/* ---- the disk, behind PCI or MMIO ---- */

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct used_element { uint32_t id, length; };

static struct descriptor descriptors[8] __attribute__((aligned(4096)));
static struct { uint16_t flags, index, ring[8], event; } available __attribute__((aligned(4096)));
static volatile struct { uint16_t flags, index; struct used_element ring[8]; uint16_t event; } used
    __attribute__((aligned(4096)));
static struct { uint32_t type, reserved; uint64_t sector; } header;
static uint8_t sector[512], status;

static volatile uint8_t *bell;
static int bell_bytes;
/* MMIO: interrupt status and acknowledge; none with MSI-X. */
static volatile uint32_t *interrupt_status;
/* A register that reads without effect. */
static volatile uint8_t *device_status;
static volatile uint64_t interrupted_at;

static uint32_t config(uint32_t device, uint32_t at) {
    out32(0xCF8, 0x80000000 | device << 11 | (at & 0xFC));
    return in32(0xCFC);
}
static void set_config(uint32_t device, uint32_t at, uint32_t value) {
    out32(0xCF8, 0x80000000 | device << 11 | (at & 0xFC));
    out32(0xCFC, value);
}

static volatile uint8_t *bar(uint32_t device, uint32_t number) {
    uint32_t low = config(device, 0x10 + 4 * number);
    uint64_t at = low & ~0xFull;
    if ((low & 6) == 4) at |= (uint64_t)config(device, 0x14 + 4 * number) << 32;
    if (at >> 32) {
        uint64_t gib = at & ~0x3FFFFFFFull;
        for (uint64_t i = 0; i < 512; i++) spare_pd[i] = (gib + (i << 21)) | 0x93;
        uint64_t *table = pml4[at >> 39] ? (uint64_t *)(pml4[at >> 39] & ~0xFFFull) : spare_pdpt;
        pml4[at >> 39] = (uint64_t)table | 3;
        table[at >> 30 & 511] = (uint64_t)spare_pd | 3;
    }
    return (volatile uint8_t *)at;
}

#define REG8(at) (*(volatile uint8_t *)(at))
#define REG16(at) (*(volatile uint16_t *)(at))
#define REG32(at) (*(volatile uint32_t *)(at))

static int start_pci(void) {
    for (uint32_t device = 0; device < 32; device++) {
        uint32_t id = config(device, 0);
        if (id != 0x10421AF4 && id != 0x10011AF4) continue;
        set_config(device, 4, 6); /* memory, bus master */
        volatile uint8_t *common = 0, *notify = 0;
        uint32_t multiplier = 0;
        for (uint32_t at = config(device, 0x34) & 0xFC; at; at = config(device, at) >> 8 & 0xFC) {
            uint32_t head = config(device, at), b = config(device, at + 4) & 0xFF;
            if ((head & 0xFF) == 0x11) { /* MSI-X: entry 0 */
                uint32_t table = config(device, at + 4);
                volatile uint8_t *entry = bar(device, table & 7) + (table & ~7u);
                REG32(entry) = 0xFEE00000, REG32(entry + 4) = 0, REG32(entry + 8) = VECTOR, REG32(entry + 12) = 0;
                set_config(device, at, head | 0x80000000);
            }
            if ((head & 0xFF) != 9) continue;
            if (head >> 24 == 1) common = bar(device, b) + config(device, at + 8);
            if (head >> 24 == 2) {
                notify = bar(device, b) + config(device, at + 8);
                multiplier = config(device, at + 16);
            }
        }
        if (!common || !notify) continue;
        REG8(common + 20) = 0;
        REG8(common + 20) = 3;
        REG32(common + 8) = 0, REG32(common + 12) = 0; /* no features but VERSION_1 */
        REG32(common + 8) = 1, REG32(common + 12) = 1;
        REG8(common + 20) = 11;
        REG16(common + 22) = 0;
        REG16(common + 24) = 8;
        REG16(common + 26) = 0;
        REG32(common + 32) = (uintptr_t)descriptors, REG32(common + 36) = 0;
        REG32(common + 40) = (uintptr_t)&available, REG32(common + 44) = 0;
        REG32(common + 48) = (uintptr_t)&used, REG32(common + 52) = 0;
        REG16(common + 28) = 1;
        REG8(common + 20) = 15;
        bell = notify + REG16(common + 30) * multiplier;
        bell_bytes = 2;
        device_status = common + 20;
        return 1;
    }
    return 0;
}

/* QEMU's microvm has them from 0xFEB00000. */
static int start_mmio(void) {
    for (uintptr_t at = 0xFEB00000; at < 0xFEB03000; at += 0x200) {
        if (REG32(at) != 0x74726976 || REG32(at + 8) != 2) continue;
        REG32(at + 0x70) = 0;
        REG32(at + 0x70) = 3;
        REG32(at + 0x24) = 0, REG32(at + 0x20) = 0;
        REG32(at + 0x24) = 1, REG32(at + 0x20) = 1;
        REG32(at + 0x70) = 11;
        REG32(at + 0x30) = 0;
        REG32(at + 0x38) = 8;
        REG32(at + 0x80) = (uintptr_t)descriptors, REG32(at + 0x84) = 0;
        REG32(at + 0x90) = (uintptr_t)&available, REG32(at + 0x94) = 0;
        REG32(at + 0xA0) = (uintptr_t)&used, REG32(at + 0xA4) = 0;
        REG32(at + 0x44) = 1;
        REG32(at + 0x70) = 15;
        bell = (volatile uint8_t *)(at + 0x50);
        bell_bytes = 4;
        interrupt_status = (volatile uint32_t *)(at + 0x60);
        device_status = (volatile uint8_t *)(at + 0x70);
        /* Which pin of which I/O APIC it has is the board's affair; the first are timers and the serial port. */
        for (uint32_t pin = 9; pin < 48; pin++) {
            volatile uint32_t *ioapic = (volatile uint32_t *)(uintptr_t)(pin < 24 ? 0xFEC00000 : 0xFEC10000);
            ioapic[0] = 0x10 + 2 * (pin % 24), ioapic[4] = VECTOR;
            ioapic[0] = 0x11 + 2 * (pin % 24), ioapic[4] = 0;
        }
        return 1;
    }
    return 0;
}

static void __attribute__((interrupt)) on_interrupt(void *frame) {
    (void)frame;
    interrupted_at = tsc();
    if (interrupt_status) interrupt_status[1] = interrupt_status[0];
    LAPIC[0xB0 / 4] = 0;
}

static struct { uint16_t low, selector, flags, middle; uint32_t high, zero; } idt[VECTOR + 1]
    __attribute__((aligned(16)));

static void interrupts_on(void) {
    uintptr_t at = (uintptr_t)on_interrupt;
    idt[VECTOR].low = at, idt[VECTOR].middle = at >> 16, idt[VECTOR].high = at >> 32;
    idt[VECTOR].selector = 8, idt[VECTOR].flags = 0x8E00;
    struct { uint16_t limit; void *base; } __attribute__((packed)) pointer = {sizeof idt - 1, idt};
    asm volatile("lidt %0" ::"m"(pointer));
    out8(0x21, 0xFF), out8(0xA1, 0xFF);
    LAPIC[0xF0 / 4] = 0x1FF;
}

/* Reads the first sector; the ticks from before the notification to the interrupt. */
static uint64_t request(void) {
    descriptors[0] = (struct descriptor){(uintptr_t)&header, 16, 1, 1};
    descriptors[1] = (struct descriptor){(uintptr_t)sector, 512, 3, 2};
    descriptors[2] = (struct descriptor){(uintptr_t)&status, 1, 2, 0};
    status = 0xFF;
    interrupted_at = 0;
    uint16_t next = used.index + 1;
    available.ring[available.index % 8] = 0;
    asm volatile("" ::: "memory");
    available.index++;
    asm volatile("mfence" ::: "memory");
    uint64_t start = tsc();
    if (bell_bytes == 2) REG16(bell) = 0;
    else REG32(bell) = 0;
    for (;;) {
        asm volatile("cli" ::: "memory");
        if (interrupted_at) break;
        asm volatile("sti; hlt" ::: "memory");
    }
    return used.index == next && status == 0 ? interrupted_at - start : 0;
}

static void measure_disk(void) {
    uint64_t total = 0;
    for (int i = 0; i < WARM_UP + REQUESTS; i++) {
        uint64_t ticks = request();
        if (!ticks) {
            say("FAILED a read of the disk\r\n");
            return;
        }
        if (i >= WARM_UP) total += ticks;
    }
    cost("virtio-blk", REQUESTS, total);
}

void payload(void) {
#ifdef IDLE
    for (;;) asm volatile("cli; hlt");
#endif
    uint32_t scratch;
    interrupts_on();
    MEASURE("nothing", asm volatile(""));
    MEASURE("cpuid", asm volatile("cpuid" : "=a"(scratch) : "a"(0), "c"(0) : "ebx", "edx"));
    MEASURE("pio-write", out8(SCRATCH, i));
    MEASURE("pio-read", in8(SCRATCH));
    if (in8(SCRATCH) != (uint8_t)(CALLS - 1)) say("FAILED the scratch register\r\n");
    if (!start_pci() && !start_mmio()) {
        say("FAILED there is no disk\r\n");
        return;
    }
    MEASURE("mmio-read", REG8(device_status));
    if (interrupt_status) MEASURE("mmio-write", interrupt_status[1] = 0);
    else MEASURE("mmio-write", REG16(device_status + 2) = 0);
    measure_disk();
    say("COSTS END\r\n");
}
