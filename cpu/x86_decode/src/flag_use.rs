//! What instructions do with the arithmetic flags, as bits of RFLAGS (Intel SDM volume 1, appendix A).

use crate::{FlowControl, Instruction, Mnemonic as M, OpKind, Register, RflagsBits as B};
use x86_defs::flags;

/// Flags that `insn` reads.
pub fn read(insn: &Instruction) -> u64 {
    as_rflags(insn.rflags_read())
}

/// Flags that `insn` changes if it changes any.
pub fn modified(insn: &Instruction) -> u64 {
    as_rflags(insn.rflags_modified())
}

/// Flags that are surely others' no more behind `insn`.
pub fn overwritten(insn: &Instruction) -> u64 {
    if may_keep_all(insn) { 0 } else { modified(insn) }
}

/// Flags that `insn` leaves undefined, if it changes any.
pub fn undefined(insn: &Instruction) -> u64 {
    as_rflags(insn.rflags_undefined())
}

/// A shift by zero changes no flag, nor does a string instruction that repeats zero times.
pub fn may_keep_all(insn: &Instruction) -> bool {
    let shift = matches!(
        insn.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if !shift {
        return insn.is_string_instruction();
    }
    let last = insn.op_count() - 1;
    let mask = if insn.op0_register().is_gpr64() || insn.memory_size().size() == 8 { 63 } else { 31 };
    insn.op_kind(last) != OpKind::Immediate8 || insn.immediate8() & mask == 0
}

/// Whether `insn` may show all flags to somebody: it raises exceptions on purpose, stores flags, or talks to the system.
pub fn shows_all(insn: &Instruction) -> bool {
    insn.is_privileged()
        || matches!(
            insn.flow_control(),
            FlowControl::Interrupt | FlowControl::Exception | FlowControl::XbeginXabortXend
        )
        || matches!(insn.mnemonic(), M::Syscall | M::Sysenter | M::Pushf | M::Pushfd | M::Pushfq | M::Lahf)
}

/// Whether `insn` shows no flags at CPL 0, where it raises nothing. (Who is interrupted behind STI finds them as they were.)
pub fn is_quiet_in_supervisor(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Swapgs | M::Cli | M::Sti)
        || insn.mnemonic() == M::Mov && insn.op1_register() == Register::CR2
}

/// iced's bits as RFLAGS has them.
fn as_rflags(bits: u32) -> u64 {
    [
        (B::CF, flags::CF),
        (B::PF, flags::PF),
        (B::AF, flags::AF),
        (B::ZF, flags::ZF),
        (B::SF, flags::SF),
        (B::OF, flags::OF),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |all, (_, flag)| all | flag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Decoded, decode};
    use x86_defs::cpuid::{Feature, FeatureSet};
    use x86_defs::flags::{AF, CF, OF, STATUS, ZF};

    fn of(bytes: &[u8]) -> Instruction {
        match decode(bytes, 64, 0, FeatureSet::of(&[Feature::Lm, Feature::Syscall])) {
            Decoded::Instruction(insn) => insn,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn adc_reads_one_and_overwrites_all() {
        let adc = of(&[0x11, 0xD8]);
        assert_eq!((read(&adc), overwritten(&adc), undefined(&adc)), (CF, STATUS, 0));
        assert!(!shows_all(&adc));
    }

    #[test]
    fn a_shift_overwrites_flags_only_by_a_count_that_is_not_zero() {
        let (by_cl, by_64, by_32) =
            (of(&[0xD3, 0xE0]), of(&[0x48, 0xC1, 0xE0, 64]), of(&[0x48, 0xC1, 0xE0, 32]));
        assert_eq!((overwritten(&by_cl), modified(&by_cl)), (0, STATUS));
        assert_eq!((overwritten(&by_64), overwritten(&by_32)), (0, STATUS));
        assert_eq!(undefined(&by_32), AF | OF);
        assert_eq!(overwritten(&of(&[0xC1, 0xE0, 32])), 0);
    }

    #[test]
    fn scas_may_repeat_zero_times_and_bt_leaves_all_but_two_undefined() {
        assert_eq!(overwritten(&of(&[0xF2, 0xAE])), 0);
        assert_eq!(undefined(&of(&[0x0F, 0xA3, 0xC8])), STATUS & !CF & !ZF);
    }

    #[test]
    fn what_stores_or_interrupts_shows_all() {
        for bytes in [&[0x9C][..], &[0x9F], &[0x0F, 0x05], &[0xCC], &[0xF4]] {
            assert!(shows_all(&of(bytes)), "{bytes:x?}");
        }
        // swapgs, cli, sti, mov rax, cr2; but mov cr2, rax
        for bytes in [&[0x0F, 0x01, 0xF8][..], &[0xFA], &[0xFB], &[0x0F, 0x20, 0xD0]] {
            assert!(shows_all(&of(bytes)) && is_quiet_in_supervisor(&of(bytes)), "{bytes:x?}");
        }
        assert!(!is_quiet_in_supervisor(&of(&[0x0F, 0x22, 0xD0])));
    }
}
