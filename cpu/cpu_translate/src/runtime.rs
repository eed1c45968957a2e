//! What emitted code calls. Each function gets the `SoftCore` with the guest's registers in memory and says
//! where to go on: 0 (behind the operation), the address of a translation, or that of the leaving thunk.

use crate::engine::{Engine, ExitSite};
use crate::feedback::WayOut;
use crate::thunks::slot;
use crate::x87;
use cpu_soft::SoftCore;
use cpu_soft::translate::Exit;
use x86_emulate::Step;
use x86_emulate::cpu::RIP;
use x86_emulate::flags::LazyFlags;
use x86_emulate::system::interrupts::Outcome;

/// Instructions between two looks whether somebody wants something.
pub const SPAN: i64 = 8192;

/// The core and the engine that emitted code runs for.
///
/// # Safety
/// `core` is the pointer that `Engine::run` gave to emitted code, and that call has not returned.
unsafe fn parts<'a>(core: *mut SoftCore) -> (&'a mut SoftCore, &'a mut Engine) {
    // SAFETY: `Engine::run` holds both exclusively and touches neither while emitted code runs; the slot holds
    // the engine's address since then.
    unsafe {
        let core = &mut *core;
        let engine = core.hot.slots[slot::ENGINE] as *mut Engine;
        (core, &mut *engine)
    }
}

/// Runs the operation of site `site`.
///
/// # Safety
/// See [`parts`].
pub unsafe extern "sysv64" fn operation(core: *mut SoftCore, site: u64) -> u64 {
    // SAFETY: the caller is emitted code.
    let (core, engine) = unsafe { parts(core) };
    let site = &engine.sites[site as usize];
    let (op, barrier) = (&site.op, site.barrier);
    core.cpu.flags = LazyFlags::from_bits(core.hot.raw_flags);
    let block_number = site.block;
    let block = &engine.blocks[block_number as usize];
    core.cpu.gpr[RIP] = block.linear_page();
    core.set_block_page(block.watched_page());
    let (done, sees_x87) = (i64::from(site.done), site.sees_x87);
    if sees_x87 {
        x87::to_core(core, engine);
    }
    match (op.run)(core, op) {
        // Not if it wrote code: what is behind in this block, and where it leads, may be stale.
        Step::Next if !barrier && core.may_go_on() => {
            if core.hot.slots[slot::X87_WAS] == x87::state::HOST {
                x87::to_image(core);
            }
            core.hot.raw_flags = core.cpu.flags.bits();
            return 0;
        }
        Step::Next => core.cpu.gpr[RIP] = op.next_ip(core),
        Step::Branch => {}
        Step::Fault => {
            // What the unit remembers is of the segments of now.
            x87::to_core(core, engine);
            let exit = match core.deliver(op) {
                Some(Outcome::Delivered) => None,
                Some(Outcome::Waits) => Some(Exit::Service),
                Some(Outcome::TripleFault) => Some(Exit::TripleFault),
                None => Some(Exit::Fault(*op)),
            };
            if let Some(exit) = exit {
                engine.exit = exit;
                core.hot.countdown -= done;
                return engine.thunks.leave;
            }
        }
        Step::Exit => {
            engine.exit = Exit::Service;
            core.hot.countdown -= done;
            return engine.thunks.leave;
        }
    }
    core.hot.countdown -= done;
    if core.hot.countdown <= 0 {
        engine.left(block_number, WayOut { done: done as u16, target: 0 });
    }
    engine.go_on(core)
}

/// Exit `exit` was taken, for the first time or with the countdown run out: goes to its target, by itself the next time.
///
/// # Safety
/// See [`parts`].
pub unsafe extern "sysv64" fn exit(core: *mut SoftCore, exit: u64) -> u64 {
    // SAFETY: the caller is emitted code.
    let (core, engine) = unsafe { parts(core) };
    core.cpu.flags = LazyFlags::from_bits(core.hot.raw_flags);
    let site: ExitSite = engine.exits[exit as usize];
    core.cpu.gpr[RIP] = site.target;
    let way = WayOut { done: site.done(), target: site.target };
    if core.hot.countdown <= 0 && engine.sample(core, site.block(), way) {
        return engine.thunks.leave;
    }
    let to = if site.careful() { engine.go_on_carefully(core, exit as usize) } else { engine.go_on(core) };
    if to != engine.thunks.leave {
        engine.link(exit as usize, core);
    }
    to
}

/// The guard of block `block` failed: its address leads elsewhere now.
///
/// # Safety
/// See [`parts`].
pub unsafe extern "sysv64" fn miss(core: *mut SoftCore, block: u64) -> u64 {
    // SAFETY: the caller is emitted code.
    let (core, engine) = unsafe { parts(core) };
    core.cpu.flags = LazyFlags::from_bits(core.hot.raw_flags);
    let b = engine.blocks[block as usize];
    core.cpu.gpr[RIP] = b.linear;
    if !b.is_live() && b.is_careful() {
        return engine.leave_from(&b);
    }
    let to = engine.go_on_checked(core);
    if to != engine.thunks.leave {
        engine.replace(block as usize, to);
    }
    to
}

/// Block `block` is not any more what it was made from: the interpreter goes on there, or what the block became.
///
/// # Safety
/// See [`parts`].
pub unsafe extern "sysv64" fn stale(core: *mut SoftCore, block: u64) -> u64 {
    // SAFETY: the caller is emitted code.
    let (core, engine) = unsafe { parts(core) };
    core.cpu.flags = LazyFlags::from_bits(core.hot.raw_flags);
    let b = engine.blocks[block as usize];
    core.cpu.gpr[RIP] = b.linear;
    if b.is_live() || b.is_careful() {
        engine.stale = Some(block as u32);
        return engine.leave_from(&b);
    }
    let to = engine.go_on_checked(core);
    if to != engine.thunks.leave {
        engine.replace_body(block as usize, to);
    }
    to
}

/// The countdown ran out on the way to `linear`.
///
/// # Safety
/// See [`parts`].
pub unsafe extern "sysv64" fn resume(core: *mut SoftCore, linear: u64) -> u64 {
    // SAFETY: the caller is emitted code.
    let (core, engine) = unsafe { parts(core) };
    core.cpu.flags = LazyFlags::from_bits(core.hot.raw_flags);
    core.cpu.gpr[RIP] = linear;
    let (block, done) = (core.hot.slots[slot::LEFT_BLOCK], core.hot.slots[slot::LEFT_DONE]);
    if engine.sample(core, block as u32, WayOut { done: done as u16, target: linear }) {
        return engine.thunks.leave;
    }
    engine.go_on(core)
}

/// The instruction at `linear` is not for emitted code now.
///
/// # Safety
/// See [`parts`].
pub unsafe extern "sysv64" fn interpret(core: *mut SoftCore, linear: u64) -> u64 {
    // SAFETY: the caller is emitted code.
    let (core, engine) = unsafe { parts(core) };
    core.cpu.flags = LazyFlags::from_bits(core.hot.raw_flags);
    core.cpu.gpr[RIP] = linear;
    engine.exit = Exit::Branch;
    engine.thunks.leave
}

/// Puts the x87 unit into the image that the host's is loaded from.
///
/// # Safety
/// See [`parts`].
pub unsafe extern "sysv64" fn x87_to_image(core: *mut SoftCore, _: u64) -> u64 {
    // SAFETY: the caller is emitted code.
    let (core, _) = unsafe { parts(core) };
    x87::to_image(core);
    0
}

/// Settles the countdown with the slice, and says whether anything keeps the vCPU from going on.
pub fn may_go_on(core: &mut SoftCore) -> bool {
    if core.hot.countdown <= 0 {
        core.hot.budget -= SPAN - core.hot.countdown;
        // Not always the same: samples of a loop would all be of one of its blocks. A budget that is used up stays so.
        let less = if core.hot.budget > 0 { core.hot.budget & 0x3FF } else { 0 };
        core.hot.budget += less;
        core.hot.countdown = SPAN - less;
    }
    core.hot.budget > 0 && core.may_go_on()
}
