//! The page walk (SDM vol. 3, chapter 4): 32-bit, PAE and 4-level paging, with permissions and A/D bits.
//!
//! Called when the TLB misses. Accessed and dirty bits are set by atomic exchanges after the permission
//! check, the dirty bit before the write that needs it.

use crate::core::{ALIGNED_USER, SoftCore};
use crate::tlb::Mapping;
use x86_defs::control::*;
use x86_defs::exception::*;
use x86_defs::paging::*;
use x86_defs::{Exception, cpuid};
use x86_emulate::system::debug;
use x86_emulate::{Core, Fault, ModeKey};

/// Widest physical address of every CPU model of ours.
pub const PHYSICAL_BITS: u32 = 46;
const PHYSICAL_MASK: u64 = (1 << PHYSICAL_BITS) - 1;

/// Whether the lower 48 bits of a linear address say all.
#[inline(always)]
pub fn is_canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}

/// Why memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write, or read and write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Offset in the RAM span.
    Ram(u64),
    /// Guest-physical address outside RAM.
    Mmio(u64),
}

/// A finished walk.
struct Leaf {
    gpa: u64,
    user: bool,
    writable: bool,
    no_execute: bool,
    global: bool,
    dirty: bool,
    page_bytes: u64,
}

/// An entry on the way, for its accessed bit.
#[derive(Clone, Copy, Default)]
struct Visited {
    gpa: u64,
    entry: u64,
    wide: bool,
}

enum Failure {
    NotPresent,
    Reserved,
    /// An entry changed while it was looked at: walk again.
    Raced,
}

impl SoftCore {
    /// Translates `linear` for an access of kind `index` (see [`crate::tlb`]) and enters it into the TLB.
    /// The access must not cross a page.
    #[cold]
    #[inline(never)]
    pub(crate) fn translate(&mut self, index: u8, linear: u64, access: Access) -> Result<Target, Fault> {
        let index = if index == ALIGNED_USER { 0 } else { index };
        if self.cpu.mode.is_long() && !is_canonical(linear) {
            let fault = self.raise(Exception::GeneralProtection, 0);
            if access != Access::Fetch {
                // It may have to be #SS: see `stack_fault.rs`.
                self.cpu.exc.address = linear;
            }
            return Err(fault);
        }
        if let Some(m) = self.refilled(index, linear) {
            let allowed = match access {
                Access::Read => m.read,
                Access::Write => m.write,
                Access::Fetch => m.exec,
            };
            if allowed {
                return Ok(Target::Ram(m.host + (linear & 0xFFF)));
            }
        }
        let leaf = self.find_leaf(index, linear, access)?;
        let page = leaf.gpa & !0xFFF;
        let Some(host) = self.shared.ram.offset(page, 4096) else {
            return Ok(Target::Mmio(leaf.gpa));
        };
        let user = index == 0;
        let smap = index == 1 && leaf.user && self.cpu.cr4 & CR4_SMAP != 0;
        let smep = !user && leaf.user && self.cpu.cr4 & CR4_SMEP != 0;
        let allowed = if user { leaf.user } else { !smap };
        let writable = leaf.writable || (!user && self.cpu.cr0 & CR0_WP == 0);
        // Watched pages never enter the TLB for data: their accesses all come by `note_access`.
        let watched =
            self.cpu.mode.has(ModeKey::BREAKPOINTS) && debug::watches_page(&self.cpu, linear & !0xFFF);
        let mapping = Mapping {
            linear,
            host,
            read: allowed && !watched,
            write: allowed && !watched && writable && leaf.dirty,
            exec: (!user || leaf.user) && !smep && !leaf.no_execute,
            global: leaf.global && self.cpu.cr4 & CR4_PGE != 0,
            page_bytes: leaf.page_bytes,
        };
        if !watched {
            self.tlb.walked.keep(self.pcid(), index, &mapping);
        }
        self.enter(index, &mapping);
        Ok(Target::Ram(host + (leaf.gpa & 0xFFF)))
    }

    /// What an earlier walk found of `linear`, entered into the first level again. (A page that may hold code now is
    /// not for writing there, but `write` tells whether it could be.)
    fn refilled(&mut self, index: u8, linear: u64) -> Option<Mapping> {
        if self.cpu.mode.has(ModeKey::BREAKPOINTS) {
            return None;
        }
        let mapping = Mapping { linear, ..self.tlb.walked.find(self.pcid(), index, linear)? };
        self.enter(index, &mapping);
        Some(mapping)
    }

    /// Enters a mapping into the first level. Not for writing if the page is tracked, for its code or by a log of writes:
    /// the first write is to be seen.
    fn enter(&mut self, index: u8, mapping: &Mapping) {
        let tracked = self.shared.ram.tracks(mapping.host >> 12) != 0;
        if mapping.write {
            self.keep_page(mapping.host >> 12);
        }
        self.tlb.insert(index, &Mapping { write: mapping.write && !tracked, ..*mapping });
    }

    /// Enters what an earlier walk found of `linear` into the TLB for accesses of the current kind.
    pub(crate) fn refill(&mut self, linear: u64) {
        let index = self.cpu.mmu_index;
        if index != ALIGNED_USER {
            self.refilled(index, linear);
        }
    }

    fn find_leaf(&mut self, index: u8, linear: u64, access: Access) -> Result<Leaf, Fault> {
        if self.cpu.cr0 & CR0_PG == 0 {
            let page_bytes = 4096;
            return Ok(Leaf {
                gpa: linear & 0xFFFF_FFFF,
                user: true,
                writable: true,
                no_execute: false,
                global: false,
                dirty: true,
                page_bytes,
            });
        }
        loop {
            let mut visited = [Visited::default(); 4];
            let mut count = 0;
            let found = self.walk(linear, &mut visited, &mut count);
            let code = match found {
                Ok(mut leaf) => match self.denied(index, &leaf, access) {
                    Some(code) => code,
                    None => {
                        if self.set_accessed(&visited[..count], &mut leaf, access).is_err() {
                            continue;
                        }
                        return Ok(leaf);
                    }
                },
                Err(Failure::NotPresent) => self.fault_bits(index, access),
                Err(Failure::Reserved) => self.fault_bits(index, access) | PF_PRESENT | PF_RESERVED,
                Err(Failure::Raced) => continue,
            };
            return Err(self.page_fault(linear, code));
        }
    }

    /// Error code bits that depend on the access alone.
    fn fault_bits(&self, index: u8, access: Access) -> u32 {
        let nxe = self.cpu.efer & EFER_NXE != 0 && self.cpu.cr4 & CR4_PAE != 0;
        let fetch_shown = nxe || self.cpu.cr4 & CR4_SMEP != 0;
        (if access == Access::Write { PF_WRITE } else { 0 })
            | (if index == 0 { PF_USER } else { 0 })
            | (if access == Access::Fetch && fetch_shown { PF_FETCH } else { 0 })
    }

    /// The error code if the access is not allowed.
    fn denied(&self, index: u8, leaf: &Leaf, access: Access) -> Option<u32> {
        let user = index == 0;
        let ok = match access {
            Access::Fetch => {
                let smep = !user && leaf.user && self.cpu.cr4 & CR4_SMEP != 0;
                !leaf.no_execute && !smep && (!user || leaf.user)
            }
            Access::Read | Access::Write => {
                let smap = index == 1 && leaf.user && self.cpu.cr4 & CR4_SMAP != 0;
                let reach = if user { leaf.user } else { !smap };
                let write_ok = leaf.writable || (!user && self.cpu.cr0 & CR0_WP == 0);
                reach && (access == Access::Read || write_ok)
            }
        };
        (!ok).then(|| self.fault_bits(index, access) | PF_PRESENT)
    }

    fn walk(&mut self, linear: u64, visited: &mut [Visited; 4], count: &mut usize) -> Result<Leaf, Failure> {
        if self.cpu.cr4 & CR4_PAE == 0 {
            return self.walk_32(linear, visited, count);
        }
        let long = self.cpu.efer & EFER_LMA != 0;
        let (mut table, mut level) = if long {
            (self.cpu.cr3 & PTE_ADDR & PHYSICAL_MASK, 4)
        } else {
            let pdpte = self.cpu.pdpte[(linear >> 30 & 3) as usize];
            if pdpte & PTE_P == 0 {
                return Err(Failure::NotPresent);
            }
            (pdpte & PTE_ADDR & PHYSICAL_MASK, 2)
        };
        let nxe = self.cpu.efer & EFER_NXE != 0;
        let (mut user, mut writable, mut no_execute) = (true, true, false);
        loop {
            let shift = 12 + 9 * (level - 1);
            let at = table + (linear >> shift & 511) * 8;
            let entry = self.load_physical(at);
            if entry & PTE_P == 0 {
                return Err(Failure::NotPresent);
            }
            let large = level > 1 && entry & PTE_PS != 0;
            let mut reserved = PTE_ADDR & !PHYSICAL_MASK;
            if !nxe {
                reserved |= PTE_NX;
            }
            if large {
                let gigabyte = self.shared.model.features.has(cpuid::Feature::Pdpe1gb);
                reserved |= match level {
                    2 => 0x1F_E000,
                    3 if gigabyte => 0x3FFF_E000,
                    _ => PTE_PS,
                };
            }
            if !long {
                reserved |= 0x7FF0_0000_0000_0000 & !PTE_ADDR;
            }
            if entry & reserved != 0 {
                return Err(Failure::Reserved);
            }
            user &= entry & PTE_U != 0;
            writable &= entry & PTE_W != 0;
            no_execute |= entry & PTE_NX != 0;
            visited[*count] = Visited { gpa: at, entry, wide: true };
            *count += 1;
            if level == 1 || large {
                let page_bytes = 1u64 << shift;
                let base = entry & PTE_ADDR & PHYSICAL_MASK & !(page_bytes - 1);
                return Ok(Leaf {
                    gpa: base | (linear & (page_bytes - 1)),
                    user,
                    writable,
                    no_execute,
                    global: entry & PTE_G != 0,
                    dirty: entry & PTE_D != 0,
                    page_bytes,
                });
            }
            table = entry & PTE_ADDR & PHYSICAL_MASK;
            level -= 1;
        }
    }

    /// Two levels of 4-byte entries, 4 MiB pages with PSE (40-bit addresses by PSE-36).
    fn walk_32(
        &mut self,
        linear: u64,
        visited: &mut [Visited; 4],
        count: &mut usize,
    ) -> Result<Leaf, Failure> {
        let directory = (self.cpu.cr3 & 0xFFFF_F000) + (linear >> 22 & 1023) * 4;
        let pde = self.load_physical_32(directory);
        if pde & PTE_P == 0 {
            return Err(Failure::NotPresent);
        }
        visited[0] = Visited { gpa: directory, entry: pde, wide: false };
        *count = 1;
        let leaf = |entry: u64, gpa: u64, page_bytes: u64| Leaf {
            gpa,
            user: pde & entry & PTE_U != 0,
            writable: pde & entry & PTE_W != 0,
            no_execute: false,
            global: entry & PTE_G != 0,
            dirty: entry & PTE_D != 0,
            page_bytes,
        };
        if pde & PTE_PS != 0 && self.cpu.cr4 & CR4_PSE != 0 {
            if pde & 1 << 21 != 0 {
                return Err(Failure::Reserved);
            }
            let base = (pde & 0xFFC0_0000) | (pde >> 13 & 0xFF) << 32;
            return Ok(leaf(pde, base | (linear & 0x3F_FFFF), 1 << 22));
        }
        let at = (pde & 0xFFFF_F000) + (linear >> 12 & 1023) * 4;
        let pte = self.load_physical_32(at);
        if pte & PTE_P == 0 {
            return Err(Failure::NotPresent);
        }
        visited[1] = Visited { gpa: at, entry: pte, wide: false };
        *count = 2;
        Ok(leaf(pte, (pte & 0xFFFF_F000) | (linear & 0xFFF), 4096))
    }

    fn load_physical_32(&mut self, gpa: u64) -> u64 {
        match self.shared.ram.offset(gpa, 4) {
            Some(at) => u64::from(self.shared.ram.load::<u32>(at)),
            None => 0,
        }
    }

    /// Sets A in all entries, and D in the leaf's for a write.
    fn set_accessed(&mut self, visited: &[Visited], leaf: &mut Leaf, access: Access) -> Result<(), Failure> {
        for (i, v) in visited.iter().enumerate() {
            let last = i + 1 == visited.len();
            let dirty = if last && access == Access::Write { PTE_D } else { 0 };
            let new = v.entry | PTE_A | dirty;
            if new != v.entry {
                self.exchange_entry(v, new)?;
            }
            leaf.dirty |= dirty != 0;
        }
        Ok(())
    }

    fn exchange_entry(&mut self, v: &Visited, new: u64) -> Result<(), Failure> {
        let bytes = if v.wide { 8 } else { 4 };
        // Entries outside RAM read as not present, so this one is in RAM.
        let Some(at) = self.shared.ram.offset(v.gpa, bytes) else { return Ok(()) };
        let ram = &self.shared.ram;
        let same = if v.wide {
            ram.compare_exchange::<u64>(at, v.entry, new) == v.entry
        } else {
            ram.compare_exchange::<u32>(at, v.entry as u32, new as u32) == v.entry as u32
        };
        if !same {
            return Err(Failure::Raced);
        }
        self.code_page_written(at >> 12);
        Ok(())
    }
}
