//! The HPET: counter, one-shot and periodic timers, lines and messages, saved state.

use super::*;
use crate::testing::{Access, LineLog, MessageLog, golden};
use guest_time::manual::{ManualTime, ManualTimer};
use proptest::prelude::*;

struct Bench {
    hpet: Hpet,
    time: ManualTime,
    timer: ManualTimer,
    log: LineLog,
    messages: MessageLog,
}

// Lines 100 and 108 are the legacy ones.
fn bench() -> Bench {
    let (time, clock) = ManualTime::clock();
    let (timer, log, messages) = (ManualTimer::default(), LineLog::default(), MessageLog::default());
    let wiring = HpetWiring {
        lines: [2, 20, 21].map(|pin| (pin, log.line(pin.into()))).into(),
        legacy: [log.line(100), log.line(108)],
        messages: Some(Arc::new(messages.clone())),
        clock,
        timer: Box::new(timer.clone()),
        replaced: LegacyReplacement::new(),
    };
    Bench { hpet: Hpet::new("hpet", wiring), time, timer, log, messages }
}

impl Bench {
    fn rd(&mut self, at: u64) -> u64 {
        self.hpet.get(0, at, 8)
    }
    fn wr(&mut self, at: u64, value: u64) {
        self.hpet.put(0, at, 8, value).unwrap();
    }
    fn wr32(&mut self, at: u64, value: u32) {
        self.hpet.put(0, at, 4, value.into()).unwrap();
    }
    fn run(&mut self, ns: u64) {
        let end = self.hpet.wiring.clock.now() + ns;
        while let Some(at) = self.timer.deadline().filter(|at| *at <= end) {
            self.time.advance(at.saturating_sub(self.hpet.wiring.clock.now()));
            self.hpet.poll();
        }
        self.time.advance(end - self.hpet.wiring.clock.now());
    }
}

#[test]
fn the_counter() {
    let mut b = bench();
    assert_eq!(b.rd(0), 0x0098_9680_8086_A201);
    b.time.advance(500);
    assert_eq!(b.rd(COUNTER_AT), 0, "stands");
    b.wr(CONFIG_AT, 1);
    b.time.advance(1000);
    assert_eq!((b.rd(COUNTER_AT), b.hpet.get(0, COUNTER_AT + 4, 4)), (100, 0));
    b.wr(CONFIG_AT, 0);
    b.time.advance(1000);
    b.wr32(COUNTER_AT + 4, 7);
    assert_eq!(b.rd(COUNTER_AT), 7 << 32 | 100);
    b.wr(CONFIG_AT, 1);
    b.time.advance(10);
    assert_eq!(b.rd(COUNTER_AT), 7 << 32 | 101);
    assert_eq!(b.hpet.put(0, 0x11, 1, 0), Err(IoError::Width));
}

#[test]
fn capabilities_of_a_timer() {
    let mut b = bench();
    assert_eq!(b.rd(0x100), (1 << 2 | 1 << 20 | 1 << 21) << 32 | 0x8030);
    b.wr(0x100, 20 << 9);
    b.wr(0x100, 3 << 9);
    assert_eq!(b.rd(0x100) >> 9 & 0x1F, 20, "no such route");
    assert_eq!((b.rd(0x108), b.rd(0x160), b.rd(0x3F8)), (u64::MAX, 0, 0));
}

#[test]
fn one_shot_edges() {
    let mut b = bench();
    b.wr(0x100, config::INTERRUPT | 2 << 9);
    b.wr(0x108, 100_000);
    b.wr(CONFIG_AT, 1);
    assert_eq!(b.timer.deadline(), Some(1_000_000));
    b.run(999_990);
    assert_eq!(b.log.take_edges(2), 0);
    b.run(10);
    assert_eq!(b.log.take_edges(2), 1);
    b.run(1 << 40);
    assert_eq!((b.log.take_edges(2), b.timer.deadline()), (0, None));
    b.wr(0x108, 5);
    assert_eq!(b.timer.deadline(), None, "64 bits: the past never comes");
    b.wr(0x100, config::INTERRUPT | config::FORCE_32 | 2 << 9);
    let now = b.rd(COUNTER_AT);
    b.wr32(0x108, now as u32 + 10_000);
    b.run(200_000);
    assert_eq!(b.log.take_edges(2), 1);
    b.run((1 << 32) * 10);
    assert_eq!(b.log.take_edges(2), 1, "again when 32 bits wrap");
}

/// As Linux sets up its tick.
#[test]
fn periodic_with_legacy_replacement() {
    let mut b = bench();
    b.wr(CONFIG_AT, 3);
    assert!(b.hpet.wiring.replaced.is_on());
    b.time.advance(12_345);
    b.wr32(0x100, (config::INTERRUPT | config::PERIODIC | config::SET_VALUE | config::FORCE_32) as u32);
    let now = b.rd(COUNTER_AT) as u32;
    b.wr32(0x108, now + 100_000);
    b.wr32(0x108, 100_000);
    b.run(10_000_000);
    assert_eq!(b.log.take_edges(100), 10);
    assert_eq!(b.rd(0x108), u64::from(now) + 1_100_000);
    b.time.advance(5_500_000);
    b.hpet.poll();
    assert_eq!(b.log.take_edges(100), 1, "coalesced");
    b.run(500_000);
    assert_eq!(b.log.take_edges(100), 1, "in phase");
    b.wr(CONFIG_AT, 0);
    assert_eq!((b.timer.deadline(), b.hpet.wiring.replaced.is_on()), (None, false));
}

#[test]
fn levels_and_messages() {
    let mut b = bench();
    b.wr(0x120, config::INTERRUPT | config::LEVEL | 21 << 9);
    b.wr(0x128, 10_000);
    b.wr(0x140, config::INTERRUPT | config::MESSAGE);
    b.wr(0x150, 0xFEE0_1000_0000_4042);
    b.wr(0x148, 20_000);
    b.wr(CONFIG_AT, 1);
    b.run(300_000);
    assert_eq!((b.log.level(21), b.rd(STATUS_AT)), (true, 2));
    assert_eq!(b.messages.take(), [MsiMessage { address: 0xFEE0_1000, data: 0x4042 }]);
    b.wr(STATUS_AT, 1);
    assert!(b.log.level(21));
    b.wr(STATUS_AT, 2);
    assert!(!b.log.level(21));
    assert!(!b.log.level(2));
}

#[test]
fn a_short_period_does_not_flood() {
    let mut b = bench();
    b.wr(0x100, config::INTERRUPT | config::PERIODIC | config::SET_VALUE | 2 << 9);
    b.wr(0x108, 1);
    b.wr(CONFIG_AT, 1);
    b.run(10_000_000);
    assert!(b.log.take_edges(2) <= 201);
}

fn stir(h: &mut Hpet) {
    for (at, value) in [
        (0x100, config::INTERRUPT | config::PERIODIC | config::SET_VALUE | config::FORCE_32 | 20 << 9),
        (0x108, 500),
        (0x120, config::INTERRUPT | config::LEVEL | 21 << 9),
        (0x128, 0),
        (0x150, 0x1234_5678_9ABC_DEF0),
        (CONFIG_AT, 3),
    ] {
        h.put(0, at, 8, value).unwrap();
    }
}

#[test]
fn golden_bytes_of_version_1() {
    let mut b = bench();
    b.time.advance(1_000_000);
    stir(&mut b.hpet);
    golden(
        &b.hpet.save().unwrap(),
        "01000100000003020001000000020300080000006079feffffffffff040058000000280000000100020000000c290200
         02000000f401030002000000f4010500010000000106000300000094880108000000010002000000062a1c0000000200
         08000000ffffffffffffffff040008000000f0debc9a78563412",
    );
}

#[test]
fn restored_without_an_edge() {
    let mut b = bench();
    stir(&mut b.hpet);
    let mut copy = bench();
    copy.hpet.restore(&b.hpet.save().unwrap()).unwrap();
    assert!(copy.log.0.lock().is_empty() && copy.hpet.wiring.legacy[1].level());
    assert!(copy.hpet.wiring.replaced.is_on());
    assert_eq!(copy.timer.deadline(), b.timer.deadline());
}

device::device_conformance!(conformance, || bench().hpet, &[REGION_BYTES], stir);

proptest! {
    #[test]
    fn random_traffic_never_panics(
        steps in proptest::collection::vec((0u64..0x30, any::<u64>(), any::<bool>(), 0u64..1 << 50), 0..100),
    ) {
        let mut b = bench();
        for (at, value, wide, ns) in steps {
            let at = match at { 0..6 => CONFIG_AT, 6..8 => COUNTER_AT, at => 0x100 + (at % 12) * 8 };
            b.hpet.put(0, at, if wide { 8 } else { 4 }, value).unwrap();
            b.time.advance(ns);
            b.hpet.poll();
            b.rd(at);
            let blob = b.hpet.save().unwrap();
            b.hpet.restore(&blob).unwrap();
            prop_assert_eq!(b.hpet.save().unwrap(), blob);
        }
    }
}
