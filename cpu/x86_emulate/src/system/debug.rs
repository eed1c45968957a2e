//! Debug registers, breakpoints and single step (SDM vol. 3, 17.2 and 17.3).
//!
//! Run loops: while `ModeKey::TRAP` is set or [`breakpoints_enabled`], run one instruction at a time; before
//! it ask [`breakpoint_at`] (unless RF is set), after it [`after_instruction`]. Memory accesses that hit a
//! watched address go through [`data_access`], whose bits gather in `cpu.pending_debug` until the
//! instruction ends.

use super::{handler, require_cpl0};
use crate::core::{Core, Fault};
use crate::cpu::{Cpu, PendingException};
use crate::lower::{LowerContext, gpr};
use crate::op::{Op, Step};
use x86_decode::{Code, Instruction, Register};
use x86_defs::control::*;
use x86_defs::{Exception, flags};

/// DR7: the enable bits of all four breakpoints.
const DR7_ENABLES: u64 = 0xFF;
/// DR7 bits that can be written.
const DR7_WRITABLE: u64 = 0xFFFF_23FF;
/// DR6 bits that can be written: B0–B3, BD, BS, BT.
const DR6_WRITABLE: u64 = 0xE00F;

/// In `pending_debug`: the instruction entered a handler that starts without TF, so that no single-step trap
/// follows it.
pub(super) const NO_STEP: u64 = 1 << 63;
/// DEBUGCTL: single-step on branches.
const DEBUGCTL_BTF: u64 = 1 << 1;

/// What a breakpoint watches (DR7's R/W field).
const ON_EXECUTE: u64 = 0;
const ON_WRITE: u64 = 1;
const ON_PORT: u64 = 2;

/// Whether DR7 enables any breakpoint.
#[inline(always)]
pub fn breakpoints_enabled(cpu: &Cpu) -> bool {
    cpu.dr[7] & DR7_ENABLES != 0
}

/// Breakpoints that an access of `bytes` at `at` hits, as DR6 bits; `wanted` decides by the R/W field.
fn hits(cpu: &Cpu, at: u64, bytes: u64, wanted: impl Fn(u64) -> bool) -> u64 {
    let mut found = 0;
    for n in 0..4 {
        let control = cpu.dr[7] >> (16 + 4 * n);
        if cpu.dr[7] >> (2 * n) & 3 == 0 || !wanted(control & 3) {
            continue;
        }
        let len: u64 = [1, 2, 8, 4][(control >> 2 & 3) as usize];
        let start = cpu.dr[n as usize] & !(len - 1);
        let (last, end) = (start.wrapping_add(len - 1), at.wrapping_add(bytes - 1));
        if at <= last && end >= start {
            found |= 1 << n;
        }
    }
    found
}

/// DR6 bits of the data breakpoints that an access hits (0: none). The caller adds them to
/// `cpu.pending_debug`.
pub fn data_access(cpu: &Cpu, linear: u64, bytes: u64, write: bool) -> u64 {
    if !breakpoints_enabled(cpu) {
        return 0;
    }
    hits(cpu, linear, bytes, |kind| kind == 3 || write && kind == ON_WRITE)
}

/// Whether data breakpoints watch anything in `page` (a linear address of a page's start): its accesses
/// must not be served by a TLB.
pub fn watches_page(cpu: &Cpu, page: u64) -> bool {
    breakpoints_enabled(cpu) && hits(cpu, page, 4096, |kind| kind & 1 != 0) != 0
}

/// Notes the I/O breakpoints that an access of `bytes` at `port` hits.
pub(super) fn port_access(cpu: &mut Cpu, port: u16, bytes: u8) {
    if breakpoints_enabled(cpu) && cpu.cr4 & CR4_DE != 0 {
        cpu.pending_debug |= hits(cpu, u64::from(port), u64::from(bytes), |kind| kind == ON_PORT);
    }
}

/// The fault of an instruction breakpoint at `linear` (CS base + RIP), before the instruction runs.
pub fn breakpoint_at(cpu: &Cpu, linear: u64) -> Option<PendingException> {
    if !breakpoints_enabled(cpu) || cpu.rflags & flags::RF != 0 || cpu.shadow_blocks_debug {
        return None;
    }
    let found = hits(cpu, linear, 1, |kind| kind == ON_EXECUTE);
    (found != 0).then(|| debug_exception(found, false))
}

/// The trap after an instruction that completed: single step if TF was set before it (`tf`; with BTF only if
/// it `jumped`), data and I/O breakpoints that it hit. Clears RF. Nothing is lost to the shadow of a load of
/// SS: breakpoints wait for the next instruction.
pub fn after_instruction(cpu: &mut Cpu, tf: bool, jumped: bool) -> Option<PendingException> {
    cpu.rflags &= !flags::RF;
    if cpu.shadow_blocks_debug {
        return None;
    }
    let step = tf && cpu.pending_debug & NO_STEP == 0 && (jumped || cpu.msrs.debugctl & DEBUGCTL_BTF == 0);
    let found = cpu.pending_debug & !NO_STEP | if step { DR6_BS } else { 0 };
    cpu.pending_debug = 0;
    (found != 0).then(|| debug_exception(found, true))
}

fn debug_exception(dr6: u64, is_trap: bool) -> PendingException {
    PendingException { vector: Some(Exception::Debug), error_code: 0, address: dr6, is_trap }
}

/// Takes the breakpoints that wait for the end of the instruction, as DR6 bits.
pub(super) fn take_breakpoints(cpu: &mut Cpu) -> u64 {
    let waiting = cpu.pending_debug & !NO_STEP;
    cpu.pending_debug &= NO_STEP;
    waiting
}

/// What entering the #DB handler does: DR6 gets `bits`, DR7.GD and DEBUGCTL's LBR and BTF are cleared.
pub(super) fn enter_handler(cpu: &mut Cpu, bits: u64) {
    if bits != 0 {
        // B0–B3 say what this exception is about, the others only gather.
        cpu.dr[6] = cpu.dr[6] & !0xF | bits & DR6_WRITABLE | DR6_FIXED_1;
    }
    cpu.dr[7] &= !DR7_GD;
    cpu.msrs.debugctl &= !3;
}

fn check_access<C: Core>(c: &mut C, number: u8) -> Result<usize, Fault> {
    let cpu = c.cpu();
    // DR4 and DR5 are names of DR6 and DR7 unless CR4.DE says that they do not exist.
    if matches!(number, 4 | 5) && cpu.cr4 & CR4_DE != 0 {
        return Err(c.ud());
    }
    require_cpl0(c)?;
    if c.cpu().dr[7] & DR7_GD != 0 {
        c.cpu_mut().exc = debug_exception(DR6_BD, false);
        return Err(Fault);
    }
    Ok(usize::from(if matches!(number, 4 | 5) { number + 2 } else { number } & 7))
}

fn read_dr<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let n = check_access(c, op.aux)?;
    let value = c.cpu().dr[n];
    c.cpu_mut().gpr[(op.dst & 31) as usize] = if op.width == 8 { value } else { value & 0xFFFF_FFFF };
    Ok(Step::Next)
}

fn write_dr<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let n = check_access(c, op.aux)?;
    let value = c.cpu().gpr[(op.src & 31) as usize];
    let value = if op.width == 8 { value } else { value & 0xFFFF_FFFF };
    if n >= 6 && value >> 32 != 0 {
        return Err(c.gp(0));
    }
    let cpu = c.cpu_mut();
    let was_on = breakpoints_enabled(cpu);
    cpu.dr[n] = match n {
        6 => value & DR6_WRITABLE | DR6_FIXED_1,
        7 => value & DR7_WRITABLE | DR7_FIXED_1,
        _ => value,
    };
    cpu.update_mode();
    if was_on || breakpoints_enabled(cpu) {
        // Watched pages must leave the TLB.
        c.paging_changed(crate::core::PagingChange::All);
    }
    Ok(op.end_block(c))
}

/// Number of a debug register that exists.
fn number(register: Register) -> Option<u8> {
    (register as u8).checked_sub(Register::DR0 as u8).filter(|n| *n < 8)
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    match insn.code() {
        Code::Mov_r32_dr | Code::Mov_r64_dr => {
            let mut op = ctx.op(insn, handler!(read_dr));
            op.aux = number(insn.op1_register())?;
            op.dst = gpr(insn.op0_register());
            op.width = insn.op0_register().size() as u8;
            Some(op)
        }
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => {
            let mut op = ctx.op(insn, handler!(write_dr));
            op.aux = number(insn.op0_register())?;
            op.src = gpr(insn.op1_register());
            op.width = insn.op1_register().size() as u8;
            Some(op)
        }
        _ => None,
    }
}
