//! Which arithmetic flags matter where.
//!
//! The frame of a page fault may show flags that nothing reads before they are overwritten: those are not
//! kept (ADR 6). Everything that a program can branch on is.

use x86_decode::{
    ConditionCode, Decoded, FlowControl, Instruction, Mnemonic as M, OpKind, RflagsBits, decode,
};
use x86_defs::cpuid::FeatureSet;

/// A set of arithmetic flags, as iced's `RflagsBits`.
pub type Flags = u32;
/// All six.
pub const ALL: Flags =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;
/// Instructions looked at behind an exit.
const AHEAD: usize = 6;

/// Flags that `insn` reads, and those that it surely overwrites.
pub fn effect(insn: &Instruction) -> (Flags, Flags) {
    let (read, written) = (insn.rflags_read() & ALL, insn.rflags_modified() & ALL);
    if keeps_flags_sometimes(insn) { (read, 0) } else { (read, written) }
}

/// A shift by zero changes no flag.
fn keeps_flags_sometimes(insn: &Instruction) -> bool {
    let shift = matches!(
        insn.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if !shift {
        return insn.is_string_instruction();
    }
    let last = insn.op_count() - 1;
    let mask = if insn.op0_register().is_gpr64() || insn.memory_size().size() == 8 { 63 } else { 31 };
    insn.op_kind(last) != OpKind::Immediate8 || insn.immediate8() & mask == 0
}

/// Flags that matter before `insn`, given those after it.
pub fn before(insn: &Instruction, after: Flags) -> Flags {
    let (read, written) = effect(insn);
    (after & !written) | read
}

/// Flags that code at `offset` of `page` may read. All of them where that is not known.
pub fn at(page: &[u8], offset: u64, features: FeatureSet) -> Flags {
    let (mut read, mut written) = (0, 0);
    let mut at = offset;
    for _ in 0..AHEAD {
        let Some(bytes) = page.get(at as usize..) else { break };
        let Decoded::Instruction(insn) = decode(bytes, 64, at, features) else { break };
        if shows_flags(&insn) {
            break;
        }
        let (r, w) = effect(&insn);
        read |= r & !written;
        written |= w;
        if written & ALL == ALL {
            return read;
        }
        match insn.flow_control() {
            FlowControl::Next => at += insn.len() as u64,
            FlowControl::UnconditionalBranch => at = insn.near_branch_target(),
            _ => break,
        }
    }
    read | ALL & !written
}

/// Instructions that may show all flags to somebody: those that raise exceptions on purpose or talk to the system.
pub fn shows_flags(insn: &Instruction) -> bool {
    insn.is_privileged()
        || matches!(
            insn.flow_control(),
            FlowControl::Interrupt | FlowControl::Exception | FlowControl::XbeginXabortXend
        )
        || matches!(insn.mnemonic(), M::Syscall | M::Sysenter | M::Pushf | M::Pushfd | M::Pushfq | M::Lahf)
}

/// Number of a condition as in the opcodes of Jcc.
pub fn condition(insn: &Instruction) -> u8 {
    match insn.condition_code() {
        ConditionCode::None => 0,
        code => code as u8 - 1,
    }
}
