//! x87 instructions, two ways.
//!
//! [`run_x87`] works on a whole state: it loads the state, runs the instruction, saves the state. The guest's control word is in force, unmasked exceptions included: an unmasked exception only becomes
//! pending in the saved status, because nothing that waits for it runs before FNINIT. So results, tags,
//! condition codes, stack faults and biased results of unmasked overflows are the processor's own.
//!
//! [`x87_compute`], [`x87_load`] and [`x87_store`] run one computation on numbers, some twenty times faster; the
//! caller has looked after the stack, and all exceptions must be masked.

use core::arch::naked_asm;

/// The 512 bytes of FXSAVE. Only the x87 part counts.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct X87Image(pub [u8; 512]);

/// An x87 instruction: its place in the table of stubs, 512 register forms, then 64 memory forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87Instruction(u16);

impl X87Instruction {
    /// Opcode D8–DF (its low three bits) and a ModRM byte C0–FF.
    pub const fn register(opcode: u8, modrm: u8) -> Self {
        Self((opcode as u16 & 7) << 6 | modrm as u16 & 0x3F)
    }
    /// Opcode D8–DF (its low three bits) and ModRM.reg; the operand is memory.
    pub const fn memory(opcode: u8, reg: u8) -> Self {
        Self(512 + ((opcode as u16 & 7) << 3 | reg as u16 & 7))
    }
    /// Its number, below 1024.
    pub const fn number(self) -> u16 {
        self.0
    }
    /// The instruction with this number.
    pub const fn from_number(number: u16) -> Self {
        if number < 576 { Self(number) } else { Self::register(1, 0xD0) }
    }

    fn index(self) -> u64 {
        self.0.into()
    }

    /// Whether it is FLDENV, FNSTENV, FRSTOR, FNSAVE or their neighbours on control and status.
    fn is_control(self) -> bool {
        let (d9, dd) = (512 + 8, 512 + 5 * 8);
        self.0 >= d9 + 4 && self.0 < d9 + 8 || [dd + 4, dd + 6, dd + 7].contains(&self.0)
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

/// Flags travel in AH.
#[unsafe(naked)]
unsafe extern "sysv64" fn thunk(image: *mut X87Image, operand: *mut [u8; 16], index: u64, flags: u32) -> u32 {
    naked_asm!(
        "fxrstor [rdi]",
        "lea r9, [rip + {stubs}]",
        "lea r9, [r9 + rdx*4]",
        "mov eax, ecx",
        "sahf",
        "call r9",
        "lahf",
        "fxsave [rdi]",
        "fninit",
        "movzx eax, ah",
        "ret",
        stubs = sym stubs,
    )
}

/// Every x87 instruction and a return: 4 bytes each, at [`X87Instruction::index`]. Memory operands are at
/// RSI.
#[unsafe(naked)]
unsafe extern "sysv64" fn stubs() {
    naked_asm!(
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

/// An 80-bit number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Extended {
    /// Significand with explicit integer bit.
    pub mantissa: u64,
    /// Sign in bit 15, biased exponent below.
    pub sign_exponent: u16,
}

/// What a single computation gave.
#[derive(Clone, Copy, Debug)]
pub struct X87Result {
    /// The number.
    pub value: Extended,
    /// The status word: condition codes and the exceptions raised; TOP means nothing.
    pub status: u16,
}

/// Control word after FNINIT.
const DEFAULT_CONTROL: u16 = 0x37F;
/// The six exception masks of the control word.
pub const X87_MASKS: u16 = 0x3F;

/// `instruction` with ST(0) = `a` and ST(1) = `b`, which must leave the stack's depth as it is; the result is
/// the new ST(0). All exceptions must be masked in `control`. Much faster than [`run_x87`].
pub fn x87_compute(
    instruction: X87Instruction,
    operand: &[u8; 16],
    a: Extended,
    b: Extended,
    control: u16,
) -> X87Result {
    let mut result = X87Result { value: Extended::default(), status: 0 };
    let controls = [control | X87_MASKS, DEFAULT_CONTROL];
    if !instruction.is_control() {
        // SAFETY: the operands are as large as the instruction wants; the stack is empty afterwards.
        unsafe { compute(&mut result, operand, &a, &b, instruction.index(), &controls) };
    }
    result
}

/// `instruction` that pushes a number: a load of memory, or a constant. As [`x87_compute`].
pub fn x87_load(instruction: X87Instruction, operand: &[u8; 16], control: u16) -> X87Result {
    let mut result = X87Result { value: Extended::default(), status: 0 };
    let controls = [control | X87_MASKS, DEFAULT_CONTROL];
    if !instruction.is_control() {
        // SAFETY: as above.
        unsafe { load(&mut result, operand, instruction.index(), &controls) };
    }
    result
}

/// `instruction` that pops `a` into memory: the bytes, and the status word. As [`x87_compute`].
pub fn x87_store(instruction: X87Instruction, a: Extended, control: u16) -> ([u8; 16], u16) {
    let mut bytes = [0; 16];
    let controls = [control | X87_MASKS, DEFAULT_CONTROL];
    let mut status = 0;
    if !instruction.is_control() {
        // SAFETY: as above.
        status = unsafe { store(&mut bytes, &a, instruction.index(), &controls) } as u16;
    }
    (bytes, status)
}

/// Where `X87Result` has its status word.
const STATUS_AT: usize = core::mem::offset_of!(X87Result, status);

#[unsafe(naked)]
unsafe extern "sysv64" fn compute(
    _: *mut X87Result,
    operand: *const [u8; 16],
    a: *const Extended,
    b: *const Extended,
    index: u64,
    controls: *const [u16; 2],
) {
    naked_asm!(
        "fldcw [r9]",
        "fld tbyte ptr [rcx]",
        "fld tbyte ptr [rdx]",
        "lea r10, [rip + {stubs}]",
        "lea r10, [r10 + r8*4]",
        "call r10",
        "fnstsw ax",
        "mov [rdi + {status}], ax",
        "test al, 0x3F",
        "jz 2f",
        "fnclex",
        "2:",
        "fstp tbyte ptr [rdi]",
        "fstp st(0)",
        "fldcw [r9 + 2]",
        "ret",
        stubs = sym stubs,
        status = const STATUS_AT,
    )
}

#[unsafe(naked)]
unsafe extern "sysv64" fn load(
    _: *mut X87Result,
    operand: *const [u8; 16],
    index: u64,
    controls: *const [u16; 2],
) {
    naked_asm!(
        "fldcw [rcx]",
        "lea r10, [rip + {stubs}]",
        "lea r10, [r10 + rdx*4]",
        "call r10",
        "fnstsw ax",
        "mov [rdi + {status}], ax",
        "test al, 0x3F",
        "jz 2f",
        "fnclex",
        "2:",
        "fstp tbyte ptr [rdi]",
        "fldcw [rcx + 2]",
        "ret",
        stubs = sym stubs,
        status = const STATUS_AT,
    )
}

#[unsafe(naked)]
unsafe extern "sysv64" fn store(
    bytes: *mut [u8; 16],
    a: *const Extended,
    index: u64,
    controls: *const [u16; 2],
) -> u32 {
    naked_asm!(
        "fldcw [rcx]",
        "fld tbyte ptr [rsi]",
        "mov rsi, rdi",
        "lea r10, [rip + {stubs}]",
        "lea r10, [r10 + rdx*4]",
        "call r10",
        "fnstsw ax",
        "test al, 0x3F",
        "jz 2f",
        "fnclex",
        "2:",
        "fldcw [rcx + 2]",
        "movzx eax, ax",
        "ret",
        stubs = sym stubs,
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
        run_x87(&mut image, X87Instruction::register(1, 0xE8), &mut operand, 0); // FLD1
        operand[..8].copy_from_slice(&2.5f64.to_le_bytes());
        run_x87(&mut image, X87Instruction::memory(4, 0), &mut operand, 0); // FADD m64
        run_x87(&mut image, X87Instruction::memory(5, 3), &mut operand, 0); // FSTP m64
        assert_eq!(operand[..8], 3.5f64.to_le_bytes());
        assert_eq!(image.0[4], 0, "the stack is empty again");
    }

    #[test]
    fn an_unmasked_exception_is_only_recorded() {
        let mut image = fresh();
        image.0[..2].copy_from_slice(&0x340u16.to_le_bytes());
        run_x87(&mut image, X87Instruction::register(1, 0xFA), &mut [0; 16], 0); // FSQRT of nothing
        let status = u16::from_le_bytes([image.0[2], image.0[3]]);
        assert_eq!(status & 0xC1, 0xC1, "stack fault, error summary, invalid operation");
    }

    #[test]
    fn flags_go_in_and_out() {
        let mut image = fresh();
        for modrm in [0xE8, 0xEE] {
            run_x87(&mut image, X87Instruction::register(1, modrm), &mut [0; 16], 0); // FLD1, FLDZ
        }
        let flags = run_x87(&mut image, X87Instruction::register(3, 0xF1), &mut [0; 16], 0); // FCOMI 0, 1
        assert_eq!(flags & 0x45, 1, "below: carry");
        run_x87(&mut image, X87Instruction::register(2, 0xC1), &mut [0; 16], flags); // FCMOVB
        let flags = run_x87(&mut image, X87Instruction::register(3, 0xF1), &mut [0; 16], 0);
        assert_eq!(flags & 0x45, 0x40, "equal: zero");
    }
}
