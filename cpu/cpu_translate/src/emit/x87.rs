//! x87 instructions on the host's unit.

use super::memory::Address;
use super::{Emitter, Stub};
use crate::asm::{Rm, T0, cc, field};
use crate::block::Item;
use crate::encoding::Encoding;
use crate::liveness;
use crate::plan;
use crate::thunks::{slot, slot_at};
use crate::x87::{Kind, MASKS, sets_flags, state};
use x86_decode::OpKind;

impl Emitter<'_> {
    /// At the start of a block that uses the unit. Handlers leave it where it was.
    pub(super) fn need_x87(&mut self) {
        // cmp qword [state], HOST
        self.a.modrm(&[], true, false, &[0x83], 7, field(slot_at(slot::X87_STATE)).into());
        self.a.bytes(&[state::HOST as u8]);
        let jump = self.a.jcc_later(cc::NOT_EQUAL);
        let back = self.a.here();
        self.stubs.push(Stub::LoadX87 { jump, back });
    }

    pub(super) fn x87(&mut self, item: &Item, kind: Kind, encoding: Option<&Encoding>) {
        match (encoding, kind) {
            (None, _) => {
                self.copy(item);
                if sets_flags(&item.insn) {
                    // The manual lets them clear C1 and some processors leave it: FINCSTP, FDECSTP clear it.
                    self.a.bytes(&[0xD9, 0xF7, 0xD9, 0xF6]);
                }
                self.note(item, kind);
            }
            (Some(_), Kind::LoadControl) => self.load_control(item),
            (Some(e), _) => self.x87_memory(item, kind, e),
        }
    }

    fn x87_memory(&mut self, item: &Item, kind: Kind, e: &Encoding) {
        let Some(access) = plan::access(&item.plan, &item.insn) else { return self.call(item) };
        let live = liveness::before(&item.insn, item.live_after);
        let (operand, jumps) = self.reach(Address::Operand(&item.insn), access, item.operand, live);
        e.emit(&mut self.a, e.reg, 0, operand.into());
        self.note(item, kind);
        self.slow(item, jumps, false);
    }

    /// FLDCW of a word that masks everything; others are the handler's, and the code behind another context's. The word is
    /// looked at in a copy: another processor may change the operand.
    fn load_control(&mut self, item: &Item) {
        let Some(access) = plan::access(&item.plan, &item.insn) else { return self.call(item) };
        let live = liveness::before(&item.insn, item.live_after);
        let (operand, mut jumps) = self.reach(Address::Operand(&item.insn), access, item.operand, live);
        self.spill_if(live);
        self.in_host = false;
        let word = field(slot_at(slot::X87_CONTROL));
        self.a.modrm(&[], false, false, &[0x0F, 0xB7], T0, operand.into()); // movzx
        self.a.store(word, T0);
        self.a.modrm(&[], true, false, &[0xF7], 2, Rm::Reg(T0)); // not
        self.a.modrm(&[], false, true, &[0xF6], 0, Rm::Reg(T0)); // test r10b, masks
        self.a.bytes(&[MASKS as u8]);
        jumps.push(self.a.jcc_later(cc::NOT_EQUAL));
        self.a.modrm(&[], false, false, &[0xD9], 5, word.into());
        self.slow_barrier(item, jumps);
    }

    /// Keeps what the unit remembers of its last instruction. Changes no flags.
    fn note(&mut self, item: &Item, kind: Kind) {
        if kind != Kind::Compute {
            return;
        }
        let site = self.site(&item.op, false, true);
        self.a.store_imm(field(slot_at(slot::X87_SITE)), site as i32);
        if item.insn.op0_kind() != OpKind::Memory {
            return;
        }
        self.offset(&item.insn, 0);
        self.a.store(field(slot_at(slot::X87_DATA)), T0);
        self.a.store_imm(field(slot_at(slot::X87_DATA_SEGMENT)), i32::from(item.op.aux) + 1);
    }
}
