//! The architectural state of one processor, as the interpreter works on it.
//!
//! Owned by an engine's vCPU; converted to and from `hypervisor::VcpuState` there. `repr(C)`, the hot
//! part first: translated code addresses it from a base register.

use crate::flags::LazyFlags;
use crate::mode::{self, ModeKey};
use x86_defs::{DescriptorTable, Exception, Segment, SegmentIndex, control, flags, msr};

/// Index of RIP in [`Cpu::gpr`]: while a block runs, the address of its first instruction.
pub const RIP: usize = 16;
/// Index in [`Cpu::gpr`] of a register that is always zero (absent base or index).
pub const ZERO: usize = 17;
/// Index in [`Cpu::seg_base`] that is always zero (flat segment).
pub const FLAT: usize = 6;

/// General registers by encoding number.
#[allow(missing_docs)]
pub mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// An exception waiting to be delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PendingException {
    /// Vector, if one is pending.
    pub vector: Option<Exception>,
    /// Error code for those that push one.
    pub error_code: u32,
    /// CR2 for a page fault; DR6 bits to set for #DB.
    pub address: u64,
    /// A trap: RIP already points behind the instruction.
    pub is_trap: bool,
}

/// An 80-bit extended-precision value as in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct F80 {
    /// Significand with explicit integer bit.
    pub mantissa: u64,
    /// Sign in bit 15, biased exponent below.
    pub sign_exponent: u16,
}

/// The x87 unit (SDM vol. 1, 8.1). Registers are physical: ST(i) is `regs[(top + i) & 7]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87 {
    /// R0–R7. MMX registers alias the mantissas.
    pub regs: [F80; 8],
    /// Control word.
    pub control: u16,
    /// Status word, with TOP in bits 11–13.
    pub status: u16,
    /// One bit a physical register: set = in use (the abridged tag of FXSAVE).
    pub in_use: u8,
    /// Last opcode (11 bits).
    pub opcode: u16,
    /// Last instruction's pointer.
    pub instruction_pointer: u64,
    /// Last instruction's code selector.
    pub instruction_selector: u16,
    /// Last operand's pointer.
    pub data_pointer: u64,
    /// Last operand's selector.
    pub data_selector: u16,
}

impl Default for X87 {
    /// After FNINIT.
    fn default() -> Self {
        Self {
            regs: [F80::default(); 8],
            control: 0x37F,
            status: 0,
            in_use: 0,
            opcode: 0,
            instruction_pointer: 0,
            instruction_selector: 0,
            data_pointer: 0,
            data_selector: 0,
        }
    }
}

/// Vector and x87 registers.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct ExtendedState {
    /// YMM0–15, little end first; XMM is the low half.
    pub ymm: [[u64; 4]; 16],
    /// SSE control and status.
    pub mxcsr: u32,
    /// x87 and MMX.
    pub x87: X87,
}

impl Default for ExtendedState {
    fn default() -> Self {
        Self { ymm: [[0; 4]; 16], mxcsr: flags::MXCSR_RESET, x87: X87::default() }
    }
}

/// MSRs that are plain storage to the interpreter (those with effects elsewhere are fields of [`Cpu`] or
/// belong to the engine: APIC, TSC, kvmclock).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the manual's names
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub xss: u64,
    pub misc_features_enables: u64,
    pub mcg_status: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    pub mc_banks: [[u64; 4]; 4],
}

/// See the module's header.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Cpu {
    /// 0–15 general registers, [`RIP`], [`ZERO`]; the rest stays zero (the array's length lets an index
    /// masked by 31 need no bounds check).
    pub gpr: [u64; 32],
    /// Arithmetic flags.
    pub flags: LazyFlags,
    /// All other bits of RFLAGS; the six arithmetic ones are zero here.
    pub rflags: u64,
    /// Segment bases as address computation uses them: by [`SegmentIndex`], then [`FLAT`].
    pub seg_base: [u64; 8],
    /// Mode key of the current state.
    pub mode: ModeKey,
    /// Current privilege level.
    pub cpl: u8,
    /// Which TLB data accesses use: 0 user, 1 supervisor without AC, 2 supervisor with AC (or no SMAP),
    /// 3 user with alignment checks (engines keep no translations for it).
    pub mmu_index: u8,
    /// Interrupts are held off for one instruction (after STI or a load of SS).
    pub interrupt_shadow: bool,
    /// The shadow also holds off debug traps (a load of SS).
    pub shadow_blocks_debug: bool,
    /// Blocked until IRET: an NMI is being handled.
    pub nmi_blocked: bool,
    /// In HLT.
    pub halted: bool,
    /// Bit 0: FS, bit 1: GS can be read and written anywhere, so that the base alone matters; in 32-bit protected mode.
    pub open: u8,
    /// The exception that a handler raised; see `Step::Fault`.
    pub exc: PendingException,
    /// Data and I/O breakpoints that the instruction under way has hit, as DR6 bits.
    pub pending_debug: u64,

    /// Vector and x87 registers.
    pub x: ExtendedState,

    /// Segment registers with hidden parts.
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table root and PCID.
    pub cr3: u64,
    /// Extensions.
    pub cr4: u64,
    /// Extended features.
    pub efer: u64,
    /// Enabled extended state.
    pub xcr0: u64,
    /// DR0–DR3, DR6, DR7 at their own indices.
    pub dr: [u64; 8],
    /// PAE page-directory pointers, loaded with CR3 in PAE mode.
    pub pdpte: [u64; 4],
    /// Other MSRs.
    pub msrs: Msrs,
}

impl Default for Cpu {
    /// The state after power-up or reset (SDM vol. 3, table 10-1), of a processor of family 6.
    fn default() -> Self {
        use x86_defs::SegmentAttributes as A;
        let data = Segment { selector: 0, attributes: A(0x93), limit: 0xFFFF, base: 0, unusable: false };
        let code = Segment { selector: 0xF000, attributes: A(0x9B), base: 0xFFFF_0000, ..data };
        let mut cpu = Self {
            gpr: [0; 32],
            flags: LazyFlags::from_bits(0),
            rflags: flags::FIXED_1,
            seg_base: [0; 8],
            mode: ModeKey::default(),
            cpl: 0,
            mmu_index: 2,
            interrupt_shadow: false,
            shadow_blocks_debug: false,
            nmi_blocked: false,
            halted: false,
            open: 0,
            exc: PendingException::default(),
            pending_debug: 0,
            x: ExtendedState::default(),
            seg: [data, code, data, data, data, data],
            ldtr: Segment { attributes: A(0x82), ..data },
            tr: Segment { attributes: A(0x8B), ..data },
            gdtr: DescriptorTable { base: 0, limit: 0xFFFF },
            idtr: DescriptorTable { base: 0, limit: 0xFFFF },
            cr0: control::CR0_ET | control::CR0_NW | control::CR0_CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: control::XCR0_X87,
            dr: [0, 0, 0, 0, 0, 0, control::DR6_FIXED_1, control::DR7_FIXED_1],
            pdpte: [0; 4],
            msrs: Msrs { pat: msr::PAT_RESET, misc_enable: 1, ..Msrs::default() },
        };
        cpu.gpr[RIP] = 0xFFF0;
        cpu.x.x87.control = 0x40;
        cpu.refresh();
        cpu
    }
}

impl Cpu {
    /// RFLAGS, complete.
    pub fn rflags_all(&self) -> u64 {
        self.rflags | self.flags.bits()
    }

    /// Sets all of RFLAGS; the caller has checked which bits may change. Updates the mode.
    pub fn set_rflags_all(&mut self, value: u64) {
        self.flags = LazyFlags::from_bits(value);
        self.rflags = (value & flags::ALL & !flags::STATUS) | flags::FIXED_1;
        self.update_mode();
    }

    /// Recomputes what is derived from control registers, flags and segments' attributes.
    pub fn update_mode(&mut self) {
        self.mode = ModeKey::of(self);
        self.open = 0;
        if self.mode.has(ModeKey::PROTECTED) && self.mode.0 & (ModeKey::LONG | ModeKey::V86) == 0 {
            self.open |= u8::from(mode::is_open(self, SegmentIndex::Fs));
            self.open |= u8::from(mode::is_open(self, SegmentIndex::Gs)) << 1;
        }
        self.mmu_index = if self.cpl == 3 {
            if self.mode.has(ModeKey::ALIGN) { 3 } else { 0 }
        } else if self.cr4 & control::CR4_SMAP == 0 || self.rflags & flags::AC != 0 {
            2
        } else {
            1
        };
    }

    /// Recomputes everything derived, segment bases included.
    pub fn refresh(&mut self) {
        for i in 0..6 {
            self.seg_base[i] = self.seg[i].base;
        }
        self.update_mode();
    }

    /// A segment register.
    #[inline]
    pub fn segment(&self, index: SegmentIndex) -> &Segment {
        &self.seg[index as usize]
    }

    /// Whether 64-bit or compatibility mode is active.
    #[inline]
    pub fn long_mode_active(&self) -> bool {
        self.efer & control::EFER_LMA != 0
    }
}
