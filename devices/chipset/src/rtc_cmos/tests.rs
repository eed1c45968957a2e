//! The RTC: calendar formats, setting as Linux does it, its three interrupts, saved state.

use super::*;
use crate::testing::{Access, LineLog, golden};
use guest_time::manual::{ManualTime, ManualTimer};
use proptest::prelude::*;

// The manual clock starts at 2023-11-14 22:13:20 UTC, a Tuesday.

struct Bench {
    rtc: RtcCmos,
    time: ManualTime,
    timer: ManualTimer,
    log: LineLog,
    replaced: LegacyReplacement,
}

fn bench(missed_ticks: MissedTicks) -> Bench {
    let (time, clock) = ManualTime::clock();
    let (timer, log, replaced) = (ManualTimer::default(), LineLog::default(), LegacyReplacement::new());
    let wiring =
        RtcWiring { irq: log.line(8), clock, timer: Box::new(timer.clone()), replaced: replaced.clone() };
    let rtc = RtcCmos::new("rtc", missed_ticks, wiring, &memory_size_bytes(3 << 30, 1 << 30));
    Bench { rtc, time, timer, log, replaced }
}

impl Bench {
    fn get(&mut self, index: u8) -> u8 {
        self.rtc.outb(0, 0, index);
        self.rtc.inb(0, 1)
    }
    fn set(&mut self, index: u8, value: u8) {
        self.rtc.outb(0, 0, index);
        self.rtc.outb(0, 1, value);
    }
    fn all(&mut self) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|i| self.get(i))
    }
    /// As a guest that takes each interrupt at once; returns how often and what C said in sum.
    fn run(&mut self, ns: u64) -> (usize, u8) {
        let (end, mut taken, mut flags) = (self.rtc.wiring.clock.now() + ns, 0, 0);
        while let Some(at) = self.timer.deadline().filter(|at| *at <= end) {
            self.time.advance(at.saturating_sub(self.rtc.wiring.clock.now()));
            self.rtc.poll();
            while self.rtc.wiring.irq.level() {
                taken += 1;
                flags |= self.get(REGISTER_C);
            }
        }
        self.time.advance(end - self.rtc.wiring.clock.now());
        (taken, flags)
    }
}

#[test]
fn shows_the_wall_clock_in_every_format() {
    let mut b = bench(MissedTicks::Discard);
    assert_eq!(b.all(), [0x20, 0x23, 0x11, 0x14, 3, 0x22, 0x13, 0x20]);
    b.set(REGISTER_B, B_BINARY | B_24_HOURS);
    assert_eq!(b.all(), [20, 23, 11, 14, 3, 22, 13, 20]);
    b.set(REGISTER_B, 0);
    assert_eq!(b.get(HOURS), 0x90, "ten at night");
    b.time.advance(2 * 3600 * SECOND_NS);
    assert_eq!(b.get(HOURS), 0x12, "after midnight");
    assert_eq!((b.get(DAY), b.get(REGISTER_D), b.rtc.inb(0, 0)), (0x15, 0x80, 0xFF));
}

#[test]
fn is_set_as_linux_does() {
    let mut b = bench(MissedTicks::Discard);
    b.time.advance(300_000_000);
    b.set(REGISTER_B, B_SET | B_24_HOURS);
    b.set(REGISTER_A, 0x76);
    for (at, value) in [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31)] {
        b.set(at, value);
    }
    for (at, value) in [(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)] {
        b.set(at, value);
    }
    b.time.advance(5 * SECOND_NS);
    assert_eq!(b.get(SECONDS), 0x59, "stands");
    b.set(REGISTER_B, B_24_HOURS);
    b.set(REGISTER_A, 0x26);
    b.time.advance(499_000_000);
    assert_eq!((b.get(SECONDS), b.get(REGISTER_A)), (0x59, 0xA6), "the first update is after half a second");
    b.time.advance(1_000_000);
    assert_eq!(b.all(), [0x20, 0, 1, 1, 7, 0, 0, 0]);
    assert_eq!(b.get(REGISTER_A), 0x26);
    b.set(MINUTES, 0x30);
    assert_eq!(b.all()[6..], [0x30, 0], "without stopping it");
}

#[test]
fn an_hour_that_never_is_can_be_read_back() {
    let mut b = bench(MissedTicks::Discard);
    b.set(REGISTER_B, B_SET | B_BINARY | B_24_HOURS);
    b.set(HOURS, 0xFF);
    assert_eq!(b.get(HOURS), 0xFF);
    b.set(REGISTER_B, B_SET);
    assert_eq!(b.get(HOURS), 0x83, "in the other format, three in the afternoon");
    b.set(REGISTER_B, 0);
    b.all();
}

#[test]
fn update_and_alarm_interrupts() {
    let mut b = bench(MissedTicks::Discard);
    b.get(REGISTER_C);
    b.set(REGISTER_B, B_24_HOURS | UPDATED);
    assert_eq!(b.run(3 * SECOND_NS).0, 3);
    assert_eq!(b.timer.deadline(), Some(4 * SECOND_NS));
    for (at, value) in [(HOURS_ALARM, 0xFF), (MINUTES_ALARM, 0x15), (SECONDS_ALARM, 0x01)] {
        b.set(at, value);
    }
    b.set(REGISTER_B, B_24_HOURS | ALARM);
    // 22:13:23 to 22:15:01.
    assert_eq!(b.timer.deadline(), Some((3 + 98) * SECOND_NS));
    let (taken, flags) = b.run(100 * SECOND_NS);
    assert_eq!((taken, flags & 0xA0), (1, 0xA0));
    assert_eq!(b.run(3600 * SECOND_NS).0, 1, "each hour");
    b.set(SECONDS_ALARM, 0x75);
    assert_eq!(b.run(30 * 3600 * SECOND_NS).0, 0, "a second that never is");
    b.time.advance(30 * 3600 * SECOND_NS);
    b.get(REGISTER_C);
    b.set(SECONDS_ALARM, 0x01);
    b.time.advance(30 * 3600 * SECOND_NS);
    assert_eq!(b.get(REGISTER_C) & 0x20, 0x20, "one that was slept through");
}

#[test]
fn periodic_interrupts() {
    let mut b = bench(MissedTicks::Discard);
    b.set(REGISTER_B, B_24_HOURS | PERIODIC);
    b.get(REGISTER_C);
    assert_eq!(b.run(SECOND_NS).0, 1024);
    b.time.advance(SECOND_NS);
    assert_eq!(b.run(1).0, 1, "discarded");
    b.time.advance(1_000_000);
    b.rtc.poll();
    assert_eq!((b.rtc.wiring.irq.level(), b.timer.deadline()), (true, None), "nothing more to tell");
    b.set(REGISTER_A, 0x2F);
    b.get(REGISTER_C);
    assert_eq!(b.run(SECOND_NS).0, 2);
    b.replaced.set(true);
    b.log.take_edges(8);
    b.time.advance(SECOND_NS);
    b.rtc.poll();
    assert_eq!(b.log.take_edges(8), 0, "the line is the HPET's");
}

#[test]
fn reinjects_one_a_read_of_c() {
    let mut b = bench(MissedTicks::Reinject);
    b.set(REGISTER_B, B_24_HOURS | PERIODIC);
    b.get(REGISTER_C);
    b.time.advance(SECOND_NS / 2);
    assert_eq!(b.run(SECOND_NS / 2).0, 1024);
    b.time.advance(100 * SECOND_NS);
    assert_eq!(b.run(1).0, 1025, "at most a second's");
}

#[test]
fn ram_survives_a_reset_and_tells_the_memory() {
    let mut b = bench(MissedTicks::Discard);
    b.set(0x0F, 0xA5);
    b.set(0x34, 0);
    b.rtc.outb(0, 0, 0x80);
    assert!(b.rtc.is_nmi_masked());
    b.rtc.reset();
    assert_eq!((b.get(0x0F), b.rtc.is_nmi_masked()), (0xA5, false));
    let word = |b: &mut Bench, at| u16::from_le_bytes([b.get(at), b.get(at + 1)]);
    assert_eq!((word(&mut b, 0x15), word(&mut b, 0x17), word(&mut b, 0x30)), (640, 0xFFFF, 0xFFFF));
    assert_eq!((word(&mut b, 0x34), word(&mut b, 0x5B)), (0xBF00, 0x4000));
}

#[test]
fn a_slow_guest_clock_still_follows_the_wall() {
    let mut b = bench(MissedTicks::Discard);
    b.rtc.wiring.clock.set_rate(1, 8);
    b.set(REGISTER_B, B_24_HOURS | UPDATED);
    b.get(REGISTER_C);
    assert_eq!(b.timer.deadline(), Some(SECOND_NS / 8));
    b.time.advance(SECOND_NS);
    assert_eq!(b.get(SECONDS), 0x21);
}

fn stir(b: &mut Bench) {
    b.set(0x40, 0x77);
    b.set(MINUTES_ALARM, 0xFF);
    b.set(YEAR, 0x24);
    b.time.advance(3 * SECOND_NS + 7);
    b.set(REGISTER_B, PERIODIC | B_BINARY);
    b.rtc.poll();
    b.set(REGISTER_B, B_SET | PERIODIC);
    b.time.advance(SECOND_NS / 8);
    b.rtc.outb(0, 0, 0x8C);
}

#[test]
fn golden_bytes_of_version_1() {
    let mut b = bench(MissedTicks::Reinject);
    stir(&mut b);
    golden(
        &b.rtc.save().unwrap(),
        "0100010000000c0200010000000103000100000026040001000000c00500010000005006000300000000ff0007008000
         00000000000000000000000000000000000000000000008002ffff000000000000000000000000000000000000000000
         0000ffff000000bf00000000000000000000770000000000000000000000000000000000000000000000000000004000
         000000000000000000000000000000000000000000000000000000000000000000000800040000000085e2010a000800
         0000170d160e0be807000b0004000000037636670c0002000000000c",
    );
}

#[test]
fn restored_without_an_edge() {
    let mut b = bench(MissedTicks::Reinject);
    stir(&mut b);
    let mut copy = bench(MissedTicks::Reinject);
    copy.rtc.restore(&b.rtc.save().unwrap()).unwrap();
    assert_eq!((copy.log.take_edges(8), copy.rtc.wiring.irq.level()), (0, true));
    assert_eq!(copy.all(), b.all());
}

// The battery's part (RAM, alarm, time) survives a reset and is not stirred here.
device::device_conformance!(conformance, || bench(MissedTicks::Reinject).rtc, &[2], |rtc: &mut RtcCmos| {
    for (at, value) in [(0, REGISTER_B), (1, B_SET | SOURCES), (0, REGISTER_A), (1, 0x2C), (0, 0xA0)] {
        rtc.outb(0, at, value);
    }
});

proptest! {
    #[test]
    fn random_traffic_never_panics(
        steps in proptest::collection::vec((0u8..0x40, any::<u8>(), 0u64..1 << 50), 0..100),
        reinject: bool,
    ) {
        let mut b = bench(if reinject { MissedTicks::Reinject } else { MissedTicks::Discard });
        for (at, value, ns) in steps {
            b.set(at, value);
            b.time.advance(ns);
            b.all();
            b.get(REGISTER_C);
            b.rtc.poll();
            let blob = b.rtc.save().unwrap();
            b.rtc.restore(&blob).unwrap();
            prop_assert_eq!(b.rtc.save().unwrap(), blob);
        }
    }
}
