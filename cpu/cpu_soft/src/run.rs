//! The loop of a vCPU: find the block at RIP, run it, look whether somebody wants something.
//!
//! Interrupts, code invalidations and stops are taken between blocks only. `single.rs`: instructions that run by themselves.

use crate::block::{self, Builder};
use crate::cache::{BlockCache, BlockId, Found};
use crate::core::{NO_PAGE, SoftCore};
use crate::hardware::Hardware;
use crate::lockstep::Lockstep;
use crate::mmu::{Access, Target};
use crate::shared::{CodeNotice, Watch, attention};
use crate::single::ONE_BY_ONE;
use crate::tlb::Tlb;
use crate::translate::{Exit, Translator};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use guest_time::GuestNs;
use hypervisor::{VcpuExit, VcpuIo};
use x86_defs::{Exception, SegmentIndex, control, flags};
use x86_emulate::cpu::RIP;
use x86_emulate::system::interrupts::{self, Kind, Outcome};
use x86_emulate::{Cpu, Fault, ModeKey, Op, Step};

/// Instructions between two looks at the clock.
pub(crate) const SLICE: i64 = 16_384;
/// Bytes that most blocks fit in.
const FEW_BYTES: usize = 96;

/// One vCPU of the `soft` engine.
pub struct SoftVcpu {
    pub(crate) core: Box<SoftCore>,
    pub(crate) cache: BlockCache,
    pub(crate) builder: Builder,
    pub(crate) translator: Option<Box<dyn Translator>>,
    /// Translated code is compared with what the interpreter does.
    pub(crate) lockstep: Option<Lockstep>,
    /// A processor that runs guest code in place of the blocks.
    pub(crate) hardware: Option<Box<dyn Hardware>>,
    /// After INIT: waits for SIPI.
    pub(crate) wait_for_sipi: bool,
    pub(crate) nmi_pending: bool,
    /// Acknowledged by another engine, which did not come to deliver it.
    pub(crate) interrupt: Option<u8>,
    /// After a triple fault: only INIT and a reset lead out of it.
    pub(crate) shutdown: bool,
    /// Instructions executed.
    pub(crate) instructions: u64,
    /// Instructions between two looks at the clock and at what others want.
    pub(crate) slice: i64,
    /// Guest time of the last look at the clock, while `run` is under way.
    looked_at: GuestNs,
}

/// Why `execute` stopped.
pub(crate) enum Stop {
    /// Look at attention, clock, HLT.
    Service,
    /// The processor is in shutdown.
    TripleFault,
    /// `run` returns: others want the host's processor.
    Yield,
    /// The hardware cannot go on.
    Failed(String),
}

impl SoftVcpu {
    pub(crate) fn with_core(
        core: Box<SoftCore>,
        translator: Option<Box<dyn Translator>>,
        wait_for_sipi: bool,
    ) -> Self {
        let cache = BlockCache::new(core.shared.vcpus.len());
        Self {
            core,
            cache,
            builder: Builder::default(),
            translator,
            lockstep: None,
            hardware: None,
            wait_for_sipi,
            nmi_pending: false,
            interrupt: None,
            shutdown: false,
            instructions: 0,
            slice: SLICE,
            looked_at: 0,
        }
    }

    /// Runs until the machine has something to decide.
    pub(crate) fn run_guest(&mut self, io: &Arc<dyn VcpuIo>) -> VcpuExit {
        self.core.io = Some(io.clone());
        self.looked_at = self.core.shared.clock.now();
        let exit = loop {
            self.core.me.enter();
            self.take_notices();
            let exit = self.run_entered();
            self.core.me.leave();
            // Who signalled between the last look and `leave` saw a running vCPU and woke nobody.
            let unseen = self.core.me.attention.load(SeqCst) & (attention::IRQ | attention::STOP) != 0;
            if !(unseen && matches!(exit, VcpuExit::Halted { .. })) {
                break exit;
            }
        };
        if let Some(hardware) = &mut self.hardware {
            hardware.leave(&mut self.core);
        }
        self.core.io = None;
        self.account(self.core.shared.clock.now());
        exit
    }

    /// Publishes what was done up to `now`.
    fn account(&mut self, now: GuestNs) {
        let me = &self.core.me;
        me.instructions.store(self.instructions, Relaxed);
        me.busy_ns.fetch_add(now.saturating_sub(self.looked_at), Relaxed);
        self.looked_at = now;
    }

    fn run_entered(&mut self) -> VcpuExit {
        self.deliver_restored();
        loop {
            if let Some(exit) = self.service() {
                return exit;
            }
            let stop = match self.core.cpu.exc.vector {
                None => self.execute(),
                Some(_) => self.deliver_fault(self.core.cpu.gpr[RIP]),
            };
            match stop {
                Stop::Service => {}
                Stop::TripleFault => {
                    self.shutdown = true;
                    return VcpuExit::TripleFault;
                }
                Stop::Yield => return VcpuExit::Kicked,
                Stop::Failed(reason) => return VcpuExit::Fatal(reason),
            }
        }
    }

    /// A restored state may be in the middle of an exception, or of an interrupt.
    fn deliver_restored(&mut self) {
        if self.shutdown || self.wait_for_sipi {
            return;
        }
        if self.core.cpu.exc.vector.is_some()
            && let Stop::TripleFault = self.deliver_fault(self.core.cpu.gpr[RIP])
        {
            self.shutdown = true;
        }
        if self.core.cpu.exc.vector.is_some() {
            return;
        }
        if let Some(vector) = self.interrupt.take() {
            let core = &mut *self.core;
            core.block_page = NO_PAGE;
            core.cpu.halted = false;
            let outcome = interrupts::deliver_interrupt(core, vector, Kind::External);
            self.shutdown |= outcome == Outcome::TripleFault;
        }
    }

    /// Takes what waits: stops, code notices, timer, interrupts. `Some`: `run` returns.
    fn service(&mut self) -> Option<VcpuExit> {
        let core = &mut *self.core;
        let seen =
            core.me.attention.fetch_and(!(attention::STOP | attention::IRQ | attention::WINDOW), SeqCst);
        self.take_notices();
        if seen & attention::STOP != 0 {
            // What else was seen is still there for the next entry.
            self.core.me.attention.fetch_or(seen & attention::IRQ, SeqCst);
            return Some(VcpuExit::Kicked);
        }
        let core = &mut *self.core;
        let now = core.shared.clock.now();
        core.apic.advance(now);
        self.account(now);
        let core = &mut *self.core;
        let arrived = core.apic.poll_inbox();
        if arrived.init {
            self.init();
        }
        if let Some(vector) = arrived.sipi.filter(|_| self.wait_for_sipi) {
            self.start_at(vector);
        }
        self.nmi_pending |= arrived.nmi;
        if self.wait_for_sipi {
            return Some(VcpuExit::Halted { wake_at: None });
        }
        if self.shutdown {
            return Some(VcpuExit::TripleFault);
        }
        if let Err(exit) = self.deliver_pending() {
            self.shutdown = true;
            return Some(exit);
        }
        let core = &mut *self.core;
        core.cpu.halted.then(|| VcpuExit::Halted { wake_at: core.apic.timer_deadline() })
    }

    /// Delivers the interrupt that is due, if any.
    fn deliver_pending(&mut self) -> Result<(), VcpuExit> {
        let core = &mut *self.core;
        if core.cpu.exc.vector.is_some() {
            core.me.attention.fetch_or(attention::IRQ, SeqCst);
            return Ok(());
        }
        if core.cpu.interrupt_shadow {
            return Ok(());
        }
        if self.nmi_pending && core.cpu.nmi_blocked && !core.cpu.halted {
            // It is due right behind the IRET that ends the blocking.
            core.me.attention.fetch_or(attention::IRQ, SeqCst);
        }
        core.block_page = NO_PAGE;
        let outcome = if self.nmi_pending && !core.cpu.nmi_blocked {
            self.nmi_pending = false;
            core.cpu.halted = false;
            interrupts::deliver_interrupt(core, Exception::Nmi.vector(), Kind::Nmi)
        } else if core.cpu.rflags & flags::IF == 0 {
            if core.apic.pending_vector().is_some() || core.apic.wants_extint() {
                core.me.attention.fetch_or(attention::WINDOW, SeqCst);
            }
            return Ok(());
        } else {
            let mut vector = None;
            if core.apic.wants_extint() {
                core.apic.extint_taken();
                vector = core.io.as_ref().and_then(|io| io.pic_ack());
            }
            // An 8259 that withdrew hides nothing of the local APIC's.
            let Some(vector) = vector.or_else(|| core.apic.acknowledge()) else { return Ok(()) };
            core.cpu.halted = false;
            interrupts::deliver_interrupt(core, vector, Kind::External)
        };
        // Another one may wait behind it.
        core.me.attention.fetch_or(attention::IRQ, SeqCst);
        if outcome == Outcome::TripleFault { Err(VcpuExit::TripleFault) } else { Ok(()) }
    }

    /// INIT (SDM vol. 3, 10.1): all but the x87/SSE state and the MSRs is as after power-up.
    fn init(&mut self) {
        let old = &self.core.cpu;
        let fresh = Cpu::default();
        let cpu = Cpu {
            x: old.x,
            msrs: old.msrs,
            xcr0: old.xcr0,
            // CD and NW survive.
            cr0: fresh.cr0 & !(control::CR0_CD | control::CR0_NW)
                | old.cr0 & (control::CR0_CD | control::CR0_NW),
            ..fresh
        };
        self.core.cpu = cpu;
        self.core.cpu.refresh();
        self.core.tlb.flush_all();
        self.core.paging_touched = true;
        self.nmi_pending = false;
        self.interrupt = None;
        self.shutdown = false;
        self.wait_for_sipi = self.core.id != 0;
    }

    /// SIPI: real mode at `vector` × 4 KiB.
    fn start_at(&mut self, vector: u8) {
        let cpu = &mut self.core.cpu;
        let cs = &mut cpu.seg[SegmentIndex::Cs as usize];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        cpu.gpr[RIP] = 0;
        cpu.refresh();
        self.wait_for_sipi = false;
    }

    /// Drops all decoded code and translations: RAM may be another's now (reset, restore).
    pub(crate) fn forget_code(&mut self) {
        self.cache.clear();
        if let Some(translator) = &mut self.translator {
            translator.forget_all();
        }
        if let Some(hardware) = &mut self.hardware {
            hardware.forget();
        }
        self.core.tlb.flush_all();
    }

    /// Drops what others (or its own stores) made stale.
    fn take_notices(&mut self) {
        let core = &mut *self.core;
        let mut caches = CodeCaches { cache: &mut self.cache, translator: &mut self.translator };
        let tlb = &mut core.tlb;
        core.me.take_notices(|notice| caches.apply(notice, tlb));
        for page in core.stale_code.drain(..) {
            caches.drop_page(page);
        }
    }

    /// Linear address of RIP.
    #[inline(always)]
    pub(crate) fn linear_ip(&self) -> u64 {
        self.core.linear_ip()
    }

    /// Runs blocks until something else has to be looked at.
    fn execute(&mut self) -> Stop {
        if self.hardware.is_some() {
            return self.execute_on_hardware();
        }
        let mut budget = self.slice;
        loop {
            let mode = self.core.cpu.mode;
            if self.core.cpu.interrupt_shadow || mode.0 & ONE_BY_ONE != 0 {
                // Behind it `service` has to look: while there was a shadow it saw nothing.
                return self.run_single();
            }
            let linear = self.linear_ip();
            let exec_id = self.core.tlb.exec_id(mode.cpl() == 3, linear);
            let known = self.cache.jump(linear, exec_id);
            let found = match known.filter(|found| self.cache.is_current(found.id, mode, &self.core.ram)) {
                Some(found) => found,
                None => match self.find_block(linear) {
                    Ok(Some(found)) => found,
                    Ok(None) => match self.run_singly(&mut budget) {
                        Some(stop) => return stop,
                        None => continue,
                    },
                    Err(Fault) => return self.deliver_fault(self.core.cpu.gpr[RIP]),
                },
            };
            if let Some(exit) = self.run_translated(found.id, linear, &mut budget) {
                let stop = match exit {
                    Exit::Fault(op) => Some(self.fault_at(&op)),
                    Exit::Branch => None,
                    Exit::Service => Some(Stop::Service),
                    Exit::TripleFault => Some(Stop::TripleFault),
                };
                match stop {
                    Some(Stop::TripleFault) => return Stop::TripleFault,
                    _ if self.lockstep.as_ref().is_some_and(Lockstep::has_failed) => {
                        return Stop::Failed("translated code is not as the interpreter".into());
                    }
                    _ if budget > 0 && !matches!(exit, Exit::Service) && self.core.may_go_on() => continue,
                    _ => return Stop::Service,
                }
            }
            let Some((block, ops)) = self.cache.get(found) else { return Stop::Service };
            let core = &mut *self.core;
            if mode.0 & (ModeKey::LONG | ModeKey::FLAT_CS) == 0 && exceeds_cs(&core.cpu, block.bytes) {
                return self.run_single();
            }
            core.block_page = block.watched_page();
            let mut at = 0;
            let step = loop {
                // The closing operation never says `Next`.
                let op = &ops[at];
                let step = (op.run)(core, op);
                if step != Step::Next {
                    break step;
                }
                at += 1;
            };
            // The closing operation is no instruction; an exit or a fault leaves the rest undone.
            let ran = (at + 1).min(block.instructions());
            budget -= ran as i64;
            self.instructions += ran as u64;
            match step {
                Step::Branch => {
                    let wanted = core.me.attention.load(Relaxed);
                    if wanted != 0 && (wanted & !attention::WINDOW != 0 || core.cpu.rflags & flags::IF != 0) {
                        return Stop::Service;
                    }
                    if budget <= 0 {
                        return Stop::Service;
                    }
                }
                Step::Fault => {
                    let op = ops[at];
                    let stop = self.fault_at(&op);
                    if let Stop::TripleFault = stop {
                        return stop;
                    }
                    // A guest that does nothing but fault has timers, too.
                    if self.core.me.attention.load(Relaxed) != 0 || budget <= 0 {
                        return Stop::Service;
                    }
                }
                Step::Exit | Step::Next => return Stop::Service,
            }
        }
    }

    /// Runs one instruction by itself. `None`: nothing else has to be looked at.
    fn run_singly(&mut self, budget: &mut i64) -> Option<Stop> {
        *budget -= 1;
        match self.run_single() {
            Stop::Service if *budget > 0 && self.core.may_go_on() => None,
            stop => Some(stop),
        }
    }

    /// The block at `linear`; `None` if its first instruction must be run by itself.
    pub(crate) fn find_block(&mut self, linear: u64) -> Result<Option<Found>, Fault> {
        let core = &mut *self.core;
        let mode = core.cpu.mode;
        let index = core.cpu.mmu_index;
        let entry = core.tlb.entry(index, linear);
        let offset = linear ^ entry.exec;
        let at = if offset < 4096 {
            entry.host + offset
        } else {
            match core.translate(index, linear, Access::Fetch)? {
                Target::Ram(at) => at,
                Target::Mmio(_) => return Ok(None),
            }
        };
        let known = self.cache.find(at, mode);
        let current = known.filter(|id| self.cache.is_current(*id, mode, &self.core.ram));
        if let (Some(stale), None) = (known, current) {
            self.cache.drop_block(stale);
        }
        let id = match current {
            Some(id) => id,
            None => match self.build_block(at, mode) {
                Some(id) => id,
                None => return Ok(None),
            },
        };
        let exec_id = self.core.tlb.claim_exec_id(index, linear);
        Ok(Some(self.cache.remember(linear, exec_id, id)))
    }

    fn build_block(&mut self, at: u64, mode: ModeKey) -> Option<BlockId> {
        let core = &mut *self.core;
        let (tlb, me) = (&mut core.tlb, &core.me);
        let mut caches = CodeCaches { cache: &mut self.cache, translator: &mut self.translator };
        let watch = core.shared.protect_code(at >> 12, core.id as usize, |own| {
            if own {
                tlb.revoke_write(at & !0xFFF);
            }
            me.take_notices(|notice| caches.apply(notice, tlb));
        });
        let limit = if watch == Watch::Itself { block::MAX_CHECKED } else { block::MAX_OPS };
        let features = core.shared.model.features;
        let mut bytes = [0; block::MAX_OPS * x86_decode::MAX_LENGTH];
        let most = ((4096 - (at & 0xFFF)) as usize).min(bytes.len());
        let mut len = most.min(FEW_BYTES);
        loop {
            core.ram.load_bytes(at, &mut bytes[..len]);
            let ops = self.builder.build(&bytes[..len], mode, features, limit, watch);
            let end = ops.last().map_or(0, |op| usize::from(op.at));
            if len < most && end + x86_decode::MAX_LENGTH > len {
                len = most;
                continue;
            }
            let original = (watch == Watch::Itself).then_some(&bytes[..end.min(len)]);
            return (!ops.is_empty()).then(|| self.cache.insert(at, mode, ops, original));
        }
    }

    /// An operation of a block faulted.
    fn fault_at(&mut self, op: &Op<SoftCore>) -> Stop {
        let core = &mut *self.core;
        match core.deliver(op) {
            Some(Outcome::TripleFault) => Stop::TripleFault,
            Some(Outcome::Delivered | Outcome::Waits) => Stop::Service,
            None => {
                // A store into the block's own page: that instruction once more, by itself.
                core.cpu.gpr[RIP] = op.ip(core);
                self.run_single()
            }
        }
    }

    /// Delivers the exception in `cpu.exc`; RIP is `ip`.
    pub(crate) fn deliver_fault(&mut self, ip: u64) -> Stop {
        match self.core.deliver_fault(ip) {
            Outcome::TripleFault => Stop::TripleFault,
            Outcome::Delivered | Outcome::Waits => Stop::Service,
        }
    }
}

impl SoftCore {
    /// Delivers the exception in `cpu.exc`; RIP is `ip`.
    pub(crate) fn deliver_fault(&mut self, ip: u64) -> Outcome {
        self.note_fault();
        self.cpu.gpr[RIP] = ip;
        self.cpu.interrupt_shadow = false;
        // The frame may go to the page of the block that is left.
        self.block_page = NO_PAGE;
        if self.cpu.exc.vector == Some(Exception::GeneralProtection) && self.cpu.exc.address != 0 {
            self.refine_non_canonical();
        }
        let pending = core::mem::take(&mut self.cpu.exc);
        interrupts::deliver_exception(self, pending)
    }
}

/// Both tiers' code.
struct CodeCaches<'a> {
    cache: &'a mut BlockCache,
    translator: &'a mut Option<Box<dyn Translator>>,
}

impl CodeCaches<'_> {
    fn drop_page(&mut self, page: u64) {
        self.cache.drop_page(page);
        if let Some(translator) = self.translator {
            translator.forget_page(page);
        }
    }

    fn apply(&mut self, notice: CodeNotice, tlb: &mut Tlb) {
        match notice {
            CodeNotice::RevokeWrite(page) => tlb.revoke_write(page << 12),
            CodeNotice::Invalidate(page) => self.drop_page(page),
            CodeNotice::Everything => {
                tlb.flush_all();
                self.cache.clear();
                if let Some(translator) = self.translator {
                    translator.forget_all();
                }
            }
        }
    }
}

/// Whether a block of `bytes` reaches beyond CS's limit.
fn exceeds_cs(cpu: &Cpu, bytes: u16) -> bool {
    let last = cpu.gpr[RIP] + u64::from(bytes.max(1)) - 1;
    last > u64::from(cpu.segment(SegmentIndex::Cs).limit)
}
