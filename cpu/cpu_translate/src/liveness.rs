//! Which arithmetic flags matter where.
//!
//! The frame of a page fault may show flags that nothing reads before they are overwritten: those are not
//! kept (ADR 6). Everything that a program can branch on is.

use x86_decode::{ConditionCode, Decoded, FlowControl, Instruction, Reader, RflagsBits, flag_use};

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
    if flag_use::may_keep_all(insn) { (read, 0) } else { (read, written) }
}

/// Flags that matter before `insn`, given those after it.
pub fn before(insn: &Instruction, after: Flags) -> Flags {
    let (read, written) = effect(insn);
    (after & !written) | read
}

/// Flags that code at `offset` of a page may read. All of them where that is not known.
pub fn at(page: &mut Reader<'_>, offset: u64) -> Flags {
    let (mut read, mut written) = (0, 0);
    let mut at = offset;
    for _ in 0..AHEAD {
        let Decoded::Instruction(insn) = page.at(at as usize) else { break };
        if flag_use::shows_all(&insn) {
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

/// Number of a condition as in the opcodes of Jcc.
pub fn condition(insn: &Instruction) -> u8 {
    match insn.condition_code() {
        ConditionCode::None => 0,
        code => code as u8 - 1,
    }
}
