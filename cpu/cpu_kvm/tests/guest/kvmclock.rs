//! kvmclock, as a guest reads it: it is guest time, which stands still with the machine, and goes on in another partition.

use crate::harness::*;
use iced_x86::code_asm::*;
use x86_defs::msr;

/// Where the guest leaves its TSC.
const TSC: u64 = DATA + 0x100;
/// What kvmclock and the machine's clock may be apart: they are different clocks of the host.
const APART_NS: u64 = 10_000_000;
const PAUSE_NS: u64 = 500_000_000;

/// What the guest's page and its last TSC give, in nanoseconds (Linux, Documentation/virt/kvm/x86/msr.rst).
fn guest_ns(g: &Guest) -> u64 {
    let (stamp, system_time) = (g.load(DATA + 8), g.load(DATA + 16));
    let (multiplier, shift): (u32, u8) = (g.ram.load(DATA + 24), g.ram.load(DATA + 28));
    let ticks = u128::from(g.load(TSC).wrapping_sub(stamp));
    let scaled = if (shift as i8) < 0 { ticks >> (shift as i8).unsigned_abs() } else { ticks << shift };
    system_time + ((scaled * u128::from(multiplier)) >> 32) as u64
}

#[test]
fn it_stands_still_with_the_machine_and_goes_on_elsewhere() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, msr::KVM_SYSTEM_TIME_NEW).unwrap();
        a.mov(eax, DATA as u32 | 1).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.set_label(&mut again).unwrap();
        a.rdtsc().unwrap();
        a.mov(dword_ptr(TSC), eax).unwrap();
        a.mov(dword_ptr(TSC + 4), edx).unwrap();
        a.out(i32::from(DONE), al).unwrap();
        a.jmp(again).unwrap();
    });
    let mut last = 0;
    let mut look = |g: &mut Guest, what: &str| {
        let before = g.clock.now();
        g.run_to_done();
        let (seen, after) = (guest_ns(g), g.clock.now());
        assert!(seen >= last, "{what}: back from {last} to {seen}");
        let between = before.saturating_sub(APART_NS)..after + APART_NS;
        assert!(between.contains(&seen), "{what}: kvmclock {seen}, guest time {before} to {after}");
        last = seen;
    };
    look(&mut g, "at first");
    // Once more: the page is written when the processor is entered.
    look(&mut g, "running");
    g.clock.pause();
    std::thread::sleep(std::time::Duration::from_nanos(PAUSE_NS));
    g.clock.resume();
    look(&mut g, "after a pause");

    g.clock.pause();
    let state = g.vcpus[0].save().unwrap();
    assert!(state.msrs.contains(&(msr::KVM_SYSTEM_TIME_NEW, DATA | 1)), "{:x?}", state.msrs);
    let mut next = Guest::in_time_of(g.clock.clone(), 1).unwrap();
    let mut bytes = vec![0; RAM_BYTES as usize];
    g.ram.load_bytes(0, &mut bytes);
    next.ram.store_bytes(0, &bytes);
    if let Err(error) = next.vcpus[0].restore(&state) {
        assert!(error.to_string().contains("cannot set the guest's TSC"), "{error}");
        eprintln!("not run to its end: {error}");
        return;
    }
    g.clock.resume();
    look(&mut next, "elsewhere");
}
