//! Memory of a case: where it lies and what is in it.

use super::{Plan, code_selector, operand_bytes, selector};
use crate::forms::Form;
use crate::layout::*;
use crate::state::{Case, Registers};
use crate::values::Random;
use iced_x86::{CodeSize, Instruction, InstructionInfoFactory, Mnemonic as M, OpKind, Register, UsedMemory};

/// Sets base registers so that every access lies where the plan wants it. `None` if that cannot be.
pub fn place(
    insn: &Instruction,
    r: &mut Registers,
    plan: &Plan,
    form: Form,
    random: &mut Random,
) -> Option<()> {
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(insn).used_memory().to_vec();
    let mut fixed = vec![];
    for memory in &used {
        if plan_base(memory).is_none_or(|base| fixed.contains(&base)) {
            continue;
        }
        let bytes = memory.memory_size().size().max(1) as u64;
        let bytes = if insn.op_code().is_save_restore() { operand_bytes(form) } else { bytes };
        let mut target = plan.target(bytes, random);
        if memory.segment() == Register::GS && !form.is_32 {
            target = target.wrapping_sub(GS_BASE);
        }
        let (base, scale) = plan_base(memory)?;
        let rest = effective(memory, r, Some(base));
        if plan.wild && can_be_wild(&used, form) {
            target ^= 1 << 60;
        }
        let value = target.wrapping_sub(rest).wrapping_div(scale);
        set_gpr(r, base, value, memory.address_size(), form, random);
        fixed.push((base, scale));
    }
    if insn.mnemonic() == M::Enter {
        r.gpr[5] = r.gpr[4];
    }
    // Registers may have been set twice: look again.
    if plan.wild && can_be_wild(&used, form) {
        return Some(());
    }
    let inside = |at: u64| at.wrapping_sub(plan.boundary - 896) < 1792;
    for memory in &used {
        if memory.vsib_size() != 0 {
            continue;
        }
        let mut at = effective(memory, r, None);
        if memory.segment() == Register::GS && !form.is_32 {
            at = at.wrapping_add(GS_BASE);
        }
        if !inside(at) {
            return None;
        }
    }
    if !matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) {
        return Some(());
    }
    // The bit offset moves the access.
    let offset_ok = insn.op1_kind() != OpKind::Register || insn.op0_kind() != OpKind::Memory || {
        let n = insn.op1_register().full_register() as usize - Register::RAX as usize;
        r.gpr[n].wrapping_add(512) < 1024
    };
    offset_ok.then_some(())
}

/// Whether the only operand's address is a 64-bit base register's, and not the stack's (which would be #SS).
fn can_be_wild(used: &[UsedMemory], form: Form) -> bool {
    let [memory] = used else { return false };
    let base = memory.base();
    !form.is_32
        && base.is_gpr64()
        && base != memory.index()
        && memory.vsib_size() == 0
        && !matches!(base, Register::RSP | Register::RBP)
}

/// The register that carries the address: the base, or the index where there is none.
fn plan_base(memory: &UsedMemory) -> Option<(Register, u64)> {
    let usable = |r: Register| r.is_gpr32() || r.is_gpr64();
    if usable(memory.base()) {
        Some((memory.base().full_register(), 1))
    } else if usable(memory.index()) && memory.base() == Register::None {
        Some((memory.index().full_register(), memory.scale() as u64))
    } else {
        None
    }
}

/// The offset that `memory` gives with these registers; `without` counts as zero.
fn effective(memory: &UsedMemory, r: &Registers, without: Option<Register>) -> u64 {
    let value = |register: Register| {
        if register == Register::None
            || Some(register.full_register()) == without
            || register.is_vector_register()
        {
            return 0;
        }
        if register == Register::AL {
            return r.gpr[0] & 0xFF;
        }
        r.gpr
            .get((register.full_register() as usize).wrapping_sub(Register::RAX as usize))
            .copied()
            .unwrap_or(0)
    };
    let at = value(memory.base())
        .wrapping_add(value(memory.index()).wrapping_mul(memory.scale() as u64))
        .wrapping_add(memory.displacement());
    if memory.address_size() == CodeSize::Code32 { at & 0xFFFF_FFFF } else { at }
}

/// The linear address of `memory` in `case`.
pub fn linear(memory: &UsedMemory, case: &Case) -> u64 {
    let at = effective(memory, &case.registers, None);
    if memory.segment() == Register::GS && !case.code.is_32 { at.wrapping_add(GS_BASE) } else { at }
}

fn set_gpr(
    r: &mut Registers,
    register: Register,
    value: u64,
    size: CodeSize,
    form: Form,
    random: &mut Random,
) {
    let Some(gpr) = r.gpr.get_mut((register as usize).wrapping_sub(Register::RAX as usize)) else { return };
    *gpr = if size == CodeSize::Code32 {
        let high = if form.is_32 { 0 } else { random.bits() << 32 };
        value & 0xFFFF_FFFF | high
    } else {
        value
    };
}

/// Whether the instruction's source is a selector.
fn takes_selector(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        M::Mov | M::Pop => insn.op0_register().is_segment_register(),
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Arpl => true,
        _ => false,
    }
}

/// The register that holds such a selector.
fn selector_register(insn: &Instruction) -> Option<usize> {
    if !takes_selector(insn) || insn.op_count() == 0 {
        return None;
    }
    let operand = if insn.mnemonic() == M::Arpl { 0 } else { insn.op_count() - 1 };
    let register = insn.op_register(operand).full_register();
    (insn.op_kind(operand) == OpKind::Register && register.is_gpr())
        .then(|| register as usize - Register::RAX as usize)
}

/// Memory that an instruction wants in a certain shape: return addresses, flags, save areas.
pub fn shape(insn: &Instruction, case: &mut Case, random: &mut Random) {
    let taken = case.registers.rip - INSTRUCTION + TAKEN;
    let form = Form { code: insn.code(), is_32: case.code.is_32 };
    if let Some(n) = selector_register(insn) {
        case.registers.gpr[n] = case.registers.gpr[n] & !0xFFFF | u64::from(selector(random));
    }
    if matches!(insn.mnemonic(), M::Jmp | M::Call) && insn.op0_kind() == OpKind::Register {
        let n = (insn.op0_register().full_register() as usize).wrapping_sub(Register::RAX as usize);
        if let Some(gpr) = case.registers.gpr.get_mut(n) {
            *gpr = taken;
        }
        return;
    }
    let mut factory = InstructionInfoFactory::new();
    let Some(memory) = factory.info(insn).used_memory().first().copied() else { return };
    let address = linear(&memory, case);
    let place = address.wrapping_sub(case.window_at) as usize;
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(to) = case.window.get_mut(place + offset..place + offset + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    match insn.mnemonic() {
        // Offset and selector.
        M::Jmp | M::Call if insn.is_jmp_far_indirect() || insn.is_call_far_indirect() => {
            let offset = insn.memory_size().size() - 2;
            put(0, &taken.to_le_bytes()[..offset]);
            put(offset, &code_selector(form, random).to_le_bytes());
        }
        M::Retf => {
            let size = insn.op_code().operand_size() as usize / 8;
            put(0, &taken.to_le_bytes()[..size]);
            put(size, &u64::from(code_selector(form, random)).to_le_bytes()[..size]);
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            put(insn.memory_size().size() - 2, &selector(random).to_le_bytes());
        }
        M::Iret | M::Iretd | M::Iretq => {
            let size = insn.op_code().operand_size() as usize / 8;
            let mut at = 0;
            let data = if random.one_in(4) { selector(random) } else { DS };
            // Some processors check the frame by the AC that it loads; Linux takes that for a split lock, and the
            // instruction runs again for ever.
            let checks = if address.is_multiple_of(size as u64) { 0 } else { 0x4_0000 };
            let flags = random.bits() & !0x4100 & !0x2_0000 & !checks;
            for word in [taken, code_selector(form, random).into(), flags, random.bits(), data.into()] {
                put(at, &word.to_le_bytes()[..size]);
                at += size;
            }
        }
        _ if takes_selector(insn) => put(0, &selector(random).to_le_bytes()),
        M::Ret | M::Jmp | M::Call => {
            put(0, &taken.to_le_bytes()[..if case.code.is_32 { 4 } else { 8 }]);
        }
        // No single step, no nested task.
        M::Popf | M::Popfd | M::Popfq => {
            let flags = random.bits() & !0x4100;
            put(0, &flags.to_le_bytes()[..insn.op_code().operand_size() as usize / 8]);
        }
        // Bit 17 exists on some (misaligned SSE).
        M::Ldmxcsr | M::Vldmxcsr => {
            let reserved = if random.one_in(4) { 1 << (18 + random.below(14)) } else { 0 };
            put(0, &(random.bits() as u32 & 0xFFFF | reserved).to_le_bytes());
        }
        M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 if random.one_in(6) => put(26, &[0x40, 0]),
        M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 => {
            put(24, &(random.bits() as u32 & 0xFFFF).to_le_bytes());
            let present = random.below(8);
            let layout = if random.one_in(2) { 0 } else { 1 << 63 | present | random.below(8) };
            put(512, &present.to_le_bytes());
            put(520, &layout.to_le_bytes());
            put(528, &[0; 48]);
        }
        _ => {}
    }
}
