//! The instruction forms: iced's codes, minus what a user-mode test cannot or need not run.

use crate::interpreted::features;
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic as M};

/// A code in a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// The code.
    pub code: Code,
    /// In 32-bit code instead of 64-bit.
    pub is_32: bool,
}

/// A form that is left out.
#[derive(Clone, Copy, Debug)]
pub struct Excluded {
    /// Which.
    pub form: Form,
    /// Why.
    pub reason: &'static str,
}

/// All forms of the CPU model, in 64-bit and in 32-bit code: those to run and those left out.
pub fn all() -> (Vec<Form>, Vec<Excluded>) {
    let (mut run, mut excluded) = (Vec::new(), Vec::new());
    for code in Code::values() {
        let info = code.op_code();
        if !info.is_instruction() || !exists(code) || is_alias(code) {
            continue;
        }
        for is_32 in [false, true] {
            if !info.is_available_in_mode(if is_32 { 32 } else { 64 }) || (!is_32 && is_short_branch(code)) {
                continue;
            }
            let form = Form { code, is_32 };
            match reason_to_exclude(code) {
                Some(reason) => excluded.push(Excluded { form, reason }),
                None => run.push(form),
            }
        }
    }
    (run, excluded)
}

/// Whether the CPU model has the code.
fn exists(code: Code) -> bool {
    if matches!(code.encoding(), EncodingKind::EVEX | EncodingKind::MVEX | EncodingKind::XOP) {
        return false;
    }
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    x86_decode::allowed(&instruction, features())
}

/// Codes that no decoding of ours yields: MPX's decode as NOPs, those with FWAIT as two instructions.
fn is_alias(code: Code) -> bool {
    let info = code.op_code();
    let name = format!("{code:?}");
    name.starts_with("Bnd") || info.fwait() || matches!(code, Code::Popw_CS | Code::Ud0)
}

/// Branches with 16-bit operands: 64-bit code ignores the prefix, as Intel's processors do.
fn is_short_branch(code: Code) -> bool {
    let name = format!("{code:?}");
    ["_rel16", "_rel8_16"].iter().any(|n| name.contains(n))
        || matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Call_rm16 | Code::Jmp_rm16)
}

/// Why a code is not run.
fn reason_to_exclude(code: Code) -> Option<&'static str> {
    let name = format!("{code:?}");
    Some(match code.mnemonic() {
        M::INVALID => "not an instruction",
        M::Cpuid | M::Xgetbv | M::Rdpid | M::Rdpmc => "shows the CPU model, not the host",
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed => "not deterministic",
        M::Syscall | M::Sysenter | M::Sysret | M::Sysexit | M::Int | M::Int1 | M::Int3 | M::Into => {
            "enters the kernel: tested with the system instructions"
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => "the host's kernel emulates it (UMIP)",
        M::Vmcall | M::Vmmcall | M::Invlpga => "belongs to the host's hypervisor",
        _ if name.ends_with("_m1664") => "vendors differ: AMD's have no 64-bit offset",
        _ if name.starts_with("Reservednop") && name.contains("_0F0D") => "vendors differ",
        M::Fstdw | M::Fstsg => "80387SL only",
        _ => return None,
    })
}
