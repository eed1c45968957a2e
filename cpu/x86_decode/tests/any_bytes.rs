//! Any bytes, in any mode, on any CPU model: what decoding promises.
#![allow(missing_docs)]

use proptest::prelude::*;
use x86_decode::{Decoded, MAX_LENGTH, Reader, decode};
use x86_defs::cpuid::{Feature, FeatureSet};

/// Bytes that are often the beginning of something long: prefixes, escapes, VEX.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::select(&[0x66u8, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x64, 0x48, 0x41][..]);
    const OPCODES: [&[u8]; 8] =
        [b"\x0F", b"\x0F\x38", b"\x0F\x3A", b"\xC4\xE2", b"\xC5\xFD", b"\x62\xF1", b"\xFF", b""];
    let opcode = prop::sample::select(&OPCODES[..]);
    let parts = (prop::collection::vec(prefix, 0..16), opcode, prop::collection::vec(any::<u8>(), 0..18));
    parts.prop_map(|(prefixes, opcode, rest)| [&prefixes[..], opcode, &rest].concat())
}

fn model() -> impl Strategy<Value = FeatureSet> {
    prop::collection::vec(any::<bool>(), Feature::ALL.len()).prop_map(|has| {
        let mut features = FeatureSet::EMPTY;
        Feature::ALL
            .iter()
            .zip(has)
            .filter(|(_, has)| *has)
            .for_each(|(feature, _)| features.insert(*feature));
        features
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases * 16))]

    #[test]
    fn an_instruction_is_its_own_bytes(
        bytes in bytes(),
        bitness in prop::sample::select(&[16u32, 32, 64][..]),
        ip in any::<u64>(),
        features in model(),
    ) {
        let decoded = decode(&bytes, bitness, ip, features);
        match decoded {
            Decoded::Instruction(insn) => {
                let length = insn.len();
                prop_assert!((1..=MAX_LENGTH.min(bytes.len())).contains(&length));
                prop_assert_eq!(decode(&bytes[..length], bitness, ip, features), decoded);
                for cut in 0..length {
                    prop_assert_eq!(decode(&bytes[..cut], bitness, ip, features), Decoded::NeedMore);
                }
            }
            Decoded::NeedMore => prop_assert!(bytes.len() < MAX_LENGTH),
            Decoded::TooLong => prop_assert!(bytes.len() >= MAX_LENGTH),
            Decoded::Invalid => {}
        }
    }

    /// What is in front of an instruction and was decoded before, and what is far behind it, changes nothing.
    #[test]
    fn a_reader_reads_as_if_each_were_the_first(
        code in prop::collection::vec(bytes(), 1..5),
        bitness in prop::sample::select(&[16u32, 32, 64][..]),
        ip in any::<u64>(),
        features in model(),
        places in prop::collection::vec(any::<prop::sample::Index>(), 1..20),
    ) {
        let code = code.concat();
        let mut reader = Reader::new(&code, bitness, ip, features);
        for place in places {
            let at = place.index(code.len() + 1);
            let few = &code[at..code.len().min(at + MAX_LENGTH)];
            prop_assert_eq!(reader.at(at), decode(few, bitness, ip.wrapping_add(at as u64), features));
        }
        prop_assert_eq!(reader.at(code.len() + 1), Decoded::NeedMore);
    }

    /// A processor with more features knows what one with fewer knows, but for encodings that changed their meaning.
    #[test]
    fn features_only_add(bytes in bytes(), bitness in prop::sample::select(&[16u32, 32, 64][..]), few in model()) {
        let mut more = few;
        for feature in Feature::ALL {
            if !matches!(feature, Feature::Bmi1 | Feature::Lzcnt) {
                more.insert(*feature);
            }
        }
        if let Decoded::Instruction(insn) = decode(&bytes, bitness, 0, few) {
            prop_assert_eq!(decode(&bytes, bitness, 0, more), Decoded::Instruction(insn));
        }
    }
}

#[test]
fn fifteen_bytes_are_the_limit() {
    let all = FeatureSet::of(Feature::ALL);
    for bitness in [16, 32, 64] {
        let with = |prefixes: usize| [&vec![0x66; prefixes][..], &[0x90; 4]].concat();
        assert!(matches!(decode(&with(14), bitness, 0, all), Decoded::Instruction(insn) if insn.len() == 15));
        assert_eq!(decode(&with(15), bitness, 0, all), Decoded::TooLong);
        assert_eq!(decode(&[0x66; 14], bitness, 0, all), Decoded::NeedMore);
        assert_eq!(decode(&[0x66; 15], bitness, 0, all), Decoded::TooLong);
        assert_eq!(decode(&[], bitness, 0, all), Decoded::NeedMore);
    }
}
