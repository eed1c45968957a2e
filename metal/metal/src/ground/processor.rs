//! The processor as guests' engine sees it: time slices, the timer that ends them, and what asks for it back.

use crate::arch::{clock, interrupts, lapic};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use cpu_hardware::Ground;

/// Memory is mapped one to one.
pub fn physical(address: usize) -> u64 {
    address as u64
}

/// When whoever runs now has had its time, or the scheduler has something to do, in our time.
static TURN_ENDS: AtomicU64 = AtomicU64::new(0);
/// An interrupt came, or the scheduler is wanted: to be seen before a guest is entered.
static INTERRUPTED: AtomicU32 = AtomicU32::new(0);
/// A device wants to be polled.
static WORK: AtomicBool = AtomicBool::new(false);

/// See the module's header.
pub struct Processor;

impl Processor {
    /// Interrupts are noticed from now on.
    pub fn initialize() {
        interrupts::on_timer(|| INTERRUPTED.store(1, SeqCst));
        interrupts::on_device(Self::want_scheduler);
    }

    /// Whoever runs next has it until `at`, in our time.
    pub fn grant_until(at: u64) {
        TURN_ENDS.store(at, SeqCst);
    }

    /// The scheduler is to look at its work soon.
    pub fn want_scheduler() {
        WORK.store(true, SeqCst);
        INTERRUPTED.store(1, SeqCst);
    }

    /// The scheduler looks now.
    pub fn scheduler_looks() {
        WORK.store(false, SeqCst);
    }

    /// Waits until `at` in our time, or an interrupt.
    pub fn idle_until(at: u64) {
        crate::arch::disable_interrupts();
        let now = clock::now_ns();
        if at > now && !WORK.load(SeqCst) {
            lapic::interrupt_in(at - now);
            crate::arch::wait_for_interrupt();
        }
        crate::arch::enable_interrupts();
    }
}

impl Ground for Processor {
    fn physical(&self) -> fn(usize) -> u64 {
        physical
    }

    fn tsc_khz(&self) -> u32 {
        clock::tsc_khz()
    }

    fn before_entry(&self, due_in: Option<u64>) -> bool {
        INTERRUPTED.store(0, SeqCst);
        let left = TURN_ENDS.load(SeqCst).saturating_sub(clock::now_ns());
        if left == 0 || WORK.load(SeqCst) {
            return false;
        }
        lapic::interrupt_in(left.min(due_in.unwrap_or(u64::MAX)));
        true
    }

    fn interrupted(&self) -> &AtomicU32 {
        &INTERRUPTED
    }
}
