//! Descriptor tables and interrupt handlers of our own: every exception of the hypervisor is its end, and told;
//! interrupts are the timer's and devices'.
//!
//! Double faults, NMIs and machine checks have stacks of their own, so that an overflowing stack (whose guard page is
//! not mapped) can still be told.

use super::{lapic, processors};
use alloc::boxed::Box;
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, Ordering};

/// Vector of the local APIC's timer.
pub const TIMER_VECTOR: u8 = 0x20;
/// Vector of a wake-up from another processor.
pub const WAKE_VECTOR: u8 = 0x21;
/// Vector of all devices.
pub const DEVICE_VECTOR: u8 = 0x22;
/// Vector of the local APIC's spurious interrupt.
pub const SPURIOUS_VECTOR: u8 = 0xFF;

const CODE: u16 = 8;
const DATA: u16 = 16;
const TSS: u16 = 24;
const IST_BYTES: usize = 16 << 10;
const ENTRY_STRIDE: u64 = 16;

global_asm!(
    ".balign 16",
    ".global metal_interrupt_entries",
    "metal_interrupt_entries:",
    ".set metal_vector, 0",
    ".rept 256",
    ".balign 16",
    // Those that push an error code: 8, 10-14, 17, 21, 29, 30.
    ".if ((0x60227D00 >> (metal_vector & 31)) & 1) == 0 || metal_vector > 31",
    "push 0",
    ".endif",
    ".byte 0x68",
    ".long metal_vector",
    "jmp metal_interrupt_common",
    ".set metal_vector, metal_vector + 1",
    ".endr",
    "metal_interrupt_common:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    "mov rbx, rsp",
    "and rsp, -16",
    "call {handler}",
    "mov rsp, rbx",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    handler = sym interrupt,
);

unsafe extern "C" {
    static metal_interrupt_entries: u8;
}

/// What the entries leave on the stack.
#[repr(C)]
#[derive(Debug)]
struct Frame {
    /// R15 to R8, RDI, RSI.
    registers: [u64; 10],
    rbp: u64,
    /// RBX, RDX, RCX, RAX.
    more: [u64; 4],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// An NMI is the end.
static STOP_AT_NMI: AtomicBool = AtomicBool::new(false);

/// From now on a processor that gets an NMI stops.
pub fn stop_at_nmi() {
    STOP_AT_NMI.store(true, Ordering::SeqCst);
}

/// What is called for each interrupt of the timer or of another processor; it takes no lock.
static ON_TIMER: spin::Once<fn()> = spin::Once::new();

/// Says what they do. Only the first call counts.
pub fn on_timer(handler: fn()) {
    ON_TIMER.call_once(|| handler);
}

/// The same for devices' interrupts.
static ON_DEVICE: spin::Once<fn()> = spin::Once::new();

/// Says what a device's interrupt does. Only the first call counts.
pub fn on_device(handler: fn()) {
    ON_DEVICE.call_once(|| handler);
}

/// The same for NMIs.
static ON_NMI: spin::Once<fn()> = spin::Once::new();

/// Says what an NMI does. Only the first call counts.
pub fn on_nmi(handler: fn()) {
    ON_NMI.call_once(|| handler);
}

extern "C" fn interrupt(frame: &Frame) {
    match frame.vector as u8 {
        TIMER_VECTOR | WAKE_VECTOR => {
            if let Some(handler) = ON_TIMER.get() {
                handler();
            }
            lapic::end_of_interrupt();
        }
        DEVICE_VECTOR => {
            if let Some(handler) = ON_DEVICE.get() {
                handler();
            }
            lapic::end_of_interrupt();
        }
        SPURIOUS_VECTOR => {}
        2 if STOP_AT_NMI.load(Ordering::SeqCst) => super::stop(),
        // An NMI of the board has nobody who asked for it.
        2 => {
            if let Some(handler) = ON_NMI.get() {
                handler();
            }
        }
        vector => crate::panic::fault(
            format_args!(
                "{}exception {vector}, error code {:#x}, at {:#x}, stack {:#x}, CR2 {:#x}",
                if processors::is_guard(cr2()) { "the stack is full: " } else { "" },
                frame.error,
                frame.rip,
                frame.rsp,
                cr2()
            ),
            frame.rbp,
        ),
    }
}

fn cr2() -> u64 {
    let value: u64;
    // SAFETY: only reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

#[repr(C, packed)]
struct TaskState {
    reserved: u32,
    rsp: [u64; 3],
    reserved_too: u64,
    ist: [u64; 7],
    reserved_last: u64,
    reserved_word: u16,
    io_map: u16,
}

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// A processor's own tables. They are never freed.
#[repr(C, align(64))]
struct Tables {
    gdt: [u64; 5],
    tss: TaskState,
    idt: [[u64; 2]; 256],
    stacks: [[u8; IST_BYTES]; 3],
}

fn gate(address: u64, ist: u64) -> [u64; 2] {
    let low =
        address & 0xFFFF | u64::from(CODE) << 16 | ist << 32 | 0x8E << 40 | (address >> 16 & 0xFFFF) << 48;
    [low, address >> 32]
}

fn task_state_descriptor(base: u64) -> [u64; 2] {
    let limit = size_of::<TaskState>() as u64 - 1;
    [limit & 0xFFFF | (base & 0xFF_FFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56, base >> 32]
}

/// Gives this processor its tables.
///
/// # Safety
/// Once a processor, in 64-bit mode at privilege level 0, with interrupts off.
pub unsafe fn install() {
    let tables = Box::leak(Box::new(Tables {
        gdt: [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0, 0],
        tss: TaskState {
            reserved: 0,
            rsp: [0; 3],
            reserved_too: 0,
            ist: [0; 7],
            reserved_last: 0,
            reserved_word: 0,
            io_map: size_of::<TaskState>() as u16,
        },
        idt: [[0; 2]; 256],
        stacks: [[0; IST_BYTES]; 3],
    }));
    let mut ist = [0; 7];
    for (top, stack) in ist.iter_mut().zip(&tables.stacks) {
        *top = (stack.as_ptr_range().end.addr() & !15) as u64;
    }
    tables.tss.ist = ist;
    let [low, high] = task_state_descriptor((&raw const tables.tss).addr() as u64);
    (tables.gdt[3], tables.gdt[4]) = (low, high);
    let entries = (&raw const metal_interrupt_entries).addr() as u64;
    for (vector, entry) in tables.idt.iter_mut().enumerate() {
        let ist = match vector {
            8 => 1,
            2 => 2,
            18 => 3,
            _ => 0,
        };
        *entry = gate(entries + vector as u64 * ENTRY_STRIDE, ist);
    }
    let gdt =
        TablePointer { limit: size_of_val(&tables.gdt) as u16 - 1, base: tables.gdt.as_ptr().addr() as u64 };
    let idt =
        TablePointer { limit: size_of_val(&tables.idt) as u16 - 1, base: tables.idt.as_ptr().addr() as u64 };
    // SAFETY: the tables live for ever; the selectors are those of this GDT, whose code and data segments are like the
    // ones in use.
    unsafe {
        asm!(
            "lgdt [{gdt}]",
            "lidt [{idt}]",
            "push {code}",
            "lea {t}, [rip + 2f]",
            "push {t}",
            "retfq",
            "2:",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            "mov ss, {data:x}",
            "ltr {tss:x}",
            gdt = in(reg) &raw const gdt,
            idt = in(reg) &raw const idt,
            code = const CODE,
            data = in(reg) u64::from(DATA),
            tss = in(reg) u64::from(TSS),
            t = out(reg) _,
        );
    }
}
