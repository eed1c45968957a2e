//! The fixed pieces of code: into translated code and out of it, and calls of Rust from it.
//!
//! Emitted code runs with RSP 16-byte aligned. Between blocks, in calls of Rust and outside, the guest's
//! registers are in `Cpu::gpr`.

use crate::asm::{Asm, CONTEXT, Rm, T1, Vex, at, cc, field, reg::*};
use crate::emit::home;
use crate::runtime;
use crate::x87::state;
use core::mem::offset_of;
use cpu_soft::translate::layout;
use x86_emulate::cpu::ExtendedState;

/// Indices into `Hot::slots`.
pub mod slot {
    /// Address of the `Engine`.
    pub const ENGINE: usize = 0;
    /// Where to jump next.
    pub const JUMP: usize = 1;
    /// RAX while flags are put together.
    pub const RAX: usize = 2;
    /// The guest's vector registers and MXCSR are in the host's.
    pub const VECTOR_LIVE: usize = 3;
    /// They were when Rust was called.
    pub const WAS_LIVE: usize = 4;
    /// A value on its way to the stack.
    pub const VALUE: usize = 6;
    /// Address of the word where others say that they want something.
    pub const ATTENTION: usize = 7;
    /// MXCSR of Rust code.
    pub const HOST_MXCSR: usize = 5;
    /// First of the tables of indirect branches, one a context.
    pub const TABLES: usize = 8;
    /// Where the guest's x87 unit is: `x87::state`.
    pub const X87_STATE: usize = 24;
    /// Where it was when Rust was called.
    pub const X87_WAS: usize = 25;
    /// Site of the last x87 instruction that emitted code ran.
    pub const X87_SITE: usize = 26;
    /// Offset of the last operand in memory, if `X87_DATA_SEGMENT` is not 0.
    pub const X87_DATA: usize = 27;
    /// Number of its segment register plus one; 0 if emitted code ran no instruction with such an operand.
    pub const X87_DATA_SEGMENT: usize = 28;
    /// A control word on its way.
    pub const X87_CONTROL: usize = 29;
    /// Host address of guest RAM.
    pub const RAM: usize = 30;
    /// First of the words that FNSAVE's image takes.
    pub const X87_IMAGE: usize = 32;
    /// How many it takes.
    pub const X87_IMAGE_WORDS: usize = 14;
    /// Number of the block that an indirect branch left with the countdown run out.
    pub const LEFT_BLOCK: usize = 46;
    /// Instructions of that block up to the branch.
    pub const LEFT_DONE: usize = 47;
    /// First of the offsets in guest RAM of a block's groups of memory accesses (`elide.rs`).
    pub const GROUPS: usize = 48;
    /// How many there are.
    pub const MAX_GROUPS: usize = 16;
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
    /// Called: moves the guest's vector state into the host's registers. Changes flags.
    pub load_vector: u64,
    /// Called: the reverse.
    pub save_vector: u64,
    /// Called: moves the guest's x87 unit into the host's. Changes flags.
    pub load_x87: u64,
    /// Jumped to with the number of an exit in `T1`.
    pub exit: u64,
    /// Jumped to with the number of a block in `T1` whose guard failed.
    pub miss: u64,
    /// Jumped to with the number of a block in `T1` that found itself changed.
    pub stale: u64,
    /// Jumped to with the linear address in `T1` where the guest goes on, the countdown run out.
    pub resume: u64,
    /// Jumped to with the address of an instruction in `T1` that the interpreter has to do.
    pub interpret: u64,
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
fn call_rust(a: &mut Asm, function: u64, pushes: usize, save_vector: u64) {
    save(a);
    a.load(RAX, field(slot_at(slot::VECTOR_LIVE)));
    a.store(field(slot_at(slot::WAS_LIVE)), RAX);
    a.modrm(&[], true, false, &[0x85], RAX, Rm::Reg(RAX)); // test rax, rax
    let not_live = a.jcc_later(cc::EQUAL);
    a.call(save_vector);
    a.bind(not_live);
    a.load(RAX, field(slot_at(slot::X87_STATE)));
    a.store(field(slot_at(slot::X87_WAS)), RAX);
    a.cmp_imm(RAX, state::HOST as u32);
    let not_host = a.jcc_later(cc::NOT_EQUAL);
    a.modrm(&[], false, false, &[0xDD], 6, field(slot_at(slot::X87_IMAGE)).into()); // fnsave
    a.store_imm(field(slot_at(slot::X87_STATE)), state::IMAGE as i32);
    a.bind(not_host);
    a.mov(RDI, CONTEXT);
    a.mov(RSI, T1);
    (0..pushes).for_each(|_| a.push(CONTEXT));
    a.mov_imm(RAX, function);
    a.indirect(true, RAX);
    (0..pushes).for_each(|_| a.pop(CONTEXT));
}

/// Behind a call of Rust: registers and vector state as before.
fn come_back(a: &mut Asm, load_vector: u64) {
    a.load(RAX, field(slot_at(slot::WAS_LIVE)));
    a.modrm(&[], true, false, &[0x85], RAX, Rm::Reg(RAX)); // test rax, rax
    let not_live = a.jcc_later(cc::EQUAL);
    a.call(load_vector);
    a.bind(not_live);
    load(a);
}

/// Code that moves the guest's x87 unit into the host's.
fn x87_thunk(a: &mut Asm, t: &mut Thunks) {
    t.load_x87 = a.here();
    // cmp qword [state], CORE
    a.modrm(&[], true, false, &[0x83], 7, field(slot_at(slot::X87_STATE)).into());
    a.bytes(&[state::CORE as u8]);
    let in_image = a.jcc_later(cc::NOT_EQUAL);
    call_rust(a, runtime::x87_to_image as *const () as u64, 1, t.save_vector);
    come_back(a, t.load_vector);
    a.bind(in_image);
    a.modrm(&[], false, false, &[0xDD], 4, field(slot_at(slot::X87_IMAGE)).into()); // frstor
    a.store_imm(field(slot_at(slot::X87_STATE)), state::HOST as i32);
    a.bytes(&[0xC3]);
}

/// Jumps to the address in RAX with the guest's registers loaded.
fn go(a: &mut Asm) {
    a.store(field(slot_at(slot::JUMP)), RAX);
    load(a);
    a.indirect(false, field(slot_at(slot::JUMP)));
}

/// Where the guest's register `n` is, from byte `from` on.
fn ymm(n: u8, from: usize) -> Rm {
    let at = layout::EXTENDED + offset_of!(ExtendedState, ymm) + usize::from(n) * 32 + from;
    field(at).into()
}

/// Code that moves the guest's vector state. While its upper halves are all zero, the host's stay clean, too: SSE
/// instructions are slower with others.
fn vector_thunks(a: &mut Asm, t: &mut Thunks) {
    const F3: u8 = 2;
    const OP_66: u8 = 1;
    let mxcsr = field(layout::EXTENDED + offset_of!(ExtendedState, mxcsr));
    let host_mxcsr = field(slot_at(slot::HOST_MXCSR));
    let vex = |l: bool, pp: u8| Vex { map: 1, w: false, v: 0, l, pp };
    t.save_vector = a.here();
    (0..16).for_each(|n| a.vex(vex(true, F3), 0x7F, n, ymm(n, 0))); // vmovdqu
    a.modrm(&[], false, false, &[0x0F, 0xAE], 3, mxcsr.into()); // stmxcsr
    a.modrm(&[], false, false, &[0x0F, 0xAE], 2, host_mxcsr.into()); // ldmxcsr
    a.bytes(&[0xC5, 0xF8, 0x77]); // vzeroupper
    a.store_imm(field(slot_at(slot::VECTOR_LIVE)), 0);
    a.bytes(&[0xC3]);

    t.load_vector = a.here();
    a.vex(vex(false, F3), 0x6F, 0, ymm(0, 16)); // vmovdqu xmm0, the first upper half
    (1..16).for_each(|n| a.vex(vex(false, OP_66), 0xEB, 0, ymm(n, 16))); // vpor xmm0, xmm0, the others
    a.vex(Vex { map: 2, ..vex(false, OP_66) }, 0x17, 0, Rm::Reg(0)); // vptest
    a.bytes(&[0xC5, 0xF8, 0x77]); // vzeroupper
    let wide = a.jcc_later(cc::NOT_EQUAL);
    (0..16).for_each(|n| a.modrm(&[], false, false, &[0x0F, 0x10], n, ymm(n, 0))); // movups
    let low = a.jmp_later();
    a.bind(wide);
    (0..16).for_each(|n| a.vex(vex(true, F3), 0x6F, n, ymm(n, 0))); // vmovdqu
    a.bind(low);
    a.modrm(&[], false, false, &[0x0F, 0xAE], 2, mxcsr.into()); // ldmxcsr
    a.store_imm(field(slot_at(slot::VECTOR_LIVE)), 1);
    a.bytes(&[0xC3]);
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

        vector_thunks(a, &mut t);
        x87_thunk(a, &mut t);
        t.operation = a.here();
        call_rust(a, runtime::operation as *const () as u64, 1, t.save_vector);
        a.modrm(&[], true, false, &[0x85], RAX, Rm::Reg(RAX)); // test rax, rax
        let away = a.jcc_later(cc::NOT_EQUAL);
        // cmp qword [was], HOST
        a.modrm(&[], true, false, &[0x83], 7, field(slot_at(slot::X87_WAS)).into());
        a.bytes(&[state::HOST as u8]);
        let elsewhere = a.jcc_later(cc::NOT_EQUAL);
        a.modrm(&[], false, false, &[0xDD], 4, field(slot_at(slot::X87_IMAGE)).into()); // frstor
        a.store_imm(field(slot_at(slot::X87_STATE)), state::HOST as i32);
        a.bind(elsewhere);
        come_back(a, t.load_vector);
        a.bytes(&[0xC3]);
        a.bind(away);
        a.lea(RSP, at(RSP, 8));
        go(a);

        for (address, function) in [
            (&mut t.exit, runtime::exit as *const () as u64),
            (&mut t.miss, runtime::miss as *const () as u64),
            (&mut t.stale, runtime::stale as *const () as u64),
            (&mut t.resume, runtime::resume as *const () as u64),
            (&mut t.interpret, runtime::interpret as *const () as u64),
        ] {
            *address = a.here();
            call_rust(a, function, 2, t.save_vector);
            go(a);
        }
        t
    }
}
