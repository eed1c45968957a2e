//! Intel's IOMMUs (VT-d, 11.4): registers, with invalidation by registers, too. All units have the same tables.
//!
//! Called by: [`super`].

use super::{NotStarted, comes_true};
use crate::arch;
use crate::iommu::DeviceId;
use crate::iommu::intel::{Abilities, Fault, Tables, common_levels};
use alloc::vec::Vec;
use core::ops::Range;
use spin::{Mutex, Once};

const CAPABILITY: u64 = 0x08;
const EXTENDED_CAPABILITY: u64 = 0x10;
const GLOBAL_COMMAND: u64 = 0x18;
const GLOBAL_STATUS: u64 = 0x1C;
const ROOT_TABLE: u64 = 0x20;
const CONTEXT_COMMAND: u64 = 0x28;
const FAULT_STATUS: u64 = 0x34;
const FAULT_CONTROL: u64 = 0x38;
const PROTECTED_RANGES: u64 = 0x64;

/// Global command and status: translation, root table's pointer, write buffer, queued invalidation, remapped interrupts.
const TRANSLATION: u32 = 1 << 31;
const ROOT_POINTER: u32 = 1 << 30;
const WRITE_BUFFER: u32 = 1 << 27;
const QUEUE: u32 = 1 << 26;
const INTERRUPTS: u32 = 1 << 25;
/// Of the status what a command keeps (11.4.4.1): all but what is done once.
const KEPT: u32 = 0x96FF_FFFF;
/// Invalidate all contexts; all translations, reads and writes before drained (11.4.6, 11.4.8.1). The top bit is cleared
/// when it is done.
const ALL_CONTEXTS: u64 = 1 << 63 | 1 << 61;
const ALL_TRANSLATIONS: u64 = 1 << 63 | 1 << 60 | 0b11 << 48;
const BUSY: u64 = 1 << 63;
/// Fault status: records were lost; cleared by writing it. Fault control: no interrupt.
const OVERFLOW: u32 = 1;
const MASKED: u32 = 1 << 31;

struct Unit {
    registers: u64,
    abilities: Abilities,
}

static UNITS: Mutex<Vec<Unit>> = Mutex::new(Vec::new());
static TABLES: Once<Tables> = Once::new();

impl Unit {
    /// # Safety
    /// These are the registers of a unit, and mapped, for ever.
    unsafe fn new(registers: u64) -> Self {
        let mut unit = Self { registers, abilities: Abilities { capability: 0, extended: 0 } };
        unit.abilities =
            Abilities { capability: unit.read(CAPABILITY), extended: unit.read(EXTENDED_CAPABILITY) };
        unit
    }

    fn at<T>(&self, register: u64) -> *mut T {
        core::ptr::with_exposed_provenance_mut((self.registers + register) as usize)
    }
    fn read(&self, register: u64) -> u64 {
        // SAFETY: `new`'s caller vouches for the registers; the manual's, or those that the unit tells of.
        unsafe { self.at::<u64>(register).read_volatile() }
    }
    fn write(&self, register: u64, value: u64) {
        // SAFETY: as above.
        unsafe { self.at::<u64>(register).write_volatile(value) };
    }
    fn read32(&self, register: u64) -> u32 {
        // SAFETY: as above.
        unsafe { self.at::<u32>(register).read_volatile() }
    }
    fn write32(&self, register: u64, value: u32) {
        // SAFETY: as above.
        unsafe { self.at::<u32>(register).write_volatile(value) };
    }

    /// Sets or clears one bit, and waits until the status has it.
    fn command(&self, bit: u32, on: bool) -> Result<(), NotStarted> {
        let kept = self.read32(GLOBAL_STATUS) & KEPT & !bit;
        self.write32(GLOBAL_COMMAND, if on { kept | bit } else { kept });
        // That the buffer is being written back is what this bit of the status says.
        let done = || (self.read32(GLOBAL_STATUS) & bit != 0) == (on && bit != WRITE_BUFFER);
        comes_true(done).then_some(()).ok_or(NotStarted::Silent)
    }

    fn invalidate(&self, register: u64, what: u64) -> Result<(), NotStarted> {
        self.write(register, what);
        comes_true(|| self.read(register) & BUSY == 0).then_some(()).ok_or(NotStarted::Silent)
    }

    fn switch_on(&self, tables: &Tables) -> Result<(), NotStarted> {
        // Firmware may have used it.
        for bit in [TRANSLATION, INTERRUPTS, QUEUE] {
            if self.read32(GLOBAL_STATUS) & bit != 0 {
                self.command(bit, false)?;
            }
        }
        self.write32(FAULT_CONTROL, MASKED);
        self.write(ROOT_TABLE, tables.root_register());
        self.command(ROOT_POINTER, true)?;
        if self.abilities.buffers_writes() {
            self.command(WRITE_BUFFER, true)?;
        }
        self.invalidate(CONTEXT_COMMAND, ALL_CONTEXTS)?;
        self.invalidate(self.abilities.invalidation(), ALL_TRANSLATIONS)?;
        self.command(TRANSLATION, true)?;
        if self.abilities.protects_ranges() {
            self.write32(PROTECTED_RANGES, 0);
        }
        Ok(())
    }

    fn tell(&self, say: &mut dyn FnMut(core::fmt::Arguments<'_>)) {
        let (at, records) = self.abilities.faults();
        for record in (0..records).map(|n| at + 16 * n) {
            let what = self.read(record + 8);
            if what & Fault::VALID != 0 {
                say(format_args!("{}", Fault([self.read(record), what])));
                self.write(record + 8, Fault::VALID);
            }
        }
        if self.read32(FAULT_STATUS) & OVERFLOW != 0 {
            self.write32(FAULT_STATUS, OVERFLOW);
        }
    }
}

/// See [`super::start`].
///
/// # Safety
/// As there.
pub unsafe fn start(units: &[u64], devices: &[DeviceId], arena: Range<u64>) -> Result<u64, NotStarted> {
    // SAFETY: as the caller says.
    let units: Vec<_> = units.iter().map(|registers| unsafe { Unit::new(*registers) }).collect();
    let abilities: Vec<_> = units.iter().map(|unit| unit.abilities).collect();
    let levels = common_levels(&abilities).ok_or(NotStarted::Levels)?;
    let tables = TABLES.call_once(|| {
        let mut tables = Tables::new(levels);
        tables.map(arena);
        devices.iter().for_each(|device| tables.grant(*device));
        tables
    });
    if !abilities.iter().all(|unit| unit.is_coherent()) {
        arch::write_caches_back();
    }
    units.iter().try_for_each(|unit| unit.switch_on(tables))?;
    *UNITS.lock() = units;
    Ok(tables.bytes())
}

/// Hands what devices were kept from to `say`.
pub fn tell(say: &mut dyn FnMut(core::fmt::Arguments<'_>)) {
    UNITS.lock().iter().for_each(|unit| unit.tell(say));
}
