//! The virtual machine control block (APM vol. 2, appendix B): 4 KiB that VMRUN loads and #VMEXIT stores.
//!
//! Plain bytes with typed fields, so that what is built for the processor can be looked at on any host.

use x86_defs::{DescriptorTable, Segment, SegmentAttributes};

/// See the module's header.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Vmcb([u8; 4096]);

/// A field: where it is and how wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field<T> {
    offset: usize,
    width: core::marker::PhantomData<T>,
}

impl<T> Field<T> {
    const fn at(offset: usize) -> Self {
        Self { offset, width: core::marker::PhantomData }
    }
}

/// An integer that a field holds.
pub trait Value: Copy {
    /// From the bytes at the start of `bytes`.
    fn load(bytes: &[u8]) -> Self;
    /// To the start of `bytes`.
    fn store(self, bytes: &mut [u8]);
}

macro_rules! value {
    ($($t:ty),*) => { $(impl Value for $t {
        fn load(bytes: &[u8]) -> Self {
            let mut raw = [0; size_of::<$t>()];
            raw.copy_from_slice(&bytes[..size_of::<$t>()]);
            Self::from_le_bytes(raw)
        }
        fn store(self, bytes: &mut [u8]) {
            bytes[..size_of::<$t>()].copy_from_slice(&self.to_le_bytes());
        }
    })* };
}
value!(u8, u16, u32, u64);

/// The control area.
#[allow(missing_docs)] // the manual's names
pub mod control {
    use super::Field;
    pub const INTERCEPT_DR_READ: Field<u16> = Field::at(0x004);
    pub const INTERCEPT_DR_WRITE: Field<u16> = Field::at(0x006);
    pub const INTERCEPT_EXCEPTIONS: Field<u32> = Field::at(0x008);
    pub const INTERCEPT_1: Field<u32> = Field::at(0x00C);
    pub const INTERCEPT_2: Field<u32> = Field::at(0x010);
    pub const PAUSE_THRESHOLD: Field<u16> = Field::at(0x03C);
    pub const PAUSE_COUNT: Field<u16> = Field::at(0x03E);
    pub const IOPM_BASE: Field<u64> = Field::at(0x040);
    pub const MSRPM_BASE: Field<u64> = Field::at(0x048);
    pub const TSC_OFFSET: Field<u64> = Field::at(0x050);
    pub const ASID: Field<u32> = Field::at(0x058);
    pub const TLB_CONTROL: Field<u8> = Field::at(0x05C);
    pub const V_TPR: Field<u8> = Field::at(0x060);
    pub const V_CONTROL: Field<u32> = Field::at(0x060);
    pub const V_VECTOR: Field<u32> = Field::at(0x064);
    pub const INTERRUPT_SHADOW: Field<u64> = Field::at(0x068);
    pub const EXIT_CODE: Field<u64> = Field::at(0x070);
    pub const EXIT_INFO_1: Field<u64> = Field::at(0x078);
    pub const EXIT_INFO_2: Field<u64> = Field::at(0x080);
    pub const EXIT_INT_INFO: Field<u64> = Field::at(0x088);
    pub const NESTED_PAGING: Field<u64> = Field::at(0x090);
    pub const NESTED_CR3: Field<u64> = Field::at(0x0B0);
    pub const CLEAN_BITS: Field<u32> = Field::at(0x0C0);
    pub const NEXT_RIP: Field<u64> = Field::at(0x0C8);

    /// Bits of `INTERCEPT_1`.
    pub mod intercept_1 {
        pub const INTR: u32 = 1 << 0;
        pub const NMI: u32 = 1 << 1;
        pub const SMI: u32 = 1 << 2;
        pub const INIT: u32 = 1 << 3;
        pub const VINTR: u32 = 1 << 4;
        pub const RDTSC: u32 = 1 << 14;
        pub const RDPMC: u32 = 1 << 15;
        pub const CPUID: u32 = 1 << 18;
        pub const RSM: u32 = 1 << 19;
        pub const IRET: u32 = 1 << 20;
        pub const INVD: u32 = 1 << 22;
        pub const PAUSE: u32 = 1 << 23;
        pub const HLT: u32 = 1 << 24;
        pub const INVLPGA: u32 = 1 << 26;
        pub const IOIO: u32 = 1 << 27;
        pub const MSR: u32 = 1 << 28;
        pub const TASK_SWITCH: u32 = 1 << 29;
        pub const FERR_FREEZE: u32 = 1 << 30;
        pub const SHUTDOWN: u32 = 1 << 31;
    }
    /// Bits of `INTERCEPT_2`: VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT and so on.
    pub mod intercept_2 {
        pub const VMRUN: u32 = 1 << 0;
        pub const SVM_INSTRUCTIONS: u32 = 0x7F;
        pub const RDTSCP: u32 = 1 << 7;
        pub const WBINVD: u32 = 1 << 9;
        pub const MONITOR: u32 = 1 << 10;
        pub const MWAIT: u32 = 1 << 11 | 1 << 12;
        pub const XSETBV: u32 = 1 << 13;
    }
    /// `V_CONTROL`: a virtual interrupt is pending.
    pub const V_IRQ: u32 = 1 << 8;
    /// `V_CONTROL`: whatever the task priority.
    pub const V_IGNORE_TPR: u32 = 1 << 20;
    /// `V_CONTROL`: RFLAGS.IF of the guest masks virtual interrupts only.
    pub const V_INTR_MASKING: u32 = 1 << 24;
    /// `TLB_CONTROL`: flush everything. All processors know it.
    pub const FLUSH_ALL: u8 = 1;
    /// `TLB_CONTROL`: flush this guest's entries (FlushByAsid).
    pub const FLUSH_GUEST: u8 = 3;
}

/// The state-save area.
#[allow(missing_docs)]
pub mod save {
    use super::Field;
    pub const SEGMENTS: usize = 0x400;
    pub const GDTR: usize = 0x460;
    pub const LDTR: usize = 0x470;
    pub const IDTR: usize = 0x480;
    pub const TR: usize = 0x490;
    pub const CPL: Field<u8> = Field::at(0x4CB);
    pub const EFER: Field<u64> = Field::at(0x4D0);
    pub const CR4: Field<u64> = Field::at(0x548);
    pub const CR3: Field<u64> = Field::at(0x550);
    pub const CR0: Field<u64> = Field::at(0x558);
    pub const DR7: Field<u64> = Field::at(0x560);
    pub const DR6: Field<u64> = Field::at(0x568);
    pub const RFLAGS: Field<u64> = Field::at(0x570);
    pub const RIP: Field<u64> = Field::at(0x578);
    pub const RSP: Field<u64> = Field::at(0x5D8);
    pub const RAX: Field<u64> = Field::at(0x5F8);
    pub const STAR: Field<u64> = Field::at(0x600);
    pub const LSTAR: Field<u64> = Field::at(0x608);
    pub const CSTAR: Field<u64> = Field::at(0x610);
    pub const SFMASK: Field<u64> = Field::at(0x618);
    pub const KERNEL_GS_BASE: Field<u64> = Field::at(0x620);
    pub const SYSENTER_CS: Field<u64> = Field::at(0x628);
    pub const SYSENTER_ESP: Field<u64> = Field::at(0x630);
    pub const SYSENTER_EIP: Field<u64> = Field::at(0x638);
    pub const CR2: Field<u64> = Field::at(0x640);
    pub const PAT: Field<u64> = Field::at(0x668);
}

/// Present, among a segment's attributes.
const PRESENT: u16 = 0x80;

impl Default for Vmcb {
    fn default() -> Self {
        Self([0; 4096])
    }
}

impl Vmcb {
    /// A field's value.
    pub fn get<T: Value>(&self, field: Field<T>) -> T {
        T::load(&self.0[field.offset..])
    }

    /// Sets a field.
    pub fn set<T: Value>(&mut self, field: Field<T>, value: T) {
        value.store(&mut self.0[field.offset..]);
    }

    /// Sets bits of a field where `on`, clears them where not.
    pub fn switch(&mut self, field: Field<u32>, bits: u32, on: bool) {
        let old = self.get(field);
        self.set(field, if on { old | bits } else { old & !bits });
    }

    /// A segment register of the save area. What is not present is unusable; attributes are as
    /// [`SegmentAttributes`] has them (APM vol. 2, 15.5.1).
    pub fn segment(&self, offset: usize) -> Segment {
        let attributes = SegmentAttributes(u16::load(&self.0[offset + 2..]) & 0xFFF);
        Segment {
            selector: u16::load(&self.0[offset..]),
            attributes,
            limit: u32::load(&self.0[offset + 4..]),
            base: u64::load(&self.0[offset + 8..]),
            unusable: !attributes.present(),
        }
    }

    /// Sets one.
    pub fn set_segment(&mut self, offset: usize, segment: &Segment) {
        let absent = if segment.unusable { PRESENT } else { 0 };
        segment.selector.store(&mut self.0[offset..]);
        (segment.attributes.0 & !absent).store(&mut self.0[offset + 2..]);
        segment.limit.store(&mut self.0[offset + 4..]);
        segment.base.store(&mut self.0[offset + 8..]);
    }

    /// GDTR or IDTR.
    pub fn table(&self, offset: usize) -> DescriptorTable {
        DescriptorTable {
            base: u64::load(&self.0[offset + 8..]),
            limit: u32::load(&self.0[offset + 4..]) as u16,
        }
    }

    /// Sets one.
    pub fn set_table(&mut self, offset: usize, table: &DescriptorTable) {
        u32::from(table.limit).store(&mut self.0[offset + 4..]);
        table.base.store(&mut self.0[offset + 8..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_manual_has_them() {
        let mut vmcb = Vmcb::default();
        vmcb.set(save::RIP, 0x1122_3344_5566_7788);
        vmcb.set(control::ASID, 5);
        vmcb.set(save::CPL, 3);
        assert_eq!(vmcb.0[0x578..0x580], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!((vmcb.0[0x58], vmcb.0[0x4CB]), (5, 3));
        vmcb.switch(control::INTERCEPT_1, control::intercept_1::VINTR, true);
        assert_eq!(vmcb.0[0xC], 0x10);
        vmcb.switch(control::INTERCEPT_1, control::intercept_1::VINTR, false);
        assert_eq!(vmcb.get(control::INTERCEPT_1), 0);
        assert_eq!((size_of::<Vmcb>(), align_of::<Vmcb>()), (4096, 4096));
    }

    #[test]
    fn segments_keep_what_they_are() {
        let mut vmcb = Vmcb::default();
        let code = Segment {
            selector: 0x10,
            attributes: SegmentAttributes(0xA9B),
            limit: 0xFFFF_FFFF,
            base: 0x1234_5000,
            unusable: false,
        };
        vmcb.set_segment(save::SEGMENTS + 0x10, &code);
        assert_eq!(vmcb.segment(save::SEGMENTS + 0x10), code);
        assert_eq!(vmcb.0[0x410..0x414], [0x10, 0, 0x9B, 0x0A]);
        // A null selector: not present for the processor.
        vmcb.set_segment(save::SEGMENTS, &Segment { selector: 0, unusable: true, ..code });
        assert!(vmcb.segment(save::SEGMENTS).unusable);
        assert_eq!(vmcb.segment(save::SEGMENTS).attributes.0, 0xA1B);
    }
}
