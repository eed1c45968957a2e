//! Saved state of a local APIC, posted part included. Engines whose APIC is elsewhere (the kernel's, the
//! processor's) convert it to and from [`ApicState`], which speaks in the manual's registers.

use crate::inbox::event;
use crate::local::{LocalApic, Registers};
use crate::registers::{self as reg, TimerMode, lvt};
use crate::timer::ApicTimer;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::SeqCst;
use guest_time::GuestNs;
use saved_state::{CRITICAL, FieldWriter, Fields, RestoreError, SavedState, StateBlob, from_blob, to_blob};
use x86_defs::msr;

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApicState {
    /// Physical id: must be that of the APIC that takes the state.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Task priority, 8 bits.
    pub tpr: u8,
    /// Logical destination in xAPIC format.
    pub ldr: u32,
    /// Destination format.
    pub dfr: u32,
    /// Spurious-interrupt vector register.
    pub svr: u32,
    /// In service.
    pub isr: [u32; 8],
    /// Trigger modes.
    pub tmr: [u32; 8],
    /// Requested.
    pub irr: [u32; 8],
    /// ESR as last latched.
    pub esr: u32,
    /// Errors since then.
    pub errors: u32,
    /// Interrupt command, destination in the upper half as its mode has it.
    pub icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    /// Initial count.
    pub initial_count: u32,
    /// Divide configuration.
    pub divide: u32,
    /// Guest time at which a one-shot or periodic count expires (in TSC-deadline mode: `tsc_deadline` does).
    pub expires: Option<GuestNs>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// A message in ExtINT mode waits.
    pub extint: bool,
    /// NMI, INIT and the like that were posted and not taken (bits of our own).
    pub events: u32,
    /// Vector of a posted SIPI.
    pub sipi_vector: u8,
}

fn bits256(bits: &[u32; 8]) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (to, word) in bytes.chunks_exact_mut(4).zip(bits) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn from_bits256(bytes: [u8; 32]) -> [u32; 8] {
    core::array::from_fn(|i| {
        u32::from_le_bytes([bytes[i * 4], bytes[i * 4 + 1], bytes[i * 4 + 2], bytes[i * 4 + 3]])
    })
}

impl SavedState for ApicState {
    const KIND: &'static str = "local_apic";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { id, base, tpr, ldr, dfr, svr, isr, tmr, irr, esr, errors, icr, lvt, .. } = self;
        let Self { initial_count, divide, expires, tsc_deadline, extint, events, sipi_vector, .. } = self;
        w.uint(1, *id).uint(2 | CRITICAL, *base).uint(3, *tpr).uint(4, *ldr).uint(5, *dfr).uint(6, *svr);
        w.bytes(7, &bits256(isr)).bytes(8, &bits256(tmr)).bytes(9, &bits256(irr));
        w.uint(10, *esr).uint(11, *errors).uint(12, *icr).uints(13, lvt.iter().map(|e| u64::from(*e)));
        w.uint(14, *initial_count).uint(15, *divide).flag(16, expires.is_some());
        w.uint(17, expires.unwrap_or(0)).uint(18, *tsc_deadline).flag(19, *extint);
        w.uint(20, *events).uint(21, *sipi_vector);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let lvt_tag = 13;
        let mut state = Self {
            id: r.uint(1)?,
            base: r.uint(2 | CRITICAL)?,
            tpr: r.uint(3)?,
            ldr: r.uint(4)?,
            dfr: r.uint(5)?,
            svr: r.uint(6)?,
            isr: from_bits256(r.array(7)?),
            tmr: from_bits256(r.array(8)?),
            irr: from_bits256(r.array(9)?),
            esr: r.uint(10)?,
            errors: r.uint(11)?,
            icr: r.uint(12)?,
            lvt: [0; 6],
            initial_count: r.uint(14)?,
            divide: r.uint(15)?,
            expires: None,
            tsc_deadline: r.uint(18)?,
            extint: r.flag(19)?,
            events: r.uint(20)?,
            sipi_vector: r.uint(21)?,
        };
        let entries = r.uints(lvt_tag, 6)?;
        let wrong = RestoreError::Value { tag: lvt_tag, reason: "not six 32-bit entries" };
        for (i, entry) in state.lvt.iter_mut().enumerate() {
            *entry = entries.get(i).and_then(|e| u32::try_from(*e).ok()).ok_or(wrong.clone())?;
        }
        let (armed, at) = (r.flag(16)?, r.uint(17)?);
        state.expires = armed.then_some(at);
        Ok(state)
    }
}

impl ApicState {
    /// What was posted besides vectors and not taken, as address and data of interrupt messages: for engines whose
    /// APIC takes those.
    pub fn posted_messages(&self) -> Vec<(u64, u32)> {
        let to = reg::DEFAULT_BASE | u64::from(self.id & 0xFF) << 12;
        let message = |(bit, mode, vector): (u32, u32, u8)| {
            (self.events & bit != 0).then_some((to, mode << 8 | u32::from(vector)))
        };
        let lint1 = self.lvt[lvt::LINT1];
        let lint1_mode = if lint1 & lvt::MASKED == 0 { lint1 >> 8 & 7 } else { 0 };
        let mut all: Vec<_> = [(event::INIT, 5, 0), (event::SIPI, 6, self.sipi_vector), (event::NMI, 4, 0)]
            .into_iter()
            .filter_map(message)
            .collect();
        if lint1_mode == 4 {
            all.extend(message((event::LINT1, 4, 0)));
        }
        all
    }
}

impl LocalApic {
    /// The state, in plain form.
    pub fn state(&self) -> ApicState {
        let Registers { tpr, ldr, dfr, svr, isr, mut tmr, mut irr, esr, errors, icr, lvt, ref timer, extint } =
            self.regs;
        let ApicTimer { initial_count, divide, tsc_deadline, expires } = *timer;
        for word in 0..8 {
            let posted = self.inbox.irr[word].load(SeqCst);
            tmr[word] = (tmr[word] & !posted) | (self.inbox.tmr[word].load(SeqCst) & posted);
            irr[word] |= posted;
        }
        let counts = self.timer_mode() != TimerMode::TscDeadline;
        let events = self.inbox.events.load(SeqCst) & event::SAVED;
        let sipi = if events & event::SIPI != 0 { self.inbox.sipi_vector.load(SeqCst) as u8 } else { 0 };
        ApicState {
            id: self.id,
            base: self.base,
            tpr,
            ldr,
            dfr,
            svr,
            isr,
            tmr,
            irr,
            esr,
            errors,
            icr,
            lvt,
            initial_count,
            divide,
            expires: expires.filter(|_| counts),
            tsc_deadline,
            extint,
            events,
            sipi_vector: sipi,
        }
    }

    /// Takes over `state`; bits that no register holds are dropped. Refused if it is another APIC's, or in
    /// a mode that this one does not have.
    pub fn set_state(&mut self, state: &ApicState) -> Result<(), RestoreError> {
        let s = state;
        if s.id != self.id {
            return Err(RestoreError::Value { tag: 1, reason: "the APIC id of another processor" });
        }
        let x2apic = s.base & msr::APIC_BASE_X2APIC != 0;
        let enabled = s.base & msr::APIC_BASE_ENABLE != 0;
        let features = self.features;
        if x2apic && !(enabled && features.x2apic) {
            return Err(RestoreError::Value { tag: 2 | CRITICAL, reason: "an APIC mode that is not there" });
        }
        let address = ((1u64 << features.physical_bits.clamp(32, 52)) - 1) & !0xFFF;
        self.reset();
        self.base = s.base & (address | msr::APIC_BASE_ENABLE | msr::APIC_BASE_X2APIC | msr::APIC_BASE_BSP);
        let no_reserved = |mut bits: [u32; 8]| {
            bits[0] &= 0xFFFF_0000;
            bits
        };
        let mut entries: [u32; lvt::COUNT] = core::array::from_fn(|i| s.lvt[i] & lvt::WRITABLE[i]);
        if !features.tsc_deadline {
            entries[lvt::TIMER] &= !(1 << 18);
        }
        let icr_mask = if x2apic { 0xFFFF_FFFF_0000_0000 } else { 0xFF00_0000_0000_0000 };
        self.regs = Registers {
            tpr: s.tpr,
            ldr: s.ldr & 0xFF00_0000,
            dfr: s.dfr | reg::DFR_ONES,
            svr: s.svr & reg::SVR_WRITABLE,
            isr: no_reserved(s.isr),
            tmr: no_reserved(s.tmr),
            irr: no_reserved(s.irr),
            esr: s.esr & 0xFF,
            errors: s.errors & 0xFF,
            icr: s.icr & (icr_mask | u64::from(reg::ICR_WRITABLE)),
            lvt: entries,
            timer: ApicTimer {
                initial_count: s.initial_count,
                divide: s.divide & reg::DIVIDE_WRITABLE,
                tsc_deadline: 0,
                expires: s.expires,
            },
            extint: s.extint,
        };
        if self.timer_mode() == TimerMode::TscDeadline {
            let now = self.clock.now();
            self.regs.timer.set_tsc_deadline(&self.clock, now, s.tsc_deadline);
        }
        self.inbox.sipi_vector.store(u32::from(s.sipi_vector), SeqCst);
        self.publish();
        self.inbox.events.fetch_or(s.events & event::SAVED, SeqCst);
        Ok(())
    }

    /// The state as a blob (`VcpuState::apic`).
    pub fn save(&self) -> StateBlob {
        to_blob(&self.state())
    }
    /// Takes over a saved state. The TSC's offset is set first ([`LocalApic::set_tsc_offset`]). An error
    /// leaves the APIC as it was.
    pub fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.set_state(&from_blob(blob)?)
    }
}
