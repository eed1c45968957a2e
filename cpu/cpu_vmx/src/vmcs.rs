//! The virtual machine control structure: fields by their encodings (SDM vol. 3D, appendix B).
//!
//! A processor keeps it where and as it likes, and gives it out field by field; on any host a table stands in.

/// A field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Field(pub u32);

/// Fields by number.
pub trait Fields {
    /// VMREAD.
    fn get(&self, field: Field) -> u64;
    /// VMWRITE.
    fn set(&mut self, field: Field, value: u64);
}

/// Memory that the processor keeps one in, or (VMXON) notes of its own.
#[repr(C, align(4096))]
pub struct Region([u32; 1024]);

impl Region {
    /// Empty, for a processor that wants this revision (IA32_VMX_BASIC, bits 30:0).
    pub fn new(revision: u32) -> Self {
        let mut words = [0; 1024];
        words[0] = revision;
        Self(words)
    }
}

macro_rules! fields {
    ($($name:ident = $encoding:literal,)*) => { $(
        #[allow(missing_docs)] // the manual's names
        pub const $name: Field = Field($encoding);
    )* };
}

/// What the processor is to do.
pub mod control {
    use super::Field;
    fields! {
        VPID = 0x0000,
        IO_BITMAP_A = 0x2000,
        IO_BITMAP_B = 0x2002,
        MSR_BITMAP = 0x2004,
        TSC_OFFSET = 0x2010,
        EPT_POINTER = 0x201A,
        PIN = 0x4000,
        PRIMARY = 0x4002,
        EXCEPTIONS = 0x4004,
        PAGE_FAULT_MASK = 0x4006,
        PAGE_FAULT_MATCH = 0x4008,
        CR3_TARGETS = 0x400A,
        EXIT = 0x400C,
        EXIT_MSR_STORES = 0x400E,
        EXIT_MSR_LOADS = 0x4010,
        ENTRY = 0x4012,
        ENTRY_MSR_LOADS = 0x4014,
        ENTRY_EVENT = 0x4016,
        SECONDARY = 0x401E,
        PAUSE_GAP = 0x4020,
        PAUSE_WINDOW = 0x4022,
        CR0_MASK = 0x6000,
        CR4_MASK = 0x6002,
        CR0_SHADOW = 0x6004,
        CR4_SHADOW = 0x6006,
    }
}

/// What the processor tells of an exit.
pub mod told {
    use super::Field;
    fields! {
        GUEST_PHYSICAL = 0x2400,
        INSTRUCTION_ERROR = 0x4400,
        REASON = 0x4402,
        EVENT = 0x4404,
        EVENT_ERROR_CODE = 0x4406,
        INTERRUPTED_EVENT = 0x4408,
        INTERRUPTED_ERROR_CODE = 0x440A,
        INSTRUCTION_BYTES = 0x440C,
        QUALIFICATION = 0x6400,
    }
}

/// The guest's state.
pub mod guest {
    use super::Field;
    fields! {
        LINK = 0x2800,
        DEBUGCTL = 0x2802,
        PAT = 0x2804,
        EFER = 0x2806,
        PDPTE0 = 0x280A,
        GDTR_LIMIT = 0x4810,
        IDTR_LIMIT = 0x4812,
        INTERRUPTIBILITY = 0x4824,
        ACTIVITY = 0x4826,
        SYSENTER_CS = 0x482A,
        PREEMPTION_TIMER = 0x482E,
        CR0 = 0x6800,
        CR3 = 0x6802,
        CR4 = 0x6804,
        GDTR_BASE = 0x6816,
        IDTR_BASE = 0x6818,
        DR7 = 0x681A,
        RSP = 0x681C,
        RIP = 0x681E,
        RFLAGS = 0x6820,
        PENDING_DEBUG = 0x6822,
        SYSENTER_ESP = 0x6824,
        SYSENTER_EIP = 0x6826,
    }

    /// Number of LDTR among segment registers; those before are as [`x86_defs::SegmentIndex`] numbers them.
    pub const LDTR: u32 = 6;
    /// Number of TR.
    pub const TR: u32 = 7;

    /// Selector of segment register `n`.
    pub const fn selector(n: u32) -> Field {
        Field(0x0800 + 2 * n)
    }
    /// Its limit.
    pub const fn limit(n: u32) -> Field {
        Field(0x4800 + 2 * n)
    }
    /// Its access rights.
    pub const fn rights(n: u32) -> Field {
        Field(0x4814 + 2 * n)
    }
    /// Its base.
    pub const fn base(n: u32) -> Field {
        Field(0x6806 + 2 * n)
    }
    /// Page-directory-pointer entry `n` of PAE paging.
    pub const fn pdpte(n: u32) -> Field {
        Field(PDPTE0.0 + 2 * n)
    }
}

/// The state that an exit comes back to.
pub mod host {
    use super::Field;
    fields! {
        ES = 0x0C00,
        CS = 0x0C02,
        SS = 0x0C04,
        DS = 0x0C06,
        FS = 0x0C08,
        GS = 0x0C0A,
        TR = 0x0C0C,
        PAT = 0x2C00,
        EFER = 0x2C02,
        SYSENTER_CS = 0x4C00,
        CR0 = 0x6C00,
        CR3 = 0x6C02,
        CR4 = 0x6C04,
        FS_BASE = 0x6C06,
        GS_BASE = 0x6C08,
        TR_BASE = 0x6C0A,
        GDTR_BASE = 0x6C0C,
        IDTR_BASE = 0x6C0E,
        SYSENTER_ESP = 0x6C10,
        SYSENTER_EIP = 0x6C12,
        RSP = 0x6C14,
        RIP = 0x6C16,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// In place of a processor.
    #[derive(Default)]
    pub struct Table(BTreeMap<Field, u64>);

    impl Fields for Table {
        fn get(&self, field: Field) -> u64 {
            self.0.get(&field).copied().unwrap_or(0)
        }
        fn set(&mut self, field: Field, value: u64) {
            self.0.insert(field, value);
        }
    }

    #[test]
    fn encodings_are_what_the_manual_says() {
        // Bits 11:10: 0 control, 1 read-only, 2 guest, 3 host; 14:13: 0 is 16 bits, 1 is 64, 2 is 32, 3 natural.
        let parts = |field: Field| (field.0 >> 10 & 3, field.0 >> 13 & 3);
        assert_eq!(parts(control::EPT_POINTER), (0, 1));
        assert_eq!(parts(told::QUALIFICATION), (1, 3));
        assert_eq!(parts(guest::selector(guest::TR)), (2, 0));
        assert_eq!(parts(host::GDTR_BASE), (3, 3));
        // Table B-7, B-12, B-14: TR's selector, limit, rights and base.
        let tr = [guest::selector(7), guest::limit(7), guest::rights(7), guest::base(7), guest::pdpte(3)];
        assert_eq!(tr.map(|field| field.0), [0x80E, 0x480E, 0x4822, 0x6814, 0x2810]);
        assert_eq!((size_of::<Region>(), align_of::<Region>()), (4096, 4096));
        assert_eq!(Region::new(0x12).0[..2], [0x12, 0]);
    }
}
