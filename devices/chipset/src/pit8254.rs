//! The 8254 timer (Intel 82C54) and port 61h: three counters at 1.193182 MHz; the first interrupts, the
//! third drives the speaker and is what kernels measure processors with.
//!
//! Called by: the bus, its timer through `poll`, the board when IRQ 0 was acknowledged.
//!
//! Ticks that are late (the host had no time for us) are discarded or reinjected. Reinjected ones come one
//! an acknowledgement if the guest takes IRQ 0 through the 8259, whose acknowledgements we see; else half a
//! period apart.

mod channel;
#[cfg(test)]
mod tests;

use crate::MissedTicks;
use crate::legacy::LegacyReplacement;
use crate::rate::{Rate, SHORTEST_TIMER_NS};
use alloc::boxed::Box;
use alloc::string::String;
use channel::{Bytes, Channel};
use device::{Device, IoError, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use guest_time::{GuestClock, Timer};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

/// Region of the four ports.
pub const COUNTERS_REGION: usize = 0;
/// Region of port 61h.
pub const PORT_B_REGION: usize = 1;

/// Ticks a second.
pub const RATE: Rate = Rate(1_193_182);
/// Half the period of the memory refresh, which port 61h shows.
const REFRESH_NS: u64 = 15_085;
/// Bits of port 61h that are written: gate 2, speaker, parity and channel check.
const PORT_B_WRITABLE: u8 = 0x0F;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    channels: [Channel; 3],
    port_b: u8,
    /// Edges of counter 0's output that are dealt with.
    edges_done: u64,
    /// Ticks owed.
    backlog: u64,
    /// The last interrupt was not acknowledged; acknowledgements are seen at all.
    unacknowledged: bool,
    acknowledges: bool,
}

impl Registers {
    fn reset() -> Self {
        Self {
            channels: [Channel::reset(true), Channel::reset(true), Channel::reset(false)],
            port_b: 0,
            edges_done: 0,
            backlog: 0,
            unacknowledged: false,
            acknowledges: false,
        }
    }
}

/// What an 8254 is connected to.
pub struct PitWiring {
    /// IRQ 0.
    pub irq: IrqLine,
    /// All time.
    pub clock: GuestClock,
    /// Has the chip polled.
    pub timer: Box<dyn Timer>,
    /// Shared with the HPET.
    pub replaced: LegacyReplacement,
}

/// See the module's header. Regions: the four ports; port 61h.
pub struct Pit8254 {
    name: String,
    missed_ticks: MissedTicks,
    wiring: PitWiring,
    registers: Registers,
}

impl Pit8254 {
    /// An 8254 after power-up: no counter runs.
    pub fn new(name: &str, missed_ticks: MissedTicks, wiring: PitWiring) -> Self {
        Self { name: name.into(), missed_ticks, wiring, registers: Registers::reset() }
    }

    /// The guest acknowledged IRQ 0 at the 8259.
    pub fn acknowledged(&mut self) {
        let r = &mut self.registers;
        (r.acknowledges, r.unacknowledged) = (true, false);
        if r.backlog > 0 {
            r.backlog -= 1;
            self.interrupt();
        }
    }

    fn tick(&self) -> u64 {
        RATE.ticks(self.wiring.clock.now())
    }

    fn interrupt(&mut self) {
        if !self.wiring.replaced.is_on() {
            self.registers.unacknowledged = true;
            self.wiring.irq.pulse();
        }
    }

    /// Interrupts for the edges that have come.
    fn catch_up(&mut self) {
        let tick = self.tick();
        let r = &mut self.registers;
        let edges = r.channels[0].edges(tick);
        let new = edges.saturating_sub(r.edges_done);
        r.edges_done = edges;
        if self.missed_ticks == MissedTicks::Discard || self.wiring.replaced.is_on() {
            r.backlog = 0;
            if new > 0 {
                self.interrupt();
            }
            return;
        }
        let second = u64::from(RATE.0) / r.channels[0].edge_period();
        let owed = r.backlog.saturating_add(new);
        // With an interrupt outstanding this one merges with it: the tick stays owed.
        let merges = r.acknowledges && r.unacknowledged;
        let pays = owed > 0 && !merges && (new > 0 || !r.acknowledges);
        r.backlog = (owed - u64::from(pays)).min(second);
        if pays || new > 0 {
            self.interrupt();
        }
    }

    fn arm(&self) {
        let (r, now) = (&self.registers, self.wiring.clock.now());
        let next = r.channels[0].next_edge(r.edges_done).map(|tick| RATE.when(tick));
        let owed = (r.backlog > 0 && !r.acknowledges)
            .then(|| now.saturating_add(RATE.when(r.channels[0].edge_period()) / 2));
        match next.into_iter().chain(owed).min() {
            Some(at) => self.wiring.timer.arm(at.max(now.saturating_add(SHORTEST_TIMER_NS))),
            None => self.wiring.timer.cancel(),
        }
    }

    /// Counter 0 starts anew.
    fn restart(&mut self) {
        let r = &mut self.registers;
        (r.edges_done, r.backlog, r.unacknowledged) = (0, 0, false);
        self.arm();
    }

    fn write_control(&mut self, value: u8) {
        let tick = self.tick();
        let channels = &mut self.registers.channels;
        if value >> 6 == 3 {
            // Read-back.
            for (i, channel) in channels.iter_mut().enumerate() {
                if value & 2 << i == 0 {
                    continue;
                }
                if value & 1 << 5 == 0 {
                    channel.latch_count(tick);
                }
                if value & 1 << 4 == 0 {
                    channel.latch_status(tick);
                }
            }
            return;
        }
        let channel = &mut channels[usize::from(value >> 6)];
        match Bytes::from_bits(value >> 4) {
            None => channel.latch_count(tick),
            Some(bytes) => {
                channel.set_control(bytes, value);
                if value >> 6 == 0 {
                    self.restart();
                }
            }
        }
    }

    fn read_port_b(&self) -> u8 {
        let refresh = ((self.wiring.clock.now() / REFRESH_NS) & 1) as u8;
        let out = u8::from(self.registers.channels[2].output(self.tick()));
        self.registers.port_b | refresh << 4 | out << 5
    }
}

impl IoHandler for Pit8254 {
    fn io_read(&mut self, region: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        let tick = self.tick();
        match region {
            COUNTERS_REGION => {
                // The control port cannot be read.
                for (at, byte) in (offset..3).zip(data) {
                    *byte = self.registers.channels[at as usize].read(tick);
                }
            }
            PORT_B_REGION if offset == 0 => device::write_le(data, self.read_port_b().into()),
            _ => return Err(IoError::Offset),
        }
        Ok(())
    }

    fn io_write(&mut self, region: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        match region {
            COUNTERS_REGION => {
                for (at, byte) in (offset..4).zip(data) {
                    let tick = self.tick();
                    if at == 3 {
                        self.write_control(*byte);
                    } else if self.registers.channels[at as usize].write(tick, *byte) && at == 0 {
                        self.restart();
                    } else if at == 0 {
                        self.arm();
                    }
                }
            }
            PORT_B_REGION if offset == 0 && !data.is_empty() => {
                let tick = self.tick();
                self.registers.port_b = data[0] & PORT_B_WRITABLE;
                self.registers.channels[2].set_gate(tick, data[0] & 1 != 0);
            }
            _ => return Err(IoError::Offset),
        }
        Ok(())
    }
}

impl Device for Pit8254 {
    crate::registers_without_work!();
    fn poll(&mut self) {
        self.catch_up();
        self.arm();
    }
    fn resume(&mut self) {
        self.arm();
    }
    fn reset(&mut self) {
        self.registers = Registers::reset();
        self.wiring.irq.set(false);
        self.wiring.timer.cancel();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.registers = from_blob(blob)?;
        self.arm();
        Ok(())
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "pit8254";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { channels, port_b, edges_done, backlog, unacknowledged, acknowledges } = self;
        w.list(1, channels).uint(2, *port_b).uint(3, *edges_done).uint(4, *backlog);
        w.flag(5, *unacknowledged).flag(6, *acknowledges);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let channels = r.list(1, 3)?.try_into();
        let channels: [Channel; 3] =
            channels.map_err(|_| RestoreError::Value { tag: 1, reason: "not three counters" })?;
        let port_b = r.uint::<u8>(2)? & PORT_B_WRITABLE;
        // The gates are wired: high, high, bit 0 of port 61h.
        if [true, true, port_b & 1 != 0] != [0, 1, 2].map(|i: usize| channels[i].gate()) {
            return Err(RestoreError::Value { tag: 2, reason: "gates that are not wired so" });
        }
        Ok(Self {
            channels,
            port_b,
            edges_done: r.uint(3)?,
            backlog: r.uint::<u64>(4)?.min(u64::from(RATE.0)),
            unacknowledged: r.flag(5)?,
            acknowledges: r.flag(6)?,
        })
    }
}
