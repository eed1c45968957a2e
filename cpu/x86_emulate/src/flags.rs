//! The six arithmetic flags, kept as the last result and its carries.
//!
//! An instruction stores two words; a reader derives the flag it needs. Any combination of flags can
//! be represented, so there is no "which operation was last" to dispatch on:
//! - `result`: the result, sign-extended to 64 bits. ZF = (result == 0).
//! - `aux` bit 63: CF; bit 62: CF xor OF; bit 3: AF; bits 8–15: xor-ed into the low byte of `result` for
//!   PF; bit 0: xor-ed into the sign of `result` for SF.

use x86_defs::flags::{AF, CF, OF, PF, SF, ZF};

const AUX_CF: u64 = 1 << 63;
const AUX_CF_XOR_OF: u64 = 1 << 62;
const AUX_AF: u64 = 1 << 3;

/// See the module's header.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct LazyFlags {
    result: u64,
    aux: u64,
}

impl LazyFlags {
    /// From RFLAGS bits; bits other than the six are ignored.
    #[inline]
    pub fn from_bits(bits: u64) -> Self {
        let result = if bits & ZF != 0 { 0 } else { 1 << 8 };
        let cf = bits & CF;
        let of = (bits & OF) / OF;
        let mut aux = cf << 63 | (cf ^ of) << 62;
        if bits & AF != 0 {
            aux |= AUX_AF;
        }
        if bits & PF == 0 {
            aux |= 1 << 8;
        }
        if bits & SF != 0 {
            aux |= 1;
        }
        Self { result, aux }
    }

    /// The six flags at their RFLAGS positions.
    #[inline]
    pub fn bits(&self) -> u64 {
        (u64::from(self.cf()) * CF)
            | (u64::from(self.pf()) * PF)
            | (u64::from(self.af()) * AF)
            | (u64::from(self.zf()) * ZF)
            | (u64::from(self.sf()) * SF)
            | (u64::from(self.of()) * OF)
    }

    /// After an addition of `bits` wide operands: `carries` is the carry out of each bit.
    #[inline(always)]
    pub fn set_arithmetic(&mut self, result: u64, carries: u64, bits: u32) {
        self.result = result;
        self.aux = ((carries << (64 - bits)) & (AUX_CF | AUX_CF_XOR_OF)) | (carries & AUX_AF);
    }

    /// After INC/DEC: as `set_arithmetic`, CF unchanged.
    #[inline(always)]
    pub fn set_arithmetic_keep_cf(&mut self, result: u64, carries: u64, bits: u32) {
        let cf = self.aux >> 63;
        self.set_arithmetic(result, carries, bits);
        let of = (self.aux ^ (self.aux << 1)) >> 63;
        self.aux = (self.aux & AUX_AF) | cf << 63 | (cf ^ of) << 62;
    }

    /// After a logical operation: CF, OF and AF are clear.
    #[inline(always)]
    pub fn set_logic(&mut self, result: u64) {
        self.result = result;
        self.aux = 0;
    }

    /// SF, ZF and PF from `result` (sign-extended); CF and OF as given, AF clear.
    #[inline(always)]
    pub fn set_result_cf_of(&mut self, result: u64, cf: bool, of: bool) {
        self.result = result;
        self.aux = u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// Replaces CF and OF only.
    #[inline]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.aux = (self.aux & !(AUX_CF | AUX_CF_XOR_OF)) | u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// Replaces CF only.
    #[inline]
    pub fn set_cf(&mut self, cf: bool) {
        self.set_cf_of(cf, self.of());
    }

    /// Replaces the flags in `mask` by those of `bits`.
    #[inline]
    pub fn replace(&mut self, mask: u64, bits: u64) {
        *self = Self::from_bits((self.bits() & !mask) | (bits & mask));
    }

    /// Carry.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.aux >> 63 != 0
    }
    /// Overflow.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.aux ^ (self.aux << 1)) >> 63 != 0
    }
    /// Zero.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.result == 0
    }
    /// Sign.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.result >> 63) ^ (self.aux & 1) != 0
    }
    /// Parity: even number of ones in the low byte.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.result ^ (self.aux >> 8)) as u8).count_ones() & 1 == 0
    }
    /// Carry out of bit 3.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.aux & AUX_AF != 0
    }

    /// Condition `cc` of Jcc/SETcc/CMOVcc (SDM vol. 1, appendix B).
    #[inline(always)]
    pub fn condition<const CC: u8>(&self) -> bool {
        let base = match CC >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        base ^ (CC & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_defs::flags::STATUS;

    #[test]
    fn every_combination_round_trips() {
        for n in 0..64u64 {
            let bits = [CF, PF, AF, ZF, SF, OF]
                .iter()
                .enumerate()
                .filter(|(i, _)| n >> i & 1 != 0)
                .fold(0, |acc, (_, f)| acc | f);
            let mut flags = LazyFlags::from_bits(bits);
            assert_eq!(flags.bits(), bits);
            flags.set_cf(!flags.cf());
            assert_eq!(flags.bits(), bits ^ CF);
            flags.replace(STATUS, bits);
            assert_eq!(flags.bits(), bits);
        }
    }

    #[test]
    fn carries_of_a_byte_addition() {
        let mut flags = LazyFlags::default();
        // 0x7F + 1 = 0x80: overflow, half carry, no carry.
        flags.set_arithmetic(0x80u8 as i8 as u64, 0x7F, 8);
        assert_eq!(flags.bits(), OF | SF | AF);
        // Keeping CF while OF changes.
        flags.set_cf(true);
        flags.set_arithmetic_keep_cf(0, 0xFF, 8);
        assert_eq!(flags.bits(), CF | ZF | PF | AF);
    }
}
