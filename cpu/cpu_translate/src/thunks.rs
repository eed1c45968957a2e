//! The fixed pieces of code: into translated code and out of it, and calls of Rust from it.
//!
//! Emitted code runs with RSP 16-byte aligned. Between blocks, in calls of Rust and outside, the guest's
//! registers are in `Cpu::gpr`.

use crate::asm::{Asm, CONTEXT, Rm, T1, at, cc, field, reg::*};
use crate::emit::home;
use crate::runtime;
use cpu_soft::translate::layout;

/// Indices into `Hot::slots`.
pub mod slot {
    /// Address of the `Engine`.
    pub const ENGINE: usize = 0;
    /// Where to jump next.
    pub const JUMP: usize = 1;
    /// RAX while flags are put together.
    pub const RAX: usize = 2;
    /// First of the tables of indirect branches, one a context.
    pub const TABLES: usize = 8;
}

/// Offset of a slot in the `SoftCore`.
pub fn slot_at(n: usize) -> usize {
    layout::SLOTS + n * 8
}

/// Addresses of the pieces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thunks {
    /// `extern "sysv64" fn(core, target)`: runs translated code from `target` until it leaves.
    pub enter: u64,
    /// Leaves, with the guest's registers in memory. Values of [`runtime`] for "where next" may be this.
    pub leave: u64,
    /// Called with a site's number in `T1`: runs its operation. Comes back only if the block goes on.
    pub operation: u64,
    /// Jumped to with the number of an exit in `T1`.
    pub exit: u64,
    /// Jumped to with the number of a block in `T1` whose guard failed.
    pub miss: u64,
    /// Jumped to with the number of a block in `T1` whose countdown ran out.
    pub service: u64,
}

fn guest_registers() -> impl Iterator<Item = (u8, usize)> {
    (0..16u8).filter_map(|g| home(g).map(|h| (h, layout::GPR + usize::from(g) * 8)))
}
fn save(a: &mut Asm) {
    guest_registers().for_each(|(h, at)| a.store(field(at), h));
}
fn load(a: &mut Asm) {
    guest_registers().for_each(|(h, at)| a.load(h, field(at)));
}

/// Arguments (core, T1), call of `function` with `pushes` words pushed to keep the context and the alignment.
fn call_rust(a: &mut Asm, function: u64, pushes: usize) {
    save(a);
    a.mov(RDI, CONTEXT);
    a.mov(RSI, T1);
    (0..pushes).for_each(|_| a.push(CONTEXT));
    a.mov_imm(RAX, function);
    a.indirect(true, RAX);
    (0..pushes).for_each(|_| a.pop(CONTEXT));
}

/// Jumps to the address in RAX with the guest's registers loaded.
fn go(a: &mut Asm) {
    a.store(field(slot_at(slot::JUMP)), RAX);
    load(a);
    a.indirect(false, field(slot_at(slot::JUMP)));
}

impl Thunks {
    /// Emits them.
    pub fn emit(a: &mut Asm) -> Self {
        const SAVED: [u8; 6] = [RBX, RBP, R12, R13, R14, R15];
        let mut t = Thunks { enter: a.here(), ..Self::default() };
        SAVED.iter().for_each(|r| a.push(*r));
        a.lea(RSP, at(RSP, -8));
        a.mov(CONTEXT, RDI);
        a.mov(RAX, RSI);
        go(a);

        t.leave = a.here();
        a.lea(RSP, at(RSP, 8));
        SAVED.iter().rev().for_each(|r| a.pop(*r));
        a.bytes(&[0xC3]);

        t.operation = a.here();
        call_rust(a, runtime::operation as *const () as u64, 1);
        a.modrm(&[], true, false, &[0x85], RAX, Rm::Reg(RAX)); // test rax, rax
        let away = a.jcc_later(cc::NOT_EQUAL);
        load(a);
        a.bytes(&[0xC3]);
        a.bind(away);
        a.lea(RSP, at(RSP, 8));
        go(a);

        for (address, function) in [
            (&mut t.exit, runtime::exit as *const () as u64),
            (&mut t.miss, runtime::miss as *const () as u64),
            (&mut t.service, runtime::service as *const () as u64),
        ] {
            *address = a.here();
            call_rust(a, function, 2);
            go(a);
        }
        t
    }
}
