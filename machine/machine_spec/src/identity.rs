//! Numbers that name things: UUIDs and network addresses, with their usual text forms.
//!
//! Called by `vmm` (parsing) and `firmware` (SMBIOS). RFC 4122 section 3; IEEE 802.

use core::fmt;
use core::str::FromStr;

/// Text that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdentityError {
    /// Not a UUID.
    #[error("not a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8")]
    Uuid,
    /// Not an Ethernet address.
    #[error("not an Ethernet address such as 52:54:00:12:34:56")]
    Mac,
}

/// A universally unique identifier, bytes in the order of its text.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl FromStr for Uuid {
    type Err = ParseIdentityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut uuid = [0; 16];
        let mut parts = text.split('-');
        for range in [0..4, 4..6, 6..8, 8..10, 10..16] {
            let part = parts.next().ok_or(ParseIdentityError::Uuid)?;
            hex_bytes(part, &mut uuid[range]).ok_or(ParseIdentityError::Uuid)?;
        }
        if parts.next().is_some() {
            return Err(ParseIdentityError::Uuid);
        }
        Ok(Self(uuid))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Names one station, and is not zero.
    pub fn is_station(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for Mac {
    type Err = ParseIdentityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in mac.chunks_exact_mut(1) {
            let part = parts.next().ok_or(ParseIdentityError::Mac)?;
            hex_bytes(part, byte).ok_or(ParseIdentityError::Mac)?;
        }
        if parts.next().is_some() {
            return Err(ParseIdentityError::Mac);
        }
        Ok(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let colon = if index > 0 { ":" } else { "" };
            write!(f, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Exactly two hex digits for every byte of `to`.
fn hex_bytes(text: &str, to: &mut [u8]) -> Option<()> {
    if text.len() != to.len() * 2 {
        return None;
    }
    for (pair, byte) in text.as_bytes().chunks_exact(2).zip(to) {
        let digit = |at: usize| (pair[at] as char).to_digit(16);
        *byte = (digit(0)? << 4 | digit(1)?) as u8;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn text_forms_go_back_and_forth() {
        let text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        let uuid: Uuid = text.parse().expect("uuid");
        assert_eq!((uuid.to_string().as_str(), uuid.0[0], uuid.0[15]), (text, 0x6B, 0xC8));
        let mac: Mac = "52:54:00:12:34:AB".parse().expect("mac");
        assert_eq!(mac.to_string(), "52:54:00:12:34:ab");
        assert!(mac.is_station());
        assert!(!Mac([1, 0, 0, 0, 0, 0]).is_station() && !Mac::default().is_station());
    }

    #[test]
    fn other_text_is_refused() {
        for text in
            ["", "6ba7b810", "6ba7b8109dad11d180b400c04fd430c8", "6ba7b810-9dad-11d1-80b4-00c04fd430c8-00"]
        {
            assert_eq!(text.parse::<Uuid>(), Err(ParseIdentityError::Uuid), "{text}");
        }
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "é:54:00:12:34:5",
            "+1:00:00:00:00:00",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(ParseIdentityError::Mac), "{text}");
        }
    }
}
