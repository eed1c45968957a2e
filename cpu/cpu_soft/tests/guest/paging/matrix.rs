//! Every combination of paging mode, page size, access, privilege, permission bits and control bits against
//! a model written from SDM vol. 3, 4.6 and 4.7: allowed or not, the error code, CR2, A and D bits.

use crate::asm;
use crate::harness::guest::{long_state, protected_state, to_user32, to_user64};
use crate::harness::*;
use hypervisor::VcpuState;
use iced_x86::code_asm::*;
use x86_defs::control::*;
use x86_defs::exception::*;
use x86_defs::flags;
use x86_defs::paging::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Legacy,
    Pae,
    Long,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// What the entry above the leaf takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upper {
    Nothing,
    User,
    Write,
    Execute,
    Present,
    Reserved,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    mode: Mode,
    access: Access,
    user: bool,
    entry: u64,
    reserved: bool,
    upper: Upper,
    wp: bool,
    nxe: bool,
    smep: bool,
    smap: bool,
    ac: bool,
}

impl Case {
    fn nx_works(&self) -> bool {
        self.nxe && self.mode != Mode::Legacy
    }

    /// The error code, or `None` if the access is allowed.
    fn expected(&self) -> Option<u32> {
        let mut code = if self.user { PF_USER } else { 0 };
        match self.access {
            Access::Write => code |= PF_WRITE,
            Access::Fetch if self.nx_works() || self.smep => code |= PF_FETCH,
            _ => {}
        }
        // Top down, the first entry that ends the walk decides.
        match self.upper {
            Upper::Present => return Some(code),
            Upper::Reserved => return Some(code | PF_PRESENT | PF_RESERVED),
            Upper::Execute if !self.nxe => return Some(code | PF_PRESENT | PF_RESERVED),
            _ => {}
        }
        if self.entry & PTE_P == 0 {
            return Some(code);
        }
        if self.reserved || self.entry & PTE_NX != 0 && !self.nxe {
            return Some(code | PF_PRESENT | PF_RESERVED);
        }
        let user_page = self.entry & PTE_U != 0 && self.upper != Upper::User;
        let writable = self.entry & PTE_W != 0 && self.upper != Upper::Write;
        let no_execute = self.nx_works() && (self.entry & PTE_NX != 0 || self.upper == Upper::Execute);
        let allowed = match (self.user, self.access) {
            (true, _) if !user_page => false,
            (true, Access::Read) => true,
            (true, Access::Write) => writable,
            (false, Access::Read) => !user_page || !self.smap || self.ac,
            (false, Access::Write) => (!user_page || !self.smap || self.ac) && (writable || !self.wp),
            (false, Access::Fetch) if user_page && self.smep => false,
            (_, Access::Fetch) => !no_execute,
        };
        (!allowed).then_some(code | PF_PRESENT)
    }
}

/// The success of an access ends in this software interrupt.
const DONE: u8 = 0x80;

struct Bench {
    g: Guest,
    tables: Tables,
    mode: Mode,
    leaf: u32,
    target: u64,
    /// Where the leaf entry and the one above it are, and what that one points to.
    leaf_at: u64,
    upper_at: u64,
    below: u64,
}

impl Bench {
    fn new(mode: Mode, leaf: u32) -> Self {
        let mut g = Guest::at_reset();
        // The target lies in an address range of its own, up to the top-level entry.
        let (mut tables, window) = match mode {
            Mode::Legacy => (Tables::legacy(&g.ram), 0x4000_0000),
            Mode::Pae => (Tables::pae(&g.ram), 0x4000_0000),
            Mode::Long => (Tables::long(&g.ram), 0x80_0000_0000),
        };
        tables.identity(RAM_BYTES, PTE_P | PTE_W);
        let target = window + DATA;
        if mode == Mode::Long {
            g.idt64();
        } else {
            g.idt32();
        }
        g.put(DATA, &[0xCD, DONE]);
        let leaf_at = tables.entry(target, leaf);
        let mut bench = Self { g, tables, mode, leaf, target, leaf_at, upper_at: 0, below: 0 };
        if let Some(upper) = bench.upper_level() {
            bench.upper_at = bench.tables.entry(target, upper);
            bench.below = bench.entry(bench.upper_at) & PTE_ADDR;
        }
        bench
    }

    /// Levels whose entries have permission bits, above the leaf.
    fn upper_level(&self) -> Option<u32> {
        let top = match self.mode {
            Mode::Legacy | Mode::Pae => 2,
            Mode::Long => 4,
        };
        (self.leaf < top).then_some(self.leaf + 1)
    }

    fn entry(&self, at: u64) -> u64 {
        self.g.get(at) & if self.mode == Mode::Legacy { 0xFFFF_FFFF } else { u64::MAX }
    }
    fn set_entry(&self, at: u64, entry: u64) {
        match self.mode {
            Mode::Legacy => self.g.ram.store(at, entry as u32),
            _ => self.g.ram.store(at, entry),
        }
    }

    fn set_entries(&mut self, case: &Case, reserved_bit: Option<u32>) {
        // Code runs in the privilege's own page.
        let user = if case.user { PTE_U } else { 0 };
        self.tables.map(CODE, CODE | PTE_P | PTE_W | user, 1);
        let frame = if self.leaf == 1 { DATA } else { 0 };
        let reserved = if case.reserved { 1 << reserved_bit.unwrap() } else { 0 };
        let size = if self.leaf == 1 { 0 } else { PTE_PS };
        self.set_entry(self.leaf_at, frame | case.entry | reserved | size);
        if self.upper_level().is_none() {
            return;
        }
        let bits = match case.upper {
            Upper::Nothing => PTE_P | PTE_W | PTE_U,
            Upper::User => PTE_P | PTE_W,
            Upper::Write => PTE_P | PTE_U,
            Upper::Execute => PTE_P | PTE_W | PTE_U | PTE_NX,
            Upper::Present => PTE_W | PTE_U,
            Upper::Reserved => PTE_P | PTE_W | PTE_U | 1 << 47,
        };
        self.set_entry(self.upper_at, self.below | bits);
    }

    fn state(&self, case: &Case) -> VcpuState {
        let mut s = match self.mode {
            Mode::Long => long_state(self.tables.root),
            _ => protected_state(),
        };
        let set = |on: bool, bit: u64| if on { bit } else { 0 };
        if self.mode != Mode::Long {
            s.cr0 |= CR0_PG;
            s.cr3 = self.tables.root;
            s.cr4 = if self.mode == Mode::Pae { CR4_PAE } else { CR4_PSE };
            s.pdpte = std::array::from_fn(|i| {
                if self.mode == Mode::Pae { self.g.get(self.tables.root + i as u64 * 8) } else { 0 }
            });
        }
        s.cr0 = s.cr0 & !CR0_WP | set(case.wp, CR0_WP);
        s.cr4 |= set(case.smep, CR4_SMEP) | set(case.smap, CR4_SMAP);
        s.efer = s.efer & !EFER_NXE | set(case.nxe, EFER_NXE);
        s.rflags |= set(case.ac, flags::AC);
        match (case.user, self.mode) {
            (true, Mode::Long) => to_user64(&mut s),
            (true, _) => to_user32(&mut s),
            _ => {}
        }
        s.rip = CODE + 0x40 * case.access as u64;
        s.gpr[3] = self.target;
        s
    }

    fn run(&mut self, case: &Case, reserved_bit: Option<u32>) {
        self.set_entries(case, reserved_bit);
        let state = self.state(case);
        self.g.vcpu.restore(&state).unwrap();
        let frame = self.g.run_to_stub();
        let after = self.g.state();
        match case.expected() {
            None => {
                assert_eq!(frame.vector, DONE, "{case:x?}: {frame:x?}");
                let leaf = self.entry(self.leaf_at);
                assert_eq!(leaf & PTE_A, PTE_A, "{case:x?}");
                assert_eq!(leaf & PTE_D != 0, case.access == Access::Write, "{case:x?}");
                if self.upper_level().is_some() {
                    let upper = self.entry(self.upper_at);
                    assert_eq!(upper & (PTE_A | PTE_D), PTE_A, "{case:x?}");
                }
            }
            Some(code) => {
                assert_eq!((frame.vector, frame.error), (14, Some(code)), "{case:x?}: {frame:x?}");
                assert_eq!(after.cr2, self.target, "{case:x?}");
                assert_eq!(self.entry(self.leaf_at) & PTE_D, 0, "{case:x?}");
                let rip = if case.access == Access::Fetch { self.target } else { state.rip };
                assert_eq!(frame.rip, rip, "{case:x?}");
            }
        }
    }
}

fn bit(n: u32, bit: u32) -> bool {
    n >> bit & 1 != 0
}

/// `leaf` is the level of the leaf entry, `reserved_bit` a bit that is reserved in it.
fn all_cases(mode: Mode, leaf: u32, reserved_bit: Option<u32>) {
    let mut bench = Bench::new(mode, leaf);
    let bits = if mode == Mode::Long { 64 } else { 32 };
    // One short program for each kind of access, at CODE, CODE + 0x40 and CODE + 0x80.
    for (n, access) in [Access::Read, Access::Write, Access::Fetch].into_iter().enumerate() {
        bench.g.code_at(bits, CODE + 0x40 * n as u64, |a| {
            if bits == 64 {
                match access {
                    Access::Read => asm!(a; mov(al, byte_ptr(rbx)); int(i32::from(DONE));),
                    Access::Write => asm!(a; mov(byte_ptr(rbx), 0xCDu32); int(i32::from(DONE));),
                    Access::Fetch => asm!(a; jmp(rbx);),
                }
            } else {
                match access {
                    Access::Read => asm!(a; mov(al, byte_ptr(ebx)); int(i32::from(DONE));),
                    Access::Write => asm!(a; mov(byte_ptr(ebx), 0xCDu32); int(i32::from(DONE));),
                    Access::Fetch => asm!(a; jmp(ebx);),
                }
            }
        });
    }
    let uppers: &[Upper] = match bench.upper_level() {
        None => &[Upper::Nothing],
        Some(_) if mode == Mode::Legacy => &[Upper::Nothing, Upper::User, Upper::Write, Upper::Present],
        Some(_) => {
            &[Upper::Nothing, Upper::User, Upper::Write, Upper::Execute, Upper::Present, Upper::Reserved]
        }
    };
    for n in 0..1u32 << 11 {
        let [present, page_user, writable, nx, reserved, user, wp, nxe, smep, smap, ac] =
            std::array::from_fn(|i| bit(n, i as u32));
        if nx && mode == Mode::Legacy || reserved && reserved_bit.is_none() || ac && !smap {
            continue;
        }
        let set = |on: bool, bit: u64| if on { bit } else { 0 };
        let entry = set(present, PTE_P) | set(page_user, PTE_U) | set(writable, PTE_W) | set(nx, PTE_NX);
        for access in [Access::Read, Access::Write, Access::Fetch] {
            for upper in uppers {
                // Absent and reserved upper entries hide everything below: one look is enough.
                if matches!(upper, Upper::Present | Upper::Reserved) && (reserved || nx || !present) {
                    continue;
                }
                let case =
                    Case { mode, access, user, entry, reserved, upper: *upper, wp, nxe, smep, smap, ac };
                bench.run(&case, reserved_bit);
            }
        }
    }
}

#[test]
fn legacy_4k_pages() {
    all_cases(Mode::Legacy, 1, None);
}
#[test]
fn legacy_4m_pages() {
    all_cases(Mode::Legacy, 2, Some(21));
}
#[test]
fn pae_4k_pages() {
    all_cases(Mode::Pae, 1, Some(55));
}
#[test]
fn pae_2m_pages() {
    all_cases(Mode::Pae, 2, Some(15));
}
#[test]
fn long_4k_pages() {
    all_cases(Mode::Long, 1, Some(46));
}
#[test]
fn long_2m_pages() {
    all_cases(Mode::Long, 2, Some(13));
}
#[test]
fn long_1g_pages() {
    all_cases(Mode::Long, 3, Some(29));
}
