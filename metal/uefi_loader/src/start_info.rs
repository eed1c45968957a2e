//! What is handed to the image: Xen's `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h) with one module
//! and a memory map, in one block of bytes.

use alloc::vec::Vec;

const MAGIC: u32 = 0x336E_C578;
const HEADER_BYTES: u64 = 56;
const MODULE_BYTES: u64 = 32;
const RANGE_BYTES: u64 = 24;
const RESERVED: u32 = 2;
/// As many as the image keeps.
pub const MAX_RANGES: usize = 128;
/// The longest command line, with the zero behind it.
pub const MAX_COMMAND_LINE: usize = 128;
/// Bytes that the block takes at most.
pub const MAX_BYTES: usize =
    (HEADER_BYTES + MODULE_BYTES) as usize + MAX_RANGES * RANGE_BYTES as usize + MAX_COMMAND_LINE;

/// A range of memory with its E820 number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// 1: usable, 2: reserved, 3: ACPI tables, 4: ACPI storage.
    pub kind: u32,
}

/// Adds a range, together with the last one if it goes on from there.
pub fn add(ranges: &mut Vec<Range>, range: Range) {
    match ranges.last_mut() {
        Some(last) if last.kind == range.kind && last.start + last.bytes == range.start => {
            last.bytes += range.bytes
        }
        _ => ranges.push(range),
    }
}

/// Writes the block for address `at` into `out` without allocating; its length. `module`: start and length. Where there
/// are more ranges than are kept, reserved ones are left out: what the image does not know it does not use. A command
/// line that is too long is left out.
pub fn write(
    out: &mut [u8; MAX_BYTES],
    at: u64,
    ranges: &[Range],
    module: Option<(u64, u64)>,
    rsdp: u64,
    command_line: &str,
) -> usize {
    let all = ranges.len() <= MAX_RANGES;
    let kept = || ranges.iter().filter(|range| all || range.kind != RESERVED).take(MAX_RANGES);
    let modules_at = at + HEADER_BYTES;
    let map_at = modules_at + MODULE_BYTES;
    let words_at = map_at + kept().count() as u64 * RANGE_BYTES;
    let words =
        Some(command_line.as_bytes()).filter(|words| words.len() < MAX_COMMAND_LINE).unwrap_or_default();
    let (start, bytes) = module.unwrap_or((0, 0));
    let mut length = 0;
    let mut word = |value: u64| {
        out[length..length + 8].copy_from_slice(&value.to_le_bytes());
        length += 8;
    };
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    [pair(MAGIC, 1), pair(0, u32::from(module.is_some())), modules_at, words_at, rsdp, map_at]
        .into_iter()
        .for_each(&mut word);
    word(kept().count() as u64);
    [start, bytes, 0, 0].into_iter().for_each(&mut word);
    for range in kept() {
        [range.start, range.bytes, u64::from(range.kind)].into_iter().for_each(&mut word);
    }
    out[length..length + words.len()].copy_from_slice(words);
    out[length + words.len()] = 0;
    length + words.len() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use metal::boot_info::{BootInfo, Extent, ReadPhysical};

    struct At(u64, Vec<u8>);

    impl ReadPhysical for At {
        fn read(&self, at: u64, to: &mut [u8]) {
            let from = (at - self.0) as usize;
            to.copy_from_slice(&self.1[from..from + to.len()]);
        }
    }

    #[test]
    fn the_image_reads_what_we_write() {
        let mut ranges = Vec::new();
        add(&mut ranges, Range { start: 0, bytes: 0x1000, kind: 1 });
        add(&mut ranges, Range { start: 0x1000, bytes: 0x9_F000, kind: 1 });
        add(&mut ranges, Range { start: 0x10_0000, bytes: 0x1000_0000, kind: 1 });
        add(&mut ranges, Range { start: 0x1010_0000, bytes: 0x1000, kind: 3 });
        let mut block = [0; MAX_BYTES];
        let bytes = write(&mut block, 0x7000, &ranges, Some((0x80_0000, 0x1234)), 0xE_0000, "screen=1");
        assert_eq!(bytes, 56 + 32 + 3 * 24 + 9);
        let block = block[..bytes].to_vec();
        let info = BootInfo::read(&At(0x7000, block), 0x7000).unwrap();
        assert_eq!(info.memory.ranges().len(), 3);
        assert_eq!(info.memory.usable_bytes(), 0x100A_0000);
        assert_eq!(info.modules[0], Some(Extent { start: 0x80_0000, bytes: 0x1234 }));
        assert_eq!((info.rsdp, info.command_line()), (0xE_0000, "screen=1"));
    }

    #[test]
    fn too_many_ranges_lose_the_reserved_ones() {
        let ranges: Vec<Range> =
            (0..300).map(|n| Range { start: n << 20, bytes: 4096, kind: 1 + (n % 3 != 0) as u32 }).collect();
        let mut block = [0; MAX_BYTES];
        let bytes = write(&mut block, 0, &ranges, None, 0, &"x".repeat(MAX_COMMAND_LINE));
        let info = BootInfo::read(&At(0, block[..bytes].to_vec()), 0).unwrap();
        assert_eq!(info.memory.usable_bytes(), 100 * 4096);
        assert_eq!(info.modules[0], None);
    }
}
