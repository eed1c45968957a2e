//! A random case of a form: operands, registers, memory.

use crate::forms::Form;
use crate::layout::*;
use crate::state::{Case, Code, Registers};
use crate::values::Random;
use iced_x86::{
    CodeSize, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, Mnemonic as M,
    OpCodeOperandKind as K, OpKind, Register, UsedMemory,
};

/// RFLAGS.AC.
const ALIGNMENT_CHECK: u64 = 1 << 18;
/// Attempts to meet a form's constraints before giving up.
const ATTEMPTS: u32 = 60;

/// A case of `form` for slot `slot`. `None`: no encoding was found.
pub fn case(form: Form, slot: u32, random: &mut Random) -> Option<Case> {
    (0..ATTEMPTS).find_map(|_| attempt(form, slot, random))
}

fn attempt(form: Form, slot: u32, random: &mut Random) -> Option<Case> {
    let rip = CODE + SLOT * u64::from(slot) + INSTRUCTION;
    let plan = Plan::new(random);
    let insn = instruction(form, rip, &plan, random)?;
    let bits = if form.is_32 { 32 } else { 64 };
    let mut encoder = Encoder::new(bits);
    let len = encoder.encode(&insn, rip).ok()?;
    let encoded = encoder.take_buffer();
    let insn = Decoder::with_ip(bits, &encoded, rip, DecoderOptions::NONE).decode();
    if insn.code() != form.code {
        return None;
    }
    let mut bytes = [0; 16];
    bytes.get_mut(..len)?.copy_from_slice(&encoded);

    let mut registers = random_registers(form, random);
    registers.rip = rip;
    registers.flags = 0x202 | random.bits() & 0x8D5;
    if random.one_in(2) {
        registers.flags |= 0x400;
    }
    if random.one_in(16) && has_alignment_rule(&insn) {
        registers.flags |= ALIGNMENT_CHECK;
    }
    constrain(&insn, &mut registers, random);
    place_memory(&insn, &mut registers, &plan, form, random)?;
    if is_unfit(&insn, &registers, &plan) {
        return None;
    }
    let mut case = Case {
        registers,
        window_at: plan.boundary - WINDOW as u64 / 2,
        window: random_window(random),
        code: Code { bytes, len: len as u32, slot, is_32: form.is_32 },
    };
    shape_memory(&insn, &mut case, random);
    Some(case)
}

/// Cases whose outcome is the processor's choice.
fn is_unfit(insn: &Instruction, r: &Registers, plan: &Plan) -> bool {
    let narrow = insn.op_code().operand_size() == 16;
    match insn.mnemonic() {
        // Some require alignment of 16, some do not.
        M::Sha1msg1
        | M::Sha1msg2
        | M::Sha1nexte
        | M::Sha1rnds4
        | M::Sha256msg1
        | M::Sha256msg2
        | M::Sha256rnds2 => !plan.aligned,
        // Counts above the operand's width.
        M::Shld | M::Shrd if narrow => (insn.immediate8() | r.gpr[1] as u8) & 0x10 != 0,
        // Selectors are written with 16 bits or zero-extended.
        M::Push | M::Pop if insn.op0_register().is_segment_register() => !plan.quiet,
        // What is done or looked at before a fault.
        M::Popa | M::Popad | M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => !plan.quiet,
        // Some read 32 bits of memory, or more of the save area than they need.
        M::Movsxd if narrow => !plan.quiet,
        // The limit of 16 bits on the new IP, and what a far transfer looks at first.
        M::Xrstor | M::Xrstor64 => !plan.quiet || r.gpr[0] > 7 || r.gpr[2] != 0,
        M::Call | M::Jmp => insn.op0_register().full_register() == Register::RSP,
        _ if is_xsave(insn) => r.gpr[0] > 7 || r.gpr[2] != 0,
        _ => false,
    }
}

/// Whether alignment checks are to be compared: not for frames, far pointers and save areas, where words of
/// several sizes or #GP come in, and not for what is copied in bulk.
fn has_alignment_rule(insn: &Instruction) -> bool {
    let segment = insn.op0_register().is_segment_register();
    let far = insn.is_jmp_far_indirect() || insn.is_call_far_indirect() || insn.is_call_far();
    !(insn.op_code().is_save_restore()
        || insn.is_string_instruction()
        || far
        || segment
        || matches!(
            insn.mnemonic(),
            M::Enter
                | M::Retf
                | M::Iret
                | M::Iretd
                | M::Iretq
                | M::Lds
                | M::Les
                | M::Lfs
                | M::Lgs
                | M::Lss
                | M::Movsxd
        ))
}

/// The XSAVE family: EDX:EAX are a mask of components.
pub fn is_xsave(insn: &Instruction) -> bool {
    insn.op_code().is_save_restore() && format!("{:?}", insn.mnemonic()).starts_with('X')
}

/// Bytes of a form's memory operand.
fn operand_bytes(form: Form) -> u64 {
    let info = form.code.op_code();
    if info.is_save_restore() { 840 } else { info.memory_size().size().max(1) as u64 }
}

/// Where the case's memory lies.
struct Plan {
    boundary: u64,
    /// The quiet boundary: everything can be written.
    quiet: bool,
    /// Multiples of 64 only.
    aligned: bool,
}

impl Plan {
    fn new(random: &mut Random) -> Self {
        let quiet = !random.one_in(6);
        let boundary = if quiet { QUIET_BOUNDARY } else { ARENA + PAGE * (1 + random.below(6)) };
        Self { boundary, quiet: boundary == QUIET_BOUNDARY, aligned: random.one_in(2) }
    }

    /// An address for an operand of `bytes`.
    fn target(&self, bytes: u64, random: &mut Random) -> u64 {
        if bytes > 256 {
            // Save areas, mostly at a multiple of 64.
            let odd = if random.one_in(8) { random.below(64) } else { 0 };
            return self.boundary - 64 * random.below(15) + odd;
        }
        if self.aligned {
            return self.boundary + 64 * random.below(8) - 64 * random.below(9);
        }
        if self.quiet && random.one_in(2) {
            return self.boundary + random.below(256) - 64;
        }
        // Across the boundary, or just beside it.
        self.boundary + random.below(4) - random.below(bytes.clamp(1, 600) + 4)
    }
}

fn random_registers(form: Form, random: &mut Random) -> Registers {
    let mut r = Registers::new();
    for (i, gpr) in r.gpr.iter_mut().enumerate() {
        *gpr = random.integer();
        if form.is_32 {
            *gpr &= 0xFFFF_FFFF;
            if i > 7 {
                *gpr = 0;
            }
        }
    }
    for i in 0..16 {
        r.set_ymm(i, random.vector());
    }
    // Half of the cases with everything masked, as programs have it.
    let mxcsr = if random.one_in(2) { 0x1F80 } else { random.bits() as u32 & 0xFFFF };
    r.set_mxcsr(mxcsr);
    let control = if random.one_in(2) { 0x37F } else { 0x40 | random.bits() as u16 & 0x0F3F };
    // No exception pending, except sometimes.
    let mut status = random.bits() as u16 & 0x7F7F;
    if random.one_in(30) {
        status |= if status & !control & 0x3F != 0 { 0x8080 } else { 0 };
    } else {
        status &= !0x3F | control & 0x3F;
    }
    let in_use = if random.one_in(3) { random.bits() as u8 } else { 0xFF };
    r.set_x87(control, status, in_use);
    for i in 0..8 {
        r.set_st(i, random.extended());
    }
    r
}

fn random_window(random: &mut Random) -> [u8; WINDOW] {
    let mut window = [0; WINDOW];
    for chunk in window.chunks_exact_mut(32) {
        for (at, word) in random.vector().into_iter().enumerate() {
            chunk[8 * at..8 * at + 8].copy_from_slice(&word.to_le_bytes());
        }
    }
    window
}

/// Builds the instruction with random operands.
fn instruction(form: Form, rip: u64, plan: &Plan, random: &mut Random) -> Option<Instruction> {
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
            memory(insn, i, form, rip, plan, random);
        }
        K::mem | K::mem_mib | K::sibmem => memory(insn, i, form, rip, plan, random),
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

/// A selector, mostly one that exists.
fn selector(random: &mut Random) -> u16 {
    const KNOWN: [u16; 20] = [
        0, 1, 2, 3, 0x23, 0x2B, 0x33, 0x20, 0x28, 0x29, 0x2A, 0x30, 0x08, 0x10, 0x18, 0x1B, 0x80, 0xFFFB,
        0x24, 0x2B,
    ];
    random.pick(&KNOWN)
}

/// A selector for CS: the present one, or one that is refused. Code of the other width would not find out.
fn code_selector(form: Form, random: &mut Random) -> u16 {
    let (own, other) = if form.is_32 { (CS32, CS64) } else { (CS64, CS32) };
    let any = selector(random);
    let leads_away = any & !3 == other & !3;
    if random.one_in(2) || leads_away { own } else { any }
}

fn is_string(kind: OpKind) -> bool {
    is_short(kind) || matches!(kind, OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI)
}
fn is_short(kind: OpKind) -> bool {
    matches!(kind, OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI)
}

/// A memory operand with random addressing.
fn memory(insn: &mut Instruction, i: u32, form: Form, rip: u64, plan: &Plan, random: &mut Random) {
    insn.set_op_kind(i, OpKind::Memory);
    let short = form.is_32 || random.one_in(8);
    let first = if short { Register::EAX } else { Register::RAX };
    let count = if form.is_32 { 8 } else { 16 };
    let target = plan.target(operand_bytes(form), random);
    match random.below(8) {
        0 if !form.is_32 => {
            insn.set_memory_base(Register::RIP);
            insn.set_memory_displacement64(target);
            insn.set_memory_displ_size(8);
            let _ = rip; // iced wants the target and makes the distance of it
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

/// Registers whose values an instruction wants in a range.
fn constrain(insn: &Instruction, r: &mut Registers, random: &mut Random) {
    const RAX: usize = 0;
    const RCX: usize = 1;
    const RDX: usize = 2;
    const RBP: usize = 5;
    match insn.mnemonic() {
        _ if insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix()) => {
            r.gpr[RCX] = random.below(7) | if random.one_in(2) { 0 } else { r.gpr[RCX] & 0xFFFF_FFFF << 32 };
            let short = (0..insn.op_count()).any(|i| is_short(insn.op_kind(i)));
            if !short {
                r.gpr[RCX] &= 7;
            }
            if insn.op_code().is_input_output() {
                r.gpr[RCX] |= 1; // whether none at all is checked for permission is the processor's choice
            }
        }
        M::Bt | M::Bts | M::Btr | M::Btc
            if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register =>
        {
            let n = insn.op1_register().full_register() as usize - Register::RAX as usize;
            r.gpr[n] = random.below(1024).wrapping_sub(512);
        }
        M::Div | M::Idiv if random.one_in(2) => {
            // Quotients that fit.
            r.gpr[RDX] = if random.one_in(2) { 0 } else { random.below(16) };
            r.gpr[RAX] = random.bits() >> random.below(64);
        }
        // Components that host and model both have.
        _ if is_xsave(insn) => (r.gpr[RAX], r.gpr[RDX]) = (random.below(8), 0),
        M::Pcmpestri | M::Pcmpestrm | M::Vpcmpestri | M::Vpcmpestrm if random.one_in(2) => {
            (r.gpr[RAX], r.gpr[RDX]) = (random.below(20), random.below(20));
        }
        M::Enter | M::Leave => r.gpr[RBP] = r.gpr[4],
        _ => {}
    }
    if let Some(index) = vsib_index(insn) {
        // Lanes of either width are small.
        let lanes: [u64; 4] = core::array::from_fn(|_| {
            let small = |random: &mut Random| random.below(32).wrapping_sub(16);
            if insn.is_vsib64() { small(random) } else { small(random) & 0xFFFF_FFFF | small(random) << 32 }
        });
        r.set_ymm(index, lanes);
    }
}

fn vsib_index(insn: &Instruction) -> Option<usize> {
    insn.is_vsib().then(|| insn.memory_index().number())
}

/// Sets base registers so that every access lies where the plan wants it. `None` if that cannot be.
fn place_memory(
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
        let value = target.wrapping_sub(rest).wrapping_div(scale);
        set_gpr(r, base, value, memory.address_size(), form, random);
        fixed.push((base, scale));
    }
    if insn.mnemonic() == M::Enter {
        r.gpr[5] = r.gpr[4];
    }
    // Registers may have been set twice: look again.
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
fn shape_memory(insn: &Instruction, case: &mut Case, random: &mut Random) {
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
    let place = linear(&memory, case).wrapping_sub(case.window_at) as usize;
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
            let flags = random.bits() & !0x4100 & !0x2_0000;
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
        M::Ldmxcsr | M::Vldmxcsr if !random.one_in(4) => {
            put(0, &(random.bits() as u32 & 0xFFFF).to_le_bytes())
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
