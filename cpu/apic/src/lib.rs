//! The local APIC (SDM vol. 3, chapter 11): xAPIC and x2APIC modes, timer, inter-processor interrupts.
//!
//! It is in two parts, so that a message never has to wait for the processor that it is for:
//! - [`LocalApic`] is the owner's part: registers, IRR/ISR, timer. Only the vCPU's own thread has it.
//! - [`ApicInbox`] is everybody's: bits posted atomically by other vCPUs, the I/O APIC and MSIs, and a
//!   mirror of what others need to know to address this processor.
//!
//! The owner takes what was posted with [`LocalApic::poll_inbox`]. What a register write asks of the rest
//! of the machine comes back as an [`ApicAction`], never as a call, so that EOI → I/O APIC → local APIC
//! cannot re-enter. [`route`] finds who a message is for.
//!
//! Used by the engines that emulate the APIC themselves; the others convert their own to [`ApicState`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod access;
mod clock;
mod inbox;
mod local;
mod message;
mod registers;
pub mod route;
mod state;
#[cfg(test)]
mod tests;
mod timer;

pub use clock::{ApicClock, TIMER_HZ};
pub use inbox::ApicInbox;
pub use local::{ApicAction, ApicFeatures, Arrived, LocalApic, NoSuchRegister};
pub use message::{DeliveryMode, IpiCommand, Message, Shorthand};
pub use registers::DEFAULT_BASE;
pub use state::ApicState;
