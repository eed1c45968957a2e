//! A decoded operation: 32 bytes that a handler can run without looking at the instruction again.

use crate::core::{Core, Fault};
use crate::cpu::{FLAT, RIP, ZERO};
use crate::mode::ModeKey;

/// What a handler says to the run loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Go on with the next operation of the block.
    Next,
    /// The block ends; RIP in `gpr[RIP]` is where to go on. Mode, TLB or interrupts may have changed.
    Branch,
    /// An exception waits in `cpu.exc`; nothing of the instruction was committed (or RIP is past it, if it
    /// is a trap).
    Fault,
    /// As `Branch`, and the vCPU has something to tell its engine (HLT, shutdown): see `cpu.halted`.
    Exit,
}

/// A handler: runs one operation.
pub type Handler<C> = fn(&mut C, &Op<C>) -> Step;

/// In [`Op::seg`]: the segment is not flat, base and limit must be looked at.
pub const SEG_CHECKED: u8 = 0x08;
/// In a register field of an 8-bit operation: AH, CH, DH or BH (bits 8–15 of the register).
pub const HIGH_BYTE: u8 = 0x20;

/// See the module's header. Register fields are indices into `Cpu::gpr` (or vector registers, as the
/// handler knows).
pub struct Op<C> {
    /// The handler.
    pub run: Handler<C>,
    /// Immediate (sign-extended), branch target offset, or what the handler's family keeps here.
    pub imm: u64,
    /// Displacement of the memory operand. RIP-relative ones count from the block's start.
    pub disp: i32,
    /// Offset of the instruction from the block's start, in bytes.
    pub at: u16,
    /// Length of the instruction in bytes.
    pub len: u8,
    /// First (written) register.
    pub dst: u8,
    /// Second register.
    pub src: u8,
    /// Memory operand: base register, or [`ZERO`], or [`RIP`].
    pub base: u8,
    /// Memory operand: index register, or [`ZERO`].
    pub index: u8,
    /// Memory operand: log2 of the scale.
    pub scale: u8,
    /// Memory operand: index into `Cpu::seg_base`, perhaps with [`SEG_CHECKED`].
    pub seg: u8,
    /// Memory operand: 64 minus the address size in bits (0, 32 or 48).
    pub addr_shift: u8,
    /// Third register or whatever the handler's family keeps here.
    pub aux: u8,
    /// Operand width in bytes, where the handler is not specialised by width.
    pub width: u8,
}

impl<C> Clone for Op<C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for Op<C> {}

impl<C> Op<C> {
    /// An operation without operands.
    pub fn new(run: Handler<C>) -> Self {
        Self {
            run,
            imm: 0,
            disp: 0,
            at: 0,
            len: 0,
            dst: ZERO as u8,
            src: ZERO as u8,
            base: ZERO as u8,
            index: ZERO as u8,
            scale: 0,
            seg: FLAT as u8,
            addr_shift: 0,
            aux: 0,
            width: 0,
        }
    }
}

impl<C: Core> Op<C> {
    /// Effective address (offset in the segment) of the memory operand.
    #[inline(always)]
    pub fn effective(&self, c: &C) -> u64 {
        let gpr = &c.cpu().gpr;
        let a = gpr[(self.base & 31) as usize]
            .wrapping_add(gpr[(self.index & 31) as usize] << (self.scale & 63))
            .wrapping_add(self.disp as i64 as u64);
        (a << (self.addr_shift & 63)) >> (self.addr_shift & 63)
    }

    /// Linear address of a memory operand of `bytes` that is read.
    #[inline(always)]
    pub fn linear_read(&self, c: &mut C, bytes: u64) -> Result<u64, Fault> {
        let ea = self.effective(c);
        self.linear_at(c, ea, bytes, false)
    }

    /// Linear address of a memory operand of `bytes` that is written (or read and written).
    #[inline(always)]
    pub fn linear_write(&self, c: &mut C, bytes: u64) -> Result<u64, Fault> {
        let ea = self.effective(c);
        self.linear_at(c, ea, bytes, true)
    }

    /// Linear address of offset `ea` in the operand's segment.
    #[inline(always)]
    pub fn linear_at(&self, c: &mut C, ea: u64, bytes: u64, write: bool) -> Result<u64, Fault> {
        segment_linear(c, self.seg, ea, bytes, write)
    }

    /// `ea + delta`, wrapped at the operand's address size.
    #[inline(always)]
    pub fn effective_plus(&self, c: &C, delta: u64) -> u64 {
        let shift = self.addr_shift & 63;
        (self.effective(c).wrapping_add(delta) << shift) >> shift
    }

    /// RIP of this instruction.
    #[inline(always)]
    pub fn ip(&self, c: &C) -> u64 {
        self.mask_ip(c, c.cpu().gpr[RIP].wrapping_add(u64::from(self.at)))
    }

    /// RIP of the instruction behind this one.
    #[inline(always)]
    pub fn next_ip(&self, c: &C) -> u64 {
        self.mask_ip(c, c.cpu().gpr[RIP].wrapping_add(u64::from(self.at) + u64::from(self.len)))
    }

    /// RIP wraps at 4 GiB outside 64-bit code (16-bit code is bounded by CS's limit instead).
    #[inline(always)]
    fn mask_ip(&self, c: &C, ip: u64) -> u64 {
        if c.cpu().mode.has(ModeKey::LONG) { ip } else { ip & 0xFFFF_FFFF }
    }

    /// Ends the block behind this instruction.
    #[inline(always)]
    pub fn end_block(&self, c: &mut C) -> Step {
        c.cpu_mut().gpr[RIP] = self.next_ip(c);
        Step::Branch
    }
}

/// Linear address of `offset` in segment `seg` (as in [`Op::seg`]).
#[inline(always)]
pub fn segment_linear<C: Core>(
    c: &mut C,
    seg: u8,
    offset: u64,
    bytes: u64,
    write: bool,
) -> Result<u64, Fault> {
    if seg & SEG_CHECKED != 0 {
        return crate::core::check_segment(c, seg & 7, offset, bytes, write);
    }
    Ok(c.cpu().seg_base[(seg & 7) as usize].wrapping_add(offset))
}
