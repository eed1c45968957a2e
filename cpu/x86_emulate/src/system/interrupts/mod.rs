//! Delivery of interrupts and exceptions through the IDT or the real-mode vector table, and what happens
//! when that faults in turn (SDM vol. 3, 6.12 to 6.15, 20.3).
//!
//! Called by run loops between instructions, with the exact RIP in `gpr[RIP]`: the faulting instruction's
//! for faults, the next one's for traps and interrupts; and by INT n. Each mode's file checks everything
//! before it commits; pushes that were made before a fault stay in memory, as on a processor.

mod long;
mod protected;
mod real;

pub(super) use long::tss_rsp;
pub(super) use protected::inner_stack;

use crate::core::{Core, Fault};
use crate::cpu::{PendingException, RIP};
use crate::mode::ModeKey;
use x86_defs::{Exception, Segment, SegmentIndex, control, flags};

/// How a delivery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The handler's first instruction is next.
    Delivered,
    /// Delivery raised #AC, which waits in `cpu.exc`; the caller delivers it after a look around.
    Waits,
    /// No handler could be reached: shutdown.
    TripleFault,
}

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An exception of the processor.
    Exception,
    /// From an interrupt controller.
    External,
    /// Not maskable; further ones are blocked until IRET.
    Nmi,
    /// INT n.
    Software,
    /// INT3 and INTO.
    SoftwareException,
    /// INT1.
    PrivilegedSoftware,
}

impl Kind {
    /// The EXT bit of error codes of faults met on the way.
    fn ext(self) -> u32 {
        u32::from(!matches!(self, Kind::Software | Kind::SoftwareException))
    }
    /// Whether the gate's DPL limits who may use it.
    fn checks_dpl(self) -> bool {
        matches!(self, Kind::Software | Kind::SoftwareException)
    }
}

/// One delivery.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub vector: u8,
    pub error_code: Option<u32>,
    pub kind: Kind,
    /// RIP to return to.
    pub return_ip: u64,
    /// RF in the pushed flags is set.
    pub resume: bool,
}

impl Event {
    /// The EXT bit of error codes of faults met on the way.
    pub fn ext(&self) -> u32 {
        self.kind.ext()
    }
    /// The error code that names the IDT entry.
    pub fn idt_error(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.kind.ext()
    }
    /// RFLAGS as pushed.
    pub fn flags_image<C: Core>(&self, c: &C) -> u64 {
        c.cpu().rflags_all() | if self.resume { flags::RF } else { 0 }
    }
}

/// Delivers `pending`, or the double fault that comes of it.
pub fn deliver_exception<C: Core>(c: &mut C, pending: PendingException) -> Outcome {
    let Some(mut exception) = pending.vector else { return Outcome::Delivered };
    if exception == Exception::Debug {
        super::debug::enter_handler(c.cpu_mut(), pending.address);
    }
    let mut pending = pending;
    loop {
        if exception == Exception::PageFault {
            c.cpu_mut().cr2 = pending.address;
        }
        let event = Event {
            vector: exception.vector(),
            error_code: exception.has_error_code().then_some(pending.error_code),
            kind: Kind::Exception,
            return_ip: c.cpu().gpr[RIP],
            resume: is_fault(exception, &pending),
        };
        if deliver(c, &event).is_ok() {
            return Outcome::Delivered;
        }
        let second = core::mem::take(&mut c.cpu_mut().exc);
        match combine(exception, &second) {
            None => return Outcome::TripleFault,
            Some(next) if next == Exception::DoubleFault => {
                if second.vector == Some(Exception::PageFault) {
                    c.cpu_mut().cr2 = second.address;
                }
                pending = PendingException::default();
                exception = next;
            }
            // #AC of a frame for CPL 3: what is delivered instead may raise it again, for ever (CVE-2015-5307).
            Some(Exception::AlignmentCheck) => {
                c.cpu_mut().exc = second;
                return Outcome::Waits;
            }
            Some(next) => {
                pending = second;
                exception = next;
            }
        }
    }
}

/// Delivers an interrupt. Faults met on the way are delivered instead of it.
pub fn deliver_interrupt<C: Core>(c: &mut C, vector: u8, kind: Kind) -> Outcome {
    let return_ip = c.cpu().gpr[RIP];
    if kind == Kind::Nmi {
        c.cpu_mut().nmi_blocked = true;
    }
    let event = Event { vector, error_code: None, kind, return_ip, resume: false };
    match deliver(c, &event) {
        Ok(()) => Outcome::Delivered,
        Err(Fault) => {
            let fault = core::mem::take(&mut c.cpu_mut().exc);
            deliver_exception(c, fault)
        }
    }
}

/// INT n, INT3, INTO, INT1: `return_ip` is behind the instruction. On a fault nothing is committed.
pub(super) fn software<C: Core>(c: &mut C, vector: u8, kind: Kind, return_ip: u64) -> Result<(), Fault> {
    let stepping = c.cpu().mode.has(ModeKey::TRAP);
    deliver(c, &Event { vector, error_code: None, kind, return_ip, resume: false })?;
    if stepping {
        c.cpu_mut().pending_debug |= super::debug::NO_STEP;
    }
    Ok(())
}

/// Whether the pushed flags get RF, so that an instruction breakpoint at the instruction does not hit again
/// (SDM vol. 3, 17.3.1.1).
fn is_fault(exception: Exception, pending: &PendingException) -> bool {
    match exception {
        Exception::Debug => pending.address & control::DR6_BD != 0,
        Exception::Nmi | Exception::Breakpoint | Exception::Overflow => false,
        Exception::DoubleFault | Exception::MachineCheck => false,
        _ => true,
    }
}

/// What becomes of `second`, met while delivering `first` (SDM vol. 3, table 6-5); `None`: shutdown.
fn combine(first: Exception, second: &PendingException) -> Option<Exception> {
    let next = second.vector.unwrap_or(Exception::GeneralProtection);
    let serious = |e: Exception| e.is_contributory() || e == Exception::PageFault;
    match first {
        Exception::DoubleFault => None,
        Exception::PageFault if serious(next) => Some(Exception::DoubleFault),
        e if e.is_contributory() && next.is_contributory() => Some(Exception::DoubleFault),
        _ => Some(next),
    }
}

fn deliver<C: Core>(c: &mut C, event: &Event) -> Result<(), Fault> {
    let mode = c.cpu().mode;
    if mode.has(ModeKey::LMA) {
        long::deliver(c, event)?;
    } else if mode.has(ModeKey::PROTECTED) {
        protected::deliver(c, event)?;
    } else {
        real::deliver(c, event)?;
    }
    let cpu = c.cpu_mut();
    cpu.halted = false;
    cpu.interrupt_shadow = false;
    cpu.shadow_blocks_debug = false;
    Ok(())
}

/// The commit that all handlers have in common: CS, RIP and flags. `cleared` are the flags to clear.
fn enter<C: Core>(c: &mut C, code: Segment, cpl: u8, ip: u64, cleared: u64) {
    let cpu = c.cpu_mut();
    cpu.seg[SegmentIndex::Cs as usize] = code;
    cpu.cpl = cpl;
    cpu.rflags &= !cleared;
    cpu.gpr[RIP] = ip;
    cpu.refresh();
}
