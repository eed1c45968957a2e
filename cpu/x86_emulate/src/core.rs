//! What an engine gives the interpreter: memory at linear addresses, ports, clock, local APIC.

use crate::cpu::Cpu;
pub use guest_memory::Word;
use x86_defs::{Exception, exception};

/// An exception waits in `cpu.exc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// One vCPU as the interpreter sees it. Linear addresses go through the guest's paging; an access that
/// fails sets `cpu.exc` and commits nothing.
pub trait Core: Sized {
    /// Architectural state.
    fn cpu(&self) -> &Cpu;
    /// Architectural state.
    fn cpu_mut(&mut self) -> &mut Cpu;

    /// Reads at the current privilege. One host access if it stays within a page.
    fn load<T: Word>(&mut self, linear: u64) -> Result<T, Fault>;
    /// Writes at the current privilege.
    fn store<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault>;
    /// Reads 16 bytes within a page at the current privilege, alignment checks done. One access if aligned, unless
    /// there is no other processor.
    fn load_16(&mut self, linear: u64) -> Result<[u64; 2], Fault> {
        Ok([self.load(linear)?, self.load(linear.wrapping_add(8))?])
    }
    /// Writes 16 bytes, as `load_16` reads them.
    fn store_16(&mut self, linear: u64, value: [u64; 2]) -> Result<(), Fault> {
        self.store(linear, value[0])?;
        self.store(linear.wrapping_add(8), value[1])
    }
    /// Reads and writes one word without atomicity: `f` gives the new value. Faults before any change.
    fn modify<T: Word>(&mut self, linear: u64, f: impl FnOnce(T) -> T) -> Result<T, Fault>;
    /// As `modify`, atomic (LOCK): `f` may be called again when another vCPU interferes. Returns the old
    /// value.
    fn modify_locked<T: Word>(&mut self, linear: u64, f: impl FnMut(T) -> T) -> Result<T, Fault>;
    /// Compare and exchange of 16 bytes (aligned), atomic: returns the old value. Always writes.
    fn compare_exchange_16(&mut self, linear: u64, expected: u128, new: u128) -> Result<u128, Fault>;
    /// Reads `buf.len()` (at most 4096) bytes at the current privilege.
    fn load_bytes(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), Fault>;
    /// Writes `buf.len()` (at most 4096) bytes; checks every page before it writes the first.
    fn store_bytes(&mut self, linear: u64, buf: &[u8]) -> Result<(), Fault>;
    /// Faults as a read (or a write) of `len` bytes would, changing nothing but A/D bits.
    fn probe(&mut self, linear: u64, len: u64, write: bool) -> Result<(), Fault>;

    /// Reads as supervisor (descriptor tables, TSS), whatever the CPL.
    fn load_system<T: Word>(&mut self, linear: u64) -> Result<T, Fault>;
    /// Writes as supervisor.
    fn store_system<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault>;
    /// Reads physical memory (PAE's page-directory pointers).
    fn load_physical(&mut self, gpa: u64) -> u64;

    /// Copies `len` bytes upwards; neither run leaves its page. Returns how many bytes were done: `len`, or
    /// 0 if this cannot be done as a block (not RAM, or a close overlap).
    fn copy(&mut self, to: u64, from: u64, len: u64) -> Result<u64, Fault>;
    /// Stores `value` over `len` bytes upwards (a multiple of its size, within a page). Returns `len`, or 0
    /// if this cannot be done as a block.
    fn fill<T: Word>(&mut self, to: u64, value: T, len: u64) -> Result<u64, Fault>;

    /// IN. `bytes` is 1, 2 or 4.
    fn port_in(&mut self, port: u16, bytes: u8) -> u32;
    /// OUT.
    fn port_out(&mut self, port: u16, bytes: u8, value: u32);

    /// Time-stamp counter of the guest.
    fn tsc(&mut self) -> u64;
    /// Random 64 bits, for RDRAND and RDSEED.
    fn random(&mut self) -> u64;
    /// CPUID of the VM's CPU model, dynamic bits (OSXSAVE, APIC id, XCR0 sizes) included:
    /// [eax, ebx, ecx, edx].
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// Whether the CPU model has `feature`.
    fn has_feature(&self, feature: x86_defs::cpuid::Feature) -> bool;
    /// MSRs that are the engine's (TSC, APIC base, x2APIC, TSC deadline, kvmclock). `None`: no such MSR.
    fn engine_msr_read(&mut self, msr: u32) -> Option<Result<u64, Fault>>;
    /// As `engine_msr_read`.
    fn engine_msr_write(&mut self, msr: u32, value: u64) -> Option<Result<(), Fault>>;
    /// Task priority (CR8).
    fn tpr(&mut self) -> u8;
    /// Sets the task priority.
    fn set_tpr(&mut self, value: u8);

    /// CR0, CR3, CR4, EFER or PDPTEs changed: drop the translations that this makes stale.
    fn paging_changed(&mut self, change: PagingChange);
    /// INVLPG.
    fn invalidate_page(&mut self, linear: u64);
    /// MONITOR/MWAIT, PAUSE: a hint that the vCPU waits for another one.
    fn pause(&mut self);

    /// Raises `exception` for the instruction under way.
    #[cold]
    fn raise(&mut self, exception: Exception, error_code: u32) -> Fault {
        let cpu = self.cpu_mut();
        cpu.exc =
            crate::cpu::PendingException { vector: Some(exception), error_code, address: 0, is_trap: false };
        Fault
    }
    /// #GP(code).
    #[cold]
    fn gp(&mut self, error_code: u32) -> Fault {
        self.raise(Exception::GeneralProtection, error_code)
    }
    /// #UD.
    #[cold]
    fn ud(&mut self) -> Fault {
        self.raise(Exception::InvalidOpcode, 0)
    }
    /// #PF at `linear`.
    #[cold]
    fn page_fault(&mut self, linear: u64, error_code: u32) -> Fault {
        self.raise(Exception::PageFault, error_code);
        self.cpu_mut().exc.address = linear;
        debug_assert!(error_code & !0x1F == 0 || error_code & exception::PF_FETCH != 0);
        Fault
    }
}

/// What happened to the paging registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingChange {
    /// CR3 was loaded: entries of this PCID (or all but global ones) are stale, unless `keep` (bit 63 of
    /// the source with PCIDs).
    Cr3 {
        /// Bit 63 of the source: keep this PCID's entries.
        keep: bool,
    },
    /// Everything is stale, global entries included.
    All,
    /// INVPCID of one PCID.
    Pcid(u16),
    /// INVPCID of everything but global entries.
    AllNonGlobal,
    /// INVPCID of one address in one PCID.
    Address {
        /// The PCID.
        pcid: u16,
        /// The linear address.
        linear: u64,
    },
}

/// Base and limit of a segment that is not flat (SDM vol. 3, 5.3); `segment` indexes `Cpu::seg`.
/// Returns the linear address.
#[cold]
#[inline(never)]
pub fn check_segment<C: Core>(
    c: &mut C,
    segment: u8,
    offset: u64,
    bytes: u64,
    write: bool,
) -> Result<u64, Fault> {
    let cpu = c.cpu();
    let seg = cpu.seg[usize::from(segment).min(5)];
    let exception = if segment == 2 { Exception::StackFault } else { Exception::GeneralProtection };
    if cpu.mode.is_long() {
        // Only FS and GS get here with a base; canonical checks are the MMU's.
        return Ok(seg.base.wrapping_add(offset));
    }
    let a = seg.attributes;
    let last = offset.wrapping_add(bytes - 1);
    let in_limit = if a.conforming_or_expand_down() && !a.is_code() && a.is_code_or_data() {
        let top = if a.big() { 0xFFFF_FFFF } else { 0xFFFF };
        offset > u64::from(seg.limit) && last <= top
    } else {
        last <= u64::from(seg.limit)
    };
    let real = !cpu.mode.has(crate::ModeKey::PROTECTED) || cpu.mode.has(crate::ModeKey::V86);
    let allowed = real
        || (!seg.unusable
            && if write {
                !a.is_code() && a.readable_or_writable()
            } else {
                !a.is_code() || a.readable_or_writable()
            });
    if !in_limit || !allowed {
        return Err(c.raise(exception, 0));
    }
    Ok(seg.base.wrapping_add(offset) & 0xFFFF_FFFF)
}
