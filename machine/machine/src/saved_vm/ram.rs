//! Guest RAM as records: groups of up to 256 pages, without those that are zero, compressed if asked.
//!
//! Body: number of the group's first page (u64), a bit for each of its 256 pages that is there, then those pages in
//! order, either raw or as one zstd frame (flag [`ZSTD`]). Pages are numbered in the RAM's span, not by guest address.
//!
//! Called by: [`crate::Machine::save`] and `restore`, with all vCPUs and devices stopped.

use super::{CRITICAL, LoadError, Record, StreamError, Writer, zeroes};
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;
use guest_memory::GuestRam;
use ruzstd::decoding::FrameDecoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Pages of a group.
pub const MAX_PAGES: usize = 256;
/// Kind of these records.
pub(crate) const KIND_PAGES: super::Kind = *b"PAGE";
/// Flag: the pages are a zstd frame.
const ZSTD: u16 = 2;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

const BITMAP_BYTES: usize = MAX_PAGES / 8;
const HEAD_BYTES: usize = 8 + BITMAP_BYTES;
const GROUP_BYTES: usize = MAX_PAGES * PAGE_BYTES;

/// Writes pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamSaver {
    /// Compress with zstd.
    pub compress: bool,
}

impl RamSaver {
    /// Writes every page of `ram` that lies in one of `populated` (byte ranges of the span, ascending; the rest is
    /// known to be zero) and is not zero itself. `progress` hears of the bytes that were looked at so far.
    pub fn save(
        self,
        ram: &GuestRam,
        populated: &[Range<u64>],
        w: &mut Writer<'_>,
        mut progress: impl FnMut(u64),
    ) -> Result<(), StreamError> {
        let mut group = zeroes(GROUP_BYTES);
        let mut next = 0;
        let mut looked = 0;
        for range in populated {
            let end = range.end.min(ram.span_bytes());
            let mut first = (range.start / GROUP_BYTES as u64 * GROUP_BYTES as u64).max(next);
            while first < end {
                let bytes = (ram.span_bytes() - first).min(GROUP_BYTES as u64);
                let group = &mut group[..bytes as usize];
                ram.load_bytes(first, group);
                self.save_group(first, group, w)?;
                first += bytes;
                looked += bytes;
                progress(looked);
            }
            next = next.max(first);
        }
        Ok(())
    }

    fn save_group(self, first: u64, group: &[u8], w: &mut Writer<'_>) -> Result<(), StreamError> {
        let mut body = zeroes(HEAD_BYTES);
        body[..8].copy_from_slice(&(first / PAGE_BYTES as u64).to_le_bytes());
        for (page, bytes) in group.chunks_exact(PAGE_BYTES).enumerate() {
            if bytes != ZERO_PAGE {
                body[8 + page / 8] |= 1 << (page % 8);
                body.extend_from_slice(bytes);
            }
        }
        if body.len() == HEAD_BYTES {
            return Ok(());
        }
        let mut flags = CRITICAL;
        if self.compress {
            let packed = compress_to_vec(&body[HEAD_BYTES..], CompressionLevel::Fastest);
            if packed.len() < body.len() - HEAD_BYTES {
                body.truncate(HEAD_BYTES);
                body.extend_from_slice(&packed);
                flags |= ZSTD;
            }
        }
        w.record(KIND_PAGES, flags, &body)
    }
}

/// Writes the pages of `record` into `ram`.
pub fn restore_pages(ram: &GuestRam, record: &Record) -> Result<(), LoadError> {
    let wrong = |what: &str| LoadError::Mismatch(format!("a group of RAM pages {what}"));
    let (head, packed) = record.body.split_at_checked(HEAD_BYTES).ok_or_else(|| wrong("is cut off"))?;
    let (first, bitmap) = head.split_at(8);
    let first = u64::from_le_bytes(first.try_into().unwrap_or_default());
    let count: usize = bitmap.iter().map(|b| b.count_ones() as usize).sum();
    let unpacked;
    let pages = if record.flags & ZSTD == 0 {
        packed
    } else {
        unpacked = unpack(packed, count * PAGE_BYTES).ok_or_else(|| wrong("cannot be decompressed"))?;
        &unpacked[..]
    };
    if pages.len() != count * PAGE_BYTES {
        return Err(wrong("has more or fewer pages than it says"));
    }
    let there = (0..MAX_PAGES).filter(|page| bitmap[page / 8] & 1 << (page % 8) != 0);
    for (page, bytes) in there.zip(pages.chunks_exact(PAGE_BYTES)) {
        let offset = first.checked_add(page as u64).and_then(|p| p.checked_mul(PAGE_BYTES as u64));
        let inside =
            offset.filter(|o| o.checked_add(PAGE_BYTES as u64).is_some_and(|end| end <= ram.span_bytes()));
        ram.store_bytes(inside.ok_or_else(|| wrong("lies outside of RAM"))?, bytes);
    }
    Ok(())
}

fn unpack(packed: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(GROUP_BYTES as u64);
    let mut pages = zeroes(bytes);
    let got = decoder.decode_all(packed, &mut pages).ok()?;
    pages.truncate(got);
    Some(pages)
}
