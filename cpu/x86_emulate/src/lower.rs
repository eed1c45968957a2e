//! From a decoded instruction to an [`Op`]: tries each family in turn.
//!
//! Called by whoever builds a block. A family's `lower` returns `None` for what is not its own.

use crate::core::Core;
use crate::cpu::{FLAT, RIP, ZERO};
use crate::mode::ModeKey;
use crate::op::{HIGH_BYTE, Handler, Op, SEG_CHECKED, Step};
use x86_decode::{Instruction, MemorySize, OpKind, Register};
use x86_defs::cpuid::FeatureSet;
use x86_defs::{Exception, SegmentIndex};

/// What lowering needs to know besides the instruction.
#[derive(Clone, Copy, Debug)]
pub struct LowerContext {
    /// Mode of the block.
    pub mode: ModeKey,
    /// Features of the CPU model.
    pub features: FeatureSet,
    /// Offset of the instruction from the block's start.
    pub at: u16,
    /// Arithmetic flags (RFLAGS bits) that something may read after this instruction: those outside may
    /// be left stale.
    pub live_flags: u64,
}

/// Lowers `insn`; everything that is not implemented raises #UD.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Op<C> {
    implemented(insn, ctx).unwrap_or_else(|| undefined(insn.len() as u8, ctx))
}

/// The operation for `insn`, if there is one.
fn implemented<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    crate::integer::lower(insn, ctx)
        .or_else(|| crate::system::lower(insn, ctx))
        .or_else(|| crate::vector::lower(insn, ctx))
        .or_else(|| crate::x87::lower(insn, ctx))
}

/// An operation that raises #UD.
pub fn undefined<C: Core>(len: u8, ctx: &LowerContext) -> Op<C> {
    Op { len, ..raising(Exception::InvalidOpcode, ctx) }
}

/// An operation that raises `exception` with error code 0.
pub fn raising<C: Core>(exception: Exception, ctx: &LowerContext) -> Op<C> {
    fn raise<C: Core>(c: &mut C, op: &Op<C>) -> Step {
        let exception = Exception::from_vector(op.imm as u8).unwrap_or(Exception::InvalidOpcode);
        c.raise(exception, 0);
        Step::Fault
    }
    Op { imm: u64::from(exception.vector()), at: ctx.at, ..Op::new(raise) }
}

impl LowerContext {
    /// An operation for `insn` with place, length and memory operand (if any) filled in; `imm` is the
    /// instruction's last immediate, sign-extended to 64 bits.
    pub fn op<C: Core>(&self, insn: &Instruction, run: Handler<C>) -> Op<C> {
        let mut op = Op::new(run);
        op.at = self.at;
        op.len = insn.len() as u8;
        for i in 0..insn.op_count() {
            match insn.op_kind(i) {
                OpKind::Memory => self.set_memory(&mut op, insn),
                OpKind::Immediate8 => op.imm = insn.immediate8() as i8 as u64,
                OpKind::Immediate8_2nd => op.aux = insn.immediate8_2nd(),
                OpKind::Immediate16 => op.imm = insn.immediate16() as i16 as u64,
                OpKind::Immediate32 => op.imm = insn.immediate32() as i32 as u64,
                OpKind::Immediate64 => op.imm = insn.immediate64(),
                OpKind::Immediate8to16 => op.imm = insn.immediate8to16() as u64,
                OpKind::Immediate8to32 => op.imm = insn.immediate8to32() as u64,
                OpKind::Immediate8to64 => op.imm = insn.immediate8to64() as u64,
                OpKind::Immediate32to64 => op.imm = insn.immediate32to64() as u64,
                _ => {}
            }
        }
        op
    }

    fn set_memory<C>(&self, op: &mut Op<C>, insn: &Instruction) {
        let base = insn.memory_base();
        let index = insn.memory_index();
        let displacement = insn.memory_displacement64();
        op.scale = insn.memory_index_scale().trailing_zeros() as u8;
        op.index = if index == Register::None { ZERO as u8 } else { gpr(index) };
        // A displacement without base or index gives the address size by its own width.
        let displacement_bits = match insn.memory_displ_size() {
            2 => 16,
            8 => 64,
            _ => 32,
        };
        let bits = match (base, index) {
            (Register::None, Register::None) => displacement_bits,
            // A vector index (VSIB) without base has the address size of the code: no prefix shows here.
            (Register::None, r) if !r.is_gpr() => displacement_bits,
            (Register::None, r) | (r, _) => r.size() as u8 * 8,
        };
        op.addr_shift = 64 - bits;
        match base {
            Register::RIP | Register::EIP => {
                op.base = RIP as u8;
                // iced gives the target for IP = the instruction's address; blocks are decoded with
                // addresses counted from the block's start.
                op.disp = displacement as i32;
                if base == Register::EIP {
                    op.addr_shift = 32;
                }
            }
            Register::None => op.base = ZERO as u8,
            r => op.base = gpr(r),
        }
        if base != Register::RIP && base != Register::EIP {
            op.disp = displacement as i32;
            if bits == 64 && displacement as i32 as i64 as u64 != displacement {
                // Only MOV with a 64-bit offset has this; its handler takes the address from `imm`.
                op.imm = displacement;
            }
        }
        op.seg = self.segment(insn.memory_segment());
    }

    /// The `seg` field for a memory operand in `segment`.
    pub fn segment(&self, segment: Register) -> u8 {
        let (index, flat) = match segment {
            Register::ES => (SegmentIndex::Es, ModeKey::FLAT_ES),
            Register::CS => (SegmentIndex::Cs, u32::MAX), // reads need the readable bit: always checked
            Register::SS => (SegmentIndex::Ss, ModeKey::FLAT_SS),
            Register::FS => (SegmentIndex::Fs, u32::MAX),
            Register::GS => (SegmentIndex::Gs, u32::MAX),
            _ => (SegmentIndex::Ds, ModeKey::FLAT_DS),
        };
        if self.mode.is_long() {
            match index {
                SegmentIndex::Fs | SegmentIndex::Gs => index as u8,
                _ => FLAT as u8,
            }
        } else if flat != u32::MAX && self.mode.has(flat) {
            FLAT as u8
        } else {
            index as u8 | SEG_CHECKED
        }
    }
}

/// The register field of a general register; high bytes carry [`HIGH_BYTE`].
pub fn gpr(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            (register as u8 - Register::AH as u8) | HIGH_BYTE
        }
        r if r.is_gpr() => r.full_register() as u8 - Register::RAX as u8,
        _ => ZERO as u8,
    }
}

/// Number of an XMM or YMM register.
pub fn vector_register(register: Register) -> u8 {
    if register.is_xmm() {
        register as u8 - Register::XMM0 as u8
    } else if register.is_ymm() {
        register as u8 - Register::YMM0 as u8
    } else {
        0
    }
}

/// Bytes of the memory operand, 0 if its size is not fixed.
pub fn memory_bytes(insn: &Instruction) -> usize {
    if insn.memory_size() == MemorySize::Unknown { 0 } else { insn.memory_size().size() }
}

#[cfg(test)]
mod tests;
