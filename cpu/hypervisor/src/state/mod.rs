//! The whole architectural state of a vCPU, in plain form, independent of any engine.
//!
//! Engines convert their own state to and from [`VcpuState`] in `save` and `restore`; snapshots and
//! migrations carry it. Extended state is kept by component, never as a raw XSAVE area, because the layout
//! of one differs between processors. SMM and nested virtualization have reserved tags (`codec`).

mod codec;

use alloc::vec::Vec;
use saved_state::StateBlob;
use x86_defs::{DescriptorTable, Exception, Segment, SegmentAttributes, control, flags};

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum RunState {
    /// Executing instructions.
    #[default]
    Running = 0,
    /// In HLT.
    Halted = 1,
    /// After INIT: only a SIPI starts it.
    WaitForSipi = 2,
    /// After a triple fault.
    Shutdown = 3,
}

/// Interrupts are held off for one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum InterruptShadow {
    /// No.
    #[default]
    None = 0,
    /// After STI.
    Sti = 1,
    /// After a load of SS, which holds off debug traps, too.
    MovSs = 2,
}

/// An event whose delivery is under way: it must be delivered before the next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingEvent {
    /// The exception.
    pub exception: Exception,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
    /// CR2 to come with a page fault; DR6 bits to come with #DB.
    pub address: u64,
    /// RIP points behind the instruction that caused it.
    pub is_trap: bool,
}

/// An 80-bit register of the x87 unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Float80 {
    /// Significand; the MMX register of the same number.
    pub mantissa: u64,
    /// Sign and exponent.
    pub sign_exponent: u16,
}

/// Component 0: x87 and MMX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87State {
    /// R0 to R7: physical registers, not relative to TOP.
    pub registers: [Float80; 8],
    /// FCW.
    pub control: u16,
    /// FSW, with TOP.
    pub status: u16,
    /// One bit a physical register: not empty.
    pub in_use: u8,
    /// FOP.
    pub opcode: u16,
    /// FIP.
    pub instruction_pointer: u64,
    /// FCS.
    pub instruction_selector: u16,
    /// FDP.
    pub data_pointer: u64,
    /// FDS.
    pub data_selector: u16,
}

impl Default for X87State {
    /// After FNINIT.
    fn default() -> Self {
        Self {
            registers: [Float80::default(); 8],
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

/// Component 1: XMM registers and MXCSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SseState {
    /// XMM0–15, low half first.
    pub xmm: [[u64; 2]; 16],
    /// Control and status.
    pub mxcsr: u32,
}

impl Default for SseState {
    fn default() -> Self {
        Self { xmm: [[0; 2]; 16], mxcsr: flags::MXCSR_RESET }
    }
}

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuState {
    /// General registers by encoding number.
    pub gpr: [u64; 16],
    /// Instruction pointer (offset in CS).
    pub rip: u64,
    /// Flags, complete.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS. The privilege level is the DPL of SS.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4. (CR8 is the local APIC's.)
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0–DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// PAE page-directory pointers as loaded.
    pub pdpte: [u64; 4],
    /// Other MSRs that are plain state, ascending by number; those at zero may be left out.
    pub msrs: Vec<(u32, u64)>,
    /// Component 0.
    pub x87: X87State,
    /// Component 1.
    pub sse: SseState,
    /// Component 2: upper halves of YMM0–15.
    pub avx: [[u64; 2]; 16],
    /// The local APIC, as its owner saves it (APIC_BASE, TSC-deadline timer included).
    pub apic: Option<StateBlob>,
    /// What it is doing.
    pub run_state: RunState,
    /// Interrupt shadow.
    pub shadow: InterruptShadow,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// An NMI is being handled: further ones wait for IRET.
    pub nmi_blocked: bool,
    /// Exception under way.
    pub exception: Option<PendingEvent>,
    /// An external interrupt that was acknowledged and not delivered: it is, before the next instruction.
    pub interrupt: Option<u8>,
    /// Guest TSC minus what the partition's clock gives (wrapping).
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub tsc_deadline: u64,
}

impl Default for VcpuState {
    /// After power-up (SDM vol. 3, table 10-1).
    fn default() -> Self {
        let data = Segment {
            selector: 0,
            attributes: SegmentAttributes(0x93),
            limit: 0xFFFF,
            base: 0,
            unusable: false,
        };
        let code =
            Segment { selector: 0xF000, attributes: SegmentAttributes(0x9B), base: 0xFFFF_0000, ..data };
        let table = DescriptorTable { base: 0, limit: 0xFFFF };
        Self {
            gpr: [0; 16],
            rip: 0xFFF0,
            rflags: flags::FIXED_1,
            segments: [data, code, data, data, data, data],
            ldtr: Segment { attributes: SegmentAttributes(0x82), ..data },
            tr: Segment { attributes: SegmentAttributes(0x8B), ..data },
            gdtr: table,
            idtr: table,
            cr0: control::CR0_ET | control::CR0_NW | control::CR0_CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: control::XCR0_X87,
            dr: [0, 0, 0, 0, control::DR6_FIXED_1, control::DR7_FIXED_1],
            pdpte: [0; 4],
            msrs: Vec::new(),
            x87: X87State { control: 0x40, ..X87State::default() },
            sse: SseState::default(),
            avx: [[0; 2]; 16],
            apic: None,
            run_state: RunState::Running,
            shadow: InterruptShadow::None,
            nmi_pending: false,
            nmi_blocked: false,
            exception: None,
            interrupt: None,
            tsc_offset: 0,
            tsc_adjust: 0,
            tsc_deadline: 0,
        }
    }
}

#[cfg(test)]
mod tests;
