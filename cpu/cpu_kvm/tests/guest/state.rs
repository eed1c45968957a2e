//! Saved in mid-loop and restored, elsewhere too.

use crate::harness::*;
use hypervisor::VcpuState;
use iced_x86::code_asm::*;
use saved_state::{from_blob, to_blob};

fn counting(g: &mut Guest) {
    g.long();
    g.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 5000).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(rbx, rcx).unwrap();
        a.imul_3(rbx, rbx, 0x1234_5677).unwrap();
        a.out(0x20, al).unwrap();
        a.in_(al, 0x21).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.mov(qword_ptr(DATA), rbx).unwrap();
        a.mov(byte_ptr(DATA + 8), 1).unwrap();
        a.out(i32::from(DONE), al).unwrap();
    });
}

#[test]
fn a_loop_cut_into_pieces_gives_the_same_result() {
    let Some(mut whole) = Guest::new(1) else { return };
    counting(&mut whole);
    whole.run_to_done();
    let mut g = Guest::new(1).unwrap();
    counting(&mut g);
    let mut cuts = 0;
    loop {
        let kicker = g.vcpus[0].kicker();
        let left = std::sync::atomic::AtomicU32::new(100);
        g.on_out(move |port, _| {
            if port == 0x20 && left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1 {
                kicker.kick();
            }
        });
        assert_eq!(g.run(), hypervisor::VcpuExit::Kicked);
        if g.load(DATA + 8) & 1 != 0 {
            break;
        }
        cuts += 1;
        let state: VcpuState = from_blob(&to_blob(&g.vcpus[0].save().unwrap())).unwrap();
        let next = Guest::in_time_of(g.clock.clone(), 1).unwrap();
        let mut bytes = vec![0; RAM_BYTES as usize];
        g.ram.load_bytes(0, &mut bytes);
        next.ram.store_bytes(0, &bytes);
        g = next;
        g.vcpus[0].restore(&state).unwrap();
    }
    assert_eq!(cuts, 50);
    assert_eq!(g.load(DATA), whole.load(DATA));
}

/// A read in two parts that is cut after the first is completed before `run` returns: nothing of it is under way in the state.
#[test]
fn a_kick_within_an_access_waits_for_its_end() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    let mut end = 0;
    g.assemble(64, CODE, |a| {
        a.mov(ebx, MMIO as u32).unwrap();
        a.mov(rdi, DATA).unwrap();
        a.movups(xmm1, xmmword_ptr(rbx)).unwrap();
        end = CODE + a.assemble(CODE).unwrap().len() as u64;
        a.movups(xmmword_ptr(rdi), xmm1).unwrap();
        a.out(i32::from(DONE), al).unwrap();
    });
    g.board.answers.lock().unwrap().extend([0x1111, 0x2222]);
    *g.board.kick_at_read.lock().unwrap() = Some(g.vcpus[0].kicker());
    assert_eq!(g.run(), hypervisor::VcpuExit::Kicked);
    assert_eq!(*g.board.events.lock().unwrap(), [Event::Read(MMIO), Event::Read(MMIO + 8)]);
    let state = g.vcpus[0].save().unwrap();
    assert_eq!((state.rip, state.sse.xmm[1]), (end, [0x1111, 0x2222]));
    // It goes on elsewhere.
    let mut next = Guest::in_time_of(g.clock.clone(), 1).unwrap();
    let mut bytes = vec![0; RAM_BYTES as usize];
    g.ram.load_bytes(0, &mut bytes);
    next.ram.store_bytes(0, &bytes);
    next.vcpus[0].restore(&state).unwrap();
    next.run_to_done();
    assert_eq!([next.load(DATA), next.load(DATA + 8)], [0x1111, 0x2222]);
}
