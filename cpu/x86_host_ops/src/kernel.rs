//! A thunk for each kernel of the list and form (MMX, XMM, YMM), and the safe way to call them.
//!
//! A thunk takes pointers to its result and its operands, loads all operands before it stores, and touches
//! nothing else. An immediate picks one of 256 copies of the instruction, 8 bytes each.

use core::arch::{asm, naked_asm};

/// A vector register: YMM; XMM is its low half, MMX its low word.
pub type V = [u64; 4];

pub(crate) type Thunk =
    unsafe extern "sysv64" fn(out: *mut V, a: *const V, b: *const V, c: *const V, imm: u64);

/// Which registers an instruction works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// 64 bits.
    Mmx,
    /// 128 bits; the result's upper half is not written.
    Xmm,
    /// 256 bits.
    Ymm,
}

/// Where a kernel's result may be tiny (denormal).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// Nowhere: comparison, conversion to integers, minimum, square root.
    None,
    /// Lowest 32 bits.
    LowSingle,
    /// Lowest 64 bits.
    LowDouble,
    /// Any 32 bits.
    Singles,
    /// Any 64 bits.
    Doubles,
    /// Any 16 bits.
    Halves,
}

/// What a kernel has to do with MXCSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Environment {
    /// Nothing.
    Integer,
    /// It obeys the controls and sets the flags.
    Float(Lanes),
}

/// How a kernel's operands stand in the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `a` is the first source.
    Binary,
    /// No `a`.
    Unary,
    /// `b` is a count; there is a form with an immediate instead.
    Shift,
    /// `c` is a register of its own.
    Blend,
    /// `c` is the destination.
    Fused,
}

/// The thunks of one kernel.
#[derive(Debug)]
pub struct Entry {
    mmx: Thunk,
    xmm: Thunk,
    ymm: Thunk,
    /// MXCSR's role.
    pub environment: Environment,
    /// Place of the operands.
    pub shape: Shape,
}

/// The second source.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A register by number.
    Register(u8),
    /// A value, from memory or computed.
    Value(&'a V),
}

/// The operands of a kernel; register numbers are taken modulo 16.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// Register that is written.
    pub dst: u8,
    /// First source.
    pub a: u8,
    /// Second source.
    pub b: Source<'a>,
    /// Third source.
    pub c: u8,
    /// Immediate.
    pub imm: u8,
}

impl Operands<'_> {
    /// Result, `a`, `b`, `c`: all valid for as long as `r` is borrowed.
    #[inline(always)]
    fn pointers(&self, r: &mut [V; 16]) -> (*mut V, *const V, *const V, *const V) {
        let base = r.as_mut_ptr();
        let register = |n: u8| base.wrapping_add(usize::from(n & 15));
        let b = match self.b {
            Source::Register(n) => register(n).cast_const(),
            Source::Value(v) => v as *const V,
        };
        (register(self.dst), register(self.a), b, register(self.c))
    }
}

/// For a form that does not exist; the decoder never lets one pass.
unsafe extern "sysv64" fn absent(_: *mut V, _: *const V, _: *const V, _: *const V, _: u64) {}

/// A naked function from lines of assembly.
macro_rules! thunk {
    ($($line:expr),* $(,)?) => {{
        #[unsafe(naked)]
        unsafe extern "sysv64" fn thunk(_: *mut V, _: *const V, _: *const V, _: *const V, _: u64) {
            naked_asm!($($line),*)
        }
        thunk
    }};
}

/// The instruction with each of the 256 immediates; the one that R8 says runs.
macro_rules! by_immediate {
    ($instruction:expr) => {
        concat!(
            "lea r9, [rip + 2f]\n lea r9, [r9 + r8*8]\n call r9\n jmp 3f\n .p2align 3\n 2:\n",
            ".set bedplate_immediate, 0\n .rept 256\n",
            $instruction,
            ", bedplate_immediate\n ret\n .p2align 3\n",
            ".set bedplate_immediate, bedplate_immediate + 1\n .endr\n 3:"
        )
    };
}

macro_rules! mmx {
    ($i:expr) => {
        thunk!("movq mm0, [rsi]", "movq mm1, [rdx]", $i, "movq [rdi], mm0", "emms", "ret")
    };
}
macro_rules! xmm {
    ($i:expr) => {
        thunk!("movups xmm0, [rsi]", "movups xmm1, [rdx]", $i, "movups [rdi], xmm0", "ret")
    };
}
macro_rules! ymm {
    ($i:expr) => {
        thunk!("vmovups ymm0, [rsi]", "vmovups ymm1, [rdx]", $i, "vmovups [rdi], ymm0", "vzeroupper", "ret")
    };
}
/// VEX on 128 bits: leaves no dirty upper halves.
macro_rules! vex_xmm {
    ($i:expr) => {
        thunk!("vmovups xmm0, [rsi]", "vmovups xmm1, [rdx]", $i, "vmovups [rdi], xmm0", "ret")
    };
}
macro_rules! text {
    ($name:ident $operands:literal) => {
        concat!(stringify!($name), " ", $operands)
    };
}
macro_rules! text_imm {
    ($name:ident $operands:literal) => {
        by_immediate!(text!($name $operands))
    };
}

/// `[mmx, xmm, ymm], shape` of a kernel.
macro_rules! forms {
    (mmx_binary $l:ident $v:ident) => {
        ([mmx!(text!($l "mm0, mm1")), xmm!(text!($l "xmm0, xmm1")), ymm!(text!($v "ymm0, ymm0, ymm1"))], Binary)
    };
    (mmx_unary $l:ident $v:ident) => {
        ([mmx!(text!($l "mm0, mm1")), xmm!(text!($l "xmm0, xmm1")), ymm!(text!($v "ymm0, ymm1"))], Unary)
    };
    (mmx_shift $l:ident $v:ident) => {
        ([mmx!(text!($l "mm0, mm1")), xmm!(text!($l "xmm0, xmm1")), ymm!(text!($v "ymm0, ymm0, xmm1"))], Shift)
    };
    (mmx_binary_imm $l:ident $v:ident) => {
        (
            [
                mmx!(text_imm!($l "mm0, mm1")),
                xmm!(text_imm!($l "xmm0, xmm1")),
                ymm!(text_imm!($v "ymm0, ymm0, ymm1")),
            ],
            Binary,
        )
    };
    (mmx_only_unary_imm $l:ident) => { ([mmx!(text_imm!($l "mm0, mm1")), absent, absent], Unary) };
    (binary $l:ident $v:ident) => {
        ([absent, xmm!(text!($l "xmm0, xmm1")), ymm!(text!($v "ymm0, ymm0, ymm1"))], Binary)
    };
    (unary $l:ident $v:ident) => {
        ([absent, xmm!(text!($l "xmm0, xmm1")), ymm!(text!($v "ymm0, ymm1"))], Unary)
    };
    (widen $l:ident $v:ident) => {
        ([absent, xmm!(text!($l "xmm0, xmm1")), ymm!(text!($v "ymm0, xmm1"))], Unary)
    };
    (narrow $l:ident $v:ident) => {
        ([absent, xmm!(text!($l "xmm0, xmm1")), ymm!(text!($v "xmm0, ymm1"))], Unary)
    };
    (binary_imm $l:ident $v:ident) => {
        ([absent, xmm!(text_imm!($l "xmm0, xmm1")), ymm!(text_imm!($v "ymm0, ymm0, ymm1"))], Binary)
    };
    (unary_imm $l:ident $v:ident) => {
        ([absent, xmm!(text_imm!($l "xmm0, xmm1")), ymm!(text_imm!($v "ymm0, ymm1"))], Unary)
    };
    (xmm_binary $l:ident $($v:ident)?) => { ([absent, xmm!(text!($l "xmm0, xmm1")), absent], Binary) };
    (xmm_unary $l:ident $($v:ident)?) => { ([absent, xmm!(text!($l "xmm0, xmm1")), absent], Unary) };
    (xmm_binary_imm $l:ident $($v:ident)?) => { ([absent, xmm!(text_imm!($l "xmm0, xmm1")), absent], Binary) };
    (sse_binary_imm $l:ident) => { ([absent, xmm!(text_imm!($l "xmm0, xmm1")), absent], Binary) };
    (xmm_unary_imm $l:ident $($v:ident)?) => { ([absent, xmm!(text_imm!($l "xmm0, xmm1")), absent], Unary) };
    (vex_binary $v:ident) => {
        ([absent, vex_xmm!(text!($v "xmm0, xmm0, xmm1")), ymm!(text!($v "ymm0, ymm0, ymm1"))], Binary)
    };
    (vex_binary_imm $v:ident) => {
        ([absent, vex_xmm!(text_imm!($v "xmm0, xmm0, xmm1")), ymm!(text_imm!($v "ymm0, ymm0, ymm1"))], Binary)
    };
    (vex_xmm_binary_imm $v:ident) => { ([absent, vex_xmm!(text_imm!($v "xmm0, xmm0, xmm1")), absent], Binary) };
    (vex_widen $v:ident) => {
        ([absent, vex_xmm!(text!($v "xmm0, xmm1")), ymm!(text!($v "ymm0, xmm1"))], Unary)
    };
    (vex_narrow_imm $v:ident) => {
        ([absent, vex_xmm!(text_imm!($v "xmm0, xmm1")), ymm!(text_imm!($v "xmm0, ymm1"))], Unary)
    };
    (ymm_binary $v:ident) => { ([absent, absent, ymm!(text!($v "ymm0, ymm0, ymm1"))], Binary) };
    (ymm_binary_imm $v:ident) => { ([absent, absent, ymm!(text_imm!($v "ymm0, ymm0, ymm1"))], Binary) };
    (ymm_unary_imm $v:ident) => { ([absent, absent, ymm!(text_imm!($v "ymm0, ymm1"))], Unary) };
    (@blend $l:ident) => {
        thunk!(
            "movups xmm0, [rcx]",
            "movups xmm1, [rsi]",
            "movups xmm2, [rdx]",
            text!($l "xmm1, xmm2, xmm0"),
            "movups [rdi], xmm1",
            "ret"
        )
    };
    (blend $l:ident $v:ident) => {
        (
            [
                absent,
                forms!(@blend $l),
                thunk!(
                    "vmovups ymm2, [rcx]",
                    "vmovups ymm0, [rsi]",
                    "vmovups ymm1, [rdx]",
                    text!($v "ymm0, ymm0, ymm1, ymm2"),
                    "vmovups [rdi], ymm0",
                    "vzeroupper",
                    "ret"
                ),
            ],
            Blend,
        )
    };
    (xmm_blend $l:ident) => { ([absent, forms!(@blend $l), absent], Blend) };
    (@fused $v:ident $operands:literal $c:literal $a:literal $b:literal) => {
        thunk!(
            concat!("vmovups ", $c, ", [rcx]"),
            concat!("vmovups ", $a, ", [rsi]"),
            concat!("vmovups ", $b, ", [rdx]"),
            text!($v $operands),
            concat!("vmovups [rdi], ", $c),
            "vzeroupper",
            "ret"
        )
    };
    (fused $v:ident) => {
        (
            [
                absent,
                forms!(@fused $v "xmm0, xmm1, xmm2" "xmm0" "xmm1" "xmm2"),
                forms!(@fused $v "ymm0, ymm1, ymm2" "ymm0" "ymm1" "ymm2"),
            ],
            Fused,
        )
    };
    (xmm_fused $v:ident) => { ([absent, forms!(@fused $v "xmm0, xmm1, xmm2" "xmm0" "xmm1" "xmm2"), absent], Fused) };
}

macro_rules! environment {
    (int) => {
        Environment::Integer
    };
    (fp) => {
        Environment::Float(Lanes::None)
    };
    (ss) => {
        Environment::Float(Lanes::LowSingle)
    };
    (sd) => {
        Environment::Float(Lanes::LowDouble)
    };
    (ps) => {
        Environment::Float(Lanes::Singles)
    };
    (pd) => {
        Environment::Float(Lanes::Doubles)
    };
    (ph) => {
        Environment::Float(Lanes::Halves)
    };
}

macro_rules! define {
    ($($shape:ident $environment:ident { $($legacy:ident $($vex:ident)?,)* })*) => {
        /// An instruction of the list, by its mnemonic.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        #[allow(missing_docs)]
        pub enum Kernel { $($($legacy,)*)* }

        impl Kernel {
            /// All of them.
            pub const ALL: &'static [Kernel] = &[$($(Kernel::$legacy,)*)*];
        }

        static ENTRIES: [Entry; Kernel::ALL.len()] = {
            use Shape::*;
            [$($({
                let ([mmx, xmm, ymm], shape): ([Thunk; 3], Shape) = forms!($shape $legacy $($vex)?);
                Entry { mmx, xmm, ymm, environment: environment!($environment), shape }
            },)*)*]
        };
    };
}
kernel_list!(define);

impl Kernel {
    /// Its thunks.
    pub fn entry(self) -> &'static Entry {
        Entry::of(self as u16)
    }
}

/// MXCSR: all exceptions masked.
const MASKED: u32 = 0x1F80;
/// MXCSR: the six exception flags.
const FLAGS: u32 = 0x3F;

impl Entry {
    /// The entry of the kernel with this number.
    #[inline(always)]
    pub fn of(kernel: u16) -> &'static Entry {
        &ENTRIES[usize::from(kernel).min(ENTRIES.len() - 1)]
    }

    #[inline(always)]
    fn thunk(&self, form: Form) -> Thunk {
        match form {
            Form::Mmx => self.mmx,
            Form::Xmm => self.xmm,
            Form::Ymm => self.ymm,
        }
    }

    /// `r[dst] = kernel(r[a], b, r[c], imm)`.
    #[inline(always)]
    pub fn run(&self, form: Form, r: &mut [V; 16], operands: &Operands<'_>) {
        let (out, a, b, c) = operands.pointers(r);
        // SAFETY: all pointers lie in `r` or are `b`'s; the thunk reads whole `V`s, then writes one. It runs
        // an instruction that the host has: see `supported`.
        unsafe { self.thunk(form)(out, a, b, c, operands.imm.into()) };
    }

    /// `kernel(a, b, c, imm)` without registers.
    pub fn run_values(&self, form: Form, a: &V, b: &V, c: &V, imm: u8) -> V {
        let mut out = [0; 4];
        // SAFETY: as in `run`.
        unsafe { self.thunk(form)(&mut out, a, b, c, imm.into()) };
        out
    }

    /// As `run`, under the rounding and flushing controls of `mxcsr`, exceptions masked. Returns the
    /// exception flags of `mxcsr` and those that the instruction raised.
    #[inline(always)]
    pub fn run_float(&self, form: Form, r: &mut [V; 16], operands: &Operands<'_>, mxcsr: u32) -> u32 {
        let (out, a, b, c) = operands.pointers(r);
        // SAFETY: as in `run`.
        unsafe { call_with_mxcsr(self.thunk(form), out, a, b, c, operands.imm, mxcsr) }
    }

    /// As `run_float`, with the result apart.
    pub fn compute_float(
        &self,
        form: Form,
        r: &mut [V; 16],
        operands: &Operands<'_>,
        mxcsr: u32,
    ) -> (V, u32) {
        let (_, a, b, c) = operands.pointers(r);
        let mut out = [0; 4];
        // SAFETY: as in `run`.
        let flags = unsafe { call_with_mxcsr(self.thunk(form), &mut out, a, b, c, operands.imm, mxcsr) };
        (out, flags)
    }
}

/// Calls `thunk` with MXCSR as in `mxcsr`, exceptions masked, and returns the flags then. Loading MXCSR is
/// cheap, reading it is what costs; the host's controls come back at the end (its flags mean nothing).
///
/// # Safety
/// The pointers are good for `thunk`.
#[inline(always)]
pub(crate) unsafe fn call_with_mxcsr(
    thunk: Thunk,
    out: *mut V,
    a: *const V,
    b: *const V,
    c: *const V,
    imm: u8,
    mxcsr: u32,
) -> u32 {
    let mut words = [mxcsr | MASKED, MASKED];
    // SAFETY: the caller vouches for the pointers; the thunk follows the System V convention, which R12
    // survives.
    unsafe {
        asm!(
            "ldmxcsr [r12]",
            "call {thunk}",
            "stmxcsr [r12]",
            "ldmxcsr [r12 + 4]",
            thunk = in(reg) thunk,
            in("r12") words.as_mut_ptr(),
            in("rdi") out, in("rsi") a, in("rdx") b, in("rcx") c, in("r8") u64::from(imm),
            clobber_abi("sysv64"),
        );
    }
    words[0] & FLAGS
}
