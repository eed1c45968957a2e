//! Control flow and the stack.
//!
//! An indirect branch looks its target up in the context's table; what is not there, the handler does.

use super::memory::{Access, Address, OPERAND, OPERAND_T0};
use super::{Emitter, STACK, Stub, home, memory_home};
use crate::asm::{Patch, Rm, T0, T1, at, cc, field, reg::RBP};
use crate::block::Item;
use crate::engine::TABLE_ENTRIES;
use crate::liveness::{self, ALL};
use crate::plan::number;
use crate::thunks::{slot, slot_at};
use x86_decode::OpKind;

fn stack(disp: i32, write: bool) -> Access<'static> {
    Access { address: Address::Register(STACK, disp), size: 8, write, align: 1 }
}

impl Emitter<'_> {
    /// Checks an access; the host's flags are lost.
    fn checked(&mut self, access: Access<'_>, live: liveness::Flags) -> Vec<Patch> {
        self.spill_if(live);
        let jumps = self.check(access);
        self.in_host = false;
        jumps
    }

    pub(super) fn push(&mut self, item: &Item, guest: u8) {
        let jumps = self.checked(stack(-8, true), item.live_after);
        match home(guest) {
            Some(h) => self.a.store(OPERAND, h),
            None => {
                self.a.alu(0x03, T0, T1); // add
                self.a.load(T1, memory_home(guest));
                self.a.store(OPERAND_T0, T1);
            }
        }
        self.a.lea(STACK, at(STACK, -8));
        self.slow(item, jumps, false);
    }

    pub(super) fn push_imm(&mut self, item: &Item, value: i32) {
        let jumps = self.checked(stack(-8, true), item.live_after);
        self.a.store_imm(OPERAND, value);
        self.a.lea(STACK, at(STACK, -8));
        self.slow(item, jumps, false);
    }

    pub(super) fn pop(&mut self, item: &Item, guest: u8) {
        let jumps = self.checked(stack(0, false), item.live_after);
        self.a.load(home(guest).unwrap_or(T0), OPERAND);
        self.a.lea(STACK, at(STACK, 8));
        if home(guest).is_none() {
            self.a.store(memory_home(guest), T0);
        }
        self.slow(item, jumps, false);
    }

    pub(super) fn leave(&mut self, item: &Item) {
        let access = Access { address: Address::Register(RBP, 0), size: 8, write: false, align: 1 };
        let jumps = self.checked(access, item.live_after);
        self.a.load(T0, OPERAND);
        self.a.lea(STACK, at(RBP, 8));
        self.a.mov(RBP, T0);
        self.slow(item, jumps, false);
    }

    pub(super) fn jcc(&mut self, item: &Item, condition: u8) {
        self.need_host_flags();
        let spill = item.live_target != 0 && !self.in_memory;
        let target = self.linear(item.insn.near_branch_target());
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
        self.leave_to(item.insn.near_branch_target(), item.live_target);
    }

    pub(super) fn call_direct(&mut self, item: &Item) {
        let jumps = self.checked(stack(-8, true), item.live_target);
        self.push_return(item);
        self.leave_to(item.insn.near_branch_target(), item.live_target);
        self.slow(item, jumps, false);
    }

    /// Stores the return address to the checked operand and moves the stack pointer.
    fn push_return(&mut self, item: &Item) {
        let next = self.linear(item.insn.next_ip());
        match i32::try_from(next as i64) {
            Ok(v) => self.a.store_imm(OPERAND, v),
            Err(_) => {
                self.a.lea(T0, crate::asm::Mem { ram: false, ..OPERAND });
                self.a.mov_imm(T1, next);
                self.a.store(OPERAND_T0, T1);
            }
        }
        self.a.lea(STACK, at(STACK, -8));
    }

    /// The entry for the linear address in `T0`, to `T1`; the jump is taken if the table lacks it.
    fn find(&mut self) -> Patch {
        self.a.modrm(&[], false, false, &[0x8B], T1, Rm::Reg(T0)); // mov r11d, r10d
        self.a.and_imm32(T1, TABLE_ENTRIES as u32 - 1);
        self.a.shift(true, T1, 4);
        let table = field(slot_at(slot::TABLES + usize::from(self.block.context)));
        self.a.alu(0x03, T1, table); // add
        self.a.alu(0x3B, T0, at(T1, 0)); // cmp
        self.a.jcc_later(cc::NOT_EQUAL)
    }

    pub(super) fn ret(&mut self, item: &Item, more: u16) {
        let mut jumps = self.checked(stack(0, false), ALL);
        self.a.load(T0, OPERAND);
        jumps.push(self.find());
        self.count();
        self.a.lea(STACK, at(STACK, 8 + i32::from(more)));
        self.a.indirect(false, at(T1, 8));
        self.slow(item, jumps, false);
    }

    pub(super) fn indirect(&mut self, item: &Item, call: bool) {
        let insn = &item.insn;
        self.spill_if(ALL);
        let mut jumps = if insn.op0_kind() == OpKind::Memory {
            let access = Access { address: Address::Operand(insn), size: 8, write: false, align: 1 };
            let jumps = self.checked(access, ALL);
            self.a.load(T0, OPERAND);
            jumps
        } else {
            let guest = number(insn.op0_register()).unwrap_or(0);
            match home(guest) {
                Some(h) => self.a.mov(T0, h),
                None => self.a.load(T0, memory_home(guest)),
            }
            Vec::new()
        };
        jumps.push(self.find());
        self.in_host = false;
        if call {
            self.a.load(T1, at(T1, 8));
            let next = field(slot_at(slot::JUMP));
            self.a.store(next, T1);
            jumps.extend(self.check(stack(-8, true)));
            self.push_return(item);
            self.count();
            self.a.indirect(false, next);
        } else {
            self.count();
            self.a.indirect(false, at(T1, 8));
        }
        self.slow(item, jumps, false);
    }
}
