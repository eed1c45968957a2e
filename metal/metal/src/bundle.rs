//! The bundle: what to run, in one file that the loader brings into memory beside the image. A cpio archive ("newc")
//! with `bedplate.toml` and the files that it names; `cargo xtask metal bundle` makes one.
//!
//! Called by: [`crate::ground`]. The archive is checked before anything is taken from it: every length is capped by
//! what is there.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};

/// The file that says what to run.
pub const SPEC: &str = "bedplate.toml";
const MAGIC: &[u8] = b"070701";
const HEADER_BYTES: usize = 110;
const END: &str = "TRAILER!!!";
const MAX_FILES: usize = 256;

/// What is wrong with a bundle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// Something else, or damaged.
    #[error("the bundle is no cpio archive at byte {0}")]
    NotCpio(usize),
    /// Cut off.
    #[error("the bundle ends in the middle of {0}")]
    CutOff(String),
    /// More files than anybody needs.
    #[error("the bundle has more than {MAX_FILES} files")]
    TooManyFiles,
    /// Nothing says what to run.
    #[error("the bundle has no {SPEC}")]
    NoSpec,
}

/// See the module's header.
#[derive(Debug)]
pub struct Bundle<'a> {
    files: BTreeMap<&'a str, &'a [u8]>,
}

impl<'a> Bundle<'a> {
    /// Reads an archive.
    pub fn read(archive: &'a [u8]) -> Result<Self, BundleError> {
        let mut files = BTreeMap::new();
        let mut at = 0usize;
        loop {
            let header = archive
                .get(at..)
                .and_then(|rest| rest.get(..HEADER_BYTES))
                .ok_or(BundleError::NotCpio(at))?;
            if !header.starts_with(MAGIC) {
                return Err(BundleError::NotCpio(at));
            }
            let number = |field: usize| {
                hexadecimal(&header[6 + 8 * field..14 + 8 * field]).ok_or(BundleError::NotCpio(at))
            };
            let (bytes, name_bytes) = (number(6)?, number(11)?);
            let name_at = at + HEADER_BYTES;
            let name =
                piece(archive, name_at, name_bytes).ok_or_else(|| BundleError::CutOff("a name".into()))?;
            let name = name.strip_suffix(b"\0").and_then(|name| core::str::from_utf8(name).ok());
            let name = name.ok_or(BundleError::NotCpio(at))?;
            if name == END {
                return Ok(Self { files });
            }
            let data_at = (name_at + name_bytes).next_multiple_of(4);
            let data = piece(archive, data_at, bytes).ok_or_else(|| BundleError::CutOff(name.to_string()))?;
            if files.len() == MAX_FILES {
                return Err(BundleError::TooManyFiles);
            }
            files.insert(name, data);
            at = (data_at + bytes).next_multiple_of(4);
        }
    }

    /// A file of it.
    pub fn file(&self, name: &str) -> Option<&'a [u8]> {
        self.files.get(name).copied()
    }

    /// What to run.
    pub fn spec(&self) -> Result<&'a [u8], BundleError> {
        self.file(SPEC).ok_or(BundleError::NoSpec)
    }
}

fn piece(archive: &[u8], at: usize, bytes: usize) -> Option<&[u8]> {
    archive.get(at..at.checked_add(bytes)?)
}

/// Eight hexadecimal digits.
fn hexadecimal(digits: &[u8]) -> Option<usize> {
    let text =
        core::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u32::from_str_radix(text, 16).ok().map(|number| number as usize)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::format;
    use std::vec::Vec;

    /// An archive of `files`.
    pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, data) in files.iter().chain([&(END, &b""[..])]) {
            let fields = [0, 0o100_644, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
            out.extend_from_slice(MAGIC);
            fields.iter().for_each(|field| out.extend_from_slice(format!("{field:08X}").as_bytes()));
            out.extend_from_slice(name.as_bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(4), 0);
            out.extend_from_slice(data);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    #[test]
    fn files_are_found() {
        let bytes = archive(&[("bedplate.toml", b"x = 1"), ("kernel", &[7; 1001])]);
        let bundle = Bundle::read(&bytes).unwrap();
        assert_eq!(bundle.spec().unwrap(), b"x = 1");
        assert_eq!(bundle.file("kernel").unwrap().len(), 1001);
        assert_eq!(bundle.file("other"), None);
        let empty = archive(&[]);
        assert_eq!(Bundle::read(&empty).unwrap().spec(), Err(BundleError::NoSpec));
    }

    #[test]
    fn damaged_ones_are_refused() {
        let bytes = archive(&[("bedplate.toml", b"x = 1"), ("kernel", &[7; 1001])]);
        // Three bytes of padding are at the end.
        for end in 0..bytes.len() - 3 {
            assert!(Bundle::read(&bytes[..end]).is_err(), "cut at {end}");
        }
        let mut wrong = bytes.clone();
        wrong[6 + 8 * 6..14 + 8 * 6].copy_from_slice(b"FFFFFFFF");
        assert_eq!(Bundle::read(&wrong).unwrap_err(), BundleError::CutOff("bedplate.toml".into()));
        wrong[6 + 8 * 6] = b'+';
        assert_eq!(Bundle::read(&wrong).unwrap_err(), BundleError::NotCpio(0));
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x41;
            // Whatever comes of it, it comes to an end.
            let _ = Bundle::read(&flipped);
        }
    }
}
