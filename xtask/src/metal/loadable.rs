//! What of an image is loaded, without the sections behind it: debug information is most of the file, and firmware reads
//! all of it.

use anyhow::{Context, Result, bail};

/// ELF-64's header and its program headers (System V ABI, chapter 4 and 5).
const PROGRAM_HEADERS: usize = 0x20;
const SECTION_HEADERS: usize = 0x28;
const PROGRAM_HEADER_BYTES: usize = 0x36;
const PROGRAM_HEADER_COUNT: usize = 0x38;
const SECTION_HEADER_COUNT: usize = 0x3C;
const HEADER_BYTES: usize = 0x40;
const FILE_OFFSET: usize = 0x08;
const FILE_BYTES: usize = 0x20;

/// The file up to the end of its last segment, with no sections.
pub fn loadable(elf: &[u8]) -> Result<Vec<u8>> {
    if !elf.starts_with(b"\x7FELF\x02\x01") || elf.len() < HEADER_BYTES {
        bail!("the image is no 64-bit ELF file");
    }
    let number = |at: usize, bytes: usize| {
        let raw = elf.get(at..at.saturating_add(bytes)).context("the image's headers are cut off")?;
        anyhow::Ok(raw.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    let (headers, each) = (number(PROGRAM_HEADERS, 8)?, number(PROGRAM_HEADER_BYTES, 2)?);
    let count = number(PROGRAM_HEADER_COUNT, 2)?;
    let mut end = headers + each * count;
    for n in 0..count {
        let header = headers + n * each;
        end = end.max(number(header + FILE_OFFSET, 8)? + number(header + FILE_BYTES, 8)?);
    }
    let mut kept = elf.get(..end).context("the image's segments are cut off")?.to_vec();
    kept[SECTION_HEADERS..SECTION_HEADERS + 8].fill(0);
    // How many there are, and which has their names.
    kept[SECTION_HEADER_COUNT..HEADER_BYTES].fill(0);
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_go_and_segments_stay() {
        let mut elf = vec![0; 200];
        elf[..6].copy_from_slice(b"\x7FELF\x02\x01");
        (elf[PROGRAM_HEADERS], elf[SECTION_HEADERS], elf[PROGRAM_HEADER_BYTES]) = (64, 180, 56);
        (elf[PROGRAM_HEADER_COUNT], elf[SECTION_HEADER_COUNT]) = (1, 1);
        (elf[64 + FILE_OFFSET], elf[64 + FILE_BYTES], elf[159]) = (150, 10, 7);
        let kept = loadable(&elf).unwrap();
        assert_eq!(
            (kept.len(), kept[159], kept[SECTION_HEADERS], kept[SECTION_HEADER_COUNT]),
            (160, 7, 0, 0)
        );
        elf[64 + FILE_BYTES] = 51;
        assert!(loadable(&elf).is_err() && loadable(b"\x7FELF").is_err());
    }
}
