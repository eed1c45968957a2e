//! The vCPU as instruction handlers see it: memory through the soft TLB, ports, clock, local APIC.
//!
//! Hot: `load`, `store`, `modify` are one TLB probe and one host access. Everything else is in `slow` below
//! or in other files.

use crate::lockstep::{Tape, what};
use crate::mmu::{Access, Target};
use crate::shared::{Shared, VcpuShared, attention};
use crate::tlb::Tlb;
use alloc::boxed::Box;
use alloc::sync::Arc;
use apic::{ApicAction, LocalApic};
use core::sync::atomic::Ordering::SeqCst;
use guest_memory::GuestRam;
use hypervisor::VcpuIo;
use x86_defs::Exception;
use x86_defs::cpuid::Feature;
use x86_emulate::core::PagingChange;
use x86_emulate::system::debug;
use x86_emulate::{Core, Cpu, Fault, ModeKey, Word};

/// One vCPU but for its cache of decoded code. `repr(C)`: translated code addresses it from its start.
#[repr(C)]
pub struct SoftCore {
    /// Architectural state.
    pub cpu: Cpu,
    /// What translated code keeps beside it.
    pub hot: crate::translate::Hot,
    pub(crate) tlb: Tlb,
    pub(crate) ram: GuestRam,
    pub(crate) shared: Arc<Shared>,
    pub(crate) me: Arc<VcpuShared>,
    pub(crate) id: u32,
    pub(crate) apic: LocalApic,
    /// The machine, while `run` is under way.
    pub(crate) io: Option<Arc<dyn VcpuIo>>,
    /// RAM page of the block under way: a store into it must end the block first.
    pub(crate) block_page: u64,
    /// One instruction is being run by itself: it may store into its own page.
    pub(crate) single: bool,
    /// Pages whose cached code must go before the next block (own stores, notices of others).
    pub(crate) stale_code: alloc::vec::Vec<u64>,
    /// Index of implied supervisor accesses.
    pub(crate) msr: crate::msr::EngineMsrs,
    /// State of the generator behind RDRAND.
    pub(crate) random_state: u64,
    /// What the processor may have cached of the guest's paging is stale, as far as the interpreter knows.
    pub(crate) paging_touched: bool,
    /// PAUSE was executed this often without a block that did anything else.
    pub(crate) pauses: u32,
    /// What lockstep keeps of the run under way.
    pub(crate) tape: Option<Box<Tape>>,
}

/// TLB index of user accesses while alignment is checked: always empty.
pub(crate) const ALIGNED_USER: u8 = 3;

/// `RAM page` that no block has.
pub(crate) const NO_PAGE: u64 = u64::MAX;

/// The two words of 16 bytes.
pub(crate) fn words_of(raw: [u8; 16]) -> [u64; 2] {
    let value = u128::from_le_bytes(raw);
    [value as u64, (value >> 64) as u64]
}

impl SoftCore {
    /// TLB index of implied supervisor accesses (descriptor tables, TSS): AC does not help them.
    fn system_index(&self) -> u8 {
        if self.cpu.cr4 & x86_defs::control::CR4_SMAP != 0 { 1 } else { 2 }
    }

    /// The address space in use, as the second level of the TLB numbers them.
    pub(crate) fn pcid(&self) -> u16 {
        if self.cpu.cr4 & x86_defs::control::CR4_PCIDE != 0 { self.cpu.cr3 as u16 & 0xFFF } else { 0 }
    }

    #[inline(always)]
    fn load_at<T: Word>(&mut self, index: u8, linear: u64) -> Result<T, Fault> {
        let e = self.tlb.entry(index, linear);
        let offset = linear ^ e.read;
        if offset <= 4096 - u64::from(T::BYTES) {
            return Ok(self.ram.load(e.host + offset));
        }
        self.load_slow(index, linear)
    }

    #[inline(always)]
    fn store_at<T: Word>(&mut self, index: u8, linear: u64, value: T) -> Result<(), Fault> {
        let e = self.tlb.entry(index, linear);
        let offset = linear ^ e.write;
        if offset <= 4096 - u64::from(T::BYTES) {
            self.ram.store(e.host + offset, value);
            return Ok(());
        }
        self.store_slow(index, linear, value)
    }

    /// User accesses with alignment checks have a TLB index of their own that is never filled, so that all of
    /// them come by here. Returns the index to go on with.
    fn checked_index<T: Word>(&mut self, index: u8, linear: u64) -> Result<u8, Fault> {
        if index != ALIGNED_USER {
            return Ok(index);
        }
        if linear & u64::from(T::BYTES - 1) != 0 {
            return Err(self.raise(Exception::AlignmentCheck, 0));
        }
        Ok(0)
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Word>(&mut self, index: u8, linear: u64) -> Result<T, Fault> {
        let index = self.checked_index::<T>(index, linear)?;
        let mut raw = [0; 8];
        let bytes = T::BYTES as usize;
        self.read_pieces(index, linear, &mut raw[..bytes])?;
        Ok(T::from_u64(u64::from_le_bytes(raw)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Word>(&mut self, index: u8, linear: u64, value: T) -> Result<(), Fault> {
        let index = self.checked_index::<T>(index, linear)?;
        if linear & 0xFFF <= 4096 - u64::from(T::BYTES) {
            match self.translate_write(index, linear)? {
                Target::Ram(at) => {
                    self.note_access(linear, u64::from(T::BYTES), true);
                    self.ram.store(at, value);
                    self.code_page_written(at >> 12);
                }
                Target::Mmio(gpa) => self.mmio_write(gpa, &value.zext().to_le_bytes()[..T::BYTES as usize]),
            }
            return Ok(());
        }
        self.write_pieces(index, linear, &value.zext().to_le_bytes()[..T::BYTES as usize])
    }

    #[cold]
    #[inline(never)]
    fn load_16_slow(&mut self, linear: u64) -> Result<[u64; 2], Fault> {
        let mut raw = [0; 16];
        self.read_pieces(self.cpu.mmu_index, linear, &mut raw)?;
        Ok(words_of(raw))
    }

    #[cold]
    #[inline(never)]
    fn store_16_slow(&mut self, linear: u64, value: [u64; 2]) -> Result<(), Fault> {
        let raw = u128::from(value[0]) | u128::from(value[1]) << 64;
        self.write_pieces(self.cpu.mmu_index, linear, &raw.to_le_bytes())
    }

    /// Notes the data breakpoints that an access which the TLB did not serve hits.
    #[inline]
    pub(crate) fn note_access(&mut self, linear: u64, bytes: u64, write: bool) {
        if self.cpu.mode.has(ModeKey::BREAKPOINTS) {
            self.cpu.pending_debug |= debug::data_access(&self.cpu, linear, bytes, write);
        }
    }

    /// Translates for a write; a store into the page of the running block is put off (see `single`).
    pub(crate) fn translate_write(&mut self, index: u8, linear: u64) -> Result<Target, Fault> {
        let target = self.translate(index, linear, Access::Write)?;
        if let Target::Ram(at) = target
            && at >> 12 == self.block_page
            && !self.single
        {
            // The run loop repeats the instruction by itself.
            self.cpu.exc = Default::default();
            return Err(Fault);
        }
        if let Target::Ram(at) = target {
            self.keep_page(at >> 12);
        }
        Ok(target)
    }

    /// Does what a write to the local APIC asks for.
    pub(crate) fn apic_action(&mut self, action: ApicAction) {
        // Whatever was written, another interrupt may be deliverable now.
        self.me.attention.fetch_or(attention::IRQ, SeqCst);
        match action {
            ApicAction::None | ApicAction::BaseChanged { .. } => {}
            ApicAction::Eoi { vector } => {
                if let Some(io) = &self.io {
                    io.eoi(vector);
                }
            }
            ApicAction::Ipi(command) => {
                let shared = &self.shared;
                apic::route::deliver_ipi(&command, self.id as usize, &shared.inboxes, |n| {
                    shared.vcpus[n].signal(attention::IRQ);
                });
            }
        }
    }

    /// RAM behind a linear run that stays in its page, for block operations.
    fn block_target(&mut self, linear: u64, access: Access) -> Result<Option<u64>, Fault> {
        let index = self.cpu.mmu_index;
        let e = self.tlb.entry(index, linear);
        let offset = linear ^ if access == Access::Write { e.write } else { e.read };
        if offset < 4096 {
            return Ok(Some(e.host + offset));
        }
        let target = if access == Access::Write {
            self.translate_write(index, linear)?
        } else {
            self.translate(index, linear, access)?
        };
        Ok(match target {
            Target::Ram(at) => Some(at),
            Target::Mmio(_) => None,
        })
    }
}

impl Core for SoftCore {
    #[inline(always)]
    fn cpu(&self) -> &Cpu {
        &self.cpu
    }
    #[inline(always)]
    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    #[inline(always)]
    fn load<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        self.load_at(self.cpu.mmu_index, linear)
    }
    #[inline(always)]
    fn store<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.store_at(self.cpu.mmu_index, linear, value)
    }
    #[inline(always)]
    fn load_16(&mut self, linear: u64) -> Result<[u64; 2], Fault> {
        let e = self.tlb.entry(self.cpu.mmu_index, linear);
        let offset = linear ^ e.read;
        if offset <= 4096 - 16 {
            return Ok(self.ram.load_16(e.host + offset));
        }
        self.load_16_slow(linear)
    }
    #[inline(always)]
    fn store_16(&mut self, linear: u64, value: [u64; 2]) -> Result<(), Fault> {
        let e = self.tlb.entry(self.cpu.mmu_index, linear);
        let offset = linear ^ e.write;
        if offset <= 4096 - 16 {
            self.ram.store_16(e.host + offset, value);
            return Ok(());
        }
        self.store_16_slow(linear, value)
    }
    #[inline(always)]
    fn modify<T: Word>(&mut self, linear: u64, f: impl FnOnce(T) -> T) -> Result<T, Fault> {
        let e = self.tlb.entry(self.cpu.mmu_index, linear);
        let offset = linear ^ e.write;
        if offset <= 4096 - u64::from(T::BYTES) {
            let at = e.host + offset;
            let old = self.ram.load::<T>(at);
            self.ram.store(at, f(old));
            return Ok(old);
        }
        self.checked_index::<T>(self.cpu.mmu_index, linear)?;
        // The write side first: a page that cannot be written faults as a write.
        self.probe(linear, u64::from(T::BYTES), true)?;
        let old = self.load::<T>(linear)?;
        self.store(linear, f(old))?;
        Ok(old)
    }

    fn modify_locked<T: Word>(&mut self, linear: u64, mut f: impl FnMut(T) -> T) -> Result<T, Fault> {
        let bytes = u64::from(T::BYTES);
        self.checked_index::<T>(self.cpu.mmu_index, linear)?;
        if linear & 0xFFF > 4096 - bytes {
            self.probe(linear, bytes, true)?;
            let (shared, id) = (self.shared.clone(), self.id as usize);
            return shared.alone(id, || self.modify(linear, f));
        }
        let index = self.cpu.mmu_index;
        let e = self.tlb.entry(index, linear);
        let offset = linear ^ e.write;
        let at = if offset <= 4096 - bytes {
            e.host + offset
        } else {
            match self.translate_write(index, linear)? {
                Target::Ram(at) => at,
                Target::Mmio(_) => return self.modify(linear, f),
            }
        };
        if offset > 4096 - bytes {
            self.note_access(linear, bytes, true);
        }
        let mut old = self.ram.load::<T>(at);
        loop {
            let seen = self.ram.compare_exchange(at, old, f(old));
            if seen == old {
                break;
            }
            old = seen;
        }
        if offset > 4096 - bytes {
            self.code_page_written(at >> 12);
        }
        Ok(old)
    }

    fn compare_exchange_16(&mut self, linear: u64, expected: u128, new: u128) -> Result<u128, Fault> {
        match self.translate_write(self.cpu.mmu_index, linear)? {
            Target::Ram(at) => {
                self.note_access(linear, 16, true);
                let old = self.ram.compare_exchange_16(at, expected, new);
                self.code_page_written(at >> 12);
                Ok(old)
            }
            target @ Target::Mmio(_) => {
                let mut raw = [0; 16];
                self.read_target(target, &mut raw);
                let old = u128::from_le_bytes(raw);
                self.write_target(target, &if old == expected { new } else { old }.to_le_bytes());
                Ok(old)
            }
        }
    }

    fn load_bytes(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), Fault> {
        if buf.is_empty() {
            return Ok(());
        }
        let index = self.cpu.mmu_index;
        let e = self.tlb.entry(index, linear);
        let offset = linear ^ e.read;
        if offset < 4096 && buf.len() as u64 <= 4096 - offset {
            self.ram.load_bytes(e.host + offset, buf);
            return Ok(());
        }
        self.read_pieces(index, linear, buf)
    }
    fn store_bytes(&mut self, linear: u64, buf: &[u8]) -> Result<(), Fault> {
        if buf.is_empty() {
            return Ok(());
        }
        let index = self.cpu.mmu_index;
        let e = self.tlb.entry(index, linear);
        let offset = linear ^ e.write;
        if offset < 4096 && buf.len() as u64 <= 4096 - offset {
            self.ram.store_bytes(e.host + offset, buf);
            return Ok(());
        }
        self.write_pieces(index, linear, buf)
    }
    fn probe(&mut self, linear: u64, len: u64, write: bool) -> Result<(), Fault> {
        let index = self.cpu.mmu_index;
        let last = linear.wrapping_add(len.max(1) - 1);
        // A fault in the second page is at its first byte.
        for at in [linear, self.wrap(last & !0xFFF)] {
            if write {
                self.translate_write(index, at)?;
            } else {
                self.translate(index, at, Access::Read)?;
            }
            if (linear ^ last) & !0xFFF == 0 {
                break;
            }
        }
        Ok(())
    }

    fn load_system<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        self.load_at(self.system_index(), linear)
    }
    fn store_system<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.store_at(self.system_index(), linear, value)
    }
    fn load_physical(&mut self, gpa: u64) -> u64 {
        match self.ram.offset(gpa, 8) {
            Some(at) => self.ram.load(at),
            None => 0,
        }
    }

    fn copy(&mut self, to: u64, from: u64, len: u64) -> Result<u64, Fault> {
        if self.cpu.mmu_index == ALIGNED_USER || self.cpu.mode.has(ModeKey::BREAKPOINTS) {
            return Ok(0);
        }
        let Some(source) = self.block_target(from, Access::Read)? else { return Ok(0) };
        let Some(target) = self.block_target(to, Access::Write)? else { return Ok(0) };
        // A copy onto itself a few bytes further repeats in units of its elements: one by one.
        if target.wrapping_sub(source) < 8 {
            return Ok(0);
        }
        self.ram.copy_within(source, target, len);
        self.code_page_written(target >> 12);
        Ok(len)
    }
    fn fill<T: Word>(&mut self, to: u64, value: T, len: u64) -> Result<u64, Fault> {
        if self.cpu.mmu_index == ALIGNED_USER || self.cpu.mode.has(ModeKey::BREAKPOINTS) {
            return Ok(0);
        }
        let Some(target) = self.block_target(to, Access::Write)? else { return Ok(0) };
        let bytes = value.zext().to_le_bytes();
        if bytes[..T::BYTES as usize].iter().all(|b| *b == bytes[0]) {
            self.ram.fill_bytes(target, bytes[0], len);
        } else {
            let mut word = [0; 8];
            word.iter_mut().zip(bytes[..T::BYTES as usize].iter().cycle()).for_each(|(to, from)| *to = *from);
            self.ram.fill_words(target, u64::from_le_bytes(word), len / 8);
            for at in (len & !7..len).step_by(T::BYTES as usize) {
                self.ram.store(target + at, value);
            }
        }
        self.code_page_written(target >> 12);
        Ok(len)
    }

    fn port_in(&mut self, port: u16, bytes: u8) -> u32 {
        let mut raw = [0xFF; 4];
        let n = usize::from(bytes).min(4);
        let got = self.taped(what(1, port.into(), bytes.into()), |core| {
            if let Some(io) = &core.io {
                io.pio_read(port, &mut raw[..n]);
            }
            u32::from_le_bytes(raw).into()
        });
        let mask = if n == 4 { u32::MAX } else { (1 << (n * 8)) - 1 };
        got as u32 & mask
    }
    fn port_out(&mut self, port: u16, bytes: u8, value: u32) {
        self.taped(what(2, port.into(), value.into()), |core| {
            if let Some(io) = &core.io {
                io.pio_write(port, &value.to_le_bytes()[..usize::from(bytes).min(4)]);
            }
            0
        });
    }

    fn tsc(&mut self) -> u64 {
        self.taped(what(3, 0, 0), |core| core.apic.clock().tsc())
    }
    /// SplitMix64 over a state that the machine's clock keeps moving: good enough for what guests mix into
    /// their own pools; the real source of entropy is virtio-rng.
    fn random(&mut self) -> u64 {
        self.taped(what(4, 0, 0), |core| {
            core.random_state = core
                .random_state
                .wrapping_add(0x9E37_79B9_7F4A_7C15)
                .wrapping_add(core.shared.clock.wall_ns() << 20);
            let mut z = core.random_state;
            z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ z >> 31
        })
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.cpuid_leaf(leaf, subleaf)
    }
    fn has_feature(&self, feature: Feature) -> bool {
        self.shared.model.features.has(feature)
    }
    fn engine_msr_read(&mut self, msr: u32) -> Option<Result<u64, Fault>> {
        self.read_engine_msr(msr)
    }
    fn engine_msr_write(&mut self, msr: u32, value: u64) -> Option<Result<(), Fault>> {
        self.write_engine_msr(msr, value)
    }
    fn tpr(&mut self) -> u8 {
        self.taped(what(5, 0, 0), |core| u64::from(core.apic.tpr() << 4)) as u8
    }
    fn set_tpr(&mut self, value: u8) {
        self.taped(what(6, 0, value.into()), |core| {
            core.apic.set_tpr(value >> 4);
            core.me.attention.fetch_or(attention::IRQ, SeqCst);
            0
        });
    }

    fn paging_changed(&mut self, change: PagingChange) {
        self.paging_touched = true;
        self.note_paging();
        match change {
            // The first level caches one address space at a time, so that entries of another PCID are never there.
            PagingChange::Cr3 { keep } => {
                self.tlb.flush_non_global();
                if !keep {
                    self.tlb.walked.forget_space(self.pcid());
                }
            }
            PagingChange::AllNonGlobal => {
                self.tlb.flush_non_global();
                self.tlb.walked.forget_spaces();
            }
            PagingChange::Pcid(pcid) => {
                self.tlb.flush_non_global();
                self.tlb.walked.forget_space(pcid);
            }
            PagingChange::All => self.tlb.flush_all(),
            PagingChange::Address { pcid, linear } => self.tlb.flush_page(pcid, linear),
        }
    }
    fn invalidate_page(&mut self, linear: u64) {
        self.paging_touched = true;
        self.note_paging();
        self.tlb.flush_page(self.pcid(), linear);
    }
    fn pause(&mut self) {
        self.pauses += 1;
        if self.pauses >= 1000 {
            self.pauses = 0;
            sync::relax();
        }
    }
}
