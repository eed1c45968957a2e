//! What firmware does before an operating system starts: bus numbers, BARs, bridge windows, interrupt lines.
//!
//! Called for direct boot, after every function was attached or reset. Deterministic: larger regions first,
//! then by slot and BAR, so that the same machine gets the same addresses every time. Memory that does not
//! fit above 4 GiB goes below. Everything assigned decodes afterwards; bus mastering stays off.

use crate::address::Devfn;
use crate::config::{Bar, BarKind};
use crate::pirq::{PIRQS, pirq_of};
use crate::regs::*;
use crate::topology::{FunctionId, Parent, SharedFunction, Topology, Windows};
use alloc::vec::Vec;

/// Ports that a bridge gets at least, also with nothing behind it.
const BRIDGE_IO: u64 = IO_GRANULE;
/// Memory window below 4 GiB that a bridge gets at least.
const BRIDGE_MEMORY: u64 = 2 << 20;
/// Prefetchable window that a bridge gets at least.
const BRIDGE_PREFETCH: u64 = 1 << 30;
const MEMORY_GRANULE: u64 = 1 << 20;
const IO_GRANULE: u64 = 0x1000;

/// Why not everything could be assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// More bridges than bus numbers.
    #[error("more PCI bridges than bus numbers")]
    Buses,
    /// A region found no room.
    #[error("no room for {bytes:#x} bytes of {kind} of PCI function {devfn} on bus {bus:#x}")]
    Room {
        /// Bus of the function.
        bus: u8,
        /// The function.
        devfn: Devfn,
        /// What it is.
        kind: &'static str,
        /// How much it needs.
        bytes: u64,
    },
}

/// Which pool a region comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Pool {
    Io,
    Memory,
    Prefetch,
}

impl Pool {
    fn name(self) -> &'static str {
        match self {
            Pool::Io => "ports",
            Pool::Memory => "memory",
            Pool::Prefetch => "64-bit memory",
        }
    }
}

#[derive(Clone, Copy)]
enum Target {
    Bar { index: u8, kind: BarKind },
    Window,
}

struct Need {
    function: SharedFunction,
    bus: u8,
    devfn: Devfn,
    pool: Pool,
    target: Target,
    bytes: u64,
    align: u64,
    /// The functions behind the window.
    behind: Vec<Need>,
}

/// Free room: inclusive ranges.
#[derive(Default)]
struct Room(Vec<(u64, u64)>);

impl Room {
    fn take(&mut self, bytes: u64, align: u64) -> Option<u64> {
        for range in &mut self.0 {
            let Some(base) = range.0.checked_next_multiple_of(align) else { continue };
            let Some(last) = base.checked_add(bytes - 1) else { continue };
            if last <= range.1 {
                // What alignment skips is lost; largest first keeps that small.
                range.0 = last.saturating_add(1);
                return Some(base);
            }
        }
        None
    }
}

struct Rooms {
    io: Room,
    memory: Room,
    prefetch: Room,
}

impl Topology {
    /// Assigns everything. On an error what was assigned so far stays, the rest decodes nothing.
    pub fn assign(&self) -> Result<(), AssignError> {
        let mut next_bus = 1;
        self.number_buses(Parent::Root, 0, &mut next_bus)?;
        let needs = self.needs(Parent::Root, 0);
        let Windows { io, memory32, memory64 } = self.windows().clone();
        place(needs, &mut Rooms { io: Room(io), memory: Room(memory32), prefetch: Room(memory64) })?;
        self.enable(Parent::Root);
        Ok(())
    }

    /// Tells every function with an interrupt pin which interrupt of the 8259 it drives: `lines` are those that PIRQA to
    /// PIRQH are routed to (PCI Local Bus Specification 3.0, 6.2.4).
    pub fn set_interrupt_lines(&self, lines: &[u8; PIRQS]) {
        self.set_lines_below(Parent::Root, &|device, pin| lines[usize::from(pirq_of(device, pin))]);
    }

    fn set_lines_below(&self, parent: Parent, line_of: &dyn Fn(u8, u8) -> u8) {
        for (id, devfn, function) in self.children(parent) {
            let pin = function.lock().core().config().get(INTERRUPT_PIN, 1) as u8;
            if pin != 0 {
                function.lock().config_write(INTERRUPT_LINE, &[line_of(devfn.device(), pin)]);
            }
            // A bridge passes pins on rotated by the device's number (PCI-to-PCI Bridge Specification 1.2, 9.1).
            self.set_lines_below(Parent::Bridge(id), &|device, pin| {
                line_of(devfn.device(), (device + pin - 1) % 4 + 1)
            });
        }
    }

    fn number_buses(&self, parent: Parent, bus: u8, next: &mut u16) -> Result<(), AssignError> {
        for (id, _, function) in self.children(parent) {
            if !function.lock().core().config().is_bridge() {
                continue;
            }
            let secondary = u8::try_from(*next).map_err(|_| AssignError::Buses)?;
            *next += 1;
            function.lock().config_write(PRIMARY_BUS, &[bus, secondary, 0xFF]);
            self.number_buses(Parent::Bridge(id), secondary, next)?;
            function.lock().config_write(SUBORDINATE_BUS, &[(*next - 1) as u8]);
        }
        Ok(())
    }

    fn needs(&self, parent: Parent, bus: u8) -> Vec<Need> {
        let mut needs = Vec::new();
        for (id, devfn, function) in self.children(parent) {
            let bars: Vec<(u8, Bar)> = function.lock().core().config().bars().collect();
            for (index, Bar { kind, bytes }) in bars {
                let pool = match kind {
                    BarKind::Io => Pool::Io,
                    BarKind::Memory32 => Pool::Memory,
                    // Behind a bridge only prefetchable windows reach above 4 GiB.
                    BarKind::Memory64 { prefetchable: false } if parent != Parent::Root => Pool::Memory,
                    BarKind::Memory64 { .. } => Pool::Prefetch,
                };
                let target = Target::Bar { index, kind };
                let function = function.clone();
                needs.push(Need {
                    function,
                    bus,
                    devfn,
                    pool,
                    target,
                    bytes,
                    align: bytes,
                    behind: Vec::new(),
                });
            }
            if function.lock().core().config().is_bridge() {
                self.bridge_needs(id, bus, devfn, &function, &mut needs);
            }
        }
        sort(&mut needs);
        needs
    }

    fn bridge_needs(
        &self,
        id: FunctionId,
        bus: u8,
        devfn: Devfn,
        bridge: &SharedFunction,
        needs: &mut Vec<Need>,
    ) {
        let secondary = bridge.lock().core().config().get(SECONDARY_BUS, 1) as u8;
        let mut behind = self.needs(Parent::Bridge(id), secondary);
        let minima =
            [(Pool::Io, BRIDGE_IO), (Pool::Memory, BRIDGE_MEMORY), (Pool::Prefetch, BRIDGE_PREFETCH)];
        for (pool, least) in minima {
            let granule = if pool == Pool::Io { IO_GRANULE } else { MEMORY_GRANULE };
            let (mine, rest): (Vec<Need>, Vec<Need>) = behind.into_iter().partition(|n| n.pool == pool);
            behind = rest;
            let align = mine.iter().map(|n| n.align).max().unwrap_or(0).max(granule);
            // Sorted by size, each a multiple of what follows or of the granule: they pack from the base.
            let sum = mine.iter().fold(0u64, |at, n| at.next_multiple_of(n.align).saturating_add(n.bytes));
            let bytes = sum.max(least).checked_next_multiple_of(granule).unwrap_or(u64::MAX);
            if bytes != 0 {
                let (function, target) = (bridge.clone(), Target::Window);
                needs.push(Need { function, bus, devfn, pool, target, bytes, align, behind: mine });
            }
        }
    }

    /// Lets everything decode that was given a place.
    fn enable(&self, parent: Parent) {
        for (id, _, function) in self.children(parent) {
            let mut f = function.lock();
            let config = f.core().config();
            let mut command = config.command();
            if config.is_bridge() {
                command |= COMMAND_IO | COMMAND_MEMORY;
            }
            for (_, bar) in config.bars() {
                command |= match bar.kind {
                    BarKind::Io => COMMAND_IO,
                    _ => COMMAND_MEMORY,
                };
            }
            f.config_write(COMMAND, &command.to_le_bytes());
            drop(f);
            self.enable(Parent::Bridge(id));
        }
    }
}

fn sort(needs: &mut [Need]) {
    // Stable: equal sizes stay in the order of slots and BARs.
    needs.sort_by_key(|n| core::cmp::Reverse((n.align, n.bytes)));
}

fn place(mut needs: Vec<Need>, rooms: &mut Rooms) -> Result<(), AssignError> {
    sort(&mut needs);
    for need in needs {
        let Need { bytes, align, pool, bus, devfn, .. } = need;
        let base = match pool {
            Pool::Io => rooms.io.take(bytes, align),
            Pool::Memory => rooms.memory.take(bytes, align),
            Pool::Prefetch => rooms.prefetch.take(bytes, align).or_else(|| rooms.memory.take(bytes, align)),
        };
        let base = base.ok_or(AssignError::Room { bus, devfn, kind: pool.name(), bytes })?;
        match need.target {
            Target::Bar { index, kind } => write_bar(&need.function, index, kind, base),
            Target::Window => {
                write_window(&need.function, pool, base, base + (bytes - 1));
                let mut inner =
                    Rooms { io: Room::default(), memory: Room::default(), prefetch: Room::default() };
                match pool {
                    Pool::Io => inner.io.0.push((base, base + (bytes - 1))),
                    Pool::Memory => inner.memory.0.push((base, base + (bytes - 1))),
                    Pool::Prefetch => inner.prefetch.0.push((base, base + (bytes - 1))),
                }
                place(need.behind, &mut inner)?;
            }
        }
    }
    Ok(())
}

fn write_bar(function: &SharedFunction, index: u8, kind: BarKind, base: u64) {
    let at = BAR0 + 4 * u16::from(index);
    let mut f = function.lock();
    f.config_write(at, &(base as u32).to_le_bytes());
    if matches!(kind, BarKind::Memory64 { .. }) {
        f.config_write(at + 4, &((base >> 32) as u32).to_le_bytes());
    }
}

fn write_window(function: &SharedFunction, pool: Pool, base: u64, last: u64) {
    let mut f = function.lock();
    let megabytes = |a: u64| ((a >> 16) as u16 & 0xFFF0).to_le_bytes();
    match pool {
        Pool::Io => {
            f.config_write(IO_BASE, &[(base >> 8) as u8 & 0xF0, (last >> 8) as u8 & 0xF0]);
            f.config_write(IO_BASE_UPPER, &((base >> 16) as u16).to_le_bytes());
            f.config_write(IO_BASE_UPPER + 2, &((last >> 16) as u16).to_le_bytes());
        }
        Pool::Memory => {
            f.config_write(MEMORY_BASE, &megabytes(base));
            f.config_write(MEMORY_BASE + 2, &megabytes(last));
        }
        Pool::Prefetch => {
            f.config_write(PREFETCH_BASE, &megabytes(base));
            f.config_write(PREFETCH_BASE + 2, &megabytes(last));
            f.config_write(PREFETCH_BASE_UPPER, &((base >> 32) as u32).to_le_bytes());
            f.config_write(PREFETCH_BASE_UPPER + 4, &((last >> 32) as u32).to_le_bytes());
        }
    }
}
