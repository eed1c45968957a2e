//! One instruction by itself: behind STI and MOV SS, with TF set or breakpoints, at page ends, from MMIO, where it writes its own
//! page, and for [`crate::Completer`].
//!
//! Called by: `run.rs`. Its bytes may cross pages and may change under it: they are decoded each time.

use crate::core::{NO_PAGE, SoftCore};
use crate::mmu::{Access, Target};
use crate::run::{SoftVcpu, Stop};
use crate::shared::Watch;
use alloc::vec::Vec;
use x86_defs::{Exception, SegmentIndex, flags};
use x86_emulate::cpu::{PendingException, RIP};
use x86_emulate::system::debug;
use x86_emulate::{Core, Fault, ModeKey, Op, Step};

/// Modes in which instructions run one by one.
pub(crate) const ONE_BY_ONE: u32 = ModeKey::TRAP | ModeKey::BREAKPOINTS;

impl SoftVcpu {
    /// Runs the one instruction at RIP and delivers what it raises; for [`crate::Completer`].
    pub(crate) fn run_one(&mut self) {
        if let Stop::TripleFault = self.run_single() {
            self.shutdown = true;
        }
        self.core.stale_code.clear();
    }

    /// Runs the one instruction at RIP, from bytes that may cross pages and may change under it.
    pub(crate) fn run_single(&mut self) -> Stop {
        let ip = self.core.cpu.gpr[RIP];
        let mode = self.core.cpu.mode;
        let debugging = mode.0 & ONE_BY_ONE != 0;
        if debugging && let Some(due) = self.debug_before() {
            self.core.cpu.exc = due;
            return self.deliver_fault(ip);
        }
        let core = &mut *self.core;
        core.cpu.interrupt_shadow = false;
        core.cpu.shadow_blocks_debug = false;
        core.block_page = NO_PAGE;
        let ops = match self.fetch_single() {
            Ok(ops) => ops,
            Err(Fault) => return self.deliver_fault(ip),
        };
        self.instructions += 1;
        let core = &mut *self.core;
        let next = ops[0].next_ip(core);
        let resumed = core.cpu.rflags & flags::RF != 0;
        core.single = true;
        let step = ops.iter().map(|op| (op.run)(core, op)).find(|step| *step != Step::Next);
        core.single = false;
        if step == Some(Step::Fault) {
            core.cpu.pending_debug = 0;
            let ip = if core.cpu.exc.is_trap { next } else { ip };
            return self.deliver_fault(ip);
        }
        if debugging {
            // An IRET that loads RF means it for the instruction that it returns to.
            let loaded = core.cpu.rflags & if resumed { 0 } else { flags::RF };
            let jumped = core.cpu.gpr[RIP] != next;
            let due = debug::after_instruction(&mut core.cpu, mode.has(ModeKey::TRAP), jumped);
            core.cpu.rflags |= loaded;
            if let Some(due) = due {
                core.cpu.exc = due;
                let ip = core.cpu.gpr[RIP];
                return self.deliver_fault(ip);
            }
        }
        Stop::Service
    }

    /// What is due before the instruction at RIP: a trap that the last one left, or its own breakpoint.
    fn debug_before(&mut self) -> Option<PendingException> {
        let linear = self.linear_ip();
        let cpu = &mut self.core.cpu;
        if cpu.pending_debug != 0 && !cpu.shadow_blocks_debug {
            let address = core::mem::take(&mut cpu.pending_debug);
            return Some(PendingException {
                vector: Some(Exception::Debug),
                error_code: 0,
                address,
                is_trap: true,
            });
        }
        debug::breakpoint_at(cpu, linear)
    }

    fn fetch_single(&mut self) -> Result<Vec<Op<SoftCore>>, Fault> {
        let core = &mut *self.core;
        let mode = core.cpu.mode;
        let mut bytes = Vec::with_capacity(x86_decode::MAX_LENGTH);
        let mut whole = x86_decode::MAX_LENGTH;
        let segmented = mode.0 & (ModeKey::LONG | ModeKey::FLAT_CS) == 0;
        if segmented {
            let limit = u64::from(core.cpu.segment(SegmentIndex::Cs).limit);
            let left = (limit + 1).saturating_sub(core.cpu.gpr[RIP]);
            whole = whole.min(left as usize);
        }
        let start = self.linear_ip();
        let core = &mut *self.core;
        while bytes.len() < whole {
            let linear = start.wrapping_add(bytes.len() as u64);
            let linear = if mode.is_long() { linear } else { linear & 0xFFFF_FFFF };
            let take = ((4096 - (linear & 0xFFF)) as usize).min(whole - bytes.len());
            core.fetch_bytes(linear, take, &mut bytes)?;
            let ops = self.builder.build(&bytes, mode, core.shared.model.features, 1, Watch::Tracked);
            if !ops.is_empty() {
                return Ok(ops.to_vec());
            }
        }
        // Longer than an instruction may be, or beyond CS's limit.
        Err(core.gp(0))
    }
}

impl SoftCore {
    /// Appends `len` bytes of code at `linear` (within a page).
    pub(crate) fn fetch_bytes(&mut self, linear: u64, len: usize, to: &mut Vec<u8>) -> Result<(), Fault> {
        let start = to.len();
        let e = self.tlb.entry(self.cpu.mmu_index, linear);
        let offset = linear ^ e.exec;
        let target = if offset < 4096 {
            Target::Ram(e.host + offset)
        } else {
            self.translate(self.cpu.mmu_index, linear, Access::Fetch)?
        };
        match target {
            Target::Ram(at) => {
                to.resize(start + len, 0);
                self.ram.load_bytes(at, &mut to[start..]);
            }
            Target::Mmio(gpa) => {
                for i in 0..len as u64 {
                    let mut byte = [0xFF];
                    if let Some(io) = &self.io {
                        io.mmio_read(guest_memory::Gpa(gpa + i), &mut byte);
                    }
                    to.push(byte[0]);
                }
            }
        }
        Ok(())
    }
}
