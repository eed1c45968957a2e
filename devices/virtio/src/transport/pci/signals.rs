//! The transport's side that runners reach from any thread: interrupts, the status bit that asks for a reset.

use crate::device::Signals;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use pci::Interrupts;
use sync::Mutex;

/// No vector: the event does not interrupt.
pub const NO_VECTOR: u16 = 0xFFFF;

/// Status: the driver is ready.
pub const DRIVER_OK: u8 = 4;
/// Status: the device met an error that only a reset helps against.
pub const NEEDS_RESET: u8 = 0x40;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Lock order: ISR → interrupts.
pub struct PciSignals {
    interrupts: Arc<Interrupts>,
    pub status: AtomicU8,
    pub generation: AtomicU8,
    pub config_vector: AtomicU16,
    pub queue_vectors: Vec<AtomicU16>,
    isr: Mutex<u8>,
}

impl PciSignals {
    pub fn new(interrupts: Arc<Interrupts>, queues: usize) -> Self {
        Self {
            interrupts,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
        }
    }

    pub fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// A vector as the driver may set it: none, if there is no such.
    pub fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.interrupts.msix_vectors() { vector } else { NO_VECTOR }
    }

    fn interrupt(&self, vector: u16, isr_bit: u8) {
        if self.interrupts.msix_enabled() {
            if vector != NO_VECTOR {
                self.interrupts.fire(vector);
            }
            return;
        }
        // The line changes under the lock: it always tells what the register says.
        let mut isr = self.isr.lock();
        *isr |= isr_bit;
        self.interrupts.set_intx(true);
    }

    fn config_interrupt(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.status() & DRIVER_OK != 0 {
            self.interrupt(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
        }
    }

    /// The guest reads the ISR register, which clears it and lowers the line.
    pub fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock();
        self.interrupts.set_intx(false);
        core::mem::take(&mut *isr)
    }

    pub fn isr(&self) -> u8 {
        *self.isr.lock()
    }

    /// Puts a saved value in place; the line is the function's to restore.
    pub fn restore_isr(&self, value: u8) {
        *self.isr.lock() = value;
    }

    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.take_isr();
    }
}

impl Signals for PciSignals {
    fn used(&self, queue: u16) {
        let vector = self.queue_vectors.get(usize::from(queue));
        self.interrupt(vector.map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst)), ISR_QUEUE);
    }
    fn config_changed(&self) {
        self.config_interrupt();
    }
    fn needs_reset(&self) {
        self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        self.config_interrupt();
    }
}
