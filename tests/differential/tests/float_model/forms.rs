//! Which forms have a floating-point number in them, and which of these the model computes.

use crate::{vector, x87};
use differential::forms::{self, Form};
use iced_x86::{Code, CpuidFeature, Instruction, MemorySize, Mnemonic as M, OpKind};

/// The two units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Vector,
    X87,
}

/// The forms of 64-bit code that have to do with floating-point numbers.
pub fn of(unit: Unit) -> Vec<Form> {
    let all = forms::all().0.into_iter().filter(|form| !form.is_32);
    all.filter(|form| match unit {
        Unit::X87 => is_x87(form.code),
        Unit::Vector => is_vector(form.code),
    })
    .collect()
}

fn is_x87(code: Code) -> bool {
    let features = code.cpuid_features();
    let of_x87 = |f: &CpuidFeature| {
        matches!(
            f,
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::FPU287XL_ONLY
        )
    };
    features.iter().any(of_x87)
}

fn is_vector(code: Code) -> bool {
    let element = code.op_code().memory_size().element_type();
    let is_float = matches!(element, MemorySize::Float16 | MemorySize::Float32 | MemorySize::Float64);
    !is_x87(code) && (is_float || format!("{:?}", code.mnemonic()).to_lowercase().contains("cvt"))
}

/// Why the model leaves `form` out.
pub fn reason_to_leave_out(unit: Unit, code: Code) -> Option<&'static str> {
    match unit {
        Unit::X87 => x87_reason(code),
        Unit::Vector => vector_reason(code),
    }
}

fn x87_reason(code: Code) -> Option<&'static str> {
    Some(match code.mnemonic() {
        M::F2xm1 | M::Fyl2x | M::Fyl2xp1 | M::Fptan | M::Fpatan | M::Fsin | M::Fcos | M::Fsincos => {
            "transcendental: the manual bounds the error, the last bits are the processor's own"
        }
        M::Fxch | M::Fstpnce | M::Ffree | M::Ffreep | M::Fincstp | M::Fdecstp | M::Fnop => {
            "moves registers or the stack, computes nothing"
        }
        M::Fcmovb
        | M::Fcmove
        | M::Fcmovbe
        | M::Fcmovu
        | M::Fcmovnb
        | M::Fcmovne
        | M::Fcmovnbe
        | M::Fcmovnu => "moves registers or the stack, computes nothing",
        M::Fld | M::Fst | M::Fstp if takes_register(code) => "moves registers or the stack, computes nothing",
        M::Fninit | M::Fnclex | M::Fldcw | M::Fnstcw | M::Fnstsw | M::Wait => {
            "control and status, computes nothing"
        }
        M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => "saves and restores the state, computes nothing",
        M::Fneni | M::Fndisi | M::Fnsetpm | M::Frstpm => "no operation",
        _ => return None,
    })
}

fn takes_register(code: Code) -> bool {
    let mut insn = Instruction::new();
    insn.set_code(code);
    code.op_code().memory_size() == MemorySize::Unknown && insn.op0_kind() != OpKind::Memory
}

fn vector_reason(code: Code) -> Option<&'static str> {
    let name = format!("{:?}", code.mnemonic()).to_lowercase();
    let stem = name.strip_prefix('v').unwrap_or(&name);
    let moves = [
        "mov",
        "and",
        "or",
        "xor",
        "unpck",
        "shuf",
        "blend",
        "perm",
        "insert",
        "extract",
        "broadcast",
        "test",
        "maskmov",
        "gather",
        "lddqu",
    ];
    if stem.starts_with("rcp") || stem.starts_with("rsqrt") {
        Some("approximation: the manual bounds the error, the bits are the processor's own")
    } else if moves.iter().any(|m| stem.starts_with(m)) {
        Some("moves, selects or combines bits, computes nothing")
    } else {
        None
    }
}

/// Whether the model computes the instruction.
pub fn is_modelled(unit: Unit, insn: &Instruction) -> bool {
    match unit {
        Unit::Vector => vector::knows(insn.mnemonic()),
        Unit::X87 => x87::knows(insn),
    }
}
