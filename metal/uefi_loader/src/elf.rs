//! The image: a 64-bit ELF executable with segments at fixed physical addresses (ELF-64 object file format, 1998).

use alloc::vec::Vec;
use core::ops::Range;

/// A part of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its bytes in the file.
    pub file: Range<usize>,
    /// Where they go.
    pub physical: u64,
    /// Length in memory; what the file does not have is zero.
    pub memory_bytes: u64,
}

/// What is to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The parts.
    pub segments: Vec<Segment>,
    /// The 64-bit entry.
    pub entry: u64,
}

/// It is no such file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the image is no 64-bit ELF executable: {0}")]
pub struct NotAnImage(&'static str);

const MAX_SEGMENTS: usize = 16;
const LOAD: u32 = 1;

fn number<const N: usize>(file: &[u8], at: usize) -> Result<u64, NotAnImage> {
    let bytes = file.get(at..at.saturating_add(N)).ok_or(NotAnImage("it is cut off"))?;
    Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

impl Image {
    /// Reads the headers.
    pub fn read(file: &[u8]) -> Result<Self, NotAnImage> {
        if !file.starts_with(b"\x7FELF\x02\x01\x01") {
            return Err(NotAnImage("its first bytes are others"));
        }
        let (entry, headers) = (number::<8>(file, 24)?, number::<8>(file, 32)? as usize);
        let (size, count) = (number::<2>(file, 54)? as usize, number::<2>(file, 56)? as usize);
        if count > MAX_SEGMENTS || size < 56 {
            return Err(NotAnImage("its program headers are odd"));
        }
        let mut segments = Vec::new();
        for n in 0..count {
            let at = headers.checked_add(n * size).ok_or(NotAnImage("its program headers are odd"))?;
            let (offset, file_bytes) =
                (number::<8>(file, at + 8)? as usize, number::<8>(file, at + 32)? as usize);
            let (physical, memory_bytes) = (number::<8>(file, at + 24)?, number::<8>(file, at + 40)?);
            if number::<4>(file, at)? as u32 != LOAD || memory_bytes == 0 {
                continue;
            }
            let end = offset.checked_add(file_bytes).filter(|end| *end <= file.len());
            let end = end.ok_or(NotAnImage("a segment is cut off"))?;
            if file_bytes as u64 > memory_bytes || physical.checked_add(memory_bytes).is_none() {
                return Err(NotAnImage("a segment is larger than its memory"));
            }
            segments.push(Segment { file: offset..end, physical, memory_bytes });
        }
        Ok(Self { segments, entry })
    }

    /// From the first to the last byte that it takes in memory.
    pub fn extent(&self) -> Range<u64> {
        let start = self.segments.iter().map(|s| s.physical).min().unwrap_or(0);
        let end = self.segments.iter().map(|s| s.physical + s.memory_bytes).max().unwrap_or(0);
        start..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Vec<u8> {
        let mut file = alloc::vec![0; 0x200];
        file[..7].copy_from_slice(b"\x7FELF\x02\x01\x01");
        file[24..32].copy_from_slice(&0x10_0040u64.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&2u16.to_le_bytes());
        for (n, (offset, physical, file_bytes, memory_bytes)) in
            [(0x100u64, 0x10_0000u64, 0x80u64, 0x80u64), (0x180, 0x10_1000, 0x10, 0x3000)].iter().enumerate()
        {
            let at = 64 + 56 * n;
            file[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
            for (place, value) in [(8, offset), (24, physical), (32, file_bytes), (40, memory_bytes)] {
                file[at + place..at + place + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        file
    }

    #[test]
    fn segments_are_found() {
        let image = Image::read(&example()).unwrap();
        assert_eq!(image.entry, 0x10_0040);
        assert_eq!(image.extent(), 0x10_0000..0x10_4000);
        assert_eq!(
            image.segments[1],
            Segment { file: 0x180..0x190, physical: 0x10_1000, memory_bytes: 0x3000 }
        );
    }

    #[test]
    fn others_are_refused() {
        let whole = example();
        for end in 0..0x190 {
            assert!(Image::read(&whole[..end]).is_err(), "cut at {end:#x}");
        }
        let mut longer_in_file = whole.clone();
        longer_in_file[64 + 40] = 0x7F;
        assert!(Image::read(&longer_in_file).is_err());
        let mut wraps = whole;
        wraps[64 + 24..64 + 32].fill(0xFF);
        assert!(Image::read(&wraps).is_err());
    }
}
