//! Thunks of instructions with a general register, flags or an MMX register beside a vector register.

use crate::kernel::{Thunk, V, call_with_mxcsr};
use core::arch::naked_asm;

macro_rules! specials {
    ($($(#[$doc:meta])* $name:ident [$($line:expr),*],)*) => {
        /// An instruction that writes a general register, flags or an MMX register, or reads one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Special { $($(#[$doc])* $name),* }

        static THUNKS: &[Thunk] = &[$(thunk!(
            "movups xmm0, [rsi]", "movups xmm1, [rdx]", $($line,)* "ret"
        )),*];
    };
}

macro_rules! to_general {
    ($i:literal) => {
        concat!($i, "\n mov [rdi], rax")
    };
}
macro_rules! to_mmx {
    ($i:literal) => {
        concat!($i, "\n movq [rdi], mm0\n emms")
    };
}
macro_rules! to_xmm {
    ($i:literal) => {
        concat!($i, "\n movups [rdi], xmm0")
    };
}
macro_rules! to_flags {
    ($i:literal) => {
        concat!($i, "\n lahf\n movzx eax, ah\n mov [rdi], rax")
    };
}
/// XMM0 to words 0 and 1, RCX to word 2, flags to word 3.
macro_rules! string {
    ($i:literal) => {
        concat!(
            by_immediate!($i),
            "\n movups [rdi], xmm0\n mov [rdi + 16], rcx\n pushfq\n pop qword ptr [rdi + 24]"
        )
    };
}
macro_rules! string_explicit {
    ($i:literal) => {
        concat!("mov rax, [rcx]\n mov rdx, [rcx + 8]\n", string!($i))
    };
}

specials! {
    Cvtss2si32 [to_general!("cvtss2si eax, xmm1")],
    Cvtss2si64 [to_general!("cvtss2si rax, xmm1")],
    Cvttss2si32 [to_general!("cvttss2si eax, xmm1")],
    Cvttss2si64 [to_general!("cvttss2si rax, xmm1")],
    Cvtsd2si32 [to_general!("cvtsd2si eax, xmm1")],
    Cvtsd2si64 [to_general!("cvtsd2si rax, xmm1")],
    Cvttsd2si32 [to_general!("cvttsd2si eax, xmm1")],
    Cvttsd2si64 [to_general!("cvttsd2si rax, xmm1")],
    Cvtsi2ss32 [to_xmm!("cvtsi2ss xmm0, dword ptr [rdx]")],
    Cvtsi2ss64 [to_xmm!("cvtsi2ss xmm0, qword ptr [rdx]")],
    Cvtsi2sd32 [to_xmm!("cvtsi2sd xmm0, dword ptr [rdx]")],
    Cvtsi2sd64 [to_xmm!("cvtsi2sd xmm0, qword ptr [rdx]")],
    Comiss [to_flags!("comiss xmm0, xmm1")],
    Comisd [to_flags!("comisd xmm0, xmm1")],
    Ucomiss [to_flags!("ucomiss xmm0, xmm1")],
    Ucomisd [to_flags!("ucomisd xmm0, xmm1")],
    Cvtpi2ps [to_xmm!("cvtpi2ps xmm0, qword ptr [rdx]")],
    Cvtpi2pd [to_xmm!("cvtpi2pd xmm0, qword ptr [rdx]")],
    Cvtps2pi [to_mmx!("cvtps2pi mm0, xmm1")],
    Cvttps2pi [to_mmx!("cvttps2pi mm0, xmm1")],
    Cvtpd2pi [to_mmx!("cvtpd2pi mm0, xmm1")],
    Cvttpd2pi [to_mmx!("cvttpd2pi mm0, xmm1")],
    /// Words 0 and 1: mask; word 2: index; word 3: flags.
    Pcmpistrm [string!("pcmpistrm xmm0, xmm1")],
    Pcmpistri [string!("pcmpistri xmm0, xmm1")],
    /// As the above; the lengths are `c`'s words 0 and 1, as 32-bit numbers.
    Pcmpestrm [string_explicit!("pcmpestrm xmm0, xmm1")],
    Pcmpestri [string_explicit!("pcmpestri xmm0, xmm1")],
}

impl Special {
    /// Runs it on `a` and `b` under `mxcsr`'s controls, exceptions masked: the result, and the exception
    /// flags of `mxcsr` with those raised.
    pub fn run(self, a: &V, b: &V, c: &V, imm: u8, mxcsr: u32) -> (V, u32) {
        let mut out = [0; 4];
        // SAFETY: the thunks read and write whole `V`s.
        let flags = unsafe { call_with_mxcsr(THUNKS[self as usize], &mut out, a, b, c, imm, mxcsr) };
        (out, flags)
    }
}
