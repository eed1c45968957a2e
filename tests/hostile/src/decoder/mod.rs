//! Bytes as code, in every mode a processor has.
//!
//! Twice: instruction by instruction on a bare core ([`scratch`]), where each is decoded, lowered and run whatever the
//! one before it did; and as a guest of the `soft` engine ([`soft`]), interpreted and translated, where they run as they branch.

pub(crate) mod modes;
mod scratch;
mod soft;

use arbitrary::Arbitrary;
use modes::Mode;

#[derive(Arbitrary, Debug)]
pub(crate) struct Script<'a> {
    pub mode: Mode,
    /// What of the CPU model is missing.
    pub without: u64,
    /// Disorder of the registers.
    pub seed: u64,
    /// Exceptions are delivered to the guest, or dropped.
    pub deliver: bool,
    pub code: &'a [u8],
}

/// Runs bytes as code.
pub fn run(data: &[u8]) {
    let Some(script) = crate::script::<Script<'_>>(data) else { return };
    scratch::run(&script);
    soft::run(&script);
}

/// xorshift64*: registers out of a seed.
pub(crate) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    /// Small, an address of the code's surroundings, near a power of two, or anything.
    pub fn value(&mut self) -> u64 {
        match self.next() >> 62 {
            0 => self.next() & 0xFF,
            1 => self.next() & 0x1_FFFF,
            2 => 1u64.rotate_left((self.next() & 63) as u32).wrapping_sub(self.next() & 1),
            _ => self.next(),
        }
    }
}
