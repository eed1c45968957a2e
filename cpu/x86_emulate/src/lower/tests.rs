//! Whatever the decoder lets pass is implemented: all opcodes of all maps, with the prefixes that choose forms.

extern crate std;

use super::*;
use crate::vector::tests::flat::Flat;
use std::collections::{BTreeMap, BTreeSet};
use std::string::String;
use std::vec::Vec;
use x86_decode::{Code, Decoded};
use x86_defs::cpuid::Feature;
use x86_defs::flags::STATUS;

/// Codes that raise #UD on purpose: UD, RSM outside of system management, shadow stacks that do not exist (RDSSP
/// alone is a NOP without them).
fn is_undefined(code: Code) -> bool {
    let name = std::format!("{code:?}");
    ["Ud0", "Ud1", "Ud2", "Rsm", "Clrssbsy", "Incssp", "Rstorssp", "Saveprevssp", "Setssbsy", "Wrss", "Wruss"]
        .iter()
        .any(|n| name.starts_with(n))
}

/// Everything up to ModRM: each opcode of each map behind each prefix, legacy and VEX.
fn opcodes() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for prefix in
        [&[][..], &[0x66], &[0xF3], &[0xF2], &[0x48], &[0x66, 0x48], &[0xF3, 0x48], &[0xF2, 0x48], &[0xF0]]
    {
        for map in [&[][..], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]] {
            all.extend((0..=255).map(|opcode| [prefix, map, &[opcode]].concat()));
        }
    }
    for map in 1..=3u8 {
        for rest in (0..=255u8).filter(|b| [0, 0x78].contains(&(b & 0x78))) {
            all.extend((0..=255).map(|opcode| [0xC4, 0xE0 | map, rest, opcode].to_vec()));
        }
    }
    all
}

/// Codes that decode in code of `bitness` and are `wanted`, with an example.
fn examples(
    bitness: u32,
    opcodes: &[Vec<u8>],
    wanted: impl Fn(&Instruction, &LowerContext) -> bool,
) -> BTreeMap<String, Vec<u8>> {
    let mode = ModeKey(match bitness {
        64 => ModeKey::LONG | ModeKey::LMA | ModeKey::PROTECTED | ModeKey::OSFXSR | ModeKey::AVX,
        32 => ModeKey::BIG_CODE | ModeKey::PROTECTED | ModeKey::OSFXSR | ModeKey::AVX,
        _ => 0,
    });
    let features = FeatureSet::of(Feature::ALL);
    let ctx = LowerContext { mode, features, at: 0, live_flags: STATUS };
    let mut found = BTreeMap::new();
    for opcode in opcodes {
        // Registers with each low number; memory without and with SIB (a vector index included).
        for modrm in (0..=255u8).filter(|m| m >> 6 == 3 || m >> 6 == 0) {
            let bytes = [&opcode[..], &[modrm, 0x0C], &[0; 10]].concat();
            let Decoded::Instruction(insn) = x86_decode::decode(&bytes, bitness, 0, features) else {
                continue;
            };
            if wanted(&insn, &ctx) {
                found.insert(std::format!("{:?}", insn.code()), bytes);
            }
        }
    }
    found
}

#[test]
fn all_that_decodes_is_implemented() {
    let opcodes = opcodes();
    let missing = |insn: &Instruction, ctx: &LowerContext| {
        !is_undefined(insn.code()) && implemented::<Flat>(insn, ctx).is_none()
    };
    let found = [16, 32, 64].map(|bitness| examples(bitness, &opcodes, missing));
    assert!(found.iter().all(BTreeMap::is_empty), "{found:02x?}");
}

/// The translator asks one of them only.
#[test]
fn what_is_of_the_integer_family_is_none_of_the_systems() {
    let opcodes = opcodes();
    let both = |insn: &Instruction, ctx: &LowerContext| {
        crate::integer::lower::<Flat>(insn, ctx).is_some()
            && crate::system::lower::<Flat>(insn, ctx).is_some()
    };
    let found = [16, 32, 64].map(|bitness| examples(bitness, &opcodes, both));
    assert!(found.iter().all(BTreeMap::is_empty), "{found:02x?}");
}

/// 0F 0D and 0F 18 to 0F 1F: prefetches and what later processors gave a meaning that older ones ignore (SDM
/// vol. 2, appendix A, table A-3).
#[test]
fn hints_do_nothing() {
    let mut wrong = BTreeSet::new();
    for bitness in [16, 32, 64] {
        for prefix in [&[][..], &[0x66], &[0xF2], &[0xF3], &[0x48], &[0xF3, 0x48]] {
            if bitness != 64 && prefix.contains(&0x48) {
                continue;
            }
            for opcode in [0x0D, 0x18, 0x19, 0x1A, 0x1B, 0x1C, 0x1D, 0x1E, 0x1F] {
                for modrm in 0..=255u8 {
                    let bytes = [prefix, &[0x0F, opcode, modrm], &[0; 10]].concat();
                    let features = FeatureSet::of(Feature::ALL);
                    let ctx = LowerContext { mode: ModeKey::default(), features, at: 0, live_flags: STATUS };
                    let decoded = x86_decode::decode(&bytes, bitness, 0, features);
                    let done = match decoded {
                        Decoded::Instruction(insn) => implemented::<Flat>(&insn, &ctx).is_some(),
                        _ => false,
                    };
                    if !done {
                        wrong.insert(std::format!(
                            "{:02x?} {} ({bitness}-bit)",
                            &bytes[..bytes.len() - 11],
                            modrm & 0xF8
                        ));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
