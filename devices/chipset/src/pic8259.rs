//! The pair of 8259A interrupt controllers (Intel 8259A; PIIX for the ELCR), the second behind input 2 of the
//! first.
//!
//! Called by: the bus, interrupt lines ([`InterruptInputs`], lines 0–15), and the engine's acknowledge cycle.
//!
//! Requests of edge-triggered inputs are latched until they are acknowledged, as in every PC chipset. Input 2
//! of the first is not latched: it is whether the second asks.

use crate::lines::InterruptInputs;
use alloc::string::String;
use device::{Device, IoError, IoHandler, IrqLine, RestoreError, StateBlob, Unsavable};
use saved_state::{FieldWriter, Fields, SavedState, from_blob, to_blob};

/// Region of the first one's two ports.
pub const FIRST_REGION: usize = 0;
/// Region of the second one's two ports.
pub const SECOND_REGION: usize = 1;
/// Region of the two edge/level control registers.
pub const ELCR_REGION: usize = 2;

/// Input of the first that the second drives.
const CASCADE: u8 = 2;
/// Inputs that may be level-triggered: not timer, keyboard, cascade; not RTC, coprocessor.
const ELCR_WRITABLE: [u8; 2] = [0xF8, 0xDE];

/// Where in the initialization sequence it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
enum Init {
    #[default]
    Done = 0,
    Icw2 = 1,
    Icw3 = 2,
    Icw4 = 3,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Chip {
    /// Levels of the inputs.
    inputs: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    elcr: u8,
    /// Vector of input 0.
    base: u8,
    /// The input with the highest priority.
    top: u8,
    init: Init,
    /// The sequence has an ICW4; it has no ICW3.
    needs_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    /// The next read is a poll.
    poll: bool,
    /// Reads show ISR, not IRR.
    read_isr: bool,
}

impl Chip {
    /// The set input of highest priority, and its rank (0 is the highest).
    fn first(&self, bits: u8) -> Option<(u8, u8)> {
        let rank = bits.rotate_right(self.top.into()).trailing_zeros() as u8;
        (bits != 0).then_some(((rank + self.top) & 7, rank))
    }

    /// The input to be served next, if it may interrupt what is in service.
    fn request(&self, is_first: bool) -> Option<u8> {
        let (input, rank) = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && is_first {
            in_service &= !(1 << CASCADE);
        }
        match self.first(in_service) {
            Some((_, busy)) if busy <= rank => None,
            _ => Some(input),
        }
    }

    fn set_input(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rose = level && self.inputs & bit == 0;
        self.inputs = (self.inputs & !bit) | if level { bit } else { 0 };
        if self.elcr & bit != 0 {
            self.irr = (self.irr & !bit) | (self.inputs & bit);
        } else if rose {
            self.irr |= bit;
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.top = (input + 1) & 7;
        }
    }

    /// Port 0: ICW1, OCW2 or OCW3.
    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            let Self { inputs, irr, elcr, .. } = *self;
            *self = Self {
                inputs,
                irr: irr & elcr,
                elcr,
                init: Init::Icw2,
                needs_icw4: value & 1 != 0,
                single: value & 2 != 0,
                ..Self::default()
            };
        } else if value & 0x08 != 0 {
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value >> 5, value & 7);
        }
    }

    fn write_ocw2(&mut self, command: u8, input: u8) {
        match command {
            // Rotate in automatic EOI mode: clear, set.
            0 | 4 => self.rotate_on_auto_eoi = command == 4,
            // Non-specific EOI, without and with rotation.
            1 | 5 => {
                if let Some((done, _)) = self.first(self.isr) {
                    self.isr &= !(1 << done);
                    if command == 5 {
                        self.top = (done + 1) & 7;
                    }
                }
            }
            // Specific EOI, without and with rotation.
            3 | 7 => {
                self.isr &= !(1 << input);
                if command == 7 {
                    self.top = (input + 1) & 7;
                }
            }
            // Set priority.
            6 => self.top = (input + 1) & 7,
            _ => {}
        }
    }

    /// Port 1: the rest of the sequence, or the mask.
    fn write_data(&mut self, value: u8) {
        let icw4_or_done = if self.needs_icw4 { Init::Icw4 } else { Init::Done };
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xF8;
                self.init = if self.single { icw4_or_done } else { Init::Icw3 };
            }
            Init::Icw3 => self.init = icw4_or_done,
            Init::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.init = Init::Done;
            }
        }
    }
}

/// What an acknowledge cycle found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// Vector.
    pub vector: u8,
    /// The line that is in service now; `None` if the request had gone (spurious).
    pub line: Option<u8>,
}

/// See the module's header. Three regions of 2 bytes.
pub struct Pic8259 {
    name: String,
    /// INTR.
    output: IrqLine,
    chips: [Chip; 2],
}

impl Pic8259 {
    /// Both after power-up; `output` is INTR, to LINT0 of the boot processor.
    pub fn new(name: &str, output: IrqLine) -> Self {
        Self { name: name.into(), output, chips: Default::default() }
    }

    /// The acknowledge cycle: the vector to deliver (spurious if nothing asks any more).
    pub fn acknowledge(&mut self) -> u8 {
        self.acknowledge_line().vector
    }

    /// As [`Pic8259::acknowledge`]; names the line as well.
    pub fn acknowledge_line(&mut self) -> Acknowledged {
        let [first, second] = &mut self.chips;
        let done = match first.request(true) {
            None => Acknowledged { vector: first.base | 7, line: None },
            Some(CASCADE) => {
                first.acknowledge(CASCADE);
                match second.request(false) {
                    None => Acknowledged { vector: second.base | 7, line: None },
                    Some(input) => {
                        second.acknowledge(input);
                        Acknowledged { vector: second.base | input, line: Some(8 + input) }
                    }
                }
            }
            Some(input) => {
                first.acknowledge(input);
                Acknowledged { vector: first.base | input, line: Some(input) }
            }
        };
        self.update();
        done
    }

    /// INTR as it must be.
    fn asks(&mut self) -> bool {
        let [first, second] = &mut self.chips;
        let cascade = second.request(false).is_some();
        first.irr = (first.irr & !(1 << CASCADE)) | u8::from(cascade) << CASCADE;
        first.request(true).is_some()
    }

    fn update(&mut self) {
        let level = self.asks();
        self.output.set(level);
    }

    fn read(&mut self, chip: usize, offset: u64) -> u8 {
        let is_first = chip == 0;
        let c = &mut self.chips[chip];
        if c.poll {
            c.poll = false;
            let Some(input) = c.request(is_first) else { return 0 };
            c.acknowledge(input);
            return 0x80 | input;
        }
        match offset {
            0 if c.read_isr => c.isr,
            0 => c.irr,
            _ => c.imr,
        }
    }
}

impl InterruptInputs for Pic8259 {
    fn set_level(&mut self, line: u32, level: bool) {
        if line < 16 && line != u32::from(CASCADE) {
            self.chips[line as usize / 8].set_input(line as u8 % 8, level);
            self.update();
        }
    }
    fn restore_level(&mut self, line: u32, level: bool) {
        if line < 16 && line != u32::from(CASCADE) {
            let (chip, bit) = (&mut self.chips[line as usize / 8], 1 << (line % 8));
            chip.inputs = (chip.inputs & !bit) | if level { bit } else { 0 };
            if chip.elcr & bit != 0 {
                chip.irr = (chip.irr & !bit) | (chip.inputs & bit);
            }
            self.update();
        }
    }
}

impl IoHandler for Pic8259 {
    fn io_read(&mut self, region: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        for (at, byte) in (offset..2).zip(data) {
            *byte = match region {
                FIRST_REGION | SECOND_REGION => self.read(region, at),
                ELCR_REGION => self.chips[at as usize].elcr,
                _ => return Err(IoError::Offset),
            };
        }
        self.update();
        Ok(())
    }
    fn io_write(&mut self, region: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        for (at, byte) in (offset..2).zip(data) {
            match (region, at) {
                (FIRST_REGION | SECOND_REGION, 0) => self.chips[region].write_command(*byte),
                (FIRST_REGION | SECOND_REGION, _) => self.chips[region].write_data(*byte),
                (ELCR_REGION, chip) => {
                    let chip = chip as usize;
                    self.chips[chip].elcr = byte & ELCR_WRITABLE[chip];
                }
                _ => return Err(IoError::Offset),
            }
        }
        self.update();
        Ok(())
    }
}

impl Device for Pic8259 {
    crate::registers_without_work!();
    fn poll(&mut self) {}
    fn resume(&mut self) {}
    fn reset(&mut self) {
        // The inputs are the devices': those that reset lower their own.
        self.chips = Default::default();
        self.update();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(to_blob(&Saved(self.chips.clone())))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        self.chips = from_blob::<Saved>(blob)?.0;
        let level = self.asks();
        self.output.restore(level);
        Ok(())
    }
}

struct Saved([Chip; 2]);

impl SavedState for Saved {
    const KIND: &'static str = "pic8259";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        w.nested(1, &self.0[0]).nested(2, &self.0[1]);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let [mut first, mut second] =
            [r.nested::<Chip>(1)?.unwrap_or_default(), r.nested(2)?.unwrap_or_default()];
        first.elcr &= ELCR_WRITABLE[0];
        second.elcr &= ELCR_WRITABLE[1];
        Ok(Self([first, second]))
    }
}

impl SavedState for Chip {
    const KIND: &'static str = "pic8259 chip";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { inputs, irr, isr, imr, elcr, base, top, init, needs_icw4, single, .. } = self;
        let Self { auto_eoi, rotate_on_auto_eoi, special_mask, special_fully_nested, poll, read_isr, .. } =
            self;
        w.uint(1, *inputs).uint(2, *irr).uint(3, *isr).uint(4, *imr).uint(5, *elcr).uint(6, *base);
        w.uint(7, *top).uint(8, *init as u8).flag(9, *needs_icw4).flag(10, *single).flag(11, *auto_eoi);
        w.flag(12, *rotate_on_auto_eoi).flag(13, *special_mask).flag(14, *special_fully_nested);
        w.flag(15, *poll).flag(16, *read_isr);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self {
            inputs: r.uint(1)?,
            irr: r.uint(2)?,
            isr: r.uint(3)?,
            imr: r.uint(4)?,
            elcr: r.uint(5)?,
            base: r.uint::<u8>(6)? & 0xF8,
            top: r.uint::<u8>(7)? & 7,
            init: match r.uint::<u8>(8)? {
                0 => Init::Done,
                1 => Init::Icw2,
                2 => Init::Icw3,
                3 => Init::Icw4,
                _ => return Err(RestoreError::Value { tag: 8, reason: "no step of the initialization" }),
            },
            needs_icw4: r.flag(9)?,
            single: r.flag(10)?,
            auto_eoi: r.flag(11)?,
            rotate_on_auto_eoi: r.flag(12)?,
            special_mask: r.flag(13)?,
            special_fully_nested: r.flag(14)?,
            poll: r.flag(15)?,
            read_isr: r.flag(16)?,
        })
    }
}

#[cfg(test)]
mod tests;
