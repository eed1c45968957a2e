//! What an exit means (APM vol. 2, appendix C): the code and the two words beside it.

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
    /// VMRUN refused the state.
    Invalid,
    /// Any other instruction that is intercepted.
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
    /// RIP behind it; every processor tells it here.
    pub next_rip: u64,
}

impl Exit {
    /// From EXITCODE, EXITINFO1 and EXITINFO2. Failure is −1 in 64 bits, or (QEMU) in 32.
    pub fn decode(code: u64, info_1: u64, info_2: u64) -> Self {
        match code {
            0x40..=0x5F => Self::Exception { vector: (code - 0x40) as u8, error_code: info_1 as u32 },
            0x60..=0x63 => Self::Host,
            0x64 => Self::Window,
            0x6E => Self::ReadTsc,
            0x72 => Self::Cpuid,
            0x77 => Self::Pause,
            0x78 => Self::Halt,
            0x7B => Self::Port(Port::decode(info_1, info_2)),
            0x7C => Self::Msr { write: info_1 & 1 != 0 },
            0x7F => Self::TripleFault,
            0x400 => Self::NestedFault { gpa: info_2, access: info_1 },
            u64::MAX | 0xFFFF_FFFF => Self::Invalid,
            _ => Self::Instruction(code),
        }
    }

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
        }
    }
}

/// Names of exits, by [`Exit::number`].
pub const NAMES: [&str; 13] = [
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
];

impl Port {
    /// From the exit's two words (APM vol. 2, 15.10.2).
    fn decode(info: u64, next_rip: u64) -> Self {
        Self {
            number: (info >> 16) as u16,
            bytes: (info >> 4 & 7) as u8,
            input: info & 1 != 0,
            string: info & 0b1100 != 0,
            next_rip,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_what_the_manual_says() {
        assert_eq!(Exit::decode(0x60, 0, 0), Exit::Host);
        assert_eq!(Exit::decode(0x51, 0, 0), Exit::Exception { vector: 17, error_code: 0 });
        assert_eq!(Exit::decode(0x7C, 1, 0), Exit::Msr { write: true });
        assert_eq!(Exit::decode(0x400, 6, 0xFEC0_0000), Exit::NestedFault { gpa: 0xFEC0_0000, access: 6 });
        assert_eq!(Exit::decode(u64::MAX, 0, 0), Exit::Invalid);
        assert_eq!(Exit::decode(u64::from(u32::MAX), 0, 0), Exit::Invalid);
        assert_eq!(Exit::decode(0x8D, 0, 0), Exit::Instruction(0x8D));
    }

    #[test]
    fn ports_are_read_out() {
        // OUT 3F8h, AL
        let out = Port { number: 0x3F8, bytes: 1, input: false, string: false, next_rip: 0x1001 };
        assert_eq!(Exit::decode(0x7B, 0x03F8_0090, 0x1001), Exit::Port(out));
        // IN EAX, 0CFCh
        let input = Port { number: 0xCFC, bytes: 4, input: true, string: false, next_rip: 7 };
        assert_eq!(Exit::decode(0x7B, 0x0CFC_0141, 7), Exit::Port(input));
        // REP OUTSB
        let Exit::Port(string) = Exit::decode(0x7B, 0x03F8_009C, 7) else { panic!("a port access") };
        assert!(string.string && !string.input);
    }

    #[test]
    fn every_exit_has_a_name() {
        for code in 0..0x402 {
            assert!(!Exit::decode(code, 0, 0).name().is_empty());
        }
        assert_eq!(Exit::Invalid.name(), "invalid");
    }
}
