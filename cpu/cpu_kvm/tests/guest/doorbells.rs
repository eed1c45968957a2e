//! Writes that ring a bell instead of stopping the processor.

use crate::harness::{CODE, DONE, Event, Guest, MMIO, long_registers};
use hypervisor::{Bell, Gpa};
use iced_x86::code_asm::*;
use std::os::fd::AsRawFd;
use vmm_sys_util::eventfd::EventFd;

struct Ringing(EventFd);

impl Bell for Ringing {
    fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Three writes to the doorbell, one beside it.
fn writes(a: &mut CodeAssembler) {
    a.mov(ebx, MMIO as u32).unwrap();
    a.mov(word_ptr(rbx), 1).unwrap();
    a.mov(word_ptr(rbx), 2).unwrap();
    a.mov(word_ptr(rbx), 3).unwrap();
    a.mov(word_ptr(rbx + 4), 4).unwrap();
    a.out(i32::from(DONE), al).unwrap();
}

#[test]
fn a_write_rings_and_does_not_exit_until_the_bell_is_taken_off() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.assemble(64, CODE, writes);
    let doorbells = g.partition.doorbells().expect("every KVM of today has ioeventfd");
    let event = Ringing(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    doorbells.attach(Gpa(MMIO), &event).unwrap();
    doorbells.attach(Gpa(MMIO), &event).expect_err("it is there already");
    g.run_to_done();
    assert_eq!(event.0.read().unwrap(), 3);
    assert_eq!(*g.board.events.lock().unwrap(), [Event::Write(MMIO + 4, 4)]);

    doorbells.detach(Gpa(MMIO), &event);
    g.board.events.lock().unwrap().clear();
    g.set(0, long_registers);
    g.run_to_done();
    assert!(event.0.read().is_err(), "nobody rang");
    let seen = [(0, 1), (0, 2), (0, 3), (4, 4)].map(|(at, value)| Event::Write(MMIO + at, value));
    assert_eq!(*g.board.events.lock().unwrap(), seen);
}
