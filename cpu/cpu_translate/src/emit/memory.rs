//! Memory operands: the inline soft TLB.
//!
//! The check leaves the offset in the page in `T0` and the page's offset in guest RAM in `T1`, so that the
//! operand is `gs:[T0 + T1]`. It fails for whatever the TLB does not hold, and for operands that cross a page.

use super::{Emitter, Stub, memory_home};
use crate::asm::{CONTEXT, Mem, Patch, Rm, T0, T1, at, cc, field};
use crate::block::Item;
use crate::emit::home;
use cpu_soft::translate::layout;
use x86_decode::{Instruction, Register};

/// The checked operand.
pub const OPERAND: Mem = Mem { base: T0, index: Some((T1, 0)), disp: 0, ram: true };
/// The checked operand once `T1` was added to `T0`.
pub const OPERAND_T0: Mem = Mem { base: T0, index: None, disp: 0, ram: true };

/// Where an access goes.
#[derive(Clone, Copy)]
pub enum Address<'a> {
    /// To the instruction's memory operand.
    Operand(&'a Instruction),
    /// To a host register's address plus a displacement.
    Register(u8, i32),
}

/// An access.
#[derive(Clone, Copy)]
pub struct Access<'a> {
    /// Where.
    pub address: Address<'a>,
    /// Bytes.
    pub size: u32,
    /// It is written, or read and written.
    pub write: bool,
    /// It must be a multiple of this (a power of two); 1 if not.
    pub align: u32,
}

impl Emitter<'_> {
    /// Emits address and check; the jumps lead to where it fails.
    pub(super) fn check(&mut self, access: Access<'_>) -> Vec<Patch> {
        match access.address {
            Address::Operand(insn) => self.linear_address(insn),
            Address::Register(base, disp) => self.a.lea(T0, at(base, disp)),
        }
        let array = layout::tlb(self.mmu_index);
        let entry = |offset: usize| Mem {
            base: CONTEXT,
            index: Some((T1, 0)),
            disp: (array + offset) as i32,
            ram: false,
        };
        self.a.mov(T1, T0);
        self.a.shift(false, T1, 7);
        self.a.and_imm32(T1, (layout::TLB_ENTRIES as u32 - 1) << 5);
        let tag = if access.write { layout::TLB_WRITE } else { layout::TLB_READ };
        self.a.alu(0x33, T0, entry(tag)); // xor
        self.a.cmp_imm(T0, 4096 - access.size);
        let mut jumps = vec![self.a.jcc_later(cc::ABOVE)];
        if access.align > 1 {
            // test r10b, align - 1
            self.a.modrm(&[], false, true, &[0xF6], 0, Rm::Reg(T0));
            self.a.bytes(&[access.align as u8 - 1]);
            jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
        }
        self.a.load(T1, entry(layout::TLB_HOST));
        jumps
    }

    /// The handler does `item` when one of `jumps` is taken, and comes back to where code is emitted now.
    pub(super) fn slow(&mut self, item: &Item, jumps: Vec<Patch>, reload: bool) {
        self.slow_site(item, jumps, reload, false);
    }
    /// As `slow`; what is behind is looked up anew then.
    pub(super) fn slow_barrier(&mut self, item: &Item, jumps: Vec<Patch>) {
        self.slow_site(item, jumps, false, true);
    }
    fn slow_site(&mut self, item: &Item, jumps: Vec<Patch>, reload: bool, barrier: bool) {
        let site = self.site(&item.op, barrier, item.sees_x87);
        let back = self.a.here();
        self.stubs.push(Stub::Slow { jumps, site, back, reload });
    }

    /// The offset of the memory operand in its segment, to `T0`. Changes no flags, `T1` perhaps.
    pub(super) fn offset(&mut self, insn: &Instruction) {
        if insn.memory_base() == Register::RIP {
            let target = self.linear(insn.memory_displacement64());
            return self.a.mov_imm(T0, target);
        }
        match self.host_address(insn) {
            Some(m) => self.a.lea(T0, m),
            None => self.a.mov_imm(T0, insn.memory_displacement64()),
        }
    }

    /// The linear address of the memory operand, to `T0`. Changes flags for FS and GS only, `T1` always.
    fn linear_address(&mut self, insn: &Instruction) {
        self.offset(insn);
        let segment = match insn.memory_segment() {
            Register::FS => x86_defs::SegmentIndex::Fs,
            Register::GS => x86_defs::SegmentIndex::Gs,
            _ => return,
        };
        self.a.alu(0x03, T0, field(layout::SEG_BASE + segment as usize * 8)); // add
    }

    /// The operand's address in host registers (`T0` and `T1` may be loaded); `None` without base and index.
    pub(super) fn host_address(&mut self, insn: &Instruction) -> Option<Mem> {
        let number = |r: Register| r as u8 - Register::RAX as u8;
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64() as i32;
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        let index = (index != Register::None).then(|| (self.value(number(index), T1), scale));
        let base = match base {
            Register::None => {
                index?;
                // Every form of ours has a base.
                self.a.mov_imm32(T0, 0);
                T0
            }
            r => match home(number(r)) {
                Some(h) => h,
                None => {
                    self.a.load(T0, memory_home(number(r)));
                    T0
                }
            },
        };
        Some(Mem { base, index, disp, ram: false })
    }
}
