//! Every x87 instruction that computes or moves registers: the host runs it on the guest's state.

use super::{encoding, image, raise_pending};
use crate::core::{Core, Fault};
use crate::lower::{LowerContext, memory_bytes};
use crate::op::{Handler, Op, Step};
use crate::vector::memory;
use x86_decode::{Instruction, Mnemonic as M, OpKind, Register};
use x86_defs::flags::STATUS;
use x86_host_ops::{X87Image, X87Instruction, run_x87};

/// What the instruction does besides computing.
const NONE: u8 = 0;
const LOADS: u8 = 1;
const STORES: u8 = 2;
const SETS_FLAGS: u8 = 3;

/// Lowers it. `imm`: opcode and ModRM as in FOP; `aux`: segment register of the memory operand.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let instruction = encoding::encoding(insn)?;
    let in_memory = insn.op0_kind() == OpKind::Memory && insn.op_count() > 0
        || insn.op_count() > 1 && insn.op1_kind() == OpKind::Memory;
    let run: Handler<C> = match insn.mnemonic() {
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp if in_memory => run::<C, STORES>,
        _ if in_memory => run::<C, LOADS>,
        M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip => run::<C, SETS_FLAGS>,
        _ => run::<C, NONE>,
    };
    let mut op = ctx.op(insn, run);
    op.imm = match instruction {
        X87Instruction::Register(opcode, modrm) => u64::from(opcode) << 8 | u64::from(modrm),
        // FOP has the whole ModRM byte; its mod and r/m follow from the operand only roughly: [disp32].
        X87Instruction::Memory(opcode, reg) => u64::from(opcode) << 8 | u64::from(reg) << 3 | 5,
    };
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
    Some(op)
}

fn run<C: Core, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    super::step(try_run::<C, KIND>(c, op))
}

fn try_run<C: Core, const KIND: u8>(c: &mut C, op: &Op<C>) -> Result<(), Fault> {
    raise_pending(c)?;
    let mut operand = [0; 16];
    let mut linear = 0;
    if KIND == LOADS {
        linear = op.linear_read(c, u64::from(op.width))?;
        let value = memory::load(c, linear, op.width)?;
        operand.copy_from_slice(&memory::to_bytes(&value)[..16]);
    } else if KIND == STORES {
        linear = op.linear_write(c, u64::from(op.width))?;
        c.probe(linear, u64::from(op.width), true)?;
    }

    let (opcode, modrm) = ((op.imm >> 8) as u8, op.imm as u8);
    let in_memory = KIND == LOADS || KIND == STORES;
    let instruction = if in_memory {
        X87Instruction::Memory(opcode, modrm >> 3)
    } else {
        X87Instruction::Register(opcode, modrm)
    };
    let x87 = &c.cpu().x.x87;
    let before = x87.status;
    let mut state = X87Image([0; 512]);
    image::to_fxsave(x87, &mut state.0);
    let flags = run_x87(&mut state, instruction, &mut operand, c.cpu().flags.bits() as u8);

    if KIND == STORES {
        let (control, status) = image::control_and_status(&state.0);
        if !is_refused(control, status & !before) {
            let mut bytes = [0; 32];
            bytes[..16].copy_from_slice(&operand);
            memory::store(c, linear, &memory::from_bytes(&bytes), op.width)?;
        }
    }
    let (ip, offset) = (op.ip(c), if in_memory { op.effective(c) } else { 0 });
    let cpu = c.cpu_mut();
    if KIND == SETS_FLAGS {
        cpu.flags.replace(STATUS, u64::from(flags) & 0x45);
    }
    let (code, data) = (cpu.seg[1].selector, cpu.seg[usize::from(op.aux).min(5)].selector);
    let x87 = &mut cpu.x.x87;
    image::from_fxsave(x87, &state.0);
    x87.instruction_pointer = ip;
    x87.instruction_selector = code;
    x87.opcode = op.imm as u16 & 0x7FF;
    if in_memory {
        x87.data_pointer = offset;
        x87.data_selector = data;
    }
    Ok(())
}

/// Whether a store with these newly raised exceptions leaves memory alone: any but the inexact result is
/// unmasked (SDM vol. 1, 8.5).
fn is_refused(control: u16, raised: u16) -> bool {
    raised & !control & 0x1F != 0
}
