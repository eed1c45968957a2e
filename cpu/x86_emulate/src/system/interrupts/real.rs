//! Delivery through the vector table of real mode, and software interrupts of virtual-8086 mode that are
//! redirected there (SDM vol. 3, 20.1.4 and 20.3).

use super::{Event, Kind};
use crate::core::{Core, Fault};
use crate::cpu::{RIP, reg::RSP};
use crate::mode::ModeKey;
use crate::system::descriptor;
use crate::system::stack::Stack;
use x86_defs::{SegmentIndex, control, flags};

pub(super) fn deliver<C: Core>(c: &mut C, event: &Event) -> Result<(), Fault> {
    let image = event.flags_image(c);
    let idtr = c.cpu().idtr;
    if u32::from(event.vector) * 4 + 3 > u32::from(idtr.limit) {
        return Err(c.gp(event.idt_error()));
    }
    enter(c, event, idtr.base, image)?;
    let cpu = c.cpu_mut();
    cpu.rflags &= !(flags::IF | flags::TF | flags::AC | flags::RF);
    cpu.refresh();
    Ok(())
}

/// Pushes FLAGS, CS and IP and loads CS:IP from the vector table at `table`.
fn enter<C: Core>(c: &mut C, event: &Event, table: u64, image: u64) -> Result<(), Fault> {
    let at = table.wrapping_add(u64::from(event.vector) * 4) & 0xFFFF_FFFF;
    let target = c.load_system::<u32>(at)?;
    let mut stack = Stack::current(c, event.kind.ext());
    let cs = c.cpu().segment(SegmentIndex::Cs).selector;
    for word in [image, u64::from(cs), event.return_ip] {
        stack.push(c, word, 2)?;
    }
    let code = descriptor::real_segment(c, SegmentIndex::Cs, (target >> 16) as u16);
    let cpu = c.cpu_mut();
    cpu.gpr[RSP] = stack.sp;
    cpu.seg[SegmentIndex::Cs as usize] = code;
    cpu.gpr[RIP] = u64::from(target & 0xFFFF);
    Ok(())
}

/// INT n in virtual-8086 mode: checks IOPL, and with VME delivers through the vector table at address 0 if
/// the TSS's redirection bitmap says so. Returns whether it did.
pub(super) fn redirected<C: Core>(c: &mut C, event: &Event) -> Result<bool, Fault> {
    if event.kind != Kind::Software || !c.cpu().mode.has(ModeKey::V86) {
        return Ok(false);
    }
    let iopl3 = c.cpu().rflags & flags::IOPL == flags::IOPL;
    if c.cpu().cr4 & control::CR4_VME == 0 || redirection_bit(c, event.vector)? {
        return if iopl3 { Ok(false) } else { Err(c.gp(0)) };
    }
    let mut image = event.flags_image(c);
    if !iopl3 {
        let vif = image & flags::VIF != 0;
        image = image & !flags::IF | flags::IOPL | if vif { flags::IF } else { 0 };
    }
    enter(c, event, 0, image)?;
    let cpu = c.cpu_mut();
    cpu.rflags &= !(flags::TF | flags::RF | if iopl3 { flags::IF } else { flags::VIF });
    cpu.refresh();
    Ok(true)
}

/// The bit of `vector` in the bitmap below the TSS's I/O permission map. #GP(0) if it is beyond the TSS.
fn redirection_bit<C: Core>(c: &mut C, vector: u8) -> Result<bool, Fault> {
    let tr = c.cpu().tr;
    let wide = tr.attributes.kind() & 8 != 0;
    if tr.unusable || !wide || tr.limit < 0x67 {
        return Err(c.gp(0));
    }
    let io_map = c.load_system::<u16>(descriptor::wrap(c, tr.base.wrapping_add(0x66)))?;
    let Some(offset) = u32::from(io_map).checked_sub(32).map(|o| o + u32::from(vector / 8)) else {
        return Err(c.gp(0));
    };
    if offset > tr.limit {
        return Err(c.gp(0));
    }
    let byte = c.load_system::<u8>(descriptor::wrap(c, tr.base.wrapping_add(u64::from(offset))))?;
    Ok(byte >> (vector & 7) & 1 != 0)
}
