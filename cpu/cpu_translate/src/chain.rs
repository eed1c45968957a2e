//! Accesses whose address hangs on another load: until that is there, the host's processor cannot look their page up.

use crate::block::Item;
use crate::plan::{Plan, number};
use x86_decode::{Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, Register};

/// Fills in [`Item::chained`]. Twice through the block: it may be a loop.
pub fn find_chains(items: &mut [Item]) {
    let mut factory = InstructionInfoFactory::new();
    // Bits of the registers that hang on a load.
    let mut loaded = 0u16;
    for n in (0..items.len()).chain(0..items.len()) {
        let item = &mut items[n];
        item.chained = (address(&item.insn) & loaded) != 0;
        loaded = behind(&mut factory, item, loaded);
    }
}

fn bit(r: Register) -> u16 {
    // RSP hangs on nothing that matters.
    number(r).filter(|n| *n != 4).map_or(0, |n| 1 << n)
}

/// The registers that make the memory operand's address.
fn address(insn: &Instruction) -> u16 {
    bit(insn.memory_base()) | bit(insn.memory_index())
}

fn behind(factory: &mut InstructionInfoFactory, item: &Item, loaded: u16) -> u16 {
    let insn = &item.insn;
    let info = factory.info(insn);
    let loads = insn.mnemonic() != M::Lea
        && info.used_memory().iter().any(|m| !matches!(m.access(), OpAccess::Write | OpAccess::CondWrite));
    let (mut read, mut written) = (0, 0);
    for used in info.used_registers() {
        let r = bit(used.register());
        match used.access() {
            OpAccess::Read | OpAccess::CondRead => read |= r,
            OpAccess::Write | OpAccess::CondWrite => written |= r,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (read, written) = (read | r, written | r),
            _ => {}
        }
    }
    let hangs = loads || matches!(item.plan, Plan::Call) || read & loaded != 0;
    if hangs { loaded | written } else { loaded & !written }
}
