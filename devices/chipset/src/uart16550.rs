//! A 16550A UART (National Semiconductor PC16550D): FIFOs, interrupts, modem lines, loopback.
//!
//! Called by: the bus (registers), the host's serial port (`receive`, and its waker through `poll`).
//!
//! The line has no speed: a byte is sent when the host takes it. While the host is full, sent bytes wait in
//! the FIFO and THRE stays low, so that the guest waits as for a slow line. Bytes below the receive trigger
//! raise the timeout interrupt at once.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use device::{Device, IoError, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

const FIFO_BYTES: usize = 16;

mod ier {
    pub const RECEIVED: u8 = 1 << 0;
    pub const TRANSMIT: u8 = 1 << 1;
    pub const LINE: u8 = 1 << 2;
    pub const MODEM: u8 = 1 << 3;
}
mod iir {
    pub const NONE: u8 = 0x01;
    pub const MODEM: u8 = 0x00;
    pub const TRANSMIT: u8 = 0x02;
    pub const RECEIVED: u8 = 0x04;
    pub const LINE: u8 = 0x06;
    pub const TIMEOUT: u8 = 0x0C;
    pub const FIFOS: u8 = 0xC0;
}
mod fcr {
    pub const ENABLE: u8 = 1 << 0;
    pub const CLEAR_RECEIVED: u8 = 1 << 1;
    pub const CLEAR_TRANSMIT: u8 = 1 << 2;
    pub const TRIGGER: u8 = 3 << 6;
}
mod lcr {
    pub const DLAB: u8 = 1 << 7;
}
mod mcr {
    pub const OUT2: u8 = 1 << 3;
    pub const LOOP: u8 = 1 << 4;
}
mod lsr {
    pub const DATA: u8 = 1 << 0;
    pub const OVERRUN: u8 = 1 << 1;
    pub const EMPTY: u8 = 1 << 5 | 1 << 6;
}
mod msr {
    pub const RING: u8 = 1 << 6;
    /// Clear to send, data set ready, carrier: the other end is there.
    pub const CONNECTED: u8 = 0xB0;
}

/// The host's end of the line.
pub trait SerialOut: Send {
    /// Takes as many bytes as it has room for, without blocking. After a short write it has the UART polled
    /// once there is room.
    fn write(&mut self, bytes: &[u8]) -> usize;
    /// After [`Uart16550::receive`] took less than it was given: the guest has read what it had.
    fn input_room(&mut self);
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    divisor: u16,
    ier: u8,
    /// FIFO enable and trigger level.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    overrun: bool,
    /// Changes of the modem lines since MSR was last read (its low four bits).
    modem_changes: u8,
    /// The transmitter became empty and nobody was told.
    transmit_pending: bool,
    received: VecDeque<u8>,
    transmit: VecDeque<u8>,
}

impl Registers {
    fn reset() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            overrun: false,
            modem_changes: 0,
            transmit_pending: false,
            received: VecDeque::new(),
            transmit: VecDeque::new(),
        }
    }
    fn has_fifos(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }
    fn depth(&self) -> usize {
        if self.has_fifos() { FIFO_BYTES } else { 1 }
    }
    fn trigger(&self) -> usize {
        if self.has_fifos() { [1, 4, 8, 14][usize::from(self.fcr >> 6)] } else { 1 }
    }
    fn loopback(&self) -> bool {
        self.mcr & mcr::LOOP != 0
    }
    /// The modem lines (the high four bits of MSR).
    fn modem_lines(&self) -> u8 {
        if !self.loopback() {
            return msr::CONNECTED;
        }
        // RTS → CTS, DTR → DSR, OUT1 → RI, OUT2 → DCD.
        (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 0b1100) << 4
    }
    /// What IIR says, without the FIFO bits.
    fn interrupt(&self) -> u8 {
        let count = self.received.len();
        match self.ier {
            e if e & ier::LINE != 0 && self.overrun => iir::LINE,
            e if e & ier::RECEIVED != 0 && count >= self.trigger() => iir::RECEIVED,
            e if e & ier::RECEIVED != 0 && count > 0 => iir::TIMEOUT,
            e if e & ier::TRANSMIT != 0 && self.transmit_pending => iir::TRANSMIT,
            e if e & ier::MODEM != 0 && self.modem_changes != 0 => iir::MODEM,
            _ => iir::NONE,
        }
    }
}

/// See the module's header. One region of 8 bytes.
pub struct Uart16550 {
    // Configuration.
    name: String,
    // Wiring.
    irq: IrqLine,
    host: Box<dyn SerialOut>,
    // State.
    registers: Registers,
    /// The host has bytes that we did not take. Not saved: the host is told after a restore anyway.
    host_waits: bool,
}

impl Uart16550 {
    /// A UART after power-up.
    pub fn new(name: &str, irq: IrqLine, host: Box<dyn SerialOut>) -> Self {
        Self { name: name.into(), irq, host, registers: Registers::reset(), host_waits: false }
    }

    /// Bytes for the guest; returns how many fit. If not all, [`SerialOut::input_room`] says when more do.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let r = &mut self.registers;
        let room = if r.loopback() { 0 } else { r.depth().saturating_sub(r.received.len()) };
        let taken = room.min(bytes.len());
        r.received.extend(&bytes[..taken]);
        self.host_waits |= taken < bytes.len();
        self.update();
        taken
    }

    fn update(&mut self) {
        // On a PC, OUT2 gates the interrupt; loopback holds it off.
        let gate = self.registers.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        self.irq.set(gate && self.registers.interrupt() != iir::NONE);
    }

    /// Gives the host what waits to be sent.
    fn flush(&mut self) {
        let r = &mut self.registers;
        if r.transmit.is_empty() {
            return;
        }
        if r.loopback() {
            for byte in core::mem::take(&mut r.transmit) {
                if r.received.len() < r.depth() {
                    r.received.push_back(byte);
                } else {
                    r.overrun = true;
                }
            }
        } else {
            let taken = self.host.write(r.transmit.make_contiguous());
            r.transmit.drain(..taken.min(r.transmit.len()));
        }
        r.transmit_pending = r.transmit.is_empty();
    }

    fn tell_host_of_room(&mut self) {
        if self.host_waits && self.registers.received.is_empty() && !self.registers.loopback() {
            self.host_waits = false;
            self.host.input_room();
        }
    }

    fn read(&mut self, offset: u64) -> u8 {
        let r = &mut self.registers;
        let dlab = r.lcr & lcr::DLAB != 0;
        match offset {
            0 if dlab => r.divisor as u8,
            0 => r.received.pop_front().unwrap_or(0),
            1 if dlab => (r.divisor >> 8) as u8,
            1 => r.ier,
            2 => {
                let source = r.interrupt();
                if source == iir::TRANSMIT {
                    r.transmit_pending = false;
                }
                source | if r.has_fifos() { iir::FIFOS } else { 0 }
            }
            3 => r.lcr,
            4 => r.mcr,
            5 => {
                let mut value = if r.received.is_empty() { 0 } else { lsr::DATA };
                value |= if core::mem::take(&mut r.overrun) { lsr::OVERRUN } else { 0 };
                value | if r.transmit.is_empty() { lsr::EMPTY } else { 0 }
            }
            6 => r.modem_lines() | core::mem::take(&mut r.modem_changes),
            _ => r.scratch,
        }
    }

    fn write(&mut self, offset: u64, value: u8) {
        let r = &mut self.registers;
        let dlab = r.lcr & lcr::DLAB != 0;
        match offset {
            0 if dlab => r.divisor = (r.divisor & 0xFF00) | u16::from(value),
            0 => {
                r.transmit_pending = false;
                // Past the end of a full FIFO, which THRE would have told: lost.
                if r.transmit.len() < r.depth() {
                    r.transmit.push_back(value);
                }
                self.flush();
            }
            1 if dlab => r.divisor = (r.divisor & 0x00FF) | u16::from(value) << 8,
            1 => {
                if (r.ier ^ value) & ier::TRANSMIT != 0 {
                    r.transmit_pending = value & ier::TRANSMIT != 0 && r.transmit.is_empty();
                }
                r.ier = value & 0x0F;
            }
            2 => self.write_fcr(value),
            3 => r.lcr = value,
            4 => self.write_mcr(value),
            7 => r.scratch = value,
            // LSR and MSR: for the factory's tests only.
            _ => {}
        }
    }

    fn write_fcr(&mut self, value: u8) {
        let r = &mut self.registers;
        let toggled = (r.fcr ^ value) & fcr::ENABLE != 0;
        // Without the enable bit the others do nothing.
        let enabled = value & fcr::ENABLE != 0;
        if toggled || (enabled && value & fcr::CLEAR_RECEIVED != 0) {
            r.received.clear();
        }
        if (toggled || (enabled && value & fcr::CLEAR_TRANSMIT != 0)) && !r.transmit.is_empty() {
            r.transmit.clear();
            r.transmit_pending = true;
        }
        r.fcr = if enabled { value & (fcr::ENABLE | fcr::TRIGGER) } else { 0 };
    }

    fn write_mcr(&mut self, value: u8) {
        let r = &mut self.registers;
        let before = r.modem_lines();
        r.mcr = value & 0x1F;
        let (after, changed) = (r.modem_lines(), before ^ r.modem_lines());
        // RI counts only when it ends.
        let changed = if after & msr::RING != 0 { changed & !msr::RING } else { changed };
        r.modem_changes |= changed >> 4;
        // What waited for the host goes where the line leads now.
        self.flush();
    }
}

impl IoHandler for Uart16550 {
    fn io_read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        for (at, byte) in (offset..8).zip(data) {
            *byte = self.read(at);
        }
        self.update();
        self.tell_host_of_room();
        Ok(())
    }
    fn io_write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        for (at, byte) in (offset..8).zip(data) {
            self.write(at, *byte);
        }
        self.update();
        self.tell_host_of_room();
        Ok(())
    }
}

impl Device for Uart16550 {
    crate::registers_without_work!();
    fn poll(&mut self) {
        self.flush();
        self.update();
    }
    fn resume(&mut self) {
        self.poll();
        self.tell_host_of_room();
    }
    fn reset(&mut self) {
        self.registers = Registers::reset();
        self.irq.set(false);
        self.tell_host_of_room();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&self.registers))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.registers = from_blob(blob)?;
        self.host_waits = true;
        let gate = self.registers.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        self.irq.restore(gate && self.registers.interrupt() != iir::NONE);
        Ok(())
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "uart16550";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { divisor, ier, fcr, lcr, mcr, scratch, overrun, modem_changes, transmit_pending, .. } =
            self;
        let Self { received, transmit, .. } = self;
        w.uint(1, *divisor).uint(2, *ier).uint(3, *fcr).uint(4, *lcr).uint(5, *mcr).uint(6, *scratch);
        w.flag(7, *overrun).uint(8, *modem_changes).flag(9, *transmit_pending);
        let bytes = |fifo: &VecDeque<u8>| fifo.iter().copied().collect::<alloc::vec::Vec<u8>>();
        w.bytes(10, &bytes(received)).bytes(11, &bytes(transmit));
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self {
            divisor: r.uint(1)?,
            ier: r.uint::<u8>(2)? & 0x0F,
            fcr: r.uint::<u8>(3)? & (fcr::ENABLE | fcr::TRIGGER),
            lcr: r.uint(4)?,
            mcr: r.uint::<u8>(5)? & 0x1F,
            scratch: r.uint(6)?,
            overrun: r.flag(7)?,
            modem_changes: r.uint::<u8>(8)? & 0x0F,
            transmit_pending: r.flag(9)?,
            received: r.bytes(10, FIFO_BYTES)?.iter().copied().collect(),
            transmit: r.bytes(11, FIFO_BYTES)?.iter().copied().collect(),
        })
    }
}

#[cfg(test)]
mod tests;
