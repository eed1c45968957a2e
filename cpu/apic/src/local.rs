//! The owner's part: which interrupt comes next, what has been accepted, what a reset leaves.
//!
//! Priorities are those of SDM vol. 3, 11.8: the highest vector of the IRR is delivered when its class is
//! above the processor priority, which is the higher of TPR and the vector in service.

use crate::clock::ApicClock;
use crate::inbox::{ApicInbox, event, mode};
use crate::message::{DeliveryMode, IpiCommand};
use crate::registers::{self as reg, FIRST_VECTOR, TimerMode, lvt};
use crate::timer::ApicTimer;
use alloc::sync::Arc;
use core::sync::atomic::Ordering::SeqCst;
use guest_time::GuestNs;
use x86_defs::msr;

/// What the CPU model says about the APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicFeatures {
    /// x2APIC mode.
    pub x2apic: bool,
    /// TSC-deadline timer.
    pub tsc_deadline: bool,
    /// Width of physical addresses.
    pub physical_bits: u8,
}

impl Default for ApicFeatures {
    fn default() -> Self {
        Self { x2apic: true, tsc_deadline: true, physical_bits: 46 }
    }
}

/// What a register write asks of the machine. After every write, whatever the action, ask
/// [`LocalApic::pending_vector`] again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicAction {
    /// Nothing.
    None,
    /// Send it ([`crate::route::deliver_ipi`]).
    Ipi(IpiCommand),
    /// A level-triggered interrupt ended: the I/O APIC must know.
    Eoi {
        /// Its vector.
        vector: u8,
    },
    /// APIC_BASE changed.
    BaseChanged {
        /// Physical address of the 4 KiB of registers; `None` when there are none (disabled, or x2APIC mode).
        mmio: Option<u64>,
        /// Globally enabled: CPUID shows it (leaf 1, EDX bit 9).
        enabled: bool,
    },
}

/// No such MSR, or not this value: #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoSuchRegister;

/// What [`LocalApic::poll_inbox`] found that is the processor's to act on, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// INIT: reset the processor but for its memory of being the boot processor. The APIC has done its part.
    pub init: bool,
    /// SIPI: if the processor waits for one, it starts at this vector × 4 KiB.
    pub sipi: Option<u8>,
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// A system management interrupt.
    pub smi: bool,
}

/// See the module's header.
pub struct LocalApic {
    // Configuration.
    pub(crate) id: u32,
    pub(crate) is_bsp: bool,
    pub(crate) features: ApicFeatures,
    // Wiring.
    pub(crate) inbox: Arc<ApicInbox>,
    pub(crate) clock: ApicClock,
    // State.
    pub(crate) base: u64,
    pub(crate) regs: Registers,
}

/// Everything that INIT resets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    pub tpr: u8,
    /// xAPIC's; x2APIC's is derived from the id.
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub isr: [u32; 8],
    pub tmr: [u32; 8],
    pub irr: [u32; 8],
    /// Errors shown.
    pub esr: u32,
    /// Errors since ESR was last written.
    pub errors: u32,
    pub icr: u64,
    pub lvt: [u32; lvt::COUNT],
    pub timer: ApicTimer,
    /// A message in ExtINT mode waits for its acknowledge cycle.
    pub extint: bool,
}

impl Registers {
    /// After power-up and after INIT (SDM vol. 3, 11.4.7). One thing more: the boot processor's LINT0 takes
    /// the 8259 ("virtual wire"), as every BIOS leaves it, because a kernel may be started without one.
    pub fn reset(is_bsp: bool) -> Self {
        let mut entries = [lvt::MASKED; lvt::COUNT];
        if is_bsp {
            entries[lvt::LINT0] = 0x700;
        }
        Self {
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: reg::SVR_RESET,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: entries,
            timer: ApicTimer::default(),
            extint: false,
        }
    }
}

/// The highest vector in a 256-bit register.
pub(crate) fn highest(bits: &[u32; 8]) -> Option<u8> {
    let word = bits.iter().rposition(|w| *w != 0)?;
    Some((word as u32 * 32 + 31 - bits[word].leading_zeros()) as u8)
}

fn place(vector: u8) -> (usize, u32) {
    (usize::from(vector / 32), 1 << (vector % 32))
}

impl LocalApic {
    /// A local APIC after power-up, with `inbox` as its posted part.
    pub fn new(id: u32, is_bsp: bool, inbox: Arc<ApicInbox>, clock: ApicClock) -> Self {
        Self::with_features(id, is_bsp, inbox, clock, ApicFeatures::default())
    }

    /// As [`LocalApic::new`], for a CPU model that lacks something.
    pub fn with_features(
        id: u32,
        is_bsp: bool,
        inbox: Arc<ApicInbox>,
        clock: ApicClock,
        features: ApicFeatures,
    ) -> Self {
        let regs = Registers::reset(is_bsp);
        let mut apic = Self { id, is_bsp, features, inbox, clock, base: 0, regs };
        apic.reset();
        apic
    }

    /// Power-up. What was posted is forgotten; the level of the 8259's line is not ours to change.
    pub fn reset(&mut self) {
        let bsp = if self.is_bsp { msr::APIC_BASE_BSP } else { 0 };
        self.base = reg::DEFAULT_BASE | msr::APIC_BASE_ENABLE | bsp;
        self.inbox.events.store(0, SeqCst);
        self.init();
    }

    /// INIT: everything but APIC_BASE.
    pub(crate) fn init(&mut self) {
        self.regs = Registers::reset(self.is_bsp);
        for word in &self.inbox.irr {
            word.store(0, SeqCst);
        }
        self.publish();
    }

    /// Its physical id.
    pub fn id(&self) -> u32 {
        self.id
    }
    /// Its posted part.
    pub fn inbox(&self) -> &Arc<ApicInbox> {
        &self.inbox
    }
    /// Its clock.
    pub fn clock(&self) -> &ApicClock {
        &self.clock
    }

    /// The TSC was moved (WRMSR, TSC_ADJUST, restore): a TSC deadline moves with it.
    pub fn set_tsc_offset(&mut self, tsc_offset: u64) {
        self.clock.tsc_offset = tsc_offset;
        if self.timer_mode() == TimerMode::TscDeadline {
            let deadline = self.regs.timer.tsc_deadline;
            self.regs.timer.set_tsc_deadline(&self.clock, self.clock.now(), deadline);
        }
    }

    pub(crate) fn enabled(&self) -> bool {
        self.base & msr::APIC_BASE_ENABLE != 0
    }
    pub(crate) fn x2apic(&self) -> bool {
        self.base & msr::APIC_BASE_X2APIC != 0
    }
    /// Where its registers are in memory; `None` when they are not.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.enabled() && !self.x2apic()).then_some(self.base & !0xFFF)
    }
    /// Whether APIC_BASE has it enabled (CPUID leaf 1, EDX bit 9).
    pub fn is_enabled(&self) -> bool {
        self.enabled()
    }
    pub(crate) fn software_enabled(&self) -> bool {
        self.regs.svr & reg::SVR_ENABLE != 0
    }
    pub(crate) fn timer_mode(&self) -> TimerMode {
        TimerMode::of(self.regs.lvt[lvt::TIMER])
    }

    /// Tells the inbox what others need to know.
    pub(crate) fn publish(&self) {
        let mut bits = 0;
        bits |= if self.enabled() { mode::ENABLED } else { 0 };
        bits |= if self.x2apic() { mode::X2APIC } else { 0 };
        bits |= if self.software_enabled() { mode::SOFTWARE_ENABLED } else { 0 };
        self.inbox.publish(self.id, self.logical_id(), self.regs.dfr, bits);
    }

    pub(crate) fn logical_id(&self) -> u32 {
        if self.x2apic() { (self.id >> 4) << 16 | 1 << (self.id & 15) } else { self.regs.ldr }
    }

    /// Takes what was posted.
    pub fn poll_inbox(&mut self) -> Arrived {
        let events = self.inbox.events.swap(0, SeqCst);
        let mut arrived = Arrived::default();
        if events == 0 {
            return arrived;
        }
        if events & event::INIT != 0 {
            arrived.init = true;
            self.init();
        }
        if events & event::SIPI != 0 {
            arrived.sipi = Some(self.inbox.sipi_vector.load(SeqCst) as u8);
        }
        if events & event::POSTED != 0 {
            self.take_posted();
        }
        if events & event::ILLEGAL_VECTOR != 0 {
            self.error(reg::ESR_RECEIVE_VECTOR);
        }
        if events & event::EXTINT != 0 {
            self.regs.extint = true;
        }
        let lint1 = self.regs.lvt[lvt::LINT1];
        // Without an APIC the pin is the processor's NMI.
        let lint1_is_nmi = !self.enabled() || lint1 & (lvt::MASKED | 0x700) == 0x400;
        arrived.nmi = events & event::NMI != 0 || (events & event::LINT1 != 0 && lint1_is_nmi);
        if events & event::LINT1 != 0 && self.enabled() && !lint1_is_nmi {
            self.raise_lvt(lvt::LINT1);
        }
        arrived.smi = events & event::SMI != 0;
        arrived
    }

    fn take_posted(&mut self) {
        for (word, posted) in self.inbox.irr.iter().enumerate() {
            let new = posted.swap(0, SeqCst);
            if new != 0 {
                let level = self.inbox.tmr[word].load(SeqCst);
                self.regs.irr[word] |= new;
                self.regs.tmr[word] = (self.regs.tmr[word] & !new) | (level & new);
            }
        }
    }

    /// Accepts `vector` as an edge.
    pub(crate) fn accept(&mut self, vector: u8) {
        let (word, bit) = place(vector);
        self.regs.irr[word] |= bit;
        self.regs.tmr[word] &= !bit;
    }

    /// A local source: what its entry of the vector table says.
    fn raise_lvt(&mut self, source: usize) {
        let entry = self.regs.lvt[source];
        if entry & lvt::MASKED != 0 {
            return;
        }
        // The timer and the error entry have no mode bits: those are zero, which is Fixed.
        match DeliveryMode::from_bits(entry >> 8) {
            Some(DeliveryMode::Fixed) if entry as u8 >= FIRST_VECTOR => self.accept(entry as u8),
            Some(DeliveryMode::Fixed) if source == lvt::ERROR => self.regs.errors |= reg::ESR_RECEIVE_VECTOR,
            Some(DeliveryMode::Fixed) => self.error(reg::ESR_RECEIVE_VECTOR),
            Some(DeliveryMode::Nmi) => drop(self.inbox.events.fetch_or(event::NMI, SeqCst)),
            Some(DeliveryMode::ExtInt) => self.regs.extint = true,
            _ => {}
        }
    }

    /// Records an error and raises the error interrupt.
    pub(crate) fn error(&mut self, bits: u32) {
        let new = self.regs.errors & bits != bits;
        self.regs.errors |= bits;
        if new {
            self.raise_lvt(lvt::ERROR);
        }
    }

    /// Processor priority.
    pub fn ppr(&self) -> u8 {
        let in_service = highest(&self.regs.isr).unwrap_or(0) & 0xF0;
        if self.regs.tpr & 0xF0 >= in_service { self.regs.tpr } else { in_service }
    }

    /// The vector to deliver now, if the processor takes interrupts. Takes what was posted vectors first, but
    /// leaves INIT, SIPI and NMI for [`LocalApic::poll_inbox`].
    pub fn pending_vector(&mut self) -> Option<u8> {
        if self.inbox.events.load(SeqCst) & event::POSTED != 0 {
            self.inbox.events.fetch_and(!event::POSTED, SeqCst);
            self.take_posted();
        }
        if !self.enabled() {
            return None;
        }
        highest(&self.regs.irr).filter(|vector| vector & 0xF0 > self.ppr() & 0xF0)
    }

    /// The processor takes the pending interrupt: it is in service now.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending_vector()?;
        let (word, bit) = place(vector);
        self.regs.irr[word] &= !bit;
        self.regs.isr[word] |= bit;
        Some(vector)
    }

    pub(crate) fn end_of_interrupt(&mut self) -> ApicAction {
        let Some(vector) = highest(&self.regs.isr) else { return ApicAction::None };
        let (word, bit) = place(vector);
        self.regs.isr[word] &= !bit;
        if self.regs.tmr[word] & bit != 0 { ApicAction::Eoi { vector } } else { ApicAction::None }
    }

    /// Whether the 8259 asks for an acknowledge cycle that this processor would run: through LINT0 in ExtINT
    /// mode, directly when the APIC is disabled (boot processor only), or by a message.
    pub fn wants_extint(&self) -> bool {
        let lint0 = self.regs.lvt[lvt::LINT0] & (lvt::MASKED | 0x700);
        let wired = if self.enabled() { lint0 == 0x700 } else { self.is_bsp };
        (wired && self.is_bsp && self.inbox.extint_line()) || (self.enabled() && self.regs.extint)
    }
    /// The processor ran the acknowledge cycle: a message in ExtINT mode is done with.
    pub fn extint_taken(&mut self) {
        self.regs.extint = false;
    }

    /// Task priority as CR8 shows it (0–15).
    pub fn tpr(&self) -> u8 {
        self.regs.tpr >> 4
    }
    /// MOV to CR8.
    pub fn set_tpr(&mut self, cr8: u8) {
        self.regs.tpr = cr8 << 4;
    }

    /// When the timer must be looked at next: its expiry, if an interrupt would come of it that is not
    /// pending already.
    pub fn timer_deadline(&self) -> Option<GuestNs> {
        let entry = self.regs.lvt[lvt::TIMER];
        let (word, bit) = place(entry as u8);
        if !self.enabled() || entry & lvt::MASKED != 0 || self.regs.irr[word] & bit != 0 {
            return None;
        }
        self.regs.timer.expires
    }

    /// Guest time is `now`: fires the timer if it is due. Returns whether it fired.
    pub fn advance(&mut self, now: GuestNs) -> bool {
        let fired = self.enabled() && self.regs.timer.take_expired(self.timer_mode(), now);
        if fired {
            self.raise_lvt(lvt::TIMER);
        }
        fired
    }
}
