//! Interrupts: messages, the 8259's line, I/O APIC EOIs, the APIC's timer, a second processor.

use crate::harness::*;
use hypervisor::{Bell, Msi, Trigger, VcpuState};
use iced_x86::code_asm::*;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

const APIC: u64 = 0xFEE0_0000;
const VECTOR: u8 = 0x51;

/// STI; HLT in a loop; the handler of [`VECTOR`] acknowledges and says DONE.
fn waiting(g: &mut Guest) {
    g.long();
    g.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(edi, APIC as u32).unwrap();
        a.mov(dword_ptr(rdi + 0xF0), 0x1FF).unwrap();
        a.out(0x20, al).unwrap();
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.jmp(again).unwrap();
    });
    g.gate(VECTOR, HANDLERS + 0x8000);
    g.assemble(64, HANDLERS + 0x8000, |a| {
        a.mov(dword_ptr(rdi + 0xB0), 0).unwrap();
        a.inc(qword_ptr(DATA)).unwrap();
        // KVM tells of an EOI when it is entered next.
        a.out(0x22, al).unwrap();
        a.out(i32::from(DONE), al).unwrap();
        a.iretq().unwrap();
    });
}

#[test]
fn a_message_wakes_a_halted_processor() {
    let Some(mut g) = Guest::new(1) else { return };
    waiting(&mut g);
    let route = g.partition.msi_sink().route().unwrap();
    route.fire();
    route.set(Msi { address: APIC, data: VECTOR.into() });
    route.mask(true);
    route.fire();
    route.mask(false);
    g.on_out(move |port, _| {
        if port == 0x20 {
            route.fire();
        }
    });
    g.run_to_done();
    assert_eq!(g.load(DATA), 1);
}

#[test]
fn the_end_of_a_level_triggered_interrupt_is_told() {
    let Some(mut g) = Guest::new(1) else { return };
    waiting(&mut g);
    let sink = g.partition.irq_sink();
    let msi = Msi { address: APIC, data: u32::from(VECTOR) | 1 << 15 | 1 << 14 };
    sink.set_ioapic_route(3, Some(msi), Trigger::Level);
    g.on_out(move |port, _| {
        if port == 0x20 {
            sink.deliver(msi);
        }
    });
    g.run_to_done();
    assert!(g.board.events.lock().unwrap().contains(&Event::Eoi(VECTOR)));
}

#[test]
fn the_8259_interrupts_a_halted_processor() {
    let Some(mut g) = Guest::new(1) else { return };
    waiting(&mut g);
    let sink = g.partition.irq_sink();
    let board = g.board.clone();
    g.on_out(move |port, _| {
        if port == 0x20 {
            *board.pic.lock().unwrap() = Some(VECTOR);
            sink.pic_line_changed(true);
            let sink = sink.clone();
            // As the 8259 would when it is acknowledged.
            let board = board.clone();
            std::thread::spawn(move || {
                while board.pic.lock().unwrap().is_some() {
                    std::thread::yield_now();
                }
                sink.pic_line_changed(false);
            });
        }
    });
    g.run_to_done();
    assert_eq!(g.load(DATA), 1);
    assert!(g.board.events.lock().unwrap().contains(&Event::Ack));
}

#[test]
fn the_timer_fires_and_stands_still_with_guest_time() {
    let Some(mut g) = Guest::new(1) else { return };
    waiting(&mut g);
    g.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(edi, APIC as u32).unwrap();
        a.mov(dword_ptr(rdi + 0xF0), 0x1FF).unwrap();
        a.mov(dword_ptr(rdi + 0x320), i32::from(VECTOR)).unwrap();
        a.mov(dword_ptr(rdi + 0x3E0), 0xB).unwrap();
        a.mov(dword_ptr(rdi + 0x380), 300_000_000).unwrap();
        a.out(i32::from(DONE), al).unwrap();
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.jmp(again).unwrap();
    });
    g.run_to_done();
    let armed_at = g.clock.now();
    g.clock.pause();
    std::thread::sleep(std::time::Duration::from_millis(400));
    g.clock.resume();
    g.run_to_done();
    assert_eq!(g.load(DATA), 1);
    let took = g.clock.now() - armed_at;
    assert!(took >= 250_000_000, "{took} ns: it went on while guest time stood still");
}

/// As INIT and SIPI from the first processor start it.
#[test]
fn a_second_processor_starts_and_answers() {
    let Some(mut g) = Guest::new(2) else { return };
    waiting(&mut g);
    g.assemble(64, CODE, |a| {
        let mut wait = a.create_label();
        let mut again = a.create_label();
        a.mov(edi, APIC as u32).unwrap();
        a.mov(dword_ptr(rdi + 0xF0), 0x1FF).unwrap();
        for command in [0x4500, 0x4600 + 0x50] {
            a.mov(dword_ptr(rdi + 0x310), 1 << 24).unwrap();
            a.mov(dword_ptr(rdi + 0x300), command).unwrap();
        }
        a.set_label(&mut wait).unwrap();
        a.cmp(byte_ptr(DATA + 8), 0).unwrap();
        a.jz(wait).unwrap();
        // Its answer comes as an interrupt.
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.jmp(again).unwrap();
    });
    // Real mode at 0x50000: says that it is there, and again by OUT.
    let mut a = CodeAssembler::new(16).unwrap();
    a.mov(ax, (DATA >> 4) as u32).unwrap();
    a.mov(ds, ax).unwrap();
    a.mov(byte_ptr(8), 1).unwrap();
    a.out(0x21, al).unwrap();
    a.hlt().unwrap();
    g.store(0x50000, &a.assemble(0).unwrap());
    let sink = g.partition.irq_sink();
    g.on_out(move |port, _| {
        if port == 0x21 {
            sink.deliver(Msi { address: APIC, data: VECTOR.into() });
        }
    });
    g.run_to_done();
    assert_eq!((g.load(DATA), g.load(DATA + 8) & 0xFF), (1, 1));
}

/// A state in which an interrupt was acknowledged elsewhere: it is delivered before anything else.
#[test]
fn an_interrupt_under_way_is_delivered_first() {
    let Some(mut g) = Guest::new(1) else { return };
    waiting(&mut g);
    g.set(0, |s: &mut VcpuState| {
        s.interrupt = Some(VECTOR);
        s.gpr[7] = APIC;
    });
    let state = g.vcpus[0].save().unwrap();
    assert_eq!(state.interrupt, Some(VECTOR));
    g.run_to_done();
    assert_eq!((g.load(DATA), g.board.outs()), (1, vec![(0x22, 0)]));
}

struct Ringing(EventFd);

impl Bell for Ringing {
    fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// As another process or the host's kernel would: no call of the engine's. A ring while the route is masked, or while guest
/// time stands still, is not lost.
#[test]
fn a_bell_interrupts_a_halted_processor() {
    for masked in [false, true] {
        let Some(mut g) = Guest::new(1) else { return };
        waiting(&mut g);
        let event = Arc::new(Ringing(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        let bell: Arc<dyn Bell> = event.clone();
        let route = Arc::new(g.partition.msi_sink().route().unwrap());
        route.attach(&bell).unwrap();
        route.set(Msi { address: APIC, data: VECTOR.into() });
        route.mask(masked);
        let (ringing, unmasking) = (event.clone(), route.clone());
        g.on_out(move |port, _| {
            if port == 0x20 {
                ringing.0.write(1).unwrap();
                unmasking.mask(false);
            }
        });
        g.run_to_done();
        assert_eq!((g.load(DATA), event.0.read().is_err()), (1, true), "KVM has taken it");
        g.clock.pause();
        event.0.write(1).unwrap();
        g.clock.resume();
        g.run_to_done();
        assert_eq!(g.load(DATA), 2);
        // Masked it rings in vain; without the route nobody hears it.
        route.mask(true);
        event.0.write(1).unwrap();
        assert_eq!(event.0.read().unwrap(), 1);
        route.mask(false);
        g.on_out(|_, _| {});
        drop(route);
        event.0.write(1).unwrap();
        assert_eq!(event.0.read().unwrap(), 1);
    }
}
