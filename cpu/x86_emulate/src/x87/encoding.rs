//! iced's x87 codes and the bytes they stand for: opcode D8–DF and ModRM.

use x86_decode::{Code, Instruction, Register};
use x86_host_ops::X87Instruction;

/// Low three bits of opcode D8–DF, and ModRM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// With the whole ModRM byte, C0–FF.
    Register(u8, u8),
    /// With ModRM.reg.
    Memory(u8, u8),
}

impl Encoding {
    /// What the host runs for it.
    pub fn instruction(self) -> X87Instruction {
        match self {
            Self::Register(opcode, modrm) => X87Instruction::register(opcode, modrm),
            Self::Memory(opcode, reg) => X87Instruction::memory(opcode, reg),
        }
    }
}

/// The ModRM byte of an instruction with a memory operand, as assemblers write it: a scaled-index byte only where
/// one is needed. The decoder does not keep the byte itself.
pub fn memory_modrm(insn: &Instruction, reg: u8) -> u8 {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let is_relative = matches!(base, Register::RIP | Register::EIP);
    let no_base = base == Register::None && !index.is_gpr16();
    let mode = match insn.memory_displ_size() {
        0 => 0,
        _ if is_relative || no_base => 0,
        1 => 1,
        _ => 2,
    };
    let rm = match (base, index) {
        _ if is_relative => 5,
        (Register::BX, Register::SI) => 0,
        (Register::BX, Register::DI) => 1,
        (Register::BP, Register::SI) => 2,
        (Register::BP, Register::DI) => 3,
        (Register::SI, _) => 4,
        (Register::DI, _) => 5,
        (Register::BP, _) => 6,
        (Register::BX, _) => 7,
        (Register::None, Register::None) => match insn.memory_displ_size() {
            2 => 6,
            4 => 5,
            _ => 4,
        },
        (_, index) if index != Register::None => 4,
        (base, _) => (base.full_register() as u8 - Register::RAX as u8) & 7,
    };
    mode << 6 | reg << 3 | rm
}

/// The bytes of `insn`, if it computes (control and state instructions are not here).
pub fn encoding(insn: &Instruction) -> Option<Encoding> {
    if let Some((opcode, reg)) = memory_form(insn.code()) {
        return Some(Encoding::Memory(opcode, reg));
    }
    let (opcode, modrm) = register_form(insn.code())?;
    // Where ST(i) is an operand it is the second one, or the first if that is not ST(0).
    let i = match (insn.op_count(), insn.op0_register(), insn.op1_register()) {
        (0, ..) => 0,
        (1, r, _) => stack_index(r),
        (_, Register::ST0, r) => stack_index(r),
        (_, r, _) => stack_index(r),
    };
    let index = if takes_index(opcode, modrm) { i } else { 0 };
    Some(Encoding::Register(opcode, modrm | index))
}

fn stack_index(register: Register) -> u8 {
    if register.is_st() { register as u8 - Register::ST0 as u8 } else { 0 }
}

/// Whether the low bits of ModRM are a stack index.
fn takes_index(opcode: u8, modrm: u8) -> bool {
    !matches!((opcode, modrm), (1, 0xD0 | 0xE0..=0xFF) | (2, 0xE8..=0xEF) | (6, 0xD8..=0xDF))
}

fn memory_form(code: Code) -> Option<(u8, u8)> {
    use Code::*;
    Some(match code {
        Fadd_m32fp => (0, 0),
        Fmul_m32fp => (0, 1),
        Fcom_m32fp => (0, 2),
        Fcomp_m32fp => (0, 3),
        Fsub_m32fp => (0, 4),
        Fsubr_m32fp => (0, 5),
        Fdiv_m32fp => (0, 6),
        Fdivr_m32fp => (0, 7),
        Fld_m32fp => (1, 0),
        Fst_m32fp => (1, 2),
        Fstp_m32fp => (1, 3),
        Fiadd_m32int => (2, 0),
        Fimul_m32int => (2, 1),
        Ficom_m32int => (2, 2),
        Ficomp_m32int => (2, 3),
        Fisub_m32int => (2, 4),
        Fisubr_m32int => (2, 5),
        Fidiv_m32int => (2, 6),
        Fidivr_m32int => (2, 7),
        Fild_m32int => (3, 0),
        Fisttp_m32int => (3, 1),
        Fist_m32int => (3, 2),
        Fistp_m32int => (3, 3),
        Fld_m80fp => (3, 5),
        Fstp_m80fp => (3, 7),
        Fadd_m64fp => (4, 0),
        Fmul_m64fp => (4, 1),
        Fcom_m64fp => (4, 2),
        Fcomp_m64fp => (4, 3),
        Fsub_m64fp => (4, 4),
        Fsubr_m64fp => (4, 5),
        Fdiv_m64fp => (4, 6),
        Fdivr_m64fp => (4, 7),
        Fld_m64fp => (5, 0),
        Fisttp_m64int => (5, 1),
        Fst_m64fp => (5, 2),
        Fstp_m64fp => (5, 3),
        Fiadd_m16int => (6, 0),
        Fimul_m16int => (6, 1),
        Ficom_m16int => (6, 2),
        Ficomp_m16int => (6, 3),
        Fisub_m16int => (6, 4),
        Fisubr_m16int => (6, 5),
        Fidiv_m16int => (6, 6),
        Fidivr_m16int => (6, 7),
        Fild_m16int => (7, 0),
        Fisttp_m16int => (7, 1),
        Fist_m16int => (7, 2),
        Fistp_m16int => (7, 3),
        Fbld_m80bcd => (7, 4),
        Fild_m64int => (7, 5),
        Fbstp_m80bcd => (7, 6),
        Fistp_m64int => (7, 7),
        _ => return None,
    })
}

fn register_form(code: Code) -> Option<(u8, u8)> {
    use Code::*;
    Some(match code {
        Fadd_st0_sti => (0, 0xC0),
        Fmul_st0_sti => (0, 0xC8),
        Fcom_st0_sti => (0, 0xD0),
        Fcomp_st0_sti => (0, 0xD8),
        Fsub_st0_sti => (0, 0xE0),
        Fsubr_st0_sti => (0, 0xE8),
        Fdiv_st0_sti => (0, 0xF0),
        Fdivr_st0_sti => (0, 0xF8),
        Fld_sti => (1, 0xC0),
        Fxch_st0_sti => (1, 0xC8),
        Fnop => (1, 0xD0),
        Fstpnce_sti => (1, 0xD8),
        Fchs => (1, 0xE0),
        Fabs => (1, 0xE1),
        Ftst => (1, 0xE4),
        Fxam => (1, 0xE5),
        Fld1 => (1, 0xE8),
        Fldl2t => (1, 0xE9),
        Fldl2e => (1, 0xEA),
        Fldpi => (1, 0xEB),
        Fldlg2 => (1, 0xEC),
        Fldln2 => (1, 0xED),
        Fldz => (1, 0xEE),
        F2xm1 => (1, 0xF0),
        Fyl2x => (1, 0xF1),
        Fptan => (1, 0xF2),
        Fpatan => (1, 0xF3),
        Fxtract => (1, 0xF4),
        Fprem1 => (1, 0xF5),
        Fdecstp => (1, 0xF6),
        Fincstp => (1, 0xF7),
        Fprem => (1, 0xF8),
        Fyl2xp1 => (1, 0xF9),
        Fsqrt => (1, 0xFA),
        Fsincos => (1, 0xFB),
        Frndint => (1, 0xFC),
        Fscale => (1, 0xFD),
        Fsin => (1, 0xFE),
        Fcos => (1, 0xFF),
        Fcmovb_st0_sti => (2, 0xC0),
        Fcmove_st0_sti => (2, 0xC8),
        Fcmovbe_st0_sti => (2, 0xD0),
        Fcmovu_st0_sti => (2, 0xD8),
        Fucompp => (2, 0xE9),
        Fcmovnb_st0_sti => (3, 0xC0),
        Fcmovne_st0_sti => (3, 0xC8),
        Fcmovnbe_st0_sti => (3, 0xD0),
        Fcmovnu_st0_sti => (3, 0xD8),
        Fucomi_st0_sti => (3, 0xE8),
        Fcomi_st0_sti => (3, 0xF0),
        Fadd_sti_st0 => (4, 0xC0),
        Fmul_sti_st0 => (4, 0xC8),
        Fcom_st0_sti_DCD0 => (4, 0xD0),
        Fcomp_st0_sti_DCD8 => (4, 0xD8),
        Fsubr_sti_st0 => (4, 0xE0),
        Fsub_sti_st0 => (4, 0xE8),
        Fdivr_sti_st0 => (4, 0xF0),
        Fdiv_sti_st0 => (4, 0xF8),
        Ffree_sti => (5, 0xC0),
        Fxch_st0_sti_DDC8 => (5, 0xC8),
        Fst_sti => (5, 0xD0),
        Fstp_sti => (5, 0xD8),
        Fucom_st0_sti => (5, 0xE0),
        Fucomp_st0_sti => (5, 0xE8),
        Faddp_sti_st0 => (6, 0xC0),
        Fmulp_sti_st0 => (6, 0xC8),
        Fcomp_st0_sti_DED0 => (6, 0xD0),
        Fcompp => (6, 0xD9),
        Fsubrp_sti_st0 => (6, 0xE0),
        Fsubp_sti_st0 => (6, 0xE8),
        Fdivrp_sti_st0 => (6, 0xF0),
        Fdivp_sti_st0 => (6, 0xF8),
        Ffreep_sti => (7, 0xC0),
        Fxch_st0_sti_DFC8 => (7, 0xC8),
        Fstp_sti_DFD0 => (7, 0xD0),
        Fstp_sti_DFD8 => (7, 0xD8),
        Fucomip_st0_sti => (7, 0xE8),
        Fcomip_st0_sti => (7, 0xF0),
        _ => return None,
    })
}
