//! Interrupt lines of the board: from a device's line to the 8259 and the I/O APIC.
//!
//! ISA interrupt n drives both controllers, as on a PC: input n of the 8259 and pin n of the I/O APIC (pin 2 for
//! interrupt 0). Lines may be shared. GSI 16 and up are pins of the I/O APIC only.
//!
//! Called by: `build`, which hands lines to devices. Lock order: device → shared line → controller → partition.

use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{IrqLine, LineSink, SharedLine};
use machine_spec::layout::irq::{TIMER, TIMER_GSI};

/// ISA interrupts.
const ISA_LINES: u32 = 16;

/// Both controllers, as one set of ISA inputs.
struct IsaInputs {
    pic: Arc<dyn LineSink>,
    ioapic: Arc<dyn LineSink>,
}

fn pin_of(isa: u32) -> u32 {
    if isa == u32::from(TIMER) { TIMER_GSI } else { isa }
}

impl LineSink for IsaInputs {
    fn set_level(&self, line: u32, level: bool) {
        self.pic.set_level(line, level);
        self.ioapic.set_level(pin_of(line), level);
    }
    fn restore_level(&self, line: u32, level: bool) {
        self.pic.restore_level(line, level);
        self.ioapic.restore_level(pin_of(line), level);
    }
}

/// See the module's header.
pub struct BoardLines {
    isa: Vec<Arc<SharedLine>>,
    ioapic: Arc<dyn LineSink>,
}

impl BoardLines {
    /// Lines into the two controllers.
    pub fn new(pic: Arc<dyn LineSink>, ioapic: Arc<dyn LineSink>) -> Self {
        let inputs = Arc::new(IsaInputs { pic, ioapic: ioapic.clone() });
        let isa = (0..ISA_LINES).map(|line| SharedLine::new(inputs.clone(), line)).collect();
        Self { isa, ioapic }
    }

    /// A driver of ISA interrupt `line`; beyond 15 it leads nowhere.
    pub fn isa(&self, line: u8) -> IrqLine {
        self.isa.get(usize::from(line)).map_or_else(IrqLine::unconnected, SharedLine::add_driver)
    }

    /// The only driver of a pin of the I/O APIC.
    pub fn pin(&self, pin: u32) -> IrqLine {
        IrqLine::new(self.ioapic.clone(), pin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u32, bool)>>);
    impl LineSink for Log {
        fn set_level(&self, line: u32, level: bool) {
            self.0.lock().push((line, level));
        }
        fn restore_level(&self, _: u32, _: bool) {}
    }

    #[test]
    fn isa_lines_reach_both_controllers_and_the_timer_is_pin_two() {
        let (pic, ioapic) = (Arc::new(Log::default()), Arc::new(Log::default()));
        let lines = BoardLines::new(pic.clone(), ioapic.clone());
        let (mut timer, mut com1, mut com3) = (lines.isa(0), lines.isa(4), lines.isa(4));
        timer.set(true);
        com1.set(true);
        com3.set(true);
        com1.set(false);
        lines.pin(17).set(true);
        lines.isa(99).set(true);
        assert_eq!(*pic.0.lock(), [(0, true), (4, true), (4, true), (4, true)]);
        assert_eq!(*ioapic.0.lock(), [(2, true), (4, true), (4, true), (4, true), (17, true), (17, false)]);
    }
}
