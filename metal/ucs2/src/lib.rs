//! Text as UCS-2 (UEFI 2.10, 2.3.1): one unit of 16 bits a character, as far as the `uefi` crate needs it. It stands in the
//! place of the crate of this name, whose licence does not fit ours (docs/adr/0002-dependencies.md).
#![no_std]
#![forbid(unsafe_code)]

/// Why text cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The receiver has no more room.
    BufferOverflow,
    /// A character beyond U+FFFF: UCS-2 has no pairs.
    MultiByte,
}

/// Gives `output` the units of `input`, one by one, until it refuses.
pub fn encode_with(input: &str, mut output: impl FnMut(u16) -> Result<(), Error>) -> Result<(), Error> {
    input.chars().try_for_each(|c| output(u16::try_from(u32::from(c)).map_err(|_| Error::MultiByte)?))
}

/// The code point that starts at byte `at`, and its length in UTF-8.
const fn next(text: &[u8], at: usize) -> (u32, usize) {
    let first = text[at] as u32;
    let (mut value, length) = match first {
        0..=0x7F => (first, 1),
        0x80..=0xDF => (first & 0x1F, 2),
        0xE0..=0xEF => (first & 0xF, 3),
        _ => (first & 7, 4),
    };
    let mut n = 1;
    while n < length {
        value = value << 6 | text[at + n] as u32 & 0x3F;
        n += 1;
    }
    (value, length)
}

/// Characters of `text`; for [`ucs2_cstr`].
pub const fn count(text: &str) -> usize {
    let (text, mut at, mut count) = (text.as_bytes(), 0, 0);
    while at < text.len() {
        at += next(text, at).1;
        count += 1;
    }
    count
}

/// The units of `text`, and zeroes up to `N`; for [`ucs2_cstr`], so that what cannot be written does not compile.
pub const fn units<const N: usize>(text: &str) -> [u16; N] {
    let (text, mut at, mut count, mut units) = (text.as_bytes(), 0, 0, [0; N]);
    while at < text.len() {
        let (value, length) = next(text, at);
        assert!(value != 0 && value <= 0xFFFF, "no UCS-2, or a zero inside");
        units[count] = value as u16;
        at += length;
        count += 1;
    }
    units
}

/// An array of a literal's units and a zero.
#[macro_export]
macro_rules! ucs2_cstr {
    ($text:expr) => {{
        const TEXT: &str = $text;
        const UNITS: [u16; $crate::count(TEXT) + 1] = $crate::units(TEXT);
        UNITS
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_end_with_a_zero() {
        assert_eq!(ucs2_cstr!("aä€"), [0x61, 0xE4, 0x20AC, 0]);
        assert_eq!(ucs2_cstr!(""), [0]);
    }

    #[test]
    fn text_is_given_unit_by_unit() {
        let (mut units, mut count) = ([0; 3], 0);
        let mut push = |unit| {
            *units.get_mut(count).ok_or(Error::BufferOverflow)? = unit;
            count += 1;
            Ok(())
        };
        assert_eq!(encode_with("aä", &mut push), Ok(()));
        assert_eq!(encode_with("\u{10000}", &mut push), Err(Error::MultiByte));
        assert_eq!(encode_with("bc", &mut push), Err(Error::BufferOverflow));
        assert_eq!(units, [0x61, 0xE4, 0x62]);
    }
}
