//! #SS instead of #GP: which of them a non-canonical address raises depends on the instruction's segment
//! (SDM vol. 3, 6.15), which nothing on the way of an access knows in 64-bit mode.
//!
//! `mmu.rs` raises #GP(0) and leaves the address in `exc.address`; before delivery the run loop asks here,
//! and the instruction is decoded once more.

use crate::core::SoftCore;
use crate::mmu::{Access, Target};
use alloc::vec::Vec;
use x86_decode::{Decoded, Instruction, Mnemonic, OpKind, Register, decode};
use x86_defs::Exception;
use x86_emulate::Cpu;
use x86_emulate::cpu::{RIP, reg};

/// How far from its pointer an instruction may touch the stack (the deepest ENTER).
const STACK_REACH: u64 = 512;

impl SoftCore {
    /// Turns the #GP of a non-canonical address that waits in `cpu.exc` into #SS if it belongs to the stack.
    #[cold]
    pub(crate) fn refine_non_canonical(&mut self) {
        let waiting = self.cpu.exc;
        let address = waiting.address;
        if let Some(insn) = self.instruction_at_rip()
            && uses_stack_at(&self.cpu, &insn, address)
        {
            self.cpu.exc.vector = Some(Exception::StackFault);
        }
        self.cpu.exc.address = 0;
    }

    fn instruction_at_rip(&mut self) -> Option<Instruction> {
        let waiting = self.cpu.exc;
        let mut bytes = Vec::with_capacity(x86_decode::MAX_LENGTH);
        for i in 0..x86_decode::MAX_LENGTH as u64 {
            let at = self.cpu.gpr[RIP].wrapping_add(i);
            match self.translate(self.cpu.mmu_index, at, Access::Fetch) {
                Ok(Target::Ram(at)) => bytes.push(self.ram.load::<u8>(at)),
                _ => break,
            }
        }
        self.cpu.exc = waiting;
        match decode(&bytes, 64, self.cpu.gpr[RIP], self.shared.model.features) {
            Decoded::Instruction(insn) => Some(insn),
            _ => None,
        }
    }
}

fn uses_stack_at(cpu: &Cpu, insn: &Instruction, address: u64) -> bool {
    let explicit = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if explicit && insn.memory_segment() == Register::SS {
        return true;
    }
    if !insn.is_stack_instruction() {
        return false;
    }
    let pointer = match insn.mnemonic() {
        Mnemonic::Leave => cpu.gpr[reg::RBP],
        _ => cpu.gpr[reg::RSP],
    };
    let near = |pointer: u64| address.wrapping_sub(pointer).wrapping_add(STACK_REACH) < 2 * STACK_REACH;
    // ENTER copies from the frame pointer's side, too.
    near(pointer) || insn.mnemonic() == Mnemonic::Enter && near(cpu.gpr[reg::RBP])
}
