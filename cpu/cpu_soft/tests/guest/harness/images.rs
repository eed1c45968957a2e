//! Descriptors, gates and page tables.

use super::layout;
use guest_memory::GuestRam;
use x86_defs::paging::*;
use x86_defs::{Segment, SegmentAttributes};

/// Access bytes (type, S, DPL 0, P) and the flags nibble above them, as `SegmentAttributes` has them.
pub const CODE16: u16 = 0x09B;
pub const DATA16: u16 = 0x093;
pub const CODE32: u16 = 0xC9B;
pub const DATA32: u16 = 0xC93;
pub const CODE64: u16 = 0xA9B;
/// Add to make it DPL 3.
pub const DPL3: u16 = 0x60;
pub const TSS64_BUSY: u16 = 0x08B;

/// A segment descriptor; `limit` is in bytes (scaled down if `attributes` has G).
pub const fn descriptor(base: u64, limit: u32, attributes: u16) -> u64 {
    let limit = if attributes & 0x800 != 0 { limit >> 12 } else { limit } as u64;
    let a = attributes as u64;
    (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | (a & 0xFF) << 40
        | (limit >> 16 & 0xF) << 48
        | (a >> 8 & 0xF) << 52
        | (base >> 24 & 0xFF) << 56
}

/// A segment register with what the descriptor would have loaded.
pub fn segment(selector: u16, base: u64, limit: u32, attributes: u16) -> Segment {
    Segment { selector, attributes: SegmentAttributes(attributes), limit, base, unusable: false }
}

/// A 32-bit or 16-bit gate; `access` holds type, DPL and P.
pub const fn gate(selector: u16, offset: u64, access: u8) -> u64 {
    (offset & 0xFFFF) | (selector as u64) << 16 | (access as u64) << 40 | (offset >> 16 & 0xFFFF) << 48
}

/// A 64-bit gate with an IST number.
pub const fn gate64(selector: u16, offset: u64, access: u8, ist: u8) -> [u64; 2] {
    [gate(selector, offset, access) | (ist as u64) << 32, offset >> 32]
}

/// Builds page tables in guest RAM.
pub struct Tables {
    ram: GuestRam,
    next: u64,
    /// Root of what is being built.
    pub root: u64,
    levels: u32,
    wide: bool,
}

impl Tables {
    /// 4-level paging.
    pub fn long(ram: &GuestRam) -> Self {
        Self::with(ram, 4, true)
    }
    /// PAE paging (the root is the page-directory-pointer table).
    pub fn pae(ram: &GuestRam) -> Self {
        Self::with(ram, 3, true)
    }
    /// 32-bit paging.
    pub fn legacy(ram: &GuestRam) -> Self {
        Self::with(ram, 2, false)
    }

    fn with(ram: &GuestRam, levels: u32, wide: bool) -> Self {
        let mut t = Self { ram: ram.clone(), next: layout::TABLES, root: 0, levels, wide };
        t.root = t.frame();
        t
    }

    /// Another address space that takes its frames behind those of this one.
    pub fn another(&mut self) -> Self {
        let mut t = Self {
            ram: self.ram.clone(),
            next: self.next + (64 << 12),
            root: 0,
            levels: self.levels,
            wide: self.wide,
        };
        t.root = t.frame();
        t
    }

    /// As [`Tables::another`], for PAE paging.
    pub fn another_pae(&mut self) -> Self {
        let mut t = Self { levels: 3, ..self.another() };
        t.root = t.frame();
        t
    }

    /// A zeroed frame.
    pub fn frame(&mut self) -> u64 {
        let at = self.next;
        self.next += 4096;
        assert!(self.next <= layout::RAM_BYTES, "no frames left");
        let offset = self.ram.offset(at, 4096).unwrap();
        self.ram.store_bytes(offset, &[0; 4096]);
        at
    }

    fn bits(&self) -> u32 {
        if self.wide { 9 } else { 10 }
    }
    /// Address bits below `level`'s index (level 1 is the page table).
    fn shift(&self, level: u32) -> u32 {
        12 + self.bits() * (level - 1)
    }
    fn load(&self, at: u64) -> u64 {
        if self.wide { self.ram.load(at) } else { u64::from(self.ram.load::<u32>(at)) }
    }
    fn store(&self, at: u64, entry: u64) {
        if self.wide { self.ram.store(at, entry) } else { self.ram.store(at, entry as u32) }
    }

    /// Address of the entry for `linear` at `level`, with the tables above it made if they are missing
    /// (present, writable, user; in PAE's top level only present).
    pub fn entry(&mut self, linear: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut at = self.levels;
        loop {
            let index = linear >> self.shift(at) & ((1 << self.bits()) - 1);
            let place = table + index * if self.wide { 8 } else { 4 };
            if at == level {
                return place;
            }
            let mut entry = self.load(place);
            if entry & PTE_P == 0 {
                let pae_top = self.levels == 3 && at == 3;
                entry = self.frame() | PTE_P | if pae_top { 0 } else { PTE_W | PTE_U };
                self.store(place, entry);
            }
            table = entry & PTE_ADDR;
            at -= 1;
        }
    }

    /// Maps the page of `level` at `linear` by `entry` (address and bits; PS is added above level 1).
    pub fn map(&mut self, linear: u64, entry: u64, level: u32) -> u64 {
        let place = self.entry(linear, level);
        self.store(place, entry | if level > 1 { PTE_PS } else { 0 });
        place
    }

    /// Maps `bytes` from 0 onto themselves with 4 KiB pages and `bits`.
    pub fn identity(&mut self, bytes: u64, bits: u64) {
        for page in (0..bytes).step_by(4096) {
            self.map(page, page | bits, 1);
        }
    }
}
