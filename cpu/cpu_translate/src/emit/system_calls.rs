//! SYSCALL and SYSRET of 64-bit code, which go from one mode's code to another's without the handlers
//! (`x86_emulate::system::syscall`, SDM vol. 2B).
//!
//! Everything that could be otherwise than it was when the code was emitted is compared first; the handler does what
//! differs, and all that faults. Modes of blocks exclude single steps, breakpoints and alignment checks.

use super::{Emitter, Jumps, memory_home};
use crate::asm::{Mem, Patch, Rm, T0, T1, at, cc, field, reg::RCX};
use crate::block::Item;
use crate::engine::CAREFUL;
use crate::liveness::ALL;
use crate::thunks::{slot, slot_at};
use crate::x87::state;
use core::mem::offset_of;
use cpu_soft::translate::layout;
use smallvec::smallvec;
use x86_defs::control::{CR4_SMAP, EFER_SCE};
use x86_defs::{Segment, SegmentIndex, flags};
use x86_emulate::ModeKey;
use x86_emulate::system::syscall::{CODE_64, STACK, SYSRET_FLAGS};

const R11: u8 = 11;

impl Emitter<'_> {
    pub(super) fn syscall(&mut self, item: &Item) {
        let calls = self.system_calls;
        self.spill_if(ALL);
        let mut jumps: Jumps = smallvec![self.unless(layout::EFER, EFER_SCE), self.unless_in_core()];
        if calls.smap {
            // AC off: supervisor accesses as SMAP has them.
            jumps.push(self.unless(layout::CR4, CR4_SMAP));
            jumps.push(self.unless(layout::SFMASK, flags::AC));
        } else {
            self.test(layout::CR4, CR4_SMAP);
            jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
        }
        self.a.load(T0, field(layout::LSTAR));
        jumps.push(self.expect(calls.entry));

        self.a.load(T0, field(layout::RAW_FLAGS));
        self.image(4, flags::STATUS); // and
        self.a.alu(0x0B, T0, field(layout::RFLAGS)); // or
        self.image(4, !flags::RF); // and
        self.a.store(memory_home(R11), T0);
        self.a.mov_imm(RCX, self.linear(item.insn.next_ip()));
        self.a.load(T1, field(layout::SFMASK));
        self.a.modrm(&[], true, false, &[0xF7], 2, Rm::Reg(T1)); // not
        self.a.alu(0x23, T0, Rm::Reg(T1)); // and
        self.flags_from_image();

        self.a.modrm(&[], false, false, &[0x0F, 0xB7], T0, field(layout::STAR + 4).into()); // movzx
        self.image(4, !3); // and
        self.segment(SegmentIndex::Cs, CODE_64);
        self.a.lea(T0, at(T0, 8));
        self.segment(SegmentIndex::Ss, STACK);
        self.level(0, if calls.smap { 1 } else { 2 });
        // Another mode's code: not without a guard, be it in the same page.
        self.exit(calls.entry, false, true);
        self.slow_barrier(item, jumps);
    }

    pub(super) fn sysret(&mut self, item: &Item) {
        let user = self.engine.sibling(self.block.key & !CAREFUL, self.mode_at(3), 0);
        let Some(user) = user else { return self.call_handler(&item.op, true, item.sees_x87) };
        self.spill_if(ALL);
        let mut jumps: Jumps = smallvec![self.unless(layout::EFER, EFER_SCE), self.unless_in_core()];
        self.test(layout::GPR + usize::from(R11) * 8, flags::TF | flags::AC);
        jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
        jumps.push(self.wanted());
        // What is not canonical has no translation, and no entry is like it.
        self.a.mov(T0, RCX);
        jumps.push(self.find(user));
        let next = field(slot_at(slot::JUMP));
        self.a.load(T1, at(T1, 8));
        self.a.store(next, T1);

        self.a.load(T0, memory_home(R11));
        self.image(4, SYSRET_FLAGS); // and
        self.flags_from_image();
        self.a.modrm(&[], false, false, &[0x0F, 0xB7], T0, field(layout::STAR + 6).into()); // movzx
        self.a.lea(T0, at(T0, 16));
        self.image(1, 3); // or
        self.segment(SegmentIndex::Cs, CODE_64 | 3 << 5);
        self.a.modrm(&[], false, false, &[0x0F, 0xB7], T0, field(layout::STAR + 6).into()); // movzx
        self.a.lea(T0, at(T0, 8));
        self.image(1, 3); // or
        self.segment(SegmentIndex::Ss, STACK | 3 << 5);
        self.level(3, 0);
        self.count_before(Rm::Reg(RCX));
        self.a.indirect(false, next);
        self.slow_barrier(item, jumps);
    }

    /// Arithmetic of `T0` with an immediate.
    fn image(&mut self, operation: u8, with: u64) {
        self.a.modrm(&[], true, false, &[0x81], operation, Rm::Reg(T0));
        self.a.bytes(&(with as u32).to_le_bytes());
    }

    /// `test dword [offset], mask`.
    pub(super) fn test(&mut self, offset: usize, mask: u64) {
        self.a.modrm(&[], false, false, &[0xF7], 0, field(offset).into());
        self.a.bytes(&(mask as u32).to_le_bytes());
    }
    /// The jump is taken if the bit is not set.
    fn unless(&mut self, offset: usize, bit: u64) -> Patch {
        self.test(offset, bit);
        self.a.jcc_later(cc::EQUAL)
    }

    /// The jump is taken if the x87 unit is not in the core: what it remembers is of the segments of now.
    fn unless_in_core(&mut self) -> Patch {
        self.a.modrm(&[], true, false, &[0x83], 7, field(slot_at(slot::X87_STATE)).into()); // cmp
        self.a.bytes(&[state::CORE as u8]);
        self.a.jcc_later(cc::NOT_EQUAL)
    }

    /// All of RFLAGS from `T0`.
    fn flags_from_image(&mut self) {
        self.a.store(field(layout::RAW_FLAGS), T0);
        self.image(4, !flags::STATUS); // and
        self.image(1, flags::FIXED_1); // or
        self.a.store(field(layout::RFLAGS), T0);
    }

    /// Makes a segment register flat, with the selector in `T0`.
    fn segment(&mut self, index: SegmentIndex, attributes: u16) {
        let part = |offset: usize| field(layout::segment(index) + offset);
        let word = |a: &mut crate::asm::Asm, to: Mem, from: u8| {
            a.modrm(&[0x66], false, false, &[0x89], from, to.into());
        };
        word(&mut self.a, part(offset_of!(Segment, selector)), T0);
        self.a.mov_imm32(T1, attributes.into());
        word(&mut self.a, part(offset_of!(Segment, attributes)), T1);
        self.a.modrm(&[], false, false, &[0xC7], 0, part(offset_of!(Segment, limit)).into()); // mov
        self.a.bytes(&u32::MAX.to_le_bytes());
        self.a.store_imm(part(offset_of!(Segment, base)), 0);
        self.byte(layout::segment(index) + offset_of!(Segment, unusable), 0);
        self.a.store_imm(field(layout::SEG_BASE + index as usize * 8), 0);
    }

    fn byte(&mut self, offset: usize, value: u8) {
        self.a.modrm(&[], false, false, &[0xC6], 0, field(offset).into());
        self.a.bytes(&[value]);
    }

    /// The mode that the block's becomes at privilege level `cpl` with the segments of these instructions.
    fn mode_at(&self, cpl: u8) -> ModeKey {
        ModeKey(self.place.mode.0 & !(3 << 3) | u32::from(cpl) << 3 | ModeKey::BIG_STACK)
    }

    fn level(&mut self, cpl: u8, mmu_index: u8) {
        self.byte(layout::CPL, cpl);
        self.byte(layout::MMU_INDEX, mmu_index);
        self.a.modrm(&[], false, false, &[0xC7], 0, field(layout::MODE).into()); // mov
        self.a.bytes(&self.mode_at(cpl).0.to_le_bytes());
        (self.in_host, self.in_memory, self.in_t1) = (false, true, None);
    }
}
