//! Where boot segments go: claims that must be RAM and must not meet.

use super::error::{DirectBootError, FileRole};
use crate::Segment;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use guest_memory::Gpa;
use machine_spec::layout::{E820Entry, E820Kind, HIGH_RAM_START, Span};

const PAGE: u64 = 0x1000;

/// The guest's RAM while it is being given out.
pub(super) struct Placement<'a> {
    ram: Vec<Span>,
    claims: Vec<(Span, FileRole)>,
    segments: Vec<Segment<'a>>,
}

impl<'a> Placement<'a> {
    pub fn new(memory: &[E820Entry]) -> Self {
        let ram = memory.iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.span).collect();
        Self { ram, claims: Vec::new(), segments: Vec::new() }
    }

    /// Takes `size` bytes at `start` for `role`; a claim of nothing always succeeds.
    pub fn claim(&mut self, role: FileRole, start: u64, size: u64) -> Result<(), DirectBootError> {
        let outside = DirectBootError::OutsideRam { role, start, end: start.saturating_add(size) };
        let Some(end) = start.checked_add(size) else { return Err(outside) };
        if size == 0 {
            return Ok(());
        }
        let span = Span::new(start, size);
        if !self.ram.iter().any(|ram| ram.contains(&span)) {
            return Err(outside);
        }
        if let Some((_, other)) = self.claims.iter().find(|(taken, _)| taken.overlaps(&span)) {
            return Err(DirectBootError::Overlap { role, other: *other, start, end });
        }
        self.claims.push((span, role));
        Ok(())
    }

    /// Puts bytes, and zeros after them, into memory that was claimed.
    pub fn fill(&mut self, gpa: u64, bytes: Cow<'a, [u8]>, zeros_after: u64) {
        if !bytes.is_empty() || zeros_after > 0 {
            self.segments.push(Segment { gpa: Gpa(gpa), bytes, zeros_after });
        }
    }

    /// Claims just what the bytes need, and puts them there.
    pub fn add(
        &mut self,
        role: FileRole,
        gpa: u64,
        bytes: Cow<'a, [u8]>,
        zeros_after: u64,
    ) -> Result<(), DirectBootError> {
        self.claim(role, gpa, (bytes.len() as u64).saturating_add(zeros_after))?;
        self.fill(gpa, bytes, zeros_after);
        Ok(())
    }

    /// Whether `size` bytes at `start` are free RAM.
    pub fn is_free(&self, start: u64, size: u64) -> bool {
        let span = Span::new(start, size);
        start.checked_add(size).is_some()
            && self.ram.iter().any(|ram| ram.contains(&span))
            && !self.claims.iter().any(|(taken, _)| taken.overlaps(&span))
    }

    /// Puts the initial RAM disk on page boundaries, as high as possible below `limit` and 4 GiB.
    pub fn add_initrd(&mut self, bytes: &'a [u8], limit: u64) -> Result<Span, DirectBootError> {
        let limit = limit.min(HIGH_RAM_START);
        let size = bytes.len() as u64;
        if size == 0 {
            let (role, field) = (FileRole::Initrd, "its first byte");
            return Err(DirectBootError::Cut { role, field, needed: 1, have: 0 });
        }
        let none = DirectBootError::NoRoomForInitrd { bytes: size, limit };
        let taken = size.checked_next_multiple_of(PAGE).ok_or(none.clone())?;
        // The highest candidate ends at the limit, at the end of RAM, or just below a claim.
        let ram_ends = self.ram.iter().map(Span::end);
        let claim_starts = self.claims.iter().map(|(span, _)| span.start.0);
        let start = ram_ends
            .chain(claim_starts)
            .chain([limit])
            .filter_map(|end| end.min(limit).checked_sub(taken))
            .map(|start| start & !(PAGE - 1))
            .filter(|start| self.is_free(*start, taken))
            .max()
            .ok_or(none)?;
        self.claim(FileRole::Initrd, start, taken)?;
        self.fill(start, Cow::Borrowed(bytes), 0);
        Ok(Span::new(start, size))
    }

    pub fn into_segments(self) -> Vec<Segment<'a>> {
        self.segments
    }
}
