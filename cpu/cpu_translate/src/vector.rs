//! Which vector instructions are copied: an allow-list, by the interpreter's own list of what is one instruction of the
//! host, and moves.
//!
//! While `slot::VECTOR_LIVE` is set, the guest's XMM/YMM registers and MXCSR are in the host's. MXCSR has all exceptions
//! masked then (contexts with others are emitted as calls), so none is raised in the host.

use crate::encoding::{Encoding, Roles};
use x86_decode::{Instruction, Mnemonic as M, OpKind, allowed};
use x86_defs::cpuid::FeatureSet;
use x86_emulate::lower::LowerContext;
use x86_emulate::vector::gate;

macro_rules! listed {
    ($($shape:ident $kind:ident { $($name:ident $($vex:ident)?,)* })*) => {
        fn is_kernel(m: M) -> bool {
            matches!(m, $($(M::$name $(| M::$vex)?)|*)|*)
        }
    };
}
x86_host_ops::kernel_list!(listed);

fn is_move(m: M) -> bool {
    is_plain_move(m) || is_conversion(m) || is_lane_move(m)
}

fn is_plain_move(m: M) -> bool {
    matches!(
        m,
        M::Movaps
            | M::Movapd
            | M::Movups
            | M::Movupd
            | M::Movdqa
            | M::Movdqu
            | M::Movss
            | M::Movsd
            | M::Movq
            | M::Movd
            | M::Movhps
            | M::Movhpd
            | M::Movlps
            | M::Movlpd
            | M::Movhlps
            | M::Movlhps
            | M::Lddqu
            | M::Movntps
            | M::Movntpd
            | M::Movntdq
            | M::Movntdqa
            | M::Vmovaps
            | M::Vmovapd
            | M::Vmovups
            | M::Vmovupd
            | M::Vmovdqa
            | M::Vmovdqu
            | M::Vmovss
            | M::Vmovsd
            | M::Vmovq
            | M::Vmovd
            | M::Vmovhps
            | M::Vmovhpd
            | M::Vmovlps
            | M::Vmovlpd
            | M::Vmovhlps
            | M::Vmovlhps
            | M::Vlddqu
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    )
}

/// Between general and vector registers, and into flags.
fn is_conversion(m: M) -> bool {
    matches!(
        m,
        M::Cvtsi2ss
            | M::Cvtsi2sd
            | M::Cvtss2si
            | M::Cvtsd2si
            | M::Cvttss2si
            | M::Cvttsd2si
            | M::Vcvtsi2ss
            | M::Vcvtsi2sd
            | M::Vcvtss2si
            | M::Vcvtsd2si
            | M::Vcvttss2si
            | M::Vcvttsd2si
            | M::Comiss
            | M::Comisd
            | M::Ucomiss
            | M::Ucomisd
            | M::Vcomiss
            | M::Vcomisd
            | M::Vucomiss
            | M::Vucomisd
            | M::Ptest
            | M::Vptest
            | M::Movmskps
            | M::Movmskpd
            | M::Pmovmskb
            | M::Vmovmskps
            | M::Vmovmskpd
            | M::Vpmovmskb
    )
}

fn is_lane_move(m: M) -> bool {
    matches!(
        m,
        M::Pextrb
            | M::Pextrw
            | M::Pextrd
            | M::Pextrq
            | M::Pinsrb
            | M::Pinsrw
            | M::Pinsrd
            | M::Pinsrq
            | M::Vpextrb
            | M::Vpextrw
            | M::Vpextrd
            | M::Vpextrq
            | M::Vpinsrb
            | M::Vpinsrw
            | M::Vpinsrd
            | M::Vpinsrq
            | M::Extractps
            | M::Vextractps
            | M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vbroadcastf128
            | M::Vbroadcasti128
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
            | M::Vextractf128
            | M::Vextracti128
            | M::Vinsertf128
            | M::Vinserti128
            | M::Pslldq
            | M::Psrldq
            | M::Vpslldq
            | M::Vpsrldq
    )
}

/// The encoding of `insn` if it may run on the host with other registers and memory operand. `host`: what the host
/// can execute.
pub fn encoding(insn: &Instruction, bytes: &[u8], ctx: &LowerContext, host: FeatureSet) -> Option<Encoding> {
    let m = insn.mnemonic();
    if !(is_kernel(m) || is_move(m)) || insn.is_string_instruction() || !allowed(insn, host) {
        return None;
    }
    if gate::exception(insn, ctx).is_some() || gate::has_mmx(insn) {
        return None;
    }
    if insn.memory_index().is_xmm() || insn.memory_index().is_ymm() {
        return None;
    }
    let long = ctx.mode.is_long();
    let mut e = Encoding::parse(bytes, long)?;
    e.roles = roles(&e);
    if !long && (e.roles.reg || e.roles.rm) {
        e.clear_w();
    }
    let named = (0..insn.op_count())
        .filter(|&i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr())
        .count();
    let expected = usize::from(e.roles.reg) + usize::from(e.roles.rm && e.rm.is_some());
    (named == expected).then_some(e)
}

/// Which fields of ModRM name general registers.
fn roles(e: &Encoding) -> Roles {
    let none = Roles { reg: false, rm: false, v: false };
    let (reg, rm) = (Roles { reg: true, ..none }, Roles { rm: true, ..none });
    match (e.map(), e.opcode_byte()) {
        (1, 0x2C | 0x2D | 0x50 | 0xC5 | 0xD7) => reg,
        (1, 0x2A | 0x6E | 0xC4) => rm,
        // With F3 it is MOVQ between vector registers.
        (1, 0x7E) if !e.is_f3() => rm,
        (3, 0x14..=0x17 | 0x20 | 0x22) => rm,
        _ => none,
    }
}

/// The alignment that the memory operand must have, in bytes.
pub fn alignment(insn: &Instruction, vex: bool) -> u32 {
    let size = insn.memory_size().size() as u32;
    let m = insn.mnemonic();
    if vex {
        let strict = matches!(
            m,
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        );
        return if strict { size } else { 1 };
    }
    let free = matches!(m, M::Movups | M::Movupd | M::Movdqu | M::Lddqu);
    if size == 16 && !free { 16 } else { 1 }
}
