//! Registers of the first CPU at a kernel's entry, and the tables they point to.
//!
//! Linux wants flat segments from a GDT with `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18, PVH wants flat
//! 32-bit segments with a loaded TSS; interrupts are off in all. The GDT below satisfies both.

use super::Placement;
use super::error::{DirectBootError, FileRole};
use super::fields::put;
use super::low_memory::{GDT, PAGE_TABLES, STACK_TOP};
use alloc::borrow::Cow;
use alloc::vec;
use alloc::vec::Vec;
use x86_defs::control::{CR0_ET, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME};
use x86_defs::flags::FIXED_1;
use x86_defs::paging::{PTE_P, PTE_PS, PTE_W};
use x86_defs::{DescriptorTable, Segment, SegmentAttributes};

/// The processor mode at entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootMode {
    /// 64-bit code, the first 4 GiB mapped to themselves.
    LongMode,
    /// 32-bit code, flat, paging off.
    Protected32,
}

/// Registers at entry, independent of any engine; all that is not named here is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootCpu {
    /// Which mode the control registers below stand for.
    pub mode: BootMode,
    /// Entry point.
    pub rip: u64,
    /// Top of a small stack.
    pub rsp: u64,
    /// Linux: address of `boot_params`.
    pub rsi: u64,
    /// PVH: address of `hvm_start_info`.
    pub rbx: u64,
    /// Only the reserved bit: interrupts off.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// GDTR; the table is one of the segments.
    pub gdt: DescriptorTable,
    /// IDTR: empty.
    pub idt: DescriptorTable,
    /// CS.
    pub cs: Segment,
    /// DS, ES, SS, FS and GS.
    pub data: Segment,
    /// TR: a busy TSS, as the architecture demands.
    pub tr: Segment,
    /// LDTR: unusable.
    pub ldt: Segment,
}

const CODE64: u64 = 0x00AF_9B00_0000_FFFF;
const CODE32: u64 = 0x00CF_9B00_0000_FFFF;
const DATA: u64 = 0x00CF_9300_0000_FFFF;
/// A busy 32-bit TSS at 0 with the least limit; nothing ever switches through it.
const TSS: u64 = 0x0000_8B00_0000_0067;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Null, unused, code, data, TSS (16 bytes in long mode).
const GDT_ENTRIES: usize = 6;

const PAGE: usize = 0x1000;
const DIRECTORIES: usize = 4;
const PRESENT_WRITABLE: u64 = PTE_P | PTE_W;

impl BootCpu {
    /// Entry in long mode at `rip`; places GDT and page tables.
    pub(super) fn long_mode(place: &mut Placement<'_>, rip: u64, rsi: u64) -> Result<Self, DirectBootError> {
        place.add(FileRole::BootData, PAGE_TABLES, Cow::Owned(identity_page_tables()), 0)?;
        let mut cpu = Self::protected(place, CODE64, rip)?;
        cpu.mode = BootMode::LongMode;
        cpu.cr0 |= CR0_PG;
        cpu.cr3 = PAGE_TABLES;
        cpu.cr4 = CR4_PAE;
        cpu.efer = EFER_LME | EFER_LMA;
        cpu.rsi = rsi;
        Ok(cpu)
    }

    /// Entry in flat 32-bit protected mode at `rip`; places the GDT.
    pub(super) fn protected32(place: &mut Placement<'_>, rip: u64) -> Result<Self, DirectBootError> {
        Self::protected(place, CODE32, rip)
    }

    fn protected(place: &mut Placement<'_>, code: u64, rip: u64) -> Result<Self, DirectBootError> {
        place.claim(FileRole::BootData, STACK_TOP - PAGE as u64 / 2, PAGE as u64 / 2)?;
        let table = [0, 0, code, DATA, TSS, 0];
        let bytes: Vec<u8> = table.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
        place.add(FileRole::BootData, GDT, Cow::Owned(bytes), 0)?;
        Ok(Self {
            mode: BootMode::Protected32,
            rip,
            rsp: STACK_TOP,
            rsi: 0,
            rbx: 0,
            rflags: FIXED_1,
            cr0: CR0_PE | CR0_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
            gdt: DescriptorTable { base: GDT, limit: (GDT_ENTRIES * 8 - 1) as u16 },
            idt: DescriptorTable::default(),
            cs: segment(CODE_SELECTOR, code),
            data: segment(DATA_SELECTOR, DATA),
            tr: segment(TSS_SELECTOR, TSS),
            ldt: Segment { unusable: true, ..Segment::default() },
        })
    }
}

/// A segment register loaded from a descriptor whose base is zero.
fn segment(selector: u16, descriptor: u64) -> Segment {
    let attributes = SegmentAttributes::from_descriptor_high((descriptor >> 32) as u32);
    let pages_or_bytes = (descriptor & 0xFFFF) as u32 | ((descriptor >> 32) as u32 & 0xF_0000);
    let limit = if attributes.granular() { (pages_or_bytes << 12) | 0xFFF } else { pages_or_bytes };
    Segment { selector, attributes, limit, base: 0, unusable: false }
}

/// PML4, PDPT and four page directories that map the first 4 GiB to themselves by 2 MiB pages.
fn identity_page_tables() -> Vec<u8> {
    let mut tables = vec![0; (2 + DIRECTORIES) * PAGE];
    let page = |index: usize| PAGE_TABLES + (index * PAGE) as u64;
    put(&mut tables, 0, &(page(1) | PRESENT_WRITABLE).to_le_bytes());
    for directory in 0..DIRECTORIES {
        let entry = page(2 + directory) | PRESENT_WRITABLE;
        put(&mut tables, PAGE + directory * 8, &entry.to_le_bytes());
    }
    for index in 0..DIRECTORIES * 512 {
        let entry = ((index as u64) << 21) | PTE_PS | PRESENT_WRITABLE;
        put(&mut tables, 2 * PAGE + index * 8, &entry.to_le_bytes());
    }
    tables
}
