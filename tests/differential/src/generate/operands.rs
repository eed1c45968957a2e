//! Instructions of a form with random operands.

use super::{Plan, code_selector, operand_bytes};
use crate::forms::Form;
use crate::layout::*;
use crate::values::Random;
use iced_x86::{Instruction, Mnemonic as M, OpCodeOperandKind as K, OpKind, Register};

/// Builds the instruction with random operands.
pub fn instruction(form: Form, rip: u64, plan: &Plan, random: &mut Random) -> Option<Instruction> {
    let info = form.code.op_code();
    let mut insn = Instruction::new();
    insn.set_code(form.code);
    for (i, kind) in info.op_kinds().iter().enumerate() {
        operand(&mut insn, i as u32, *kind, form, rip, plan, random)?;
    }
    let in_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if info.can_use_lock_prefix() && insn.op0_kind() == OpKind::Memory && random.one_in(4) {
        insn.set_has_lock_prefix(true);
    }
    if info.can_use_rep_prefix() && random.one_in(2) {
        insn.set_has_rep_prefix(true);
    } else if info.can_use_repne_prefix() && random.one_in(2) {
        insn.set_has_repne_prefix(true);
    }
    if in_memory && !form.is_32 && random.one_in(12) {
        insn.set_segment_prefix(Register::GS);
    }
    Some(insn)
}

/// Register `n` of the class that starts with `first`.
fn register(first: Register, n: u64) -> Register {
    first + n as u32
}

fn operand(
    insn: &mut Instruction,
    i: u32,
    kind: K,
    form: Form,
    rip: u64,
    plan: &Plan,
    random: &mut Random,
) -> Option<()> {
    let count = if form.is_32 { 8 } else { 16 };
    let any = random.below(count);
    let set = |insn: &mut Instruction, r: Register| {
        insn.set_op_kind(i, OpKind::Register);
        insn.set_op_register(i, r);
    };
    let or_memory = |random: &mut Random| random.one_in(2);
    match kind {
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::mm_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem
            if or_memory(random) =>
        {
            memory(insn, i, form, plan, random);
        }
        K::mem | K::mem_mib | K::sibmem => memory(insn, i, form, plan, random),
        K::mem_vsib32x | K::mem_vsib64x => vsib(insn, i, form, Register::XMM0, random),
        K::mem_vsib32y | K::mem_vsib64y => vsib(insn, i, form, Register::YMM0, random),
        K::mem_offs => {
            insn.set_op_kind(i, OpKind::Memory);
            insn.set_memory_displacement64(plan.target(operand_bytes(form), random));
            insn.set_memory_displ_size(if form.is_32 { 4 } else { 8 });
        }
        K::r8_or_mem | K::r8_reg | K::r8_opcode => {
            let r8 = if form.is_32 { random.below(8) } else { random.below(20) };
            set(insn, register(Register::AL, r8));
        }
        K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
            set(insn, register(Register::AX, any));
        }
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
            set(insn, register(Register::EAX, any));
        }
        K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
            set(insn, register(Register::RAX, any));
        }
        K::mm_or_mem | K::mm_reg | K::mm_rm => set(insn, register(Register::MM0, any & 7)),
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
            set(insn, register(Register::XMM0, any));
        }
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
            set(insn, register(Register::YMM0, any));
        }
        K::seg_reg => set(insn, register(Register::ES, random.below(6))),
        K::cr_reg => set(insn, register(Register::CR0, random.pick(&[0, 2, 3, 4, 8]))),
        K::dr_reg => set(insn, register(Register::DR0, random.below(8))),
        K::sti_opcode => set(insn, register(Register::ST0, any & 7)),
        _ => return fixed_operand(insn, i, kind, form, rip, random),
    }
    Some(())
}

/// Implied registers, immediates, branches and string operands.
fn fixed_operand(
    insn: &mut Instruction,
    i: u32,
    kind: K,
    form: Form,
    rip: u64,
    random: &mut Random,
) -> Option<()> {
    let implied = match kind {
        K::es => Register::ES,
        K::cs => Register::CS,
        K::ss => Register::SS,
        K::ds => Register::DS,
        K::fs => Register::FS,
        K::gs => Register::GS,
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        K::st0 => Register::ST0,
        _ => Register::None,
    };
    if implied != Register::None {
        insn.set_op_kind(i, OpKind::Register);
        insn.set_op_register(i, implied);
        return Some(());
    }
    let imm = random.integer();
    let long_address = !form.is_32 && !random.one_in(4);
    let pick = |long, short| if long_address { long } else { short };
    let kind = match kind {
        K::imm8 | K::imm4_m2z if i > 0 && insn.op_kind(i - 1) == OpKind::Immediate16 => {
            insn.set_immediate8_2nd(imm as u8 & 3); // ENTER's nesting
            OpKind::Immediate8_2nd
        }
        K::imm8 | K::imm4_m2z => {
            let imm = if random.one_in(2) { random.bits() } else { imm };
            insn.set_immediate8(imm as u8);
            OpKind::Immediate8
        }
        K::imm8_const_1 => {
            insn.set_immediate8(1);
            OpKind::Immediate8
        }
        K::imm8sex16 => {
            insn.set_immediate8to16(i16::from(imm as i8));
            OpKind::Immediate8to16
        }
        K::imm8sex32 => {
            insn.set_immediate8to32(i32::from(imm as i8));
            OpKind::Immediate8to32
        }
        K::imm8sex64 => {
            insn.set_immediate8to64(i64::from(imm as i8));
            OpKind::Immediate8to64
        }
        K::imm16 => {
            let small = matches!(insn.mnemonic(), M::Enter | M::Ret | M::Retf);
            insn.set_immediate16(if small { imm as u16 & 0xFF } else { imm as u16 });
            OpKind::Immediate16
        }
        K::imm32 => {
            insn.set_immediate32(imm as u32);
            OpKind::Immediate32
        }
        K::imm32sex64 => {
            insn.set_immediate32to64(i64::from(imm as i32));
            OpKind::Immediate32to64
        }
        K::imm64 => {
            insn.set_immediate64(imm);
            OpKind::Immediate64
        }
        K::br16_1 | K::br16_2 => {
            insn.set_near_branch16((rip - INSTRUCTION + TAKEN) as u16);
            OpKind::NearBranch16
        }
        K::farbr2_2 => {
            insn.set_far_branch16((rip - INSTRUCTION + TAKEN) as u16);
            insn.set_far_branch_selector(code_selector(form, random));
            OpKind::FarBranch16
        }
        K::farbr4_2 => {
            insn.set_far_branch32((rip - INSTRUCTION + TAKEN) as u32);
            insn.set_far_branch_selector(code_selector(form, random));
            OpKind::FarBranch32
        }
        K::br32_1 | K::br32_4 => {
            insn.set_near_branch32((rip - INSTRUCTION + TAKEN) as u32);
            OpKind::NearBranch32
        }
        K::br64_1 | K::br64_4 => {
            insn.set_near_branch64(rip - INSTRUCTION + TAKEN);
            OpKind::NearBranch64
        }
        K::seg_rSI => pick(OpKind::MemorySegRSI, OpKind::MemorySegESI),
        K::es_rDI => pick(OpKind::MemoryESRDI, OpKind::MemoryESEDI),
        K::seg_rDI => pick(OpKind::MemorySegRDI, OpKind::MemorySegEDI),
        K::seg_rBX_al => {
            insn.set_memory_base(if long_address { Register::RBX } else { Register::EBX });
            insn.set_memory_index(Register::AL);
            OpKind::Memory
        }
        _ => return None,
    };
    // Both string operands have one address size.
    if i > 0 && is_string(kind) && is_string(insn.op_kind(0)) && is_short(kind) != is_short(insn.op_kind(0)) {
        return None;
    }
    insn.set_op_kind(i, kind);
    Some(())
}

fn is_string(kind: OpKind) -> bool {
    is_short(kind) || matches!(kind, OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI)
}
/// A string operand with a 32-bit address.
pub fn is_short(kind: OpKind) -> bool {
    matches!(kind, OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI)
}

/// A memory operand with random addressing.
fn memory(insn: &mut Instruction, i: u32, form: Form, plan: &Plan, random: &mut Random) {
    insn.set_op_kind(i, OpKind::Memory);
    let short = form.is_32 || random.one_in(8);
    let first = if short { Register::EAX } else { Register::RAX };
    let count = if form.is_32 { 8 } else { 16 };
    let target = plan.target(operand_bytes(form), random);
    match random.below(8) {
        0 if !form.is_32 => {
            insn.set_memory_base(Register::RIP);
            insn.set_memory_displacement64(target);
            insn.set_memory_displ_size(8); // iced wants the target and makes the distance of it
            return;
        }
        1 => {
            insn.set_memory_displacement64(target);
            insn.set_memory_displ_size(if short { 4 } else { 8 });
            return;
        }
        2 => {
            // An index and nothing else: its register carries the address.
            insn.set_memory_index(register(first, random.pick(&[0, 1, 2, 3, 5, 6, 7])));
            insn.set_memory_index_scale(1 << random.below(4));
            insn.set_memory_displacement64(target & !0xFF);
            insn.set_memory_displ_size(if short { 4 } else { 8 });
            return;
        }
        3..5 => {
            insn.set_memory_base(register(first, random.below(count)));
            let index = random.below(count);
            if index != 4 {
                insn.set_memory_index(register(first, index));
                insn.set_memory_index_scale(1 << random.below(4));
            }
        }
        _ => insn.set_memory_base(register(first, random.below(count))),
    }
    let displacement = match random.below(3) {
        0 => 0,
        1 => random.bits() as i8 as u64,
        _ if insn.memory_base() == register(first, 4) => random.bits() as i8 as u64,
        _ => random.bits() as i32 as u64,
    };
    insn.set_memory_displacement64(if short { displacement & 0xFFFF_FFFF } else { displacement });
    insn.set_memory_displ_size(if displacement == 0 { 0 } else { 1 });
}

fn vsib(insn: &mut Instruction, i: u32, form: Form, first: Register, random: &mut Random) {
    insn.set_op_kind(i, OpKind::Memory);
    let count = if form.is_32 { 8 } else { 16 };
    let base = if form.is_32 { Register::EAX } else { Register::RAX };
    insn.set_memory_base(register(base, random.below(count)));
    insn.set_memory_index(register(first, random.below(count)));
    insn.set_memory_index_scale(1 << random.below(4));
    insn.set_memory_displacement64(random.bits() as i8 as u64);
    insn.set_memory_displ_size(1);
}
