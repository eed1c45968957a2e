//! A random case of a form: operands, registers, memory.

mod memory;
mod operands;

pub use memory::linear;
pub use operands::is_short;

use crate::forms::Form;
use crate::layout::*;
use crate::state::{Case, Code, Registers};
use crate::values::Random;
use iced_x86::{Decoder, DecoderOptions, Encoder, Instruction, Mnemonic as M, OpKind, Register};

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
    let insn = operands::instruction(form, rip, &plan, random)?;
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
    memory::place(&insn, &mut registers, &plan, form, random)?;
    if is_unfit(&insn, &registers, &plan) {
        return None;
    }
    let mut case = Case {
        registers,
        window_at: plan.boundary - WINDOW as u64 / 2,
        window: random_window(random),
        code: Code { bytes, len: len as u32, slot, is_32: form.is_32 },
    };
    memory::shape(&insn, &mut case, random);
    Some(case)
}

/// Cases whose outcome is the processor's choice.
fn is_unfit(insn: &Instruction, r: &Registers, plan: &Plan) -> bool {
    let narrow = insn.op_code().operand_size() == 16;
    let may_fault = !plan.quiet || plan.wild || r.flags & ALIGNMENT_CHECK != 0;
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
        M::Popa | M::Popad | M::Retf | M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            !plan.quiet || plan.wild
        }
        // Which part of a masked store faults.
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => may_fault,
        // What a store has done already when it faults, and whether another exception comes first.
        M::Fbstp | M::Vcvtps2ph => may_fault,
        M::Movd | M::Movq | M::Movntq if insn.op1_register().is_mm() => may_fault,
        M::Fist | M::Fistp | M::Fisttp | M::Fst | M::Fstp => may_fault && r.x87_control() & 0x3F != 0x3F,
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
/// several sizes or #GP come in, not for what is copied in bulk, and not for vectors (SDM vol. 2, MOVUPS: "may or
/// may not be generated").
fn has_alignment_rule(insn: &Instruction) -> bool {
    let segment = insn.op0_register().is_segment_register();
    let far = insn.is_jmp_far_indirect() || insn.is_call_far_indirect() || insn.is_call_far();
    !(insn.op_code().is_save_restore()
        || insn.memory_size().size() >= 16
        || insn.mnemonic() == M::Vcvtph2ps
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
    /// A non-canonical address instead, where a register can carry one.
    wild: bool,
}

impl Plan {
    fn new(random: &mut Random) -> Self {
        let quiet = !random.one_in(6);
        let boundary = if quiet { QUIET_BOUNDARY } else { ARENA + PAGE * (1 + random.below(6)) };
        Self {
            boundary,
            quiet: boundary == QUIET_BOUNDARY,
            aligned: random.one_in(2),
            wild: random.one_in(50),
        }
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

/// Registers whose values an instruction wants in a range.
fn constrain(insn: &Instruction, r: &mut Registers, random: &mut Random) {
    const RAX: usize = 0;
    const RCX: usize = 1;
    const RDX: usize = 2;
    const RBP: usize = 5;
    match insn.mnemonic() {
        _ if insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix()) => {
            r.gpr[RCX] = random.below(7) | if random.one_in(2) { 0 } else { r.gpr[RCX] & 0xFFFF_FFFF << 32 };
            let short = (0..insn.op_count()).any(|i| operands::is_short(insn.op_kind(i)));
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
