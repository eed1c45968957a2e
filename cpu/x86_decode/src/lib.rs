//! Decoding of guest instructions: iced-x86, and what the guest's CPU model allows of it.
//!
//! Called by the lowering of `x86_emulate` and by the translator. An instruction whose CPUID feature the
//! guest does not have decodes as the processor without it would: #UD, or the older instruction that
//! shares the encoding (TZCNT without BMI1 is BSF, LZCNT without LZCNT is BSR, WBNOINVD is WBINVD).
#![no_std]
#![forbid(unsafe_code)]

mod features;
pub mod flag_use;

pub use features::allowed;
pub use iced_x86::{
    Code, ConditionCode, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    MemorySize, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use iced_x86::{Decoder, DecoderError, DecoderOptions};
use x86_defs::cpuid::{Feature, FeatureSet};

/// Longest instruction in bytes.
pub const MAX_LENGTH: usize = 15;

/// What decoding gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A valid instruction that the CPU model has.
    Instruction(Instruction),
    /// Invalid, or hidden by the CPU model: #UD.
    Invalid,
    /// Longer than 15 bytes: #GP(0).
    TooLong,
    /// More bytes are needed (they may be on a page that faults).
    NeedMore,
}

/// Decodes the instruction at the start of `bytes`, which lie at `ip`. `bitness` is 16, 32 or 64.
pub fn decode(bytes: &[u8], bitness: u32, ip: u64, features: FeatureSet) -> Decoded {
    Reader::new(bytes, bitness, ip, features).at(0)
}

/// Decodes here and there in the same bytes: to start takes as long as several instructions.
pub struct Reader<'a> {
    decoder: Decoder<'a>,
    bytes: &'a [u8],
    ip: u64,
    features: FeatureSet,
}

impl<'a> Reader<'a> {
    /// For `bytes`, which lie at `ip`. `bitness` is 16, 32 or 64.
    pub fn new(bytes: &'a [u8], bitness: u32, ip: u64, features: FeatureSet) -> Self {
        let decoder = Decoder::with_ip(bitness, bytes, ip, decoder_options(features));
        Self { decoder, bytes, ip, features }
    }

    /// Decodes the instruction at offset `at`; as if there were no more bytes at an offset beyond them.
    pub fn at(&mut self, at: usize) -> Decoded {
        let bytes = self.bytes.get(at..).unwrap_or_default();
        let bytes = &bytes[..bytes.len().min(MAX_LENGTH)];
        if self.decoder.set_position(at).is_err() {
            return Decoded::NeedMore;
        }
        self.decoder.set_ip(self.ip.wrapping_add(at as u64));
        let instruction = self.decoder.decode();
        if instruction.is_invalid() {
            return match self.decoder.last_error() {
                DecoderError::NoMoreBytes if undefined_as_it_is(bytes, self.decoder.bitness()) => {
                    Decoded::Invalid
                }
                DecoderError::NoMoreBytes => Decoded::NeedMore,
                // With 15 bytes at hand iced calls what wants more just invalid; but it has taken all of them. (So it has
                // of an invalid instruction of exactly 15 bytes, which gets #GP for #UD.)
                _ if self.decoder.position() == at + MAX_LENGTH => Decoded::TooLong,
                _ => Decoded::Invalid,
            };
        }
        if allowed(&instruction, self.features) {
            Decoded::Instruction(instruction)
        } else {
            Decoded::Invalid
        }
    }
}

/// Whether the bytes end with an opcode that is undefined without a ModRM byte, so that a processor does not ask for
/// more: iced wants one behind every undefined opcode. What Intel's processors do; the others are behind ModRM.
fn undefined_as_it_is(bytes: &[u8], bitness: u32) -> bool {
    let is_prefix = |b: &u8| match b {
        0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3 => true,
        0x40..=0x4F => bitness == 64,
        _ => false,
    };
    let opcode = &bytes[bytes.iter().take_while(|b| is_prefix(b)).count()..];
    match opcode {
        [0x06 | 0x07 | 0x0E | 0x16 | 0x17 | 0x1E | 0x1F | 0x27 | 0x2F | 0x37 | 0x3F] => bitness == 64,
        [0x60 | 0x61 | 0xCE | 0xD6] => bitness == 64,
        // A group with one member, which AMD once gave to XOP.
        [0x8F, modrm, ..] => modrm & 0x38 != 0,
        [0x0F, 0x04 | 0x0A | 0x0C | 0x0E | 0x0F | 0x24..=0x27 | 0x36 | 0x37] => true,
        _ => false,
    }
}

fn decoder_options(features: FeatureSet) -> u32 {
    let mut options = DecoderOptions::NO_WBNOINVD;
    if !features.has(Feature::Bmi1) {
        options |= DecoderOptions::NO_MPFX_0FBC;
    }
    if !features.has(Feature::Lzcnt) {
        options |= DecoderOptions::NO_MPFX_0FBD;
    }
    options
}
