//! Lowering of far branches, returns and software interrupts.

use super::far::{self, Transfer};
use super::interrupts::{self, Kind};
use super::{handler, iret};
use crate::core::{Core, Fault};
use crate::cpu::RIP;
use crate::lower::LowerContext;
use crate::op::{Op, Step};
use x86_decode::{Code, Instruction, OpKind};

/// A fault met by a new task is reported at its own RIP: run loops find that as "behind the instruction".
fn settle<C: Core>(c: &mut C, op: &Op<C>, done: Result<Step, Fault>) -> Result<Step, Fault> {
    if done.is_err() && c.cpu().exc.is_trap {
        let rip = &mut c.cpu_mut().gpr[RIP];
        *rip = rip.wrapping_sub(u64::from(op.at) + u64::from(op.len));
    }
    done
}

/// JMP or CALL with the address in the instruction: `imm` is the offset, `disp` the selector.
fn direct<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let t = Transfer {
        selector: op.disp as u16,
        offset: op.imm,
        bytes: op.width,
        call: op.aux != 0,
        next_ip: op.next_ip(c),
    };
    let done = far::transfer(c, &t);
    settle(c, op, done)
}

/// JMP or CALL with the address in memory.
fn indirect<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let bytes = u64::from(op.width);
    let at = op.linear_read(c, bytes + 2)?;
    let mut raw = [0; 10];
    c.load_bytes(at, &mut raw[..op.width as usize + 2])?;
    let mut offset = [0; 8];
    offset[..op.width as usize].copy_from_slice(&raw[..op.width as usize]);
    let selector = u16::from_le_bytes([raw[op.width as usize], raw[op.width as usize + 1]]);
    let t = Transfer {
        selector,
        offset: u64::from_le_bytes(offset),
        bytes: op.width,
        call: op.aux != 0,
        next_ip: op.next_ip(c),
    };
    let done = far::transfer(c, &t);
    settle(c, op, done)
}

fn iret<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let done = iret::iret(c, op);
    settle(c, op, done)
}

fn retf<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    far::return_far(c, op.width, op.imm as u16)
}

fn software<C: Core>(c: &mut C, op: &Op<C>, vector: u8, kind: Kind) -> Result<Step, Fault> {
    let next = op.next_ip(c);
    let done = interrupts::software(c, vector, kind, next).map(|()| Step::Branch);
    settle(c, op, done)
}
fn int<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    software(c, op, op.imm as u8, Kind::Software)
}
fn int3<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    software(c, op, 3, Kind::SoftwareException)
}
fn int1<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    // What a load of SS delayed comes with this exception, not as a second one in its handler.
    let waiting = super::debug::take_breakpoints(c.cpu_mut());
    let step = software(c, op, 1, Kind::PrivilegedSoftware)?;
    super::debug::enter_handler(c.cpu_mut(), waiting);
    Ok(step)
}
fn into<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    if c.cpu().flags.of() { software(c, op, 4, Kind::SoftwareException) } else { Ok(Step::Next) }
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Code as K;
    let sized = |mut op: Op<C>, bytes: u8| {
        op.width = bytes;
        if insn.op_count() == 0 {
            op.imm = 0;
        }
        Some(op)
    };
    let far = |bytes: u8, call: bool| {
        let mut op = match insn.op0_kind() {
            OpKind::FarBranch16 => {
                Op { imm: u64::from(insn.far_branch16()), ..ctx.op(insn, handler!(direct)) }
            }
            OpKind::FarBranch32 => {
                Op { imm: u64::from(insn.far_branch32()), ..ctx.op(insn, handler!(direct)) }
            }
            _ => ctx.op(insn, handler!(indirect)),
        };
        if insn.op0_kind() != OpKind::Memory {
            op.disp = i32::from(insn.far_branch_selector());
        }
        op.width = bytes;
        op.aux = u8::from(call);
        Some(op)
    };
    match insn.code() {
        K::Jmp_ptr1616 | K::Jmp_m1616 => far(2, false),
        K::Jmp_ptr1632 | K::Jmp_m1632 => far(4, false),
        K::Jmp_m1664 => far(8, false),
        K::Call_ptr1616 | K::Call_m1616 => far(2, true),
        K::Call_ptr1632 | K::Call_m1632 => far(4, true),
        K::Call_m1664 => far(8, true),
        K::Retfw | K::Retfw_imm16 => sized(ctx.op(insn, handler!(retf)), 2),
        K::Retfd | K::Retfd_imm16 => sized(ctx.op(insn, handler!(retf)), 4),
        K::Retfq | K::Retfq_imm16 => sized(ctx.op(insn, handler!(retf)), 8),
        K::Iretw => sized(ctx.op(insn, handler!(iret)), 2),
        K::Iretd => sized(ctx.op(insn, handler!(iret)), 4),
        K::Iretq => sized(ctx.op(insn, handler!(iret)), 8),
        K::Int_imm8 => Some(ctx.op(insn, handler!(int))),
        K::Int3 => Some(ctx.op(insn, handler!(int3))),
        K::Int1 => Some(ctx.op(insn, handler!(int1))),
        K::Into => Some(ctx.op(insn, handler!(into))),
        _ => None,
    }
}
