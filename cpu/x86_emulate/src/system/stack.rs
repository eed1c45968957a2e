//! A stack that is being pushed to or popped from before anything is committed: the current one, or the one
//! that a gate or a return switches to.

use super::is_canonical;
use crate::core::{Core, Fault};
use crate::cpu::reg::RSP;
use x86_defs::{Exception, Segment, SegmentIndex};

/// See the module's header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    segment: Segment,
    /// Stack pointer; grows down as words are pushed.
    pub sp: u64,
    /// 64-bit stack: no segmentation.
    long: bool,
    /// Accesses are the supervisor's whatever the current CPL.
    system: bool,
    /// Error code of #SS.
    error_code: u32,
}

impl Stack {
    /// The stack in use, with the current privilege.
    pub fn current<C: Core>(c: &C, error_code: u32) -> Self {
        let cpu = c.cpu();
        Self {
            segment: *cpu.segment(SegmentIndex::Ss),
            sp: cpu.gpr[RSP],
            long: cpu.mode.is_long(),
            system: false,
            error_code,
        }
    }

    /// The stack of an inner privilege level, outside IA-32e mode.
    pub fn inner(segment: Segment, sp: u64, error_code: u32) -> Self {
        Self { segment, sp, long: false, system: true, error_code }
    }

    /// A stack of 64-bit mode, of an inner privilege level if `system`.
    pub fn flat64(sp: u64, system: bool, error_code: u32) -> Self {
        Self { segment: Segment::default(), sp, long: true, system, error_code }
    }

    /// Offset in the segment of `sp` plus `delta`.
    fn offset(&self, delta: u64) -> u64 {
        let sp = self.sp.wrapping_add(delta);
        match (self.long, self.segment.attributes.big()) {
            (true, _) => sp,
            (false, true) => sp & 0xFFFF_FFFF,
            (false, false) => sp & 0xFFFF,
        }
    }

    /// Moves the stack pointer.
    pub fn advance(&mut self, delta: u64) {
        let sp = self.offset(delta);
        self.sp = if self.long || self.segment.attributes.big() { sp } else { self.sp & !0xFFFF | sp };
    }

    fn linear<C: Core>(&self, c: &mut C, offset: u64, bytes: u64) -> Result<u64, Fault> {
        if self.long {
            if is_canonical(offset) && is_canonical(offset.wrapping_add(bytes - 1)) {
                return Ok(offset);
            }
        } else if in_limit(&self.segment, offset, bytes) {
            return Ok(self.segment.base.wrapping_add(offset) & 0xFFFF_FFFF);
        }
        Err(c.raise(Exception::StackFault, self.error_code))
    }

    /// Pushes the low `bytes` (2, 4 or 8) of `value`.
    pub fn push<C: Core>(&mut self, c: &mut C, value: u64, bytes: u8) -> Result<(), Fault> {
        let delta = 0u64.wrapping_sub(u64::from(bytes));
        let at = self.linear(c, self.offset(delta), u64::from(bytes))?;
        match (bytes, self.system) {
            (2, false) => c.store(at, value as u16)?,
            (4, false) => c.store(at, value as u32)?,
            (_, false) => c.store(at, value)?,
            (2, true) => c.store_system(at, value as u16)?,
            (4, true) => c.store_system(at, value as u32)?,
            (_, true) => c.store_system(at, value)?,
        }
        self.advance(delta);
        Ok(())
    }

    /// Pushes a selector: the pointer moves by `bytes`, only 16 bits are written.
    pub fn push_low_16<C: Core>(&mut self, c: &mut C, value: u16, bytes: u8) -> Result<(), Fault> {
        let delta = 0u64.wrapping_sub(u64::from(bytes));
        let at = self.linear(c, self.offset(delta), 2)?;
        c.store(at, value)?;
        self.advance(delta);
        Ok(())
    }

    /// Pops a selector: the pointer moves by `bytes`, only 16 bits are read.
    pub fn pop_low_16<C: Core>(&mut self, c: &mut C, bytes: u8) -> Result<u16, Fault> {
        let at = self.linear(c, self.offset(0), 2)?;
        let value = c.load::<u16>(at)?;
        self.advance(u64::from(bytes));
        Ok(value)
    }

    /// Pops `bytes` (2, 4 or 8).
    pub fn pop<C: Core>(&mut self, c: &mut C, bytes: u8) -> Result<u64, Fault> {
        let at = self.linear(c, self.offset(0), u64::from(bytes))?;
        let value = match bytes {
            2 => u64::from(c.load::<u16>(at)?),
            4 => u64::from(c.load::<u32>(at)?),
            _ => c.load::<u64>(at)?,
        };
        self.advance(u64::from(bytes));
        Ok(value)
    }
}

/// Whether `bytes` at `offset` are within `segment`'s limit (SDM vol. 3, 5.3).
pub(crate) fn in_limit(segment: &Segment, offset: u64, bytes: u64) -> bool {
    let a = segment.attributes;
    let last = offset.wrapping_add(bytes - 1);
    if a.is_code_or_data() && !a.is_code() && a.conforming_or_expand_down() {
        let top = if a.big() { 0xFFFF_FFFF } else { 0xFFFF };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}
