//! Why a guest was left, in terms that all processors share.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
