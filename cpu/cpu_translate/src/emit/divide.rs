//! DIV and IDIV of 4 and 8 bytes. The host must not raise #DE: operands for which it could, the handler takes.

use super::memory::Address;
use super::{Emitter, Jumps, home, memory_home};
use crate::asm::{
    Rm, T0, T1, at, cc,
    reg::{RAX, RDX},
};
use crate::block::Item;
use crate::liveness::{self, ALL};
use crate::plan::{self, number};
use smallvec::smallvec;

impl Emitter<'_> {
    pub(super) fn divide(&mut self, item: &Item, signed: bool, wide: bool) {
        let insn = &item.insn;
        let live = liveness::before(insn, item.live_after);
        let mut jumps = Jumps::new();
        if let Some(access) = plan::access(&item.plan, insn) {
            let (operand, more) = self.reach(Address::Operand(insn), access, item.operand, live);
            self.spill_if(live);
            jumps = more;
            self.a.modrm(&[], wide, false, &[0x8B], T1, operand.into());
        } else {
            self.spill_if(live);
            let guest = number(insn.op0_register()).unwrap_or(0);
            match home(guest) {
                Some(h) => self.a.mov(T1, h),
                None => self.a.load(T1, memory_home(guest)),
            }
        }
        jumps.extend(if signed { self.fits_signed(wide) } else { self.fits(wide) });
        self.a.modrm(&[], wide, false, &[0xF7], if signed { 7 } else { 6 }, Rm::Reg(T1));
        (self.in_host, self.in_memory) = (true, false);
        self.slow(item, jumps, item.live_after & ALL != 0);
    }

    /// The quotient fits if the divisor is above the dividend's upper half; that is never so for zero.
    fn fits(&mut self, wide: bool) -> Jumps {
        self.a.modrm(&[], wide, false, &[0x3B], RDX, Rm::Reg(T1)); // cmp
        smallvec![self.a.jcc_later(cc::ABOVE_OR_EQUAL)]
    }

    /// The quotient surely fits if the upper half is but the lower one's sign, and the divisor neither 0 nor -1.
    fn fits_signed(&mut self, wide: bool) -> Jumps {
        self.a.modrm(&[], wide, false, &[0x8B], T0, Rm::Reg(RAX)); // mov
        self.a.modrm(&[], wide, false, &[0xC1], 7, Rm::Reg(T0)); // sar
        self.a.bytes(&[if wide { 63 } else { 31 }]);
        self.a.modrm(&[], wide, false, &[0x3B], T0, Rm::Reg(RDX)); // cmp
        let other = self.a.jcc_later(cc::NOT_EQUAL);
        self.a.modrm(&[], wide, false, &[0x8D], T0, at(T1, 1).into()); // lea
        self.a.modrm(&[], wide, false, &[0x83], 7, Rm::Reg(T0)); // cmp
        self.a.bytes(&[1]);
        smallvec![other, self.a.jcc_later(cc::BELOW_OR_EQUAL)]
    }
}
