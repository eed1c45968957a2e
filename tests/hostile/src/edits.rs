//! Changes to a file that is otherwise sound: what gets past the first check.

use arbitrary::Arbitrary;

/// A number as hostile files have it.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Number {
    /// Small.
    Small(u8),
    /// A power of two, or so many below it.
    NearPower {
        /// Which.
        log: u8,
        /// How far below.
        below: u8,
    },
    /// The negative of a small one.
    Negative(u8),
    /// Anything.
    Any(u64),
}

impl Number {
    /// Its value.
    pub fn value(self) -> u64 {
        match self {
            Self::Small(n) => n.into(),
            Self::NearPower { log, below } => (1u64 << (log & 63)).wrapping_sub((below & 3).into()),
            Self::Negative(n) => u64::from(n).wrapping_neg(),
            Self::Any(n) => n,
        }
    }
}

/// One change. Places count modulo the file's length.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Edit {
    /// Flips a bit.
    Flip {
        /// Where.
        at: u32,
        /// Which.
        bit: u8,
    },
    /// Writes a number of up to eight bytes.
    Put {
        /// Where.
        at: u32,
        /// Log of its width.
        width: u8,
        /// What.
        number: Number,
        /// Most significant byte first.
        big_endian: bool,
    },
    /// Cuts the rest off.
    Cut {
        /// From here.
        at: u32,
    },
    /// Copies bytes over others.
    Copy {
        /// From.
        from: u32,
        /// To.
        to: u32,
        /// How many.
        bytes: u8,
    },
    /// Takes bytes out.
    Remove {
        /// From.
        at: u32,
        /// How many.
        bytes: u8,
    },
    /// Doubles bytes in place.
    Repeat {
        /// From.
        at: u32,
        /// How many.
        bytes: u8,
    },
}

impl Edit {
    /// Changes `file`. Offsets are taken from its first `head` bytes half of the time: that is where headers are.
    pub fn apply(self, file: &mut Vec<u8>, head: usize) {
        if file.is_empty() {
            return;
        }
        let place = |at: u32| {
            let within = if at & 1 == 0 { head.clamp(1, file.len()) } else { file.len() };
            (at >> 1) as usize % within
        };
        match self {
            Self::Flip { at, bit } => {
                let at = place(at);
                file[at] ^= 1 << (bit & 7);
            }
            Self::Put { at, width, number, big_endian } => {
                let (at, width) = (place(at), 1 << (width & 3));
                let (value, end) = (number.value(), (at + width).min(file.len()));
                let bytes =
                    if big_endian { (value << (64 - 8 * width)).to_be_bytes() } else { value.to_le_bytes() };
                file[at..end].copy_from_slice(&bytes[..end - at]);
            }
            Self::Cut { at } => {
                let at = place(at);
                file.truncate(at);
            }
            Self::Copy { from, to, bytes } => {
                let (from, to) = (place(from), place(to));
                let n = usize::from(bytes).min(file.len() - from.max(to));
                file.copy_within(from..from + n, to);
            }
            Self::Remove { at, bytes } => {
                let at = place(at);
                file.drain(at..(at + usize::from(bytes)).min(file.len()));
            }
            Self::Repeat { at, bytes } => {
                let at = place(at);
                let part = file[at..(at + usize::from(bytes)).min(file.len())].to_vec();
                file.splice(at..at, part);
            }
        }
    }
}

/// Applies all of `edits`.
pub fn apply_all(edits: &[Edit], file: &mut Vec<u8>, head: usize) {
    edits.iter().for_each(|edit| edit.apply(file, head));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_do_what_they_say() {
        let edited = |edit: Edit| {
            let mut file = b"0123456789".to_vec();
            edit.apply(&mut file, 4);
            String::from_utf8_lossy(&file).into_owned()
        };
        assert_eq!(edited(Edit::Flip { at: 2, bit: 0 }), "0023456789");
        let put = |big_endian| Edit::Put { at: 2, width: 1, number: Number::Any(0x4142), big_endian };
        assert_eq!((edited(put(true)), edited(put(false))), ("0AB3456789".into(), "0BA3456789".into()));
        assert_eq!(edited(Edit::Cut { at: 11 }), "01234");
        assert_eq!(edited(Edit::Copy { from: 0, to: 17, bytes: 9 }), "0123456701");
        assert_eq!(edited(Edit::Remove { at: 4, bytes: 3 }), "0156789");
        assert_eq!(edited(Edit::Repeat { at: 19, bytes: 3 }), "01234567899");
        assert_eq!(Number::NearPower { log: 32, below: 1 }.value(), 0xFFFF_FFFF);
        assert_eq!(Number::Negative(1).value(), u64::MAX);
    }
}
