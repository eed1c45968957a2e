//! Why a guest was left, in terms that all processors share.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use x86_defs::Exception;
use x86_emulate::cpu::PendingException;

/// Exceptions that are looked at, by vector, because delivering them may raise them again without end (CVE-2015-5307,
/// CVE-2015-8104): the exit gives the host its processor back. Machine checks are the machine's.
pub const LOOKED_AT: u32 = 1 << Exception::Debug as u32
    | 1 << Exception::AlignmentCheck as u32
    | 1 << Exception::MachineCheck as u32;

/// Why the guest was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An interrupt, NMI, SMI or INIT of the machine that we run on: it was or will be taken there.
    Host,
    /// The guest takes interrupts from here on.
    Window,
    /// An exception that is only looked at and then delivered.
    Exception {
        /// Its vector.
        vector: u8,
        /// For those that have one.
        error_code: u32,
    },
    /// IN or OUT of one element.
    Port(Port),
    /// CPUID.
    Cpuid,
    /// RDMSR, or WRMSR.
    Msr {
        /// WRMSR.
        write: bool,
    },
    /// HLT.
    Halt,
    /// PAUSE: the guest waits for another of its vCPUs.
    Pause,
    /// RDTSC.
    ReadTsc,
    /// Memory that is no RAM, or not mapped so.
    NestedFault {
        /// Guest-physical address.
        gpa: u64,
        /// The access, in the format of a page fault's error code.
        access: u64,
    },
    /// Shutdown.
    TripleFault,
    /// The processor refused the state.
    Invalid,
    /// The time that the guest was given is over.
    Timer,
    /// Any other instruction that is intercepted; the processor's own number of the reason.
    Instruction(u64),
}

/// A port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// The port.
    pub number: u16,
    /// 1, 2 or 4.
    pub bytes: u8,
    /// IN.
    pub input: bool,
    /// INS or OUTS, maybe repeated.
    pub string: bool,
    /// RIP behind it.
    pub next_rip: u64,
}

impl Exit {
    /// For statistics.
    pub fn name(&self) -> &'static str {
        NAMES[self.number()]
    }

    /// Its place in [`NAMES`].
    #[inline]
    pub fn number(&self) -> usize {
        match self {
            Self::Host => 0,
            Self::Window => 1,
            Self::Exception { .. } => 2,
            Self::Port(_) => 3,
            Self::Cpuid => 4,
            Self::Msr { .. } => 5,
            Self::Halt => 6,
            Self::ReadTsc => 7,
            Self::NestedFault { .. } => 8,
            Self::TripleFault => 9,
            Self::Invalid => 10,
            Self::Instruction(_) => 11,
            Self::Pause => 12,
            Self::Timer => 13,
        }
    }
}

/// The event whose delivery an exit interrupted, in the words that EXITINTINFO (APM vol. 2, 15.7.2) and the IDT-vectoring
/// information (SDM vol. 3C, 25.9.3) have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interrupted {
    /// Vector in bits 7:0, type in 10:8, bit 31 if there is one.
    pub event: u32,
    /// For those that have one.
    pub error_code: u32,
}

impl Interrupted {
    /// Whether there is one.
    #[inline]
    pub fn is_valid(self) -> bool {
        self.event & 1 << 31 != 0
    }

    /// The exception, if it is one that the processor raised. Software's are raised anew: RIP is still at the instruction.
    fn exception(self) -> Option<Exception> {
        const RAISED: u32 = 3;
        let raised = self.is_valid() && self.event >> 8 & 7 == RAISED;
        let vector = Exception::from_vector(self.event as u8).filter(|_| raised)?;
        (!matches!(vector, Exception::Breakpoint | Exception::Overflow)).then_some(vector)
    }
}

impl Exit {
    /// The exception that the interpreter is to deliver before anything else: the one whose delivery the exit
    /// interrupted, or the one that exited. `cr2` is the guest's; `debug` is what DR6 is to gather of a #DB.
    pub fn exception(&self, interrupted: Interrupted, cr2: u64, debug: u64) -> Option<PendingException> {
        let (vector, error_code) = match (interrupted.exception(), self) {
            (Some(vector), _) => (vector, interrupted.error_code),
            (None, Self::Exception { vector, error_code }) => (Exception::from_vector(*vector)?, *error_code),
            (None, _) => return None,
        };
        let address = match vector {
            Exception::Debug => debug,
            Exception::PageFault => cr2,
            _ => 0,
        };
        let error_code = if vector.has_error_code() { error_code } else { 0 };
        Some(PendingException { vector: Some(vector), error_code, address, is_trap: false })
    }
}

/// Names of exits, by [`Exit::number`].
pub const NAMES: [&str; 14] = [
    "host interrupt",
    "interrupt window",
    "exception",
    "port",
    "cpuid",
    "msr",
    "hlt",
    "rdtsc",
    "nested page fault",
    "triple fault",
    "invalid",
    "other",
    "pause",
    "timer",
];

/// How many exits of each kind there were.
pub struct Counts([AtomicU64; NAMES.len()]);

impl Default for Counts {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; NAMES.len()])
    }
}

impl Counts {
    /// One more.
    #[inline]
    pub fn count(&self, exit: &Exit) {
        self.0[exit.number()].fetch_add(1, Relaxed);
    }

    /// Those that happened, for people.
    pub fn named(&self) -> Vec<(String, u64)> {
        let all =
            NAMES.iter().zip(&self.0).map(|(name, count)| (format!("exits: {name}"), count.load(Relaxed)));
        all.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_delivered_once() {
        let exited = Exit::Exception { vector: 17, error_code: 5 };
        let none = Interrupted::default();
        let check = exited.exception(none, 0, 0).unwrap();
        assert_eq!((check.vector, check.error_code), (Some(Exception::AlignmentCheck), 5));
        let debug = Exit::Exception { vector: 1, error_code: 5 }.exception(none, 0, 0x4001).unwrap();
        assert_eq!((debug.error_code, debug.address), (0, 0x4001));
        // A page fault whose delivery needed memory that is not there: it comes first.
        let fault = Exit::NestedFault { gpa: 0xFEC0_0000, access: 0 };
        let interrupted = Interrupted { event: 1 << 31 | 1 << 11 | 3 << 8 | 14, error_code: 6 };
        let page = fault.exception(interrupted, 0x1234, 0).unwrap();
        assert_eq!((page.vector, page.error_code, page.address), (Some(Exception::PageFault), 6, 0x1234));
        assert_eq!(fault.exception(none, 0, 0), None);
        // INT n and INT3 are executed again.
        for event in [1 << 31 | 4 << 8 | 0x80, 1 << 31 | 3 << 8 | 3, 3 << 8 | 14] {
            assert_eq!(fault.exception(Interrupted { event, error_code: 0 }, 0, 0), None);
        }
    }

    #[test]
    fn exits_are_counted_by_name() {
        let counts = Counts::default();
        counts.count(&Exit::Invalid);
        counts.count(&Exit::Timer);
        counts.count(&Exit::Timer);
        let expected = [("exits: invalid".into(), 1), ("exits: timer".into(), 2)];
        assert_eq!(counts.named(), expected);
        assert_eq!(Exit::Halt.name(), "hlt");
    }
}
