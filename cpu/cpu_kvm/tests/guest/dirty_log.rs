//! The log of written pages, in bitmaps and in rings: what guests, devices and completed instructions write is in it.

use crate::harness::*;
use cpu_kvm::KvmHypervisor;
use guest_memory::DmaSpace;
use hypervisor::DirtyLog;
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGES: u64 = RAM_BYTES >> 12;
/// Where the guests below write.
const FIRST: u64 = 0x10_0000;

/// A guest for each way of logging that this KVM has.
fn guests(vcpus: u32) -> Vec<Guest> {
    if model().is_none() {
        return Vec::new();
    }
    let bitmaps = KvmHypervisor::open().unwrap();
    let rings = KvmHypervisor::open().unwrap().with_dirty_ring(1024);
    [bitmaps, rings].iter().map(|kvm| Guest::on(kvm, running_clock(), vcpus)).collect()
}

fn log(g: &Guest) -> Arc<dyn DirtyLog> {
    g.partition.dirty_log().expect("every KVM has one")
}

/// Adds one to the first word of each page in `pages`.
fn touch(g: &Guest, pages: &[u64]) {
    g.assemble(64, CODE, |a| {
        for page in pages {
            a.inc(qword_ptr(page << 12)).unwrap();
        }
        a.out(i32::from(DONE), al).unwrap();
    });
}

#[test]
fn known_pages_are_found_once_and_no_others() {
    for mut g in guests(1) {
        g.long();
        let written = [0x100, 0x101, 0x1FF, 0x200, 0x3FF];
        touch(&g, &written);
        let log = log(&g);
        log.start().unwrap();
        assert_eq!(log.take().unwrap().iter().count(), 0);
        g.run_to_done();
        let seen = log.take().unwrap();
        for page in FIRST >> 12..PAGES {
            assert_eq!(seen.contains(page), written.contains(&page), "page {page:x}");
        }
        assert_eq!(log.take().unwrap().iter().count(), 0);
        // Again: what was taken is tracked anew.
        touch(&g, &written[1..2]);
        g.set(0, long_registers);
        g.run_to_done();
        assert_eq!(log.take().unwrap().iter().filter(|page| *page >= 0x100).collect::<Vec<_>>(), [0x101]);
        log.stop();
        g.set(0, long_registers);
        g.run_to_done();
        log.start().unwrap();
        assert_eq!(log.take().unwrap().iter().count(), 0, "what was written without a log");
    }
}

#[test]
fn devices_and_completed_instructions_are_logged() {
    for mut g in guests(1) {
        g.long();
        g.assemble(64, CODE, |a| {
            a.mov(rdi, 0x12_3000u64).unwrap();
            // Both are completed where the guest's kernel is emulated.
            a.lock().cmpxchg16b(xmmword_ptr(rdi)).unwrap();
            a.fninit().unwrap();
            a.fnstcw(word_ptr(rdi + 0x1FFF)).unwrap();
            a.out(i32::from(DONE), al).unwrap();
        });
        let log = log(&g);
        log.start().unwrap();
        g.run_to_done();
        let dma = DmaSpace::new(g.ram.clone());
        dma.set_enabled(true);
        dma.write(0x20_0FFF, &[1, 2]).unwrap();
        let seen: Vec<_> = log.take().unwrap().iter().filter(|page| *page >= 0x100).collect();
        assert_eq!(seen, [0x123, 0x124, 0x125, 0x200, 0x201]);
    }
}

/// Ends the copying, also when the guest fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Two vCPUs write all over their halves while pages are copied. Every page whose contents changed was told of: the copy is
/// the same in the end. The
/// ring is smaller than what they write. At ring 3, where no KVM emulates.
#[test]
fn no_write_is_lost() {
    for mut g in guests(2) {
        g.long_tables();
        g.set(0, user_registers);
        g.set(1, |s| {
            s.run_state = hypervisor::state::RunState::Running;
            user_registers(s);
            s.rip = CODE + 0x1000;
        });
        for (vcpu, half) in [(0u64, FIRST), (1, FIRST + 0x18_0000)] {
            g.assemble(64, CODE + 0x1000 * vcpu, |a| {
                let (mut again, mut next) = (a.create_label(), a.create_label());
                let mut for_ever = a.create_label();
                a.set_label(&mut for_ever).unwrap();
                a.mov(ecx, 30).unwrap();
                a.set_label(&mut again).unwrap();
                a.mov(rbx, half).unwrap();
                a.set_label(&mut next).unwrap();
                a.inc(qword_ptr(rbx + rcx * 8)).unwrap();
                a.add(rbx, 0x1000).unwrap();
                a.cmp(rbx, (half + 0x18_0000) as i32).unwrap();
                a.jb(next).unwrap();
                a.dec(ecx).unwrap();
                a.jnz(again).unwrap();
                if vcpu == 1 {
                    a.jmp(for_ever).unwrap();
                }
                a.out(i32::from(DONE), al).unwrap();
            });
        }
        let (log, ram) = (log(&g), g.ram.clone());
        let mut copy = vec![0; RAM_BYTES as usize];
        log.start().unwrap();
        ram.load_bytes(0, &mut copy);
        let over = AtomicBool::new(false);
        let update = |copy: &mut Vec<u8>| {
            let pages = log.take().unwrap();
            for page in pages.iter() {
                let at = (page << 12) as usize;
                ram.load_bytes(page << 12, &mut copy[at..at + 4096]);
            }
            pages.iter().count()
        };
        let (rounds, copied) = std::thread::scope(|threads| {
            let copier = threads.spawn(|| {
                let (mut rounds, mut copied) = (0, 0);
                while !over.load(Ordering::SeqCst) {
                    copied += update(&mut copy);
                    rounds += 1;
                }
                (rounds, copied)
            });
            let end = Ends(&over);
            g.run_to_done();
            drop(end);
            copier.join().unwrap()
        });
        // Everybody stands still now.
        update(&mut copy);
        let mut here = vec![0; RAM_BYTES as usize];
        ram.load_bytes(0, &mut here);
        let lost: Vec<_> =
            (0..PAGES as usize).filter(|n| here[n << 12..][..4096] != copy[n << 12..][..4096]).collect();
        assert!(lost.is_empty(), "pages {lost:x?} after {rounds} rounds, {copied} pages copied");
        assert!(here[FIRST as usize + 0x18_0000..].iter().any(|byte| *byte != 0), "the second one has run");
        assert!(copied >= 0x300, "{copied} pages in {rounds} rounds");
    }
}
