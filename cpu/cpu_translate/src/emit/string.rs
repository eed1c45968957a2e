//! REP MOVS and REP STOS of 64-bit code: the host's own on guest RAM, where each range lies in one page that the TLB holds
//! and the way is upwards. The handler does what differs, and all that faults.

use super::{Emitter, Jumps};
use crate::asm::{Mem, Patch, Rm, T0, T1, cc, field, reg::*};
use crate::block::Item;
use crate::engine::CAREFUL;
use crate::plan::Access;
use crate::thunks::{slot, slot_at};
use cpu_soft::translate::layout;
use smallvec::smallvec;
use x86_defs::cpuid::Feature;
use x86_defs::flags::DF;

const MOVS: u8 = 0xA4;
const STOS: u8 = 0xAA;

impl Emitter<'_> {
    pub(super) fn repeat(&mut self, item: &Item, moves: bool, bytes: u8) {
        self.spill_if(item.live_before);
        self.in_host = false;
        self.a.alu(0x85, RCX, RCX); // test
        let nothing = self.a.jcc_later(cc::EQUAL);
        self.test(layout::RFLAGS, DF);
        let mut jumps: Jumps = smallvec![self.a.jcc_later(cc::NOT_EQUAL)];
        self.a.cmp_imm(RCX, 4096 / u32::from(bytes));
        jumps.push(self.a.jcc_later(cc::ABOVE));
        jumps.extend(self.distance(RDI, bytes, true));
        if moves {
            self.copy_range(bytes, &mut jumps);
        } else {
            self.fill_range(bytes);
        }
        self.a.bind(nothing);
        self.slow(item, jumps, false);
    }

    /// Bytes from the guest's address in `register` to where that is in the host, to `T1`; the jumps are taken where RCX
    /// elements from there on are not in one page that the TLB holds.
    fn distance(&mut self, register: u8, bytes: u8, write: bool) -> [Patch; 2] {
        let scale = bytes.trailing_zeros() as u8;
        self.a.lea(T0, Mem { base: register, index: Some((RCX, scale)), disp: -1, ram: false });
        self.a.alu(0x33, T0, register); // xor
        self.a.cmp_imm(T0, 4095);
        let crosses = self.a.jcc_later(cc::ABOVE);
        self.a.mov(T0, register);
        self.find_entry();
        let other = self.compare(Access { size: 1, write, align: 1 });
        self.a.load(T1, self.entry(layout::TLB_HOST));
        self.a.alu(0x03, T1, T0); // add
        self.a.alu(0x03, T1, field(slot_at(slot::RAM))); // add
        self.a.alu(0x2B, T1, register); // sub
        self.in_t1 = None;
        [crosses, other]
    }

    /// With the destination's distance in `T1`.
    fn copy_range(&mut self, bytes: u8, jumps: &mut Jumps) {
        let kept = field(slot_at(slot::VALUE));
        self.a.store(kept, T1);
        jumps.extend(self.distance(RSI, bytes, false));
        self.a.load(T0, kept);
        let bytewise = bytes > 1 && self.prefers_bytes();
        if bytewise {
            // Onto itself, closer than an element, bytes are another copy.
            self.a.alu(0x03, T0, RDI); // add
            self.a.alu(0x2B, T0, RSI); // sub
            self.a.alu(0x2B, T0, T1); // sub
            self.a.cmp_imm(T0, bytes.into());
            jumps.push(self.a.jcc_later(cc::BELOW));
            self.a.load(T0, kept);
            self.a.shift(true, RCX, bytes.trailing_zeros() as u8);
        }
        self.a.alu(0x03, RDI, T0); // add
        self.a.alu(0x03, RSI, T1); // add
        self.repeated(MOVS, if bytewise { 1 } else { bytes });
        self.a.alu(0x2B, RDI, T0); // sub
        self.a.alu(0x2B, RSI, T1); // sub
    }

    /// With the destination's distance in `T1`.
    fn fill_range(&mut self, bytes: u8) {
        self.a.alu(0x03, RDI, T1); // add
        if bytes >= 4 && self.prefers_bytes() {
            self.a.modrm(&[], bytes == 8, false, &[0x85], RAX, Rm::Reg(RAX)); // test
            let other = self.a.jcc_later(cc::NOT_EQUAL);
            self.a.shift(true, RCX, bytes.trailing_zeros() as u8);
            self.repeated(STOS, 1);
            let filled = self.a.jmp_later();
            self.a.bind(other);
            self.repeated(STOS, bytes);
            self.a.bind(filled);
        } else {
            self.repeated(STOS, bytes);
        }
        self.a.alu(0x2B, RDI, T1); // sub
    }

    fn repeated(&mut self, opcode: u8, bytes: u8) {
        match bytes {
            1 => self.a.bytes(&[0xF3, opcode]),
            2 => self.a.bytes(&[0x66, 0xF3, opcode + 1]),
            4 => self.a.bytes(&[0xF3, opcode + 1]),
            _ => self.a.bytes(&[0xF3, 0x48, opcode + 1]),
        }
    }

    /// The host starts REP MOVSB and REP STOSB faster than those of larger elements.
    fn prefers_bytes(&self) -> bool {
        self.engine.host(self.block.key & !CAREFUL).general.has(Feature::Fsrm)
    }
}
