//! Control flow and the stack.
//!
//! An indirect branch looks its target up in the context's table; what is not there, the handler does.

use super::memory::Address;
use super::{Emitter, Jumps, STACK, Stub, home, memory_home};
use crate::asm::{Mem, Patch, Rm, T0, T1, at, cc, field, reg::RBP};
use crate::block::Item;
use crate::engine::CAREFUL;
use crate::liveness::{self, ALL, Flags};
use crate::plan::{self, Access, number};
use crate::table::TABLE_ENTRIES;
use crate::thunks::{slot, slot_at};

impl Emitter<'_> {
    /// As `reach`, for a word at `disp` from a host register.
    fn stack(&mut self, item: &Item, base: u8, disp: i32, write: bool, live: Flags) -> (Mem, Jumps) {
        let access = Access { size: self.word() as u32, write, align: 1 };
        self.reach(Address::Register(base, disp), access, item.stack, live)
    }

    pub(super) fn push(&mut self, item: &Item, guest: u8) {
        let (operand, jumps) = self.stack(item, STACK, -self.word(), true, item.live_after);
        match home(guest) {
            Some(h) => self.a.store_word(self.wide(), operand, h),
            None => {
                let (operand, scratch) = self.with_scratch(operand);
                self.a.load(scratch, memory_home(guest));
                self.a.store(operand, scratch);
            }
        }
        self.move_stack(-self.word());
        self.slow(item, jumps, false);
        self.keeps_t1 = true;
    }

    pub(super) fn push_imm(&mut self, item: &Item, value: i32) {
        let (operand, jumps) = self.stack(item, STACK, -self.word(), true, item.live_after);
        self.a.store_word_imm(self.wide(), operand, value);
        self.move_stack(-self.word());
        self.slow(item, jumps, false);
        self.keeps_t1 = true;
    }

    pub(super) fn push_memory(&mut self, item: &Item) {
        let Some(access) = plan::access(&item.plan, &item.insn) else { return self.call(item) };
        // The stack first: when the operand's check fails, the group's range must have been found.
        let (to, mut jumps) = self.stack(item, STACK, -self.word(), true, item.live_before);
        let (to, _) = self.with_scratch(to);
        let kept = field(slot_at(slot::VALUE));
        self.a.store(kept, to.base);
        let (operand, more) =
            self.reach(Address::Operand(&item.insn), access, item.operand, item.live_before);
        jumps.extend(more);
        let wide = self.wide();
        self.a.load_word(wide, T0, operand);
        self.a.load(T1, kept);
        self.in_t1 = None;
        self.a.store_word(wide, Mem { base: T1, ..to }, T0);
        self.move_stack(-self.word());
        self.slow(item, jumps, false);
    }

    /// Pushes `T0`; the jumps lead to where that is not possible.
    pub(super) fn push_t0(&mut self, item: &Item) -> Jumps {
        let kept = field(slot_at(slot::VALUE));
        self.a.store(kept, T0);
        let (operand, jumps) = self.stack(item, STACK, -self.word(), true, item.live_before);
        let (operand, scratch) = self.with_scratch(operand);
        self.a.load(scratch, kept);
        self.a.store_word(self.wide(), operand, scratch);
        self.move_stack(-self.word());
        jumps
    }

    pub(super) fn pop(&mut self, item: &Item, guest: u8) {
        let (operand, jumps) = self.stack(item, STACK, 0, false, item.live_after);
        self.a.load_word(self.wide(), home(guest).unwrap_or(T0), operand);
        if home(guest) != Some(STACK) {
            self.move_stack(self.word());
        }
        if home(guest).is_none() {
            self.a.store(memory_home(guest), T0);
        }
        self.slow(item, jumps, false);
        self.keeps_t1 = true;
    }

    pub(super) fn leave(&mut self, item: &Item) {
        let (operand, jumps) = self.stack(item, RBP, 0, false, item.live_after);
        let wide = self.wide();
        self.a.load_word(wide, T0, operand);
        self.a.lea_word(wide, STACK, at(RBP, self.word()));
        self.a.mov(RBP, T0);
        self.slow(item, jumps, false);
        self.keeps_t1 = true;
    }

    pub(super) fn jcc(&mut self, item: &Item, condition: u8) {
        self.keeps_t1 = true;
        self.need_host_flags(liveness::effect(&item.insn).0, true);
        let spill = item.live_target != 0 && self.in_host && !self.in_memory;
        let Some(other) = item.other_way() else { return };
        let target = self.linear(other);
        let condition =
            if item.follows == Some(item.insn.near_branch_target()) { condition ^ 1 } else { condition };
        if target != self.place.linear {
            let jump = self.a.jcc_later(condition);
            return self.stubs.push(Stub::Exit { jump, target, spill, done: self.done });
        }
        // A loop: straight back.
        let ends = self.a.jcc_later(condition ^ 1);
        if spill {
            self.spill();
        }
        self.exit_to(target);
        self.a.bind(ends);
    }

    pub(super) fn jmp(&mut self, item: &Item) {
        self.keeps_t1 = true;
        if item.follows.is_some() {
            return;
        }
        self.leave_to(item.insn.near_branch_target(), item.live_target);
    }

    pub(super) fn call_direct(&mut self, item: &Item) {
        let live = if item.follows.is_some() { item.live_after } else { item.live_target };
        let (operand, jumps) = self.stack(item, STACK, -self.word(), true, live);
        self.push_return(item, operand);
        if item.follows.is_none() {
            self.leave_to(item.insn.near_branch_target(), live);
        }
        self.slow(item, jumps, false);
    }

    /// Stores the return address to the checked operand and moves the stack pointer.
    fn push_return(&mut self, item: &Item, operand: Mem) {
        let next = self.linear(item.insn.next_ip());
        match i32::try_from(next as i64) {
            Ok(v) => self.a.store_word_imm(self.wide(), operand, v),
            Err(_) if !self.wide() => self.a.store_word_imm(false, operand, next as u32 as i32),
            Err(_) => {
                let (operand, scratch) = self.with_scratch(operand);
                self.a.mov_imm(scratch, next);
                self.a.store(operand, scratch);
            }
        }
        self.move_stack(-self.word());
    }

    /// The entry for the linear address in `T0` in a context's table, to `T1`; the jump is taken if it lacks it.
    pub(super) fn find(&mut self, context: u8) -> Patch {
        self.in_t1 = None;
        const { assert!(TABLE_ENTRIES == 1 << 16) };
        self.a.modrm(&[], false, false, &[0x0F, 0xB7], T1, Rm::Reg(T0)); // movzx r11d, r10w
        self.a.shift(true, T1, 4);
        let table = field(slot_at(slot::TABLES + usize::from(context)));
        self.a.alu(0x03, T1, table); // add
        self.a.alu(0x3B, T0, at(T1, 0)); // cmp
        self.a.jcc_later(cc::NOT_EQUAL)
    }

    /// The jump is taken if `T0` is not `address`.
    pub(super) fn expect(&mut self, address: u64) -> Patch {
        match i32::try_from(address as i64) {
            Ok(v) => self.a.cmp_imm(T0, v as u32),
            Err(_) => {
                self.in_t1 = None;
                self.a.mov_imm(T1, address);
                self.a.alu(0x3B, T0, T1); // cmp
            }
        }
        self.a.jcc_later(cc::NOT_EQUAL)
    }

    pub(super) fn ret(&mut self, item: &Item, more: u16) {
        let (operand, mut jumps) = self.stack(item, STACK, 0, false, ALL);
        self.spill_if(ALL);
        self.a.load_word(self.wide(), T0, operand);
        if let Some(expected) = item.follows {
            jumps.push(self.expect(self.linear(expected)));
            self.move_stack(self.word());
            self.slow(item, jumps, false);
            self.in_host = false;
            return;
        }
        if let Some(expected) = item.expected {
            let other = self.expect(expected);
            self.move_stack(self.word() + i32::from(more));
            self.exit_to(expected);
            self.a.bind(other);
        }
        jumps.push(self.find(self.block.key & !CAREFUL));
        self.move_stack(self.word() + i32::from(more));
        self.count_before(Rm::Reg(T0));
        self.a.indirect(false, at(T1, 8));
        self.slow(item, jumps, false);
    }

    pub(super) fn indirect(&mut self, item: &Item, call: bool) {
        let insn = &item.insn;
        self.spill_if(ALL);
        let mut jumps = if let Some(access) = plan::access(&item.plan, insn) {
            let (operand, jumps) = self.reach(Address::Operand(insn), access, item.operand, ALL);
            self.a.load_word(self.wide(), T0, operand);
            jumps
        } else {
            let guest = number(insn.op0_register()).unwrap_or(0);
            match home(guest) {
                Some(h) => self.a.modrm(&[], self.wide(), false, &[0x89], h, T0.into()), // mov
                None => self.a.load(T0, memory_home(guest)),
            }
            Jumps::new()
        };
        self.in_host = false;
        if let Some(expected) = item.expected {
            let other = self.expect(expected);
            if call {
                let (operand, more) = self.stack(item, STACK, -self.word(), true, ALL);
                jumps.extend(more);
                self.push_return(item, operand);
            }
            self.exit_to(expected);
            self.a.bind(other);
        }
        jumps.push(self.find(self.block.key & !CAREFUL));
        if call {
            self.a.load(T1, at(T1, 8));
            let next = field(slot_at(slot::JUMP));
            self.a.store(next, T1);
            let target = field(slot_at(slot::VALUE));
            self.a.store(target, T0);
            self.in_t1 = None;
            let (operand, more) = self.stack(item, STACK, -self.word(), true, ALL);
            jumps.extend(more);
            self.push_return(item, operand);
            self.count_before(target.into());
            self.a.indirect(false, next);
        } else {
            self.count_before(Rm::Reg(T0));
            self.a.indirect(false, at(T1, 8));
        }
        self.slow(item, jumps, false);
    }
}
