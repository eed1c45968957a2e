//! Segment registers with their hidden parts, and descriptor tables (SDM vol. 3, 3.4).

/// Which segment register; the order is the instruction encoding's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum SegmentIndex {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// Access rights of a segment: bits 8–15 and 20–23 of the descriptor's second word, moved to
/// bits 0–7 (type, S, DPL, P) and 8–11 (AVL, L, D/B, G).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SegmentAttributes(pub u16);

impl SegmentAttributes {
    /// From the high 32 bits of a descriptor.
    pub const fn from_descriptor_high(high: u32) -> Self {
        Self((((high >> 8) & 0xFF) | ((high >> 12) & 0xF00)) as u16)
    }
    /// Type field (4 bits).
    pub const fn kind(self) -> u8 {
        (self.0 & 0xF) as u8
    }
    /// Code or data (not a system descriptor).
    pub const fn is_code_or_data(self) -> bool {
        self.0 & 0x10 != 0
    }
    /// Executable.
    pub const fn is_code(self) -> bool {
        self.0 & 0x18 == 0x18
    }
    /// Conforming code, or expand-down data.
    pub const fn conforming_or_expand_down(self) -> bool {
        self.0 & 0x4 != 0
    }
    /// Readable code, or writable data.
    pub const fn readable_or_writable(self) -> bool {
        self.0 & 0x2 != 0
    }
    /// Descriptor privilege level.
    pub const fn dpl(self) -> u8 {
        ((self.0 >> 5) & 3) as u8
    }
    /// Present.
    pub const fn present(self) -> bool {
        self.0 & 0x80 != 0
    }
    /// 64-bit code.
    pub const fn long(self) -> bool {
        self.0 & 0x200 != 0
    }
    /// Default operand size 32, or big stack.
    pub const fn big(self) -> bool {
        self.0 & 0x400 != 0
    }
    /// Limit counts pages.
    pub const fn granular(self) -> bool {
        self.0 & 0x800 != 0
    }
}

/// A segment register with its hidden part. `limit` is in bytes, scaled by G.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Access rights.
    pub attributes: SegmentAttributes,
    /// Last valid offset.
    pub limit: u32,
    /// Linear base.
    pub base: u64,
    /// A null selector was loaded: unusable outside 64-bit mode.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base.
    pub base: u64,
    /// Last valid byte.
    pub limit: u16,
}
