//! Whether vector instructions may run at all: CR0.EM, CR0.TS, CR4.OSFXSR, XCR0 (SDM vol. 2, 2.4;
//! vol. 3, 2.5). Everything here is in the mode key, so it is decided when a block is built.

use crate::lower::LowerContext;
use crate::mode::ModeKey;
use x86_decode::{EncodingKind, Instruction, Mnemonic, OpKind};
use x86_defs::Exception;

/// The exception that stands in the way of `insn`, an instruction on vector registers.
pub fn exception(insn: &Instruction, ctx: &LowerContext) -> Option<Exception> {
    let mode = ctx.mode;
    if insn.encoding() == EncodingKind::VEX {
        if !mode.has(ModeKey::PROTECTED | ModeKey::AVX) || mode.has(ModeKey::V86) {
            return Some(Exception::InvalidOpcode);
        }
    } else if mode.has(ModeKey::EM) || (!mode.has(ModeKey::OSFXSR) && !is_pure_mmx(insn)) {
        return Some(Exception::InvalidOpcode);
    }
    if mode.has(ModeKey::TS) { Some(Exception::DeviceNotAvailable) } else { None }
}

/// The exception that stands in the way of an x87 instruction (WAIT has its own rule).
pub fn x87_exception(ctx: &LowerContext) -> Option<Exception> {
    let blocked = ctx.mode.has(ModeKey::EM) || ctx.mode.has(ModeKey::TS);
    blocked.then_some(Exception::DeviceNotAvailable)
}

/// Whether register operand `i` is an MMX register.
pub fn is_mmx(insn: &Instruction, i: u32) -> bool {
    i < insn.op_count() && insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm()
}

/// Whether any operand is an MMX register.
pub fn has_mmx(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| is_mmx(insn, i))
}

fn is_pure_mmx(insn: &Instruction) -> bool {
    let xmm =
        (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_xmm());
    insn.mnemonic() == Mnemonic::Emms || (has_mmx(insn) && !xmm)
}
