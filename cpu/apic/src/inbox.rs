//! The posted part of a local APIC: callable from any thread, never blocks.
//!
//! Invariant: whoever posts sets the detail first and its bit in `events` last; the owner takes `events`
//! first and the details after. So nothing is lost, and a set bit is seen at the latest at the next poll.

use crate::message::{DeliveryMode, Message};
use crate::registers::FIRST_VECTOR;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

pub(crate) mod event {
    /// Vectors were posted.
    pub const POSTED: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 1;
    pub const SMI: u32 = 1 << 2;
    pub const INIT: u32 = 1 << 3;
    pub const SIPI: u32 = 1 << 4;
    /// A message in ExtINT mode.
    pub const EXTINT: u32 = 1 << 5;
    /// The 8259's line rose.
    pub const LINE: u32 = 1 << 6;
    /// An edge at LINT1.
    pub const LINT1: u32 = 1 << 7;
    /// A vector below 16 was received.
    pub const ILLEGAL_VECTOR: u32 = 1 << 8;
    /// Those that outlive a save.
    pub const SAVED: u32 = NMI | SMI | INIT | SIPI | EXTINT | LINT1 | ILLEGAL_VECTOR;
}

/// How the APIC is enabled, as others see it.
pub(crate) mod mode {
    pub const ENABLED: u32 = 1 << 0;
    pub const X2APIC: u32 = 1 << 1;
    pub const SOFTWARE_ENABLED: u32 = 1 << 2;
}

/// See the module's header.
#[derive(Default)]
pub struct ApicInbox {
    pub(crate) irr: [AtomicU32; 8],
    /// Trigger mode of the vectors in `irr`.
    pub(crate) tmr: [AtomicU32; 8],
    pub(crate) events: AtomicU32,
    pub(crate) sipi_vector: AtomicU32,
    /// Level of the 8259's output at LINT0.
    line: AtomicBool,
    // Mirrored by the owner.
    id: AtomicU32,
    ldr: AtomicU32,
    dfr: AtomicU32,
    mode: AtomicU32,
}

impl ApicInbox {
    /// The inbox of the local APIC with this id, which [`crate::LocalApic::new`] takes over.
    pub fn new(id: u32) -> Self {
        let inbox = Self::default();
        inbox.publish(id, 0, u32::MAX, mode::ENABLED);
        inbox
    }

    /// Whether something arrived that the owner has not taken.
    pub fn wants_attention(&self) -> bool {
        self.events.load(SeqCst) != 0
    }

    /// Physical APIC id.
    pub fn id(&self) -> u32 {
        self.id.load(SeqCst)
    }

    /// Posts a message that is for this APIC. Returns whether it took something new, so that the processor
    /// must look (an APIC disabled by software takes no vectors).
    pub fn post(&self, message: &Message) -> bool {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.post_vector(message.vector, message.level)
            }
            DeliveryMode::Smi => self.raise(event::SMI),
            DeliveryMode::Nmi => self.raise(event::NMI),
            DeliveryMode::Init => {
                // A SIPI from before this INIT is void.
                let update = |events| Some((events & !event::SIPI) | event::INIT);
                self.events.fetch_update(SeqCst, SeqCst, update).is_ok()
            }
            DeliveryMode::StartUp => {
                self.sipi_vector.store(u32::from(message.vector), SeqCst);
                self.raise(event::SIPI)
            }
            DeliveryMode::ExtInt => self.raise(event::EXTINT),
        }
    }

    /// Posts a vector; level-triggered ones get an EOI to the I/O APIC later. As [`ApicInbox::post`].
    pub fn post_vector(&self, vector: u8, level: bool) -> bool {
        if !self.software_enabled() {
            return false;
        }
        if vector < FIRST_VECTOR {
            return self.raise(event::ILLEGAL_VECTOR);
        }
        let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
        if level {
            self.tmr[word].fetch_or(bit, SeqCst);
        } else {
            self.tmr[word].fetch_and(!bit, SeqCst);
        }
        let new = self.irr[word].fetch_or(bit, SeqCst) & bit == 0;
        self.raise(event::POSTED);
        new
    }

    /// The 8259's output, wired to LINT0. Returns whether the processor must look.
    pub fn set_extint_line(&self, level: bool) -> bool {
        let rose = !self.line.swap(level, SeqCst) && level;
        rose && self.raise(event::LINE)
    }
    /// An edge at LINT1, where PCs wire NMI.
    pub fn pulse_lint1(&self) -> bool {
        self.raise(event::LINT1)
    }

    fn raise(&self, event: u32) -> bool {
        self.events.fetch_or(event, SeqCst) & event == 0
    }

    pub(crate) fn extint_line(&self) -> bool {
        self.line.load(SeqCst)
    }
    pub(crate) fn software_enabled(&self) -> bool {
        let both = mode::ENABLED | mode::SOFTWARE_ENABLED;
        self.mode.load(SeqCst) & both == both
    }

    pub(crate) fn publish(&self, id: u32, ldr: u32, dfr: u32, mode: u32) {
        self.id.store(id, SeqCst);
        self.ldr.store(ldr, SeqCst);
        self.dfr.store(dfr, SeqCst);
        self.mode.store(mode, SeqCst);
    }

    /// Whether `message` names this APIC (shorthands aside). SDM vol. 3, 11.6.2 and 11.12.10.
    pub(crate) fn is_named_by(&self, message: &Message) -> bool {
        let mode = self.mode.load(SeqCst);
        if mode & mode::ENABLED == 0 {
            return false;
        }
        let to = message.destination;
        if to == if message.wide { u32::MAX } else { 0xFF } {
            return true;
        }
        let x2apic = mode & mode::X2APIC != 0;
        match (message.logical, x2apic) {
            (false, true) => to == self.id(),
            (false, false) => to == self.id() & 0xFF,
            (true, true) => {
                let ldr = self.ldr.load(SeqCst);
                to >> 16 == ldr >> 16 && to & ldr & 0xFFFF != 0
            }
            (true, false) => {
                let ldr = self.ldr.load(SeqCst) >> 24;
                match self.dfr.load(SeqCst) >> 28 {
                    _ if to > 0xFF => false,
                    0xF => to & ldr != 0,
                    0x0 => to >> 4 == ldr >> 4 && to & ldr & 0xF != 0,
                    _ => false,
                }
            }
        }
    }
}
