//! x87 instructions on a whole x87 state: load the state, run one instruction, save the state.
//!
//! The guest's control word is in force, unmasked exceptions included: an unmasked exception only becomes
//! pending in the saved status, because nothing that waits for it runs before FNINIT. So results, tags,
//! condition codes, stack faults and biased results of unmasked overflows are the processor's own.

use core::arch::naked_asm;

/// The 512 bytes of FXSAVE. Only the x87 part counts.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct X87Image(pub [u8; 512]);

/// An x87 instruction: opcode D8–DF and ModRM byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum X87Instruction {
    /// Low three bits of the opcode, ModRM byte C0–FF.
    Register(u8, u8),
    /// Low three bits of the opcode, ModRM.reg; the operand is memory.
    Memory(u8, u8),
}

impl X87Instruction {
    /// Place in the thunk's table: 512 register forms, 64 memory forms.
    fn index(self) -> u64 {
        match self {
            Self::Register(opcode, modrm) => u64::from(opcode & 7) << 6 | u64::from(modrm & 0x3F),
            Self::Memory(opcode, reg) => 512 + (u64::from(opcode & 7) << 3 | u64::from(reg & 7)),
        }
    }

    /// Whether it is FLDENV, FNSTENV, FRSTOR, FNSAVE or their neighbours on control and status.
    fn is_control(self) -> bool {
        matches!(self, Self::Memory(1, 4..=7) | Self::Memory(5, 4 | 6 | 7))
    }
}

/// Runs `instruction` on the state in `image`; `operand` is its memory operand, at most 10 bytes, read or
/// written. `flags` are the low byte of RFLAGS before (FCMOVcc reads them); returns those after (FCOMI
/// writes them). No exception may be pending in `image`. The instructions that read or write control, status
/// or the whole state in memory are not done.
pub fn run_x87(image: &mut X87Image, instruction: X87Instruction, operand: &mut [u8; 16], flags: u8) -> u8 {
    if instruction.is_control() {
        return flags;
    }
    // The host's MXCSR controls; its reserved bits must be clear.
    image.0[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
    // SAFETY: the image is 512 bytes and aligned; the instruction touches at most 10 bytes of `operand`; the
    // thunk leaves the x87 unit as the System V convention wants it.
    unsafe { thunk(image, operand, instruction.index(), u32::from(flags) << 8) as u8 }
}

/// Flags travel in AH. The stubs are 4 bytes each.
#[unsafe(naked)]
unsafe extern "sysv64" fn thunk(image: *mut X87Image, operand: *mut [u8; 16], index: u64, flags: u32) -> u32 {
    naked_asm!(
        "fxrstor [rdi]",
        "lea r9, [rip + 2f]",
        "lea r9, [r9 + rdx*4]",
        "mov eax, ecx",
        "sahf",
        "call r9",
        "lahf",
        "fxsave [rdi]",
        "fninit",
        "movzx eax, ah",
        "ret",
        ".p2align 3",
        "2:",
        ".set bedplate_opcode, 0xD8",
        ".rept 8",
        ".set bedplate_modrm, 0xC0",
        ".rept 64",
        ".byte bedplate_opcode, bedplate_modrm, 0xC3, 0xCC",
        ".set bedplate_modrm, bedplate_modrm + 1",
        ".endr",
        ".set bedplate_opcode, bedplate_opcode + 1",
        ".endr",
        // ModRM 6: [rsi].
        ".set bedplate_opcode, 0xD8",
        ".rept 8",
        ".set bedplate_modrm, 6",
        ".rept 8",
        ".byte bedplate_opcode, bedplate_modrm, 0xC3, 0xCC",
        ".set bedplate_modrm, bedplate_modrm + 8",
        ".endr",
        ".set bedplate_opcode, bedplate_opcode + 1",
        ".endr",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> X87Image {
        let mut image = X87Image([0; 512]);
        image.0[..2].copy_from_slice(&0x37Fu16.to_le_bytes());
        image
    }

    #[test]
    fn one_plus_a_double() {
        let mut image = fresh();
        let mut operand = [0; 16];
        run_x87(&mut image, X87Instruction::Register(1, 0xE8), &mut operand, 0); // FLD1
        operand[..8].copy_from_slice(&2.5f64.to_le_bytes());
        run_x87(&mut image, X87Instruction::Memory(4, 0), &mut operand, 0); // FADD m64
        run_x87(&mut image, X87Instruction::Memory(5, 3), &mut operand, 0); // FSTP m64
        assert_eq!(operand[..8], 3.5f64.to_le_bytes());
        assert_eq!(image.0[4], 0, "the stack is empty again");
    }

    #[test]
    fn an_unmasked_exception_is_only_recorded() {
        let mut image = fresh();
        image.0[..2].copy_from_slice(&0x340u16.to_le_bytes());
        run_x87(&mut image, X87Instruction::Register(1, 0xFA), &mut [0; 16], 0); // FSQRT of nothing
        let status = u16::from_le_bytes([image.0[2], image.0[3]]);
        assert_eq!(status & 0xC1, 0xC1, "stack fault, error summary, invalid operation");
    }

    #[test]
    fn flags_go_in_and_out() {
        let mut image = fresh();
        for modrm in [0xE8, 0xEE] {
            run_x87(&mut image, X87Instruction::Register(1, modrm), &mut [0; 16], 0); // FLD1, FLDZ
        }
        let flags = run_x87(&mut image, X87Instruction::Register(3, 0xF1), &mut [0; 16], 0); // FCOMI 0, 1
        assert_eq!(flags & 0x45, 1, "below: carry");
        run_x87(&mut image, X87Instruction::Register(2, 0xC1), &mut [0; 16], flags); // FCMOVB
        let flags = run_x87(&mut image, X87Instruction::Register(3, 0xF1), &mut [0; 16], 0);
        assert_eq!(flags & 0x45, 0x40, "equal: zero");
    }
}
