//! The board's chips, one a file: registers only. Ports, addresses and interrupt numbers are the board's
//! business (`machine/build`), which gives each chip its lines, timers and sinks at construction.
//!
//! All time is the guest clock's. A chip is behind a lock of its own; the lock order is device → interrupt
//! controller → partition, so that a chip may drive a line or send a message from wherever it is called.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod debug_port;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
mod legacy;
mod lines;
pub mod pic8259;
pub mod pit8254;
pub mod pm;
pub mod port92;
mod rate;
pub mod reset_control;
pub mod rtc_cmos;
#[cfg(test)]
mod testing;
pub mod uart16550;

pub use debug_port::DebugPort;
pub use hpet::{Hpet, HpetWiring};
pub use i8042::I8042;
pub use ioapic::{Ioapic, IoapicOutput};
pub use legacy::LegacyReplacement;
pub use lines::{InputPins, InterruptInputs};
pub use pic8259::Pic8259;
pub use pit8254::{Pit8254, PitWiring};
pub use pm::{PmConfig, PmWiring, PowerManagement};
pub use port92::Port92;
pub use rate::Rate;
pub use reset_control::ResetControl;
pub use rtc_cmos::{RtcCmos, RtcWiring};
pub use uart16550::{SerialOut, Uart16550};

/// A message-signalled interrupt, as a chip writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// Takes messages to the local APICs.
pub trait MessageSink: Send + Sync {
    /// Sends `message`.
    fn send(&self, message: MsiMessage);
}

/// What the guest asks of the machine as a whole. Called under a chip's lock: only notes the request.
pub trait PlatformRequests: Send + Sync {
    /// Turn the machine off.
    fn power_off(&self);
    /// Reset the machine.
    fn reset(&self);
}

/// What a periodic timer does with ticks that the guest did not get in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissedTicks {
    /// Forget them: right for guests that read a clock.
    #[default]
    Discard,
    /// Deliver them later, one an acknowledgement, at most those of one second: right for guests that count.
    Reinject,
}

/// The part of `Device` that is the same in every chip: registers on a bus, no work in flight.
macro_rules! registers_without_work {
    () => {
        fn name(&self) -> &str {
            &self.name
        }
        fn as_io(&mut self) -> Option<&mut dyn device::IoHandler> {
            Some(self)
        }
        fn quiesce(&mut self) -> core::task::Poll<()> {
            core::task::Poll::Ready(())
        }
    };
}
pub(crate) use registers_without_work;
