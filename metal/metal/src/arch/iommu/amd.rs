//! AMD's IOMMUs (48882, 3.4). All units have the same tables.
//!
//! Called by: [`super`].

use super::{NotStarted, comes_true};
use crate::arch::pci::ConfigPorts;
use crate::iommu::DeviceId;
use crate::iommu::amd::{self, Event, Tables, command};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use spin::{Mutex, Once};
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction};

const DEVICE_TABLE: u64 = 0x00;
const COMMAND_BUFFER: u64 = 0x08;
const EVENT_LOG: u64 = 0x10;
const CONTROL: u64 = 0x18;
const COMMAND_HEAD: u64 = 0x2000;
const COMMAND_TAIL: u64 = 0x2008;
const EVENT_HEAD: u64 = 0x2010;
const EVENT_TAIL: u64 = 0x2018;
/// Control: translation, event log, command buffer.
const ENABLE: u64 = 1 | 1 << 2 | 1 << 12;
/// Commands and events have 16 bytes; a ring of a page has 2⁸.
const RING_LENGTH: u64 = 8 << 56;
const ENTRIES: usize = 256;

/// Command and status of a function (PCI Local Bus 3.0, 6.2.3), and in it "signalled target abort", cleared by writing it.
const STATUS: u8 = 0x04;
const TARGET_ABORT: u32 = 1 << 27;

#[repr(C, align(4096))]
struct Ring([AtomicU64; 2 * ENTRIES]);

impl Ring {
    /// For ever: hardware has its address.
    fn new() -> &'static Self {
        Box::leak(Box::new(Self([const { AtomicU64::new(0) }; 2 * ENTRIES])))
    }
    fn register(&self) -> u64 {
        (&raw const *self).expose_provenance() as u64 | RING_LENGTH
    }
}

struct Unit {
    place: amd::Unit,
    commands: &'static Ring,
    events: &'static Ring,
    /// The event that is looked for next, and the place of the next command.
    next_event: usize,
    next_command: usize,
}

static UNITS: Mutex<Vec<Unit>> = Mutex::new(Vec::new());
static TABLES: Once<Tables> = Once::new();
/// Set by the last command.
static DONE: AtomicU64 = AtomicU64::new(0);

impl Unit {
    fn write(&self, register: u64, value: u64) {
        let at = core::ptr::with_exposed_provenance_mut::<u64>((self.place.registers + register) as usize);
        // SAFETY: `start`'s caller vouches for the registers.
        unsafe { at.write_volatile(value) };
    }

    fn switch_on(&self, tables: &Tables) {
        self.write(CONTROL, 0);
        self.write(DEVICE_TABLE, tables.device_register());
        self.write(COMMAND_BUFFER, self.commands.register());
        self.write(EVENT_LOG, self.events.register());
        [COMMAND_HEAD, COMMAND_TAIL, EVENT_HEAD, EVENT_TAIL].into_iter().for_each(|ring| self.write(ring, 0));
        self.write(CONTROL, ENABLE);
    }

    fn command(&mut self, words: [u64; 2]) {
        for (n, word) in words.into_iter().enumerate() {
            self.commands.0[2 * self.next_command + n].store(word, SeqCst);
        }
        self.next_command = (self.next_command + 1) % ENTRIES;
        self.write(COMMAND_TAIL, self.next_command as u64 * 16);
    }

    /// Has it forget what it knew; whether it did.
    fn forget(&mut self, devices: &[DeviceId]) -> bool {
        DONE.store(0, SeqCst);
        devices.iter().for_each(|device| self.command(command::invalidate_device(*device)));
        self.command(command::invalidate_pages());
        self.command(command::completion((&raw const DONE).expose_provenance() as u64, 1));
        comes_true(|| DONE.load(SeqCst) != 0)
    }

    /// Whether it ended an access since it was asked last. QEMU 7.2 tells of faults in this way only: it takes its log of
    /// events for full.
    fn has_aborted(&self) -> bool {
        let place = function(self.place.function);
        let status = ConfigPorts.read_word(place, STATUS);
        if status & TARGET_ABORT != 0 {
            // Other bits of the status stay as they are.
            ConfigPorts.write_word(place, STATUS, status & 0xFFFF | TARGET_ABORT);
        }
        status & TARGET_ABORT != 0
    }

    /// The next event, if it has come: what is not zero.
    fn event(&mut self) -> Option<Event> {
        let words = [0, 1].map(|n| &self.events.0[2 * self.next_event + n]);
        if words[0].load(SeqCst) == 0 {
            return None;
        }
        let event = Event(words.map(|word| word.swap(0, SeqCst)));
        self.next_event = (self.next_event + 1) % ENTRIES;
        self.write(EVENT_HEAD, self.next_event as u64 * 16);
        Some(event)
    }
}

/// A function by its number.
fn function(device: DeviceId) -> DeviceFunction {
    let DeviceId(id) = device;
    DeviceFunction { bus: (id >> 8) as u8, device: (id >> 3 & 31) as u8, function: (id & 7) as u8 }
}

/// See [`super::start`].
///
/// # Safety
/// As there.
pub unsafe fn start(units: &[amd::Unit], devices: &[DeviceId], arena: Range<u64>) -> Result<u64, NotStarted> {
    let last_bus = devices.iter().map(|device| device.bus()).max().unwrap_or(0);
    let tables = TABLES.call_once(|| {
        let mut tables = Tables::new(last_bus);
        tables.map(arena);
        devices.iter().for_each(|device| _ = tables.grant(*device));
        tables
    });
    let mut all = UNITS.lock();
    for place in units {
        let (commands, events) = (Ring::new(), Ring::new());
        let mut unit = Unit { place: *place, commands, events, next_event: 0, next_command: 0 };
        unit.switch_on(tables);
        if !unit.forget(devices) {
            return Err(NotStarted::Silent);
        }
        all.push(unit);
    }
    Ok(tables.bytes())
}

/// Hands what devices were kept from to `say`.
pub fn tell(say: &mut dyn FnMut(core::fmt::Arguments<'_>)) {
    for unit in UNITS.lock().iter_mut() {
        while let Some(event) = unit.event() {
            say(format_args!("{event}"));
        }
        if unit.has_aborted() {
            say(format_args!("a device was kept from memory that was not given to it"));
        }
    }
}
