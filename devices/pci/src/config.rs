//! A function's configuration space: bytes with write masks.
//!
//! Built once when the function is made, then read and written by the guest through [`crate::FunctionCore`].
//! Invariant: a guest's write changes only bits of the write mask, or clears bits of the clear mask; so
//! everything else holds what the device put there. Sizing a BAR works by its mask alone.
//! PCI Express Base Specification 5.0, 7.5.

use crate::regs::{self, *};
use alloc::boxed::Box;
use alloc::vec::Vec;
use device::{read_le, write_le};

/// Bytes of an extended configuration space.
pub const CONFIG_BYTES: usize = 4096;
/// End of the part that capabilities may stand in.
const CAPABILITY_END: usize = 256;
const FIRST_CAPABILITY: u16 = 0x40;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: base class, subclass, programming interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor and subsystem ID (type 0 only).
    pub subsystem: (u16, u16),
}

/// An address space that BARs decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Ports.
    Io,
    /// Memory.
    Memory,
}

/// What a BAR asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BARs.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    pub kind: BarKind,
    pub bytes: u64,
}

/// A region that a function answers now, as far as its own registers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Number of its BAR, which is its region number at the device.
    pub bar: u8,
    /// Where the address belongs.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Length.
    pub bytes: u64,
}

/// What a bridge forwards, as its registers say. Ranges are inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BridgeState {
    pub secondary: u8,
    pub subordinate: u8,
    pub io: Option<(u64, u64)>,
    pub memory: [Option<(u64, u64)>; 2],
}

/// See the module's header.
pub struct ConfigSpace {
    values: Box<[u8; CONFIG_BYTES]>,
    initial: Box<[u8; CONFIG_BYTES]>,
    write_mask: Box<[u8; CONFIG_BYTES]>,
    clear_mask: Box<[u8; CONFIG_BYTES]>,
    bars: [Option<Bar>; 6],
    is_bridge: bool,
    last_capability: u16,
    next_capability: u16,
}

fn zeroed() -> Box<[u8; CONFIG_BYTES]> {
    Box::new([0; CONFIG_BYTES])
}

impl ConfigSpace {
    /// An endpoint's (type 0) header.
    pub fn endpoint(identity: Identity) -> Self {
        let mut config = Self::header(identity, false);
        config.init(SUBSYSTEM_VENDOR_ID, 2, u64::from(identity.subsystem.0));
        config.init(SUBSYSTEM_ID, 2, u64::from(identity.subsystem.1));
        config
    }

    /// A bridge's (type 1) header: 32-bit I/O and 64-bit prefetchable windows.
    pub fn bridge(identity: Identity) -> Self {
        let mut config = Self::header(identity, true);
        config.init(HEADER_TYPE, 1, 1);
        config.allow(PRIMARY_BUS, 4, 0x00FF_FFFF);
        // Low nibbles: 32-bit I/O, 64-bit prefetchable. All windows start closed: base above limit.
        config.init(IO_BASE, 2, 0x01F1);
        config.allow(IO_BASE, 2, 0xF0F0);
        config.init(MEMORY_BASE, 4, 0x0000_FFF0);
        config.allow(MEMORY_BASE, 4, 0xFFF0_FFF0);
        config.init(PREFETCH_BASE, 4, 0x0001_FFF1);
        config.allow(PREFETCH_BASE, 4, 0xFFF0_FFF0);
        config.allow(PREFETCH_BASE_UPPER, 8, u64::MAX);
        config.allow(IO_BASE_UPPER, 4, 0xFFFF_FFFF);
        config.allow(BRIDGE_CONTROL, 2, 0x0003);
        config
    }

    fn header(identity: Identity, is_bridge: bool) -> Self {
        let mut config = Self {
            values: zeroed(),
            initial: zeroed(),
            write_mask: zeroed(),
            clear_mask: zeroed(),
            bars: [None; 6],
            is_bridge,
            last_capability: 0,
            next_capability: FIRST_CAPABILITY,
        };
        config.init(VENDOR_ID, 2, u64::from(identity.vendor));
        config.init(DEVICE_ID, 2, u64::from(identity.device));
        config.init(REVISION, 4, u64::from(identity.class) << 8 | u64::from(identity.revision));
        let command = COMMAND_IO
            | COMMAND_MEMORY
            | COMMAND_BUS_MASTER
            | COMMAND_PARITY
            | COMMAND_SERR
            | COMMAND_INTX_DISABLE;
        config.allow(COMMAND, 2, u64::from(command));
        config.allow(CACHE_LINE_SIZE, 1, 0xFF);
        config.allow(INTERRUPT_LINE, 1, 0xFF);
        config
    }

    /// Puts `bytes` (at most 8) bytes of `value` at `offset`: the value after reset.
    pub fn init(&mut self, offset: u16, bytes: usize, value: u64) {
        let at = usize::from(offset)..usize::from(offset) + bytes;
        write_le(&mut self.initial[at.clone()], value);
        write_le(&mut self.values[at], value);
    }
    /// Lets the guest write the bits of `mask` in `bytes` (at most 8) bytes at `offset`.
    pub fn allow(&mut self, offset: u16, bytes: usize, mask: u64) {
        write_le(&mut self.write_mask[usize::from(offset)..usize::from(offset) + bytes], mask);
    }
    /// Lets the guest clear the bits of `mask` by writing ones to them.
    pub fn allow_clear(&mut self, offset: u16, bytes: usize, mask: u64) {
        write_le(&mut self.clear_mask[usize::from(offset)..usize::from(offset) + bytes], mask);
    }
    /// Changes a register from the device's side, whatever its masks.
    pub fn set(&mut self, offset: u16, bytes: usize, value: u64) {
        write_le(&mut self.values[usize::from(offset)..usize::from(offset) + bytes], value);
    }
    /// `bytes` (at most 8) bytes at `offset`.
    pub fn get(&self, offset: u16, bytes: usize) -> u64 {
        read_le(&self.values[usize::from(offset)..usize::from(offset) + bytes])
    }
    /// The command register.
    pub fn command(&self) -> u16 {
        self.get(COMMAND, 2) as u16
    }
    /// Whether it has a type 1 header.
    pub fn is_bridge(&self) -> bool {
        self.is_bridge
    }

    /// Declares BAR `index`. `bytes` is a power of two; at least 4 KiB of memory, or 4 to 256 ports.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, bytes: u64) {
        let slots = if self.is_bridge { 2 } else { 6 };
        let wide = matches!(kind, BarKind::Memory64 { .. });
        assert!(usize::from(index) + usize::from(wide) < slots, "no such BAR");
        let least = if kind == BarKind::Io { 4 } else { 0x1000 };
        assert!(bytes.is_power_of_two() && bytes >= least, "BAR of {bytes:#x} bytes");
        assert!(kind != BarKind::Io || bytes <= 256, "I/O BAR of {bytes:#x} bytes");
        let flags = match kind {
            BarKind::Io => 1,
            BarKind::Memory32 => 0,
            BarKind::Memory64 { prefetchable } => 4 | u64::from(prefetchable) << 3,
        };
        let at = BAR0 + 4 * u16::from(index);
        let width = if wide { 8 } else { 4 };
        self.init(at, width, flags);
        self.allow(at, width, !(bytes - 1));
        self.bars[usize::from(index)] = Some(Bar { kind, bytes });
    }

    pub(crate) fn bars(&self) -> impl Iterator<Item = (u8, Bar)> + '_ {
        self.bars.iter().enumerate().filter_map(|(i, bar)| Some((i as u8, (*bar)?)))
    }

    /// Appends a capability with `body` behind its two header bytes; returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let at = self.next_capability;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= CAPABILITY_END, "no room for another capability");
        self.init(at, 1, u64::from(id));
        for (i, byte) in body.iter().enumerate() {
            self.init(at + 2 + i as u16, 1, u64::from(*byte));
        }
        let link = if self.last_capability == 0 { regs::CAPABILITIES } else { self.last_capability + 1 };
        self.init(link, 1, u64::from(at));
        self.init(STATUS, 1, self.get(STATUS, 1) | u64::from(STATUS_CAPABILITIES));
        self.last_capability = at;
        self.next_capability = (end as u16).next_multiple_of(4);
        at
    }

    /// The guest reads; outside of the space: all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let at = usize::from(offset);
        match self.values.get(at..at + data.len()) {
            Some(values) => data.copy_from_slice(values),
            None => data.fill(0xFF),
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, new) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            let Some(value) = self.values.get_mut(at) else { return };
            let (mask, clear) = (self.write_mask[at], self.clear_mask[at]);
            *value = ((*value & !mask) | (new & mask)) & !(new & clear);
        }
    }

    /// What it decodes now, by its BARs and its command register.
    pub fn decoded(&self) -> Vec<Decoded> {
        let command = self.command();
        let mut out = Vec::new();
        for (bar, Bar { kind, bytes }) in self.bars() {
            let at = BAR0 + 4 * u16::from(bar);
            let (space, enable, raw) = match kind {
                BarKind::Io => (Space::Io, COMMAND_IO, self.get(at, 4)),
                BarKind::Memory32 => (Space::Memory, COMMAND_MEMORY, self.get(at, 4)),
                BarKind::Memory64 { .. } => (Space::Memory, COMMAND_MEMORY, self.get(at, 8)),
            };
            if command & enable != 0 {
                out.push(Decoded { bar, space, base: raw & !(bytes - 1), bytes });
            }
        }
        out
    }

    /// What it forwards, if it is a bridge.
    pub(crate) fn forwarded(&self) -> Option<BridgeState> {
        if !self.is_bridge {
            return None;
        }
        let command = self.command();
        let range = |base: u64, limit: u64, enable: u16| {
            (command & enable != 0 && base <= limit).then_some((base, limit))
        };
        let io_base = (self.get(IO_BASE, 1) & 0xF0) << 8 | self.get(IO_BASE_UPPER, 2) << 16;
        let io_limit = (self.get(IO_BASE + 1, 1) & 0xF0) << 8 | self.get(IO_BASE_UPPER + 2, 2) << 16 | 0xFFF;
        let base = (self.get(MEMORY_BASE, 2) & 0xFFF0) << 16;
        let limit = (self.get(MEMORY_BASE + 2, 2) & 0xFFF0) << 16 | 0xF_FFFF;
        let pref_base = (self.get(PREFETCH_BASE, 2) & 0xFFF0) << 16 | self.get(PREFETCH_BASE_UPPER, 4) << 32;
        let pref_limit = (self.get(PREFETCH_BASE + 2, 2) & 0xFFF0) << 16
            | self.get(PREFETCH_BASE_UPPER + 4, 4) << 32
            | 0xF_FFFF;
        Some(BridgeState {
            secondary: self.get(SECONDARY_BUS, 1) as u8,
            subordinate: self.get(SUBORDINATE_BUS, 1) as u8,
            io: range(io_base, io_limit, COMMAND_IO),
            memory: [range(base, limit, COMMAND_MEMORY), range(pref_base, pref_limit, COMMAND_MEMORY)],
        })
    }

    /// Back to the values after power-up.
    pub fn reset(&mut self) {
        self.values.copy_from_slice(&*self.initial);
    }

    /// The writable bytes that differ from those after reset: offset and value, ascending.
    pub(crate) fn changed(&self) -> Vec<(u16, u8)> {
        let changed = |at: &usize| {
            (self.values[*at] ^ self.initial[*at]) & (self.write_mask[*at] | self.clear_mask[*at]) != 0
        };
        (0..CONFIG_BYTES).filter(changed).map(|at| (at as u16, self.values[at])).collect()
    }

    /// Takes over the writable bits of one byte that was saved; `false` outside of the space.
    pub(crate) fn restore_byte(&mut self, offset: u16, value: u8) -> bool {
        let at = usize::from(offset);
        let Some(now) = self.values.get_mut(at) else { return false };
        let may_change = self.write_mask[at] | self.clear_mask[at];
        *now = (*now & !may_change) | (value & may_change);
        true
    }
}
