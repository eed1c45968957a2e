//! x87 instructions that compute or move registers, on the whole state: the host runs the instruction on the
//! guest's registers, tags, control and status. Slow and complete; `fast` does the usual cases.
//!
//! `Op::imm`: bits 0–10 are FOP (opcode and ModRM), 16–25 the instruction's number, the rest is `fast`'s; `aux`
//! is the segment register of the memory operand.

use super::encoding::{self, Encoding};
use super::{fast, image, raise_pending};
use crate::core::{Core, Fault};
use crate::lower::{LowerContext, memory_bytes};
use crate::op::{Handler, Op, Step};
use crate::vector::memory;
use x86_decode::{Instruction, Mnemonic as M, OpKind, Register};
use x86_defs::flags::STATUS;
use x86_host_ops::{X87Image, X87Instruction, run_x87};

/// What the instruction does besides computing.
pub const NONE: u8 = 0;
pub const LOADS: u8 = 1;
pub const STORES: u8 = 2;
pub const SETS_FLAGS: u8 = 3;

const C1: u16 = 1 << 9;

/// Lowers it.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let encoding = encoding::encoding(insn)?;
    let in_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let run: Handler<C> = match insn.mnemonic() {
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp if in_memory => run::<C, STORES>,
        _ if in_memory => run::<C, LOADS>,
        M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip => run::<C, SETS_FLAGS>,
        _ => run::<C, NONE>,
    };
    let mut op = ctx.op(insn, run);
    op.imm = match encoding {
        Encoding::Register(opcode, modrm) => u64::from(opcode) << 8 | u64::from(modrm),
        // FOP has the whole ModRM byte.
        Encoding::Memory(opcode, reg) => {
            u64::from(opcode) << 8 | u64::from(encoding::memory_modrm(insn, reg))
        }
    };
    op.imm |= u64::from(encoding.instruction().number()) << 16;
    if in_memory {
        op.width = memory_bytes(insn) as u8;
        op.aux = match insn.memory_segment() {
            Register::ES => 0,
            Register::CS => 1,
            Register::SS => 2,
            Register::FS => 4,
            Register::GS => 5,
            _ => 3,
        };
    }
    fast::choose(&mut op, encoding);
    Some(op)
}

/// Runs the instruction on the whole state.
pub fn run<C: Core, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    super::step(try_run::<C, KIND>(c, op))
}

fn try_run<C: Core, const KIND: u8>(c: &mut C, op: &Op<C>) -> Result<(), Fault> {
    raise_pending(c)?;
    let mut operand = [0; 16];
    let mut linear = 0;
    if KIND == LOADS {
        operand = load_operand(c, op)?;
    } else if KIND == STORES {
        linear = op.linear_write(c, u64::from(op.width))?;
        memory::check_alignment(c, linear, u64::from(op.width).min(8) & !1)?; // 8 for 10 bytes
        c.probe(linear, u64::from(op.width), true)?;
    }

    let x87 = &c.cpu().x.x87;
    let before = x87.status;
    let mut state = X87Image([0; 512]);
    image::to_fxsave(x87, &mut state.0);
    let instruction = X87Instruction::from_number((op.imm >> 16) as u16 & 0x3FF);
    let flags = run_x87(&mut state, instruction, &mut operand, c.cpu().flags.bits() as u8);

    if KIND == STORES {
        let (control, status) = image::control_and_status(&state.0);
        if !is_refused(control, status & !before) {
            store_operand(c, op, linear, &operand)?;
        }
    }
    let cpu = c.cpu_mut();
    image::from_fxsave(&mut cpu.x.x87, &state.0);
    if KIND == SETS_FLAGS {
        cpu.flags.replace(STATUS, u64::from(flags) & 0x45);
        cpu.x.x87.status &= !C1; // the manual clears it, some processors leave it
    }
    note_pointers(c, op, KIND == LOADS || KIND == STORES);
    Ok(())
}

/// The memory operand, at most 10 bytes.
#[inline(always)]
pub fn load_operand<C: Core>(c: &mut C, op: &Op<C>) -> Result<[u8; 16], Fault> {
    let linear = op.linear_read(c, u64::from(op.width))?;
    let value = memory::load(c, linear, op.width)?;
    Ok((u128::from(value[0]) | u128::from(value[1]) << 64).to_le_bytes())
}

/// Writes the memory operand.
#[inline(always)]
pub fn store_operand<C: Core>(c: &mut C, op: &Op<C>, linear: u64, bytes: &[u8; 16]) -> Result<(), Fault> {
    let value = u128::from_le_bytes(*bytes);
    memory::store(c, linear, &[value as u64, (value >> 64) as u64, 0, 0], op.width)
}

/// Records where the instruction and its operand are.
#[inline(always)]
pub fn note_pointers<C: Core>(c: &mut C, op: &Op<C>, in_memory: bool) {
    let (ip, offset) = (op.ip(c), if in_memory { op.effective(c) } else { 0 });
    let cpu = c.cpu_mut();
    let (code, data) = (cpu.seg[1].selector, cpu.seg[usize::from(op.aux).min(5)].selector);
    let x87 = &mut cpu.x.x87;
    x87.instruction_pointer = ip;
    x87.instruction_selector = code;
    x87.opcode = op.imm as u16 & 0x7FF;
    if in_memory {
        x87.data_pointer = offset;
        x87.data_selector = data;
    }
}

/// Whether a store with these newly raised exceptions leaves memory alone: any but the inexact result is
/// unmasked (SDM vol. 1, 8.5).
fn is_refused(control: u16, raised: u16) -> bool {
    raised & !control & 0x1F != 0
}
