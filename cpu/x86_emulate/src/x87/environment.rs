//! FNSTENV, FLDENV, FNSAVE, FRSTOR: the state in the 14- and 28-byte formats (SDM vol. 1, 8.1.10).

use super::raise_pending;
use crate::core::{Core, Fault};
use crate::cpu::{F80, X87};
use crate::lower::LowerContext;
use crate::mode::ModeKey;
use crate::op::{Handler, Op, Step};
use crate::vector::memory;
use x86_decode::{Code, Instruction};

/// Largest image: 28 bytes and eight registers.
const MAX_BYTES: usize = 108;

/// Lowers these instructions. `width`: bytes of the environment.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let (run, width): (Handler<C>, u8) = match insn.code() {
        Code::Fnstenv_m14byte => (store::<C, false>, 14),
        Code::Fnstenv_m28byte => (store::<C, false>, 28),
        Code::Fnsave_m94byte => (store::<C, true>, 14),
        Code::Fnsave_m108byte => (store::<C, true>, 28),
        Code::Fldenv_m14byte => (load::<C, false>, 14),
        Code::Fldenv_m28byte => (load::<C, false>, 28),
        Code::Frstor_m94byte => (load::<C, true>, 14),
        Code::Frstor_m108byte => (load::<C, true>, 28),
        _ => return None,
    };
    let mut op = ctx.op(insn, run);
    op.width = width;
    op.aux = u8::from(!ctx.mode.has(ModeKey::PROTECTED) || ctx.mode.has(ModeKey::V86));
    Some(op)
}

fn store<C: Core, const ALL: bool>(c: &mut C, op: &Op<C>) -> Step {
    let store = |c: &mut C| -> Result<(), Fault> {
        let environment = usize::from(op.width);
        let bytes = environment + if ALL { 80 } else { 0 };
        let linear = op.linear_write(c, bytes as u64)?;
        memory::check_alignment(c, linear, environment as u64 / 7)?;
        let x87 = &c.cpu().x.x87;
        let mut image = [0; MAX_BYTES];
        put_environment(&mut image, x87, environment, op.aux != 0);
        for (i, chunk) in image[environment..].chunks_exact_mut(10).take(8).enumerate() {
            let r = &x87.regs[(x87.top() + i) & 7];
            chunk[..8].copy_from_slice(&r.mantissa.to_le_bytes());
            chunk[8..].copy_from_slice(&r.sign_exponent.to_le_bytes());
        }
        c.store_bytes(linear, &image[..bytes])?;
        let x87 = &mut c.cpu_mut().x.x87;
        if ALL {
            *x87 = X87 { regs: x87.regs, ..X87::default() };
        } else {
            x87.set_control(x87.control | 0x3F);
        }
        Ok(())
    };
    super::step(store(c))
}

fn load<C: Core, const ALL: bool>(c: &mut C, op: &Op<C>) -> Step {
    let load = |c: &mut C| -> Result<(), Fault> {
        raise_pending(c)?;
        let environment = usize::from(op.width);
        let bytes = environment + if ALL { 80 } else { 0 };
        let linear = op.linear_read(c, bytes as u64)?;
        memory::check_alignment(c, linear, environment as u64 / 7)?;
        let mut image = [0; MAX_BYTES];
        c.load_bytes(linear, &mut image[..bytes])?;
        let x87 = &mut c.cpu_mut().x.x87;
        take_environment(&image, x87, environment, op.aux != 0);
        if ALL {
            for (i, chunk) in image[environment..].chunks_exact(10).take(8).enumerate() {
                let mantissa = chunk[..8].iter().rev().fold(0, |acc, &b| acc << 8 | u64::from(b));
                let sign_exponent = u16::from_le_bytes([chunk[8], chunk[9]]);
                x87.regs[(x87.top() + i) & 7] = F80 { mantissa, sign_exponent };
            }
        }
        Ok(())
    };
    super::step(load(c))
}

/// The two-bit tags of R0–R7: valid, zero, special, empty.
fn full_tags(x87: &X87) -> u16 {
    let tag = |i: usize| match x87.regs[i] {
        _ if x87.in_use >> i & 1 == 0 => 3,
        F80 { mantissa: 0, sign_exponent: 0 | 0x8000 } => 1,
        F80 { sign_exponent, mantissa } => {
            let exponent = sign_exponent & 0x7FFF;
            if exponent == 0 || exponent == 0x7FFF || mantissa >> 63 == 0 { 2 } else { 0 }
        }
    };
    (0..8).rev().fold(0, |tags, i| tags << 2 | tag(i))
}

/// The seven fields in the order of the image.
fn put_environment(image: &mut [u8; MAX_BYTES], x: &X87, bytes: usize, real: bool) {
    let (ip, dp) = (x.instruction_pointer as u32, x.data_pointer as u32);
    let (cs, ds, opcode) = (x.instruction_selector, x.data_selector, x.opcode & 0x7FF);
    let linear = |selector: u16, offset: u32| (u32::from(selector) << 4).wrapping_add(offset);
    let wide = bytes == 28;
    // What is reserved in the 28-byte format reads as ones.
    let pad = |v: u16| u32::from(v) | 0xFFFF_0000;
    let pointers = match (wide, real) {
        (true, false) => [ip, u32::from(opcode) << 16 | u32::from(cs), dp, pad(ds)],
        (false, false) => [ip, u32::from(cs), dp, u32::from(ds)],
        (_, true) => {
            let (ip, dp) = (linear(cs, ip), linear(ds, dp));
            // 32 bits: bits 16–31 at 12–27; 16 bits: bits 16–19 at 12–15.
            let fill = if wide { 0xFFFF_0000 } else { 0 };
            [ip & 0xFFFF | fill, (ip >> 16) << 12 | u32::from(opcode), dp & 0xFFFF | fill, (dp >> 16) << 12]
        }
    };
    let words = [x.control, x.status, full_tags(x)].map(pad);
    let size = bytes / 7;
    for (i, field) in words.iter().chain(&pointers).enumerate() {
        image[i * size..(i + 1) * size].copy_from_slice(&field.to_le_bytes()[..size]);
    }
}

fn take_environment(image: &[u8; MAX_BYTES], x: &mut X87, bytes: usize, real: bool) {
    let size = bytes / 7;
    let field =
        |i: usize| image[i * size..(i + 1) * size].iter().rev().fold(0u32, |acc, &b| acc << 8 | u32::from(b));
    x.set_control(field(0) as u16);
    x.set_status(field(1) as u16);
    let tags = field(2);
    x.in_use = (0..8).fold(0, |acc, i| acc | u8::from(tags >> (2 * i) & 3 != 3) << i);
    if real {
        let high = |i: usize| field(i) >> 12 << 16;
        x.instruction_pointer = u64::from(field(3) & 0xFFFF | high(4));
        x.data_pointer = u64::from(field(5) & 0xFFFF | high(6));
        (x.instruction_selector, x.data_selector) = (0, 0);
        x.opcode = field(4) as u16 & 0x7FF;
    } else {
        x.instruction_pointer = field(3).into();
        x.data_pointer = field(5).into();
        x.instruction_selector = field(4) as u16;
        x.data_selector = field(6) as u16;
        if size == 4 {
            x.opcode = (field(4) >> 16) as u16 & 0x7FF;
        }
    }
}
