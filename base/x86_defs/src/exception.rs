//! Exception vectors and the page-fault error code (SDM vol. 3, chapter 6).

/// Architectural exceptions by vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the manual's
pub enum Exception {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    CoprocessorOverrun = 9,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87 = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    Simd = 19,
    ControlProtection = 21,
}

impl Exception {
    /// The exception of `vector`, if it is one of the architecture's.
    pub fn from_vector(vector: u8) -> Option<Self> {
        use Exception::*;
        Some(match vector {
            0 => DivideError,
            1 => Debug,
            2 => Nmi,
            3 => Breakpoint,
            4 => Overflow,
            5 => BoundRange,
            6 => InvalidOpcode,
            7 => DeviceNotAvailable,
            8 => DoubleFault,
            9 => CoprocessorOverrun,
            10 => InvalidTss,
            11 => SegmentNotPresent,
            12 => StackFault,
            13 => GeneralProtection,
            14 => PageFault,
            16 => X87,
            17 => AlignmentCheck,
            18 => MachineCheck,
            19 => Simd,
            21 => ControlProtection,
            _ => return None,
        })
    }

    /// Its vector.
    pub const fn vector(self) -> u8 {
        self as u8
    }

    /// Whether delivery pushes an error code.
    pub const fn has_error_code(self) -> bool {
        use Exception::*;
        matches!(
            self,
            DoubleFault
                | InvalidTss
                | SegmentNotPresent
                | StackFault
                | GeneralProtection
                | PageFault
                | AlignmentCheck
                | ControlProtection
        )
    }

    /// "Contributory" in the sense of the double-fault table (SDM vol. 3, table 6-5).
    pub const fn is_contributory(self) -> bool {
        use Exception::*;
        matches!(
            self,
            DivideError | InvalidTss | SegmentNotPresent | StackFault | GeneralProtection | ControlProtection
        )
    }
}

/// Page fault: the page was present (a protection violation).
pub const PF_PRESENT: u32 = 1 << 0;
/// Page fault: the access was a write.
pub const PF_WRITE: u32 = 1 << 1;
/// Page fault: the access came from CPL 3.
pub const PF_USER: u32 = 1 << 2;
/// Page fault: a reserved bit was set in a paging structure.
pub const PF_RESERVED: u32 = 1 << 3;
/// Page fault: instruction fetch.
pub const PF_FETCH: u32 = 1 << 4;
