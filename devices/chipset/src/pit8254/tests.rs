//! The 8254: every mode against the data sheet, late ticks under both policies, saved state.

use super::*;
use crate::testing::{Access, LineLog, golden};
use guest_time::manual::{ManualTime, ManualTimer};
use proptest::prelude::*;

struct Bench {
    pit: Pit8254,
    time: ManualTime,
    timer: ManualTimer,
    log: LineLog,
    replaced: LegacyReplacement,
}

fn bench(missed_ticks: MissedTicks) -> Bench {
    let (time, clock) = ManualTime::clock();
    let (timer, log, replaced) = (ManualTimer::default(), LineLog::default(), LegacyReplacement::new());
    let wiring =
        PitWiring { irq: log.line(0), clock, timer: Box::new(timer.clone()), replaced: replaced.clone() };
    Bench { pit: Pit8254::new("pit", missed_ticks, wiring), time, timer, log, replaced }
}

impl Bench {
    fn program(&mut self, channel: u8, mode: u8, count: u16) {
        self.pit.outb(0, 3, channel << 6 | 0x30 | mode << 1);
        for byte in count.to_le_bytes() {
            self.pit.outb(0, channel.into(), byte);
        }
    }
    fn ticks(&self, ticks: u64) {
        let clock = &self.pit.wiring.clock;
        self.time.advance(RATE.when(self.pit.tick() + ticks) - clock.now());
    }
    fn count(&mut self, channel: u8) -> u16 {
        self.pit.outb(0, 3, channel << 6);
        u16::from_le_bytes([self.pit.inb(0, channel.into()), self.pit.inb(0, channel.into())])
    }
    fn status(&mut self, channel: u8) -> u8 {
        self.pit.outb(0, 3, 0xE0 | 2 << channel);
        self.pit.inb(0, channel.into())
    }
    /// Polls when the timer says so, as long as `ns`; returns the interrupts.
    fn run(&mut self, ns: u64) -> usize {
        let end = self.pit.wiring.clock.now() + ns;
        while let Some(at) = self.timer.deadline().filter(|at| *at <= end) {
            self.time.advance(at.saturating_sub(self.pit.wiring.clock.now()));
            self.pit.poll();
        }
        self.time.advance(end - self.pit.wiring.clock.now());
        self.log.take_edges(0)
    }
}

#[test]
fn every_mode_counts_and_drives_its_output() {
    let mut b = bench(MissedTicks::Discard);
    let seen = |b: &mut Bench, at: &[u64]| -> alloc::vec::Vec<(u16, u8)> {
        let start = b.pit.tick();
        at.iter()
            .map(|t| {
                b.ticks(start + t - b.pit.tick());
                (b.count(2), b.pit.inb(1, 0) >> 5 & 1)
            })
            .collect()
    };
    b.pit.outb(1, 0, 1);
    b.program(2, 0, 5);
    assert_eq!(seen(&mut b, &[0, 4, 5, 6]), [(5, 0), (1, 0), (0, 1), (0xFFFF, 1)]);
    b.program(2, 2, 4);
    assert_eq!(seen(&mut b, &[0, 2, 3, 4]), [(4, 1), (2, 1), (1, 0), (4, 1)]);
    b.program(2, 3, 6);
    assert_eq!(seen(&mut b, &[0, 2, 3, 5, 6]), [(6, 1), (2, 1), (6, 0), (2, 0), (6, 1)]);
    b.program(2, 4, 3);
    assert_eq!(seen(&mut b, &[0, 3, 4]), [(3, 1), (0, 0), (0xFFFF, 1)]);
    b.program(2, 1, 3);
    assert_eq!(seen(&mut b, &[0, 9]), [(3, 1), (3, 1)], "waits for the gate");
    b.pit.outb(1, 0, 0);
    b.pit.outb(1, 0, 1);
    assert_eq!(seen(&mut b, &[0, 2, 3]), [(3, 0), (1, 0), (0, 1)]);
    b.program(2, 5, 3);
    b.pit.outb(1, 0, 0);
    b.pit.outb(1, 0, 1);
    assert_eq!(seen(&mut b, &[0, 3, 4]), [(3, 1), (0, 0), (0xFFFF, 1)]);
}

/// Linux measures the TSC so: gate off, mode 0, gate on, wait for OUT.
#[test]
fn the_gate_stops_and_starts_counter_2() {
    let mut b = bench(MissedTicks::Discard);
    b.program(2, 0, 1000);
    b.ticks(5000);
    assert_eq!((b.count(2), b.pit.inb(1, 0) & 0x20), (1000, 0));
    b.pit.outb(1, 0, 1);
    b.ticks(600);
    b.pit.outb(1, 0, 0);
    b.ticks(600);
    assert_eq!(b.count(2), 400);
    b.pit.outb(1, 0, 1);
    b.ticks(399);
    assert_eq!(b.pit.inb(1, 0) & 0x20, 0);
    b.ticks(1);
    assert_eq!(b.pit.inb(1, 0) & 0x21, 0x21);
    let before = b.pit.inb(1, 0);
    b.time.advance(REFRESH_NS);
    assert_eq!(before ^ b.pit.inb(1, 0), 0x10, "refresh toggles");
}

#[test]
fn bytes_bcd_and_status() {
    let mut b = bench(MissedTicks::Discard);
    assert_eq!(b.status(0), 0xF6, "power-up: null count");
    b.pit.outb(0, 3, 0x15); // counter 0, low byte, mode 2, BCD
    b.pit.outb(0, 0, 0x25);
    assert_eq!(b.status(0), 0x95);
    b.ticks(6);
    assert_eq!(b.pit.inb(0, 0), 0x19);
    b.pit.outb(0, 3, 0x20);
    b.pit.outb(0, 3, 0x24);
    b.pit.outb(0, 0, 2);
    assert_eq!(b.pit.inb(0, 0), 2);
    b.program(0, 2, 0);
    b.ticks(1);
    assert_eq!(b.count(0), 0xFFFF);
    b.pit.outb(0, 3, 0xC2); // read back both
    assert_eq!((b.pit.inb(0, 0), b.pit.inb(0, 0), b.pit.inb(0, 0)), (0xB4, 0xFF, 0xFF));
    assert_eq!(b.pit.inb(0, 3), 0xFF);
}

#[test]
fn periodic_interrupts_and_late_ones() {
    let mut b = bench(MissedTicks::Discard);
    b.program(0, 2, 1193);
    assert_eq!(b.run(100_000_000), 100);
    b.time.advance(50_000_000);
    assert_eq!(b.run(1), 1, "discarded");
    b.replaced.set(true);
    assert_eq!(b.run(10_000_000), 0);
    b.replaced.set(false);
    b.program(0, 0, 1193);
    assert_eq!(b.run(100_000_000), 1, "one shot");
    assert_eq!(b.timer.deadline(), None);
    b.program(0, 2, 2);
    assert!(b.run(1_000_000) <= 20, "faster than we let it");
}

#[test]
fn reinjects_without_acknowledgements() {
    let mut b = bench(MissedTicks::Reinject);
    b.program(0, 3, 1193);
    b.time.advance(20_000_000);
    let caught_up = b.run(60_000_000);
    assert!((79..=80).contains(&caught_up), "{caught_up}");
    b.time.advance(60_000_000_000);
    let burst = b.run(4_000_000_000);
    assert!((4_990..=5_010).contains(&burst), "at most a second's worth: {burst}");
}

#[test]
fn reinjects_one_an_acknowledgement() {
    let mut b = bench(MissedTicks::Reinject);
    b.program(0, 2, 11932);
    assert_eq!(b.run(10_100_000), 1);
    b.pit.acknowledged();
    assert_eq!(b.log.take_edges(0), 0, "nothing owed");
    assert_eq!(b.run(40_000_000), 4, "every tick pulses, acknowledged or not");
    let mut again = 0;
    for _ in 0..10 {
        b.pit.acknowledged();
        again += b.log.take_edges(0);
    }
    assert_eq!(again, 3, "three had merged");
}

fn stir(b: &mut Bench) {
    b.program(0, 2, 1193);
    b.time.advance(5_000_000);
    b.pit.poll();
    b.program(2, 3, 77);
    b.pit.outb(1, 0, 3);
    b.pit.outb(0, 3, 0xC2);
    b.pit.outb(0, 3, 0x50);
    b.pit.outb(0, 1, 9);
    b.pit.outb(0, 2, 9);
}

#[test]
fn golden_bytes_of_version_1() {
    let mut b = bench(MissedTicks::Reinject);
    stir(&mut b);
    golden(
        &b.pit.save().unwrap(),
        "0100950000003300000001000100000002020001000000030400010000000105000100000001070002000000a9040c00
         02000000aa040d0001000000b52400000002000100000001040001000000010500010000000107000100000009080002
         0000004d1732000000010001000000030200010000000304000100000001050001000000010700010000004d08000200
         00004d170a00010000000a02000100000003030001000000050400010000000405000100000001",
    );
}

#[test]
fn restored_ones_go_on() {
    let mut b = bench(MissedTicks::Reinject);
    stir(&mut b);
    let mut copy = bench(MissedTicks::Reinject);
    copy.time.advance(b.pit.wiring.clock.now());
    copy.pit.restore(&b.pit.save().unwrap()).unwrap();
    assert_eq!(copy.log.take_edges(0), 0);
    assert_eq!(copy.timer.deadline(), b.timer.deadline());
    b.log.take_edges(0);
    assert_eq!(copy.run(30_000_000), b.run(30_000_000));
}

device::device_conformance!(
    conformance,
    || bench(MissedTicks::Reinject).pit,
    &[4, 1],
    |pit: &mut Pit8254| {
        for (at, value) in [(3, 0x34), (0, 1), (0, 2), (3, 0xB2), (2, 9), (3, 0xC6)] {
            pit.outb(0, at, value);
        }
        pit.outb(1, 0, 3);
    }
);

proptest! {
    #[test]
    fn random_traffic_never_panics(
        steps in proptest::collection::vec((0u64..6, any::<u8>(), 0u64..1 << 40), 0..200),
        reinject: bool,
    ) {
        let mut b = bench(if reinject { MissedTicks::Reinject } else { MissedTicks::Discard });
        for (at, value, ns) in steps {
            match at {
                4 => b.pit.outb(1, 0, value),
                5 => b.time.advance(ns),
                _ => b.pit.outb(0, at, value),
            }
            b.pit.get(0, 0, 2);
            b.pit.inb(0, 2);
            b.pit.poll();
            if value & 1 == 0 { b.pit.acknowledged(); }
            let blob = b.pit.save().unwrap();
            b.pit.restore(&blob).unwrap();
            prop_assert_eq!(b.pit.save().unwrap(), blob);
        }
    }
}
