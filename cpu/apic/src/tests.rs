//! The local APIC by the manual's rules, routing by every scheme, golden bytes, random and hostile traffic.

use super::registers as reg;
use super::*;
use alloc::sync::Arc;
use alloc::vec::Vec;
use guest_time::manual::ManualTime;
use proptest::prelude::*;
use x86_defs::msr;

const TSC_KHZ: u32 = 2_000_000;

struct Cpu {
    apic: LocalApic,
    time: ManualTime,
}

fn cpus(n: u32) -> (Vec<Cpu>, Vec<Arc<ApicInbox>>) {
    let inboxes: Vec<_> = (0..n).map(|id| Arc::new(ApicInbox::new(id))).collect();
    let cpu = |inbox: &Arc<ApicInbox>| {
        let (time, clock) = ManualTime::clock();
        let clock = ApicClock { clock, tsc_khz: TSC_KHZ, tsc_offset: 0 };
        Cpu { apic: LocalApic::new(inbox.id(), inbox.id() == 0, inbox.clone(), clock), time }
    };
    (inboxes.iter().map(cpu).collect(), inboxes)
}

fn one() -> Cpu {
    let mut cpu = cpus(1).0.remove(0);
    cpu.set(reg::SVR, 0x1FF);
    cpu
}

impl Cpu {
    fn set(&mut self, number: u32, value: u32) -> ApicAction {
        self.apic.mmio_write(number * 16, value)
    }
    fn get(&mut self, number: u32) -> u32 {
        self.apic.mmio_read(number * 16)
    }
    fn x2(&mut self) {
        let base = self.apic.msr_read(msr::APIC_BASE).unwrap();
        self.apic.msr_write(msr::APIC_BASE, base | msr::APIC_BASE_X2APIC).unwrap();
    }
    fn wr(&mut self, number: u32, value: u64) -> Result<ApicAction, NoSuchRegister> {
        self.apic.msr_write(msr::X2APIC_FIRST + number, value)
    }
    /// Lets time pass and the timer run.
    fn pass(&mut self, ns: u64) -> bool {
        self.time.advance(ns);
        self.apic.advance(self.apic.clock().now())
    }
}

fn fixed(destination: u32, vector: u8) -> Message {
    Message {
        destination,
        logical: false,
        wide: false,
        redirect: false,
        mode: DeliveryMode::Fixed,
        vector,
        level: false,
    }
}

#[test]
fn reset_values() {
    let mut cpu = cpus(2).0.remove(1);
    let got: Vec<u32> =
        [reg::ID, reg::VERSION, reg::SVR, reg::DFR, reg::LVT_TIMER].iter().map(|n| cpu.get(*n)).collect();
    assert_eq!(got, [1 << 24, 0x0005_0014, 0xFF, u32::MAX, 0x1_0000]);
    assert_eq!(cpu.apic.msr_read(msr::APIC_BASE), Ok(0xFEE0_0800));
    assert_eq!(one().apic.msr_read(msr::APIC_BASE), Ok(0xFEE0_0900));
}

#[test]
fn priorities_and_eoi() {
    let mut cpu = one();
    let inbox = cpu.apic.inbox().clone();
    assert!(inbox.post_vector(0x51, false));
    assert!(!inbox.post_vector(0x51, false), "coalesced");
    inbox.post_vector(0x62, true);
    assert!(inbox.wants_attention());
    cpu.set(reg::TPR, 0x60);
    assert_eq!((cpu.apic.pending_vector(), cpu.apic.tpr()), (None, 6));
    cpu.apic.set_tpr(5);
    assert_eq!(cpu.apic.acknowledge(), Some(0x62));
    assert_eq!((cpu.apic.ppr(), cpu.apic.acknowledge()), (0x60, None));
    inbox.post_vector(0x70, false);
    assert_eq!(cpu.apic.acknowledge(), Some(0x70), "nests");
    assert_eq!(cpu.set(reg::EOI, 0), ApicAction::None);
    assert_eq!(cpu.set(reg::EOI, 0), ApicAction::Eoi { vector: 0x62 });
    assert_eq!(cpu.apic.acknowledge(), None);
    cpu.apic.set_tpr(0);
    assert_eq!(cpu.apic.acknowledge(), Some(0x51));
    assert_eq!(cpu.set(reg::EOI, 0), ApicAction::None);
    assert_eq!(cpu.set(reg::EOI, 0), ApicAction::None);
    assert!(!inbox.wants_attention());
}

#[test]
fn disabled_by_software_takes_no_vectors() {
    let mut cpu = one();
    cpu.set(reg::LVT_TIMER, 0x40);
    cpu.set(reg::SVR, 0xFF);
    assert_eq!(cpu.get(reg::LVT_TIMER), 0x1_0040);
    cpu.set(reg::LVT_TIMER, 0x40);
    assert_eq!(cpu.get(reg::LVT_TIMER), 0x1_0040, "stays masked");
    assert!(!cpu.apic.inbox().post_vector(0x40, false));
    assert!(cpu.apic.inbox().post(&Message { mode: DeliveryMode::Nmi, ..fixed(0, 0) }));
    assert!(cpu.apic.poll_inbox().nmi);
}

#[test]
fn init_and_sipi() {
    let (mut cpus, inboxes) = cpus(2);
    let cpu = &mut cpus[0];
    cpu.set(reg::ICR_HIGH, 1 << 24);
    let ApicAction::Ipi(init) = cpu.set(reg::ICR, 0x4500) else { panic!() };
    let ApicAction::Ipi(sipi) = cpu.set(reg::ICR, 0x4699) else { panic!() };
    assert_eq!(cpu.set(reg::ICR, 0x8500), ApicAction::None, "de-assert");
    cpus[1].set(reg::SVR, 0x1FF);
    let mut woken = Vec::new();
    route::deliver_ipi(&init, 0, &inboxes, |n| woken.push(n));
    route::deliver_ipi(&sipi, 0, &inboxes, |n| woken.push(n));
    assert_eq!(woken, [1, 1]);
    let arrived = cpus[1].apic.poll_inbox();
    assert_eq!(arrived, Arrived { init: true, sipi: Some(0x99), ..Arrived::default() });
    assert_eq!(cpus[1].get(reg::SVR), 0xFF, "INIT reset it");
    route::deliver_ipi(&sipi, 0, &inboxes, |_| ());
    route::deliver_ipi(&init, 0, &inboxes, |_| ());
    assert_eq!(cpus[1].apic.poll_inbox().sipi, None, "from before the INIT");
}

#[test]
fn shorthands() {
    let (mut cpus, inboxes) = cpus(3);
    for cpu in &mut cpus {
        cpu.set(reg::SVR, 0x1FF);
    }
    let mut reached = |low| match cpus[1].set(reg::ICR, low) {
        ApicAction::Ipi(ipi) => {
            let mut woken = Vec::new();
            route::deliver_ipi(&ipi, 1, &inboxes, |n| woken.push(n));
            woken
        }
        _ => Vec::new(),
    };
    assert_eq!(reached(0xC_0031), [0, 2]);
    assert_eq!(reached(0x8_0032), [0, 1, 2]);
    assert!(reached(0x4_0033).is_empty());
    assert_eq!(cpus[1].apic.acknowledge(), Some(0x33), "to itself");
    assert_eq!(cpus[1].apic.acknowledge(), None, "same class waits");
}

#[test]
fn illegal_vectors_are_errors() {
    let mut cpu = one();
    cpu.set(reg::LVT_ERROR, 0xFE);
    assert_eq!(cpu.set(reg::ICR, 0x4_0005), ApicAction::None);
    assert_eq!(cpu.get(reg::ESR), 0);
    cpu.set(reg::ESR, 0);
    assert_eq!(cpu.get(reg::ESR), reg::ESR_SEND_VECTOR);
    assert_eq!(cpu.apic.acknowledge(), Some(0xFE));
    cpu.apic.inbox().post_vector(3, false);
    cpu.apic.poll_inbox();
    cpu.set(0x55, 0);
    cpu.set(reg::ESR, 0);
    assert_eq!(cpu.get(reg::ESR), reg::ESR_RECEIVE_VECTOR | reg::ESR_REGISTER);
    cpu.set(reg::ESR, 0);
    assert_eq!(cpu.get(reg::ESR), 0);
}

#[test]
fn counts() {
    let mut cpu = one();
    cpu.set(reg::DIVIDE, 0b0011); // by 16
    cpu.set(reg::LVT_TIMER, 0x30);
    cpu.set(reg::INITIAL_COUNT, 100);
    assert!(!cpu.pass(1599));
    assert_eq!((cpu.get(reg::CURRENT_COUNT), cpu.apic.timer_deadline()), (1, Some(1600)));
    cpu.set(reg::DIVIDE, 0b1011); // by 1: one count left
    assert_eq!(cpu.apic.timer_deadline(), Some(1600));
    assert!(cpu.pass(1));
    assert_eq!((cpu.get(reg::CURRENT_COUNT), cpu.apic.timer_deadline()), (0, None));
    assert_eq!(cpu.apic.acknowledge(), Some(0x30));
    assert!(!cpu.pass(10_000));
}

#[test]
fn periods_coalesce_and_keep_their_phase() {
    let mut cpu = one();
    cpu.set(reg::DIVIDE, 0b1011);
    cpu.set(reg::LVT_TIMER, 0x2_0030);
    cpu.set(reg::INITIAL_COUNT, 1000);
    assert!(cpu.pass(3_500));
    assert_eq!(cpu.get(reg::CURRENT_COUNT), 500);
    assert_eq!(cpu.apic.timer_deadline(), None, "one is pending: nothing to wake for");
    assert_eq!(cpu.apic.acknowledge(), Some(0x30));
    assert_eq!(cpu.apic.timer_deadline(), Some(4_000));
    cpu.set(reg::EOI, 0);
    cpu.set(reg::LVT_TIMER, 0x3_0030);
    cpu.pass(2_000);
    assert_eq!(cpu.apic.acknowledge(), None, "masked");
    assert_eq!(cpu.get(reg::CURRENT_COUNT), 500);
    cpu.set(reg::INITIAL_COUNT, 0);
    assert_eq!(cpu.get(reg::CURRENT_COUNT), 0);
}

#[test]
fn tsc_deadline() {
    let mut cpu = one();
    assert!(cpu.apic.msr_write(msr::TSC_DEADLINE, 500).is_ok());
    assert_eq!(cpu.apic.msr_read(msr::TSC_DEADLINE), Ok(0), "not in this mode");
    cpu.set(reg::LVT_TIMER, 0x4_0040);
    cpu.set(reg::INITIAL_COUNT, 7);
    cpu.apic.msr_write(msr::TSC_DEADLINE, 2001).unwrap();
    assert_eq!((cpu.apic.timer_deadline(), cpu.get(reg::CURRENT_COUNT)), (Some(1001), 0));
    cpu.apic.set_tsc_offset(1000);
    assert_eq!(cpu.apic.timer_deadline(), Some(501));
    assert!(!cpu.pass(500));
    assert!(cpu.pass(1));
    assert_eq!(cpu.apic.msr_read(msr::TSC_DEADLINE), Ok(0));
    assert_eq!(cpu.apic.acknowledge(), Some(0x40));
    cpu.set(reg::EOI, 0);
    cpu.apic.msr_write(msr::TSC_DEADLINE, 1).unwrap();
    assert_eq!(cpu.apic.acknowledge(), Some(0x40), "in the past: at once");
    cpu.apic.msr_write(msr::TSC_DEADLINE, u64::MAX).unwrap();
    cpu.set(reg::LVT_TIMER, 0x2_0040);
    assert_eq!(cpu.apic.timer_deadline(), None, "the mode change disarmed it");
}

#[test]
fn x2apic_registers() {
    let mut cpu = cpus(35).0.remove(34);
    assert_eq!(cpu.wr(reg::SVR, 0x1FF), Err(NoSuchRegister));
    cpu.x2();
    assert_eq!(cpu.apic.mmio_base(), None);
    assert_eq!((cpu.get(reg::ID), cpu.set(reg::TPR, 0x10)), (0, ApicAction::None));
    assert_eq!(cpu.wr(reg::SVR, 0x1FF), Ok(ApicAction::None));
    let mut read = |n| cpu.apic.msr_read(msr::X2APIC_FIRST + n);
    assert_eq!((read(reg::ID), read(reg::LDR)), (Ok(34), Ok(2 << 16 | 4)));
    for absent in [reg::DFR, reg::ICR_HIGH, reg::EOI, reg::SELF_IPI, 0, 0xFF] {
        assert_eq!(read(absent), Err(NoSuchRegister), "{absent:#x}");
    }
    assert_eq!(cpu.wr(reg::EOI, 1), Err(NoSuchRegister));
    assert_eq!(cpu.wr(reg::LDR, 0), Err(NoSuchRegister));
    assert_eq!(cpu.wr(reg::TPR, 0x100), Err(NoSuchRegister));
    assert_eq!(cpu.wr(reg::ICR, 1 << 13), Err(NoSuchRegister));
    assert_eq!(cpu.wr(reg::SELF_IPI, 0x77), Ok(ApicAction::None));
    assert_eq!(cpu.apic.acknowledge(), Some(0x77));
    let Ok(ApicAction::Ipi(ipi)) = cpu.wr(reg::ICR, 0x1234_5678_0000_0040) else { panic!() };
    assert_eq!(ipi.message, Message { wide: true, ..fixed(0x1234_5678, 0x40) });
}

#[test]
fn modes_change_as_the_manual_allows() {
    let mut cpu = one();
    let mut base = |value| cpu.apic.msr_write(msr::APIC_BASE, value);
    let (on, x2) = (0xFEE0_0900, 0xFEE0_0D00);
    let changed = |mmio, enabled| Ok(ApicAction::BaseChanged { mmio, enabled });
    assert_eq!(base(0xFEE0_0500), Err(NoSuchRegister));
    assert_eq!(base(on | 1 << 50), Err(NoSuchRegister));
    assert_eq!(base(on | 1), Err(NoSuchRegister));
    assert_eq!(base(0x1000_0900), changed(Some(0x1000_0000), true));
    assert_eq!(base(x2), changed(None, true));
    assert_eq!(base(on), Err(NoSuchRegister));
    assert_eq!(base(0xFEE0_0100), changed(None, false));
    assert_eq!(base(x2), Err(NoSuchRegister));
    assert_eq!(base(on), changed(Some(0xFEE0_0000), true));
    assert_eq!(cpu.get(reg::SVR), 0xFF, "reset while it was off");
}

#[test]
fn destinations_by_every_scheme() {
    let (mut cpus, inboxes) = cpus(10);
    for (i, cpu) in cpus.iter_mut().enumerate() {
        cpu.set(reg::SVR, 0x1FF);
        cpu.set(reg::LDR, if i < 8 { 1 << (24 + i) } else { 0 });
    }
    let to = |m: Message| route::destinations(&m, &inboxes).collect::<Vec<_>>();
    let msi = |address, data| to(Message::from_msi(address, data).unwrap());
    assert_eq!(msi(0xFEE0_3000, 0x41), [3]);
    assert_eq!(msi(0xFEEF_F000, 0x41).len(), 10);
    assert_eq!(msi(0xFEE0_5004, 0x41), [0, 2]);
    assert_eq!(to(Message { logical: true, mode: DeliveryMode::LowestPriority, ..fixed(5, 0x40) }), [0]);
    assert_eq!(to(Message { logical: true, mode: DeliveryMode::LowestPriority, ..fixed(5, 0x41) }), [2]);
    assert_eq!(msi(0xFEE0_500C, 0x141), [2], "redirection hint");
    assert!(Message::from_msi(0xFED0_0000, 0).is_none() && Message::from_msi(0xFEE0_0000, 0x300).is_none());
    cpus[2].set(reg::SVR, 0xFF);
    assert_eq!(to(Message { logical: true, mode: DeliveryMode::LowestPriority, ..fixed(5, 0x41) }), [0]);
    cpus[2].set(reg::SVR, 0x1FF);
    for (i, cpu) in cpus.iter_mut().enumerate() {
        cpu.set(reg::DFR, 0x0FFF_FFFF);
        cpu.set(reg::LDR, ((i as u32 / 4) << 4 | 1 << (i % 4)) << 24);
    }
    assert_eq!(to(Message { logical: true, ..fixed(0x13, 0x41) }), [4, 5]);
    for cpu in &mut cpus {
        cpu.x2();
    }
    let wide = |destination, logical| to(Message { wide: true, logical, ..fixed(destination, 0x41) });
    assert_eq!(wide(9, false), [9]);
    assert_eq!(wide(u32::MAX, false).len(), 10);
    assert!(wide(0xFF, false).is_empty());
    assert_eq!(wide(0x0000_0103, true), [0, 1, 8]);
    assert!(wide(0x0001_0003, true).is_empty());
    cpus[9].apic.msr_write(msr::APIC_BASE, 0xFEE0_0000).unwrap();
    assert!(wide(9, false).is_empty());
}

#[test]
fn the_8259_and_lint1() {
    let mut cpu = one();
    let inbox = cpu.apic.inbox().clone();
    assert!(!cpu.apic.wants_extint());
    assert!(inbox.set_extint_line(true) && !inbox.set_extint_line(true));
    assert!(cpu.apic.wants_extint(), "virtual wire after reset");
    cpu.set(reg::LVT_TIMER + 3, 0x1_0700);
    assert!(!cpu.apic.wants_extint());
    cpu.apic.msr_write(msr::APIC_BASE, 0xFEE0_0100).unwrap();
    assert!(cpu.apic.wants_extint(), "no APIC: the pin itself");
    inbox.set_extint_line(false);
    assert!(!cpu.apic.wants_extint());
    cpu.apic.reset();
    cpu.set(reg::SVR, 0x1FF);
    inbox.post(&Message { mode: DeliveryMode::ExtInt, ..fixed(0, 0) });
    cpu.apic.poll_inbox();
    assert!(cpu.apic.wants_extint());
    cpu.apic.extint_taken();
    assert!(!cpu.apic.wants_extint());
    inbox.pulse_lint1();
    assert!(!cpu.apic.poll_inbox().nmi, "masked");
    cpu.set(reg::LVT_TIMER + 4, 0x400);
    inbox.pulse_lint1();
    assert!(cpu.apic.poll_inbox().nmi);
}

/// A state with something in every field.
fn stirred() -> Cpu {
    let mut cpu = one();
    let inbox = cpu.apic.inbox().clone();
    cpu.set(reg::TPR, 0x20);
    cpu.set(reg::LDR, 0x0400_0000);
    cpu.set(reg::DFR, 0);
    cpu.set(reg::DIVIDE, 3);
    cpu.set(reg::LVT_TIMER, 0x2_0031);
    cpu.set(reg::INITIAL_COUNT, 1000);
    cpu.set(reg::ICR_HIGH, 9 << 24);
    cpu.set(reg::ICR, 5);
    cpu.set(reg::ESR, 0);
    inbox.post_vector(0x80, true);
    cpu.apic.acknowledge();
    inbox.post_vector(0x41, true);
    inbox.post(&Message { mode: DeliveryMode::ExtInt, ..fixed(0, 0) });
    cpu.apic.poll_inbox();
    inbox.post_vector(0x42, true);
    inbox.post_vector(1, false);
    inbox.post(&Message { mode: DeliveryMode::Nmi, ..fixed(0, 0) });
    inbox.post(&Message { mode: DeliveryMode::StartUp, ..fixed(0, 0x12) });
    cpu
}

#[test]
fn golden_bytes_of_version_1() {
    let hex: alloc::string::String =
        stirred().apic.save().data.iter().map(|b| alloc::format!("{b:02x}")).collect();
    assert_eq!(hex, include_str!("golden_v1.hex").split_whitespace().collect::<alloc::string::String>());
}

#[test]
fn save_restore_save() {
    let mut cpu = stirred();
    let blob = cpu.apic.save();
    let mut copy = one();
    copy.apic.restore(&blob).unwrap();
    assert_eq!(copy.apic.save(), blob);
    assert!(copy.apic.inbox().wants_attention());
    let arrived = copy.apic.poll_inbox();
    assert_eq!((arrived.nmi, arrived.sipi), (true, Some(0x12)));
    assert_eq!(copy.set(reg::EOI, 0), ApicAction::Eoi { vector: 0x80 });
    assert_eq!((copy.apic.acknowledge(), cpu.get(reg::IRR + 2)), (Some(0x42), 6));
    let mut other = cpus(2).0.remove(1);
    assert!(other.apic.restore(&blob).is_err(), "another processor's");
    copy.apic.reset();
    let fresh = cpus(1).0.remove(0);
    assert_eq!(copy.apic.save(), fresh.apic.save());
}

#[derive(Clone, Debug)]
enum Step {
    Mmio(u32, u32),
    Read(u32),
    Msr(u32, u64),
    Post(u8, bool),
    Event(u32),
    Take,
    Pass(u64),
    Tpr(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop_oneof![any::<u32>(), 0u32..0x300, Just(u32::MAX)];
    let msrs = prop_oneof![Just(msr::APIC_BASE), Just(msr::TSC_DEADLINE), 0x800u32..0x840];
    let base = (0u64..16).prop_map(|bits| 0xFEE0_0000 | bits << 8);
    prop_oneof![
        (0u32..0x400, value).prop_map(|(o, v)| Step::Mmio(o * 4, v)),
        any::<u32>().prop_map(Step::Read),
        (msrs, prop_oneof![any::<u64>(), base, 0u64..0x300]).prop_map(|(m, v)| Step::Msr(m, v)),
        any::<(u8, bool)>().prop_map(|(v, l)| Step::Post(v, l)),
        (0u32..8).prop_map(Step::Event),
        Just(Step::Take),
        (0u64..1 << 40).prop_map(Step::Pass),
        (0u8..16).prop_map(Step::Tpr),
    ]
}

proptest! {
    #[test]
    fn random_traffic_never_panics(steps in proptest::collection::vec(step(), 0..200)) {
        let mut cpu = one();
        let inbox = cpu.apic.inbox().clone();
        for step in steps {
            match step {
                Step::Mmio(offset, value) => drop(cpu.apic.mmio_write(offset, value)),
                Step::Read(offset) => drop(cpu.apic.mmio_read(offset)),
                Step::Msr(msr, value) => {
                    let _ = cpu.apic.msr_write(msr, value);
                    let _ = cpu.apic.msr_read(msr);
                }
                Step::Post(vector, level) => drop(inbox.post_vector(vector, level)),
                Step::Event(bits) => if let Some(mode) = DeliveryMode::from_bits(bits) {
                    inbox.post(&Message { mode, ..fixed(0, 0x33) });
                    cpu.apic.poll_inbox();
                },
                Step::Take => if let Some(vector) = cpu.apic.acknowledge() {
                    prop_assert!(vector >= 16);
                },
                Step::Pass(ns) => { cpu.pass(ns); }
                Step::Tpr(class) => cpu.apic.set_tpr(class),
            }
            let _ = (cpu.apic.timer_deadline(), cpu.apic.wants_extint(), cpu.apic.pending_vector());
        }
        let blob = cpu.apic.save();
        let mut copy = one();
        copy.apic.restore(&blob).unwrap();
        prop_assert_eq!(copy.apic.save(), blob);
    }

    #[test]
    fn hostile_states_never_panic(at in 0usize..300, bit in 0u8..8, cut in 0usize..400, passes in 0u64..1 << 50) {
        let mut blob = stirred().apic.save();
        if let Some(b) = blob.data.get_mut(at) { *b ^= 1 << bit; }
        blob.data.truncate(cut);
        let mut cpu = one();
        if cpu.apic.restore(&blob).is_ok() {
            for number in 0..0x40 { cpu.get(number); }
            cpu.pass(passes);
            while cpu.apic.acknowledge().is_some() { cpu.set(reg::EOI, 0); }
        }
    }

    /// Posted by two threads while the owner takes them: each vector comes once.
    #[test]
    fn an_accepted_vector_is_delivered_exactly_once(set in proptest::collection::btree_set(16u8..=255, 1..240)) {
        extern crate std;
        let mut cpu = one();
        let inbox = cpu.apic.inbox().clone();
        let vectors: Vec<u8> = set.into_iter().collect();
        let (first, second) = vectors.split_at(vectors.len() / 2);
        let post = |list: &[u8]| list.iter().all(|v| inbox.post_vector(*v, *v & 1 == 1));
        let mut delivered = Vec::new();
        std::thread::scope(|scope| {
            let posters = [scope.spawn(|| post(first)), scope.spawn(|| post(second))];
            while !posters.iter().all(|p| p.is_finished()) || cpu.apic.inbox().wants_attention() {
                while let Some(vector) = cpu.apic.acknowledge() {
                    let level = cpu.set(reg::EOI, 0) == ApicAction::Eoi { vector };
                    assert_eq!(level, vector & 1 == 1);
                    delivered.push(vector);
                }
            }
            for poster in posters {
                assert!(poster.join().unwrap(), "all were new");
            }
        });
        delivered.sort_unstable();
        prop_assert_eq!(delivered, vectors);
    }
}
