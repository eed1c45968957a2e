//! Instructions of the system's that need no call, and instructions whose last bytes are in the next page.

use super::{Emitter, Jumps, Stub, home, memory_home};
use crate::asm::{Mem, Patch, Rm, T0, T1, at, cc, field};
use crate::block::{Item, Source};
use crate::liveness::ALL;
use crate::thunks::{slot, slot_at};
use cpu_soft::translate::layout;
use smallvec::smallvec;
use x86_defs::{SegmentIndex, flags};

impl Emitter<'_> {
    /// At the start of a block that checks itself: its bytes in RAM must be those that it was made from.
    pub(super) fn check_itself(&mut self, source: &Source) {
        let first = self.place.at as usize & 0xFFF;
        let bytes = &source.page[first..usize::from(source.end).clamp(first, source.page.len())];
        self.a.mov_imm(T1, self.place.at);
        let mut jumps = Jumps::new();
        let operand = |at: usize| Mem { base: T1, index: None, disp: at as i32, ram: true };
        let mut done = 0;
        while done < bytes.len() {
            // The last eight overlap others rather than be less.
            let n = if bytes.len() >= 8 { 8 } else { bytes.len() - done };
            let at = done.min(bytes.len() - n);
            if n == 8 {
                let mut word = [0; 8];
                word.copy_from_slice(&bytes[at..at + 8]);
                self.a.mov_imm(T0, u64::from_le_bytes(word));
                self.a.alu(0x3B, T0, operand(at)); // cmp
                jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
                done = at + 8;
            } else {
                let n = if n >= 4 { 4 } else { 1 };
                let opcode = if n == 4 { 0x81 } else { 0x80 };
                self.a.modrm(&[], false, false, &[opcode], 7, operand(at).into()); // cmp
                self.a.bytes(&bytes[at..at + n]);
                jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
                done = at + n;
            }
        }
        self.stubs.push(Stub::Stale { jumps });
    }

    /// Before an instruction that reaches into the next page, which is none of the block's and may change: its bytes there
    /// must be the same and executable. Otherwise the interpreter does it.
    pub(super) fn check_behind(&mut self, item: &Item) {
        self.spill_if(item.live_before);
        let linear = (self.place.linear | 0xFFF).wrapping_add(1);
        let entry = layout::tlb_entry(self.mmu_index, linear);
        self.a.mov_imm(T0, linear);
        self.a.alu(0x3B, T0, field(entry + layout::TLB_EXEC)); // cmp
        let mut jumps: Jumps = smallvec![self.a.jcc_later(cc::NOT_EQUAL)];
        self.a.load(T1, field(entry + layout::TLB_HOST));
        let mut bytes = item.behind();
        let mut disp = 0;
        while !bytes.is_empty() {
            let n = if bytes.len() >= 4 { 4 } else { 1 };
            let opcode = if n == 4 { 0x81 } else { 0x80 };
            let operand = Mem { base: T1, index: None, disp, ram: true };
            self.a.modrm(&[], false, false, &[opcode], 7, operand.into()); // cmp
            self.a.bytes(&bytes[..n]);
            jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
            bytes = &bytes[n..];
            disp += n as i32;
        }
        let (target, done) = (self.linear(self.at), self.done - 1);
        self.stubs.push(Stub::Interpreted { jumps, target, done });
        (self.in_host, self.in_t1) = (false, None);
    }

    pub(super) fn push_flags(&mut self, item: &Item) {
        self.spill_if(ALL);
        let image = |a: &mut crate::asm::Asm, opcode: u8, mask: u64| {
            a.modrm(&[], false, false, &[0x81], opcode, Rm::Reg(T0));
            a.bytes(&(mask as u32).to_le_bytes());
        };
        self.a.load(T0, field(layout::RAW_FLAGS));
        image(&mut self.a, 4, flags::STATUS); // and
        self.a.alu(0x0B, T0, field(layout::RFLAGS)); // or
        image(&mut self.a, 4, !(flags::VM | flags::RF)); // and
        self.in_host = false;
        let jumps = self.push_t0(item);
        self.slow(item, jumps, false);
    }

    pub(super) fn cli(&mut self, item: &Item) {
        self.spill_if(item.live_before);
        self.rflags(4, !flags::IF); // and
    }

    pub(super) fn cld(&mut self, item: &Item) {
        self.spill_if(item.live_before);
        self.rflags(4, !flags::DF); // and
    }

    /// While nobody wants anything the shadow behind it hides nothing, and blocks ask before they end only.
    pub(super) fn sti(&mut self, item: &Item) {
        self.spill_if(ALL);
        let wanted = self.wanted();
        self.rflags(1, flags::IF); // or
        self.slow_barrier(item, smallvec![wanted]);
    }

    /// The jump is taken if somebody wants something. Changes flags and `T0`.
    pub(super) fn wanted(&mut self) -> Patch {
        self.a.load(T0, field(slot_at(slot::ATTENTION)));
        self.a.modrm(&[], false, false, &[0x83], 7, at(T0, 0).into()); // cmp dword [T0], 0
        self.a.bytes(&[0]);
        self.a.jcc_later(cc::NOT_EQUAL)
    }

    /// Arithmetic of RFLAGS (but for the arithmetic flags) with an immediate.
    fn rflags(&mut self, operation: u8, with: u64) {
        self.a.modrm(&[], false, false, &[0x81], operation, field(layout::RFLAGS).into());
        self.a.bytes(&(with as u32).to_le_bytes());
        self.in_host = false;
    }

    pub(super) fn read_cr2(&mut self, to: u8) {
        let host = home(to).unwrap_or(T0);
        self.a.load(host, field(layout::CR2));
        if home(to).is_none() {
            self.a.store(memory_home(to), host);
        }
        self.keeps_t1 = true;
    }

    pub(super) fn swap_gs(&mut self) {
        let (segment, other) = (field(layout::GS), field(layout::KERNEL_GS));
        self.in_t1 = None;
        self.a.load(T0, segment);
        self.a.load(T1, other);
        self.a.store(other, T0);
        self.a.store(segment, T1);
        self.a.store(field(layout::SEG_BASE + SegmentIndex::Gs as usize * 8), T1);
    }
}
