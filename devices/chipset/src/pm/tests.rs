//! The power-management block: sleep, events, the timer and its carries.

use super::*;
use crate::testing::{Access, LineLog, RequestLog, golden};
use guest_time::manual::{ManualTime, ManualTimer};
use proptest::prelude::*;

struct Bench {
    pm: PowerManagement,
    time: ManualTime,
    timer: ManualTimer,
    log: LineLog,
    requests: Arc<RequestLog>,
}

fn bench(timer_width: TimerWidth) -> Bench {
    let (time, clock) = ManualTime::clock();
    let (timer, log, requests) =
        (ManualTimer::default(), LineLog::default(), Arc::new(RequestLog::default()));
    let wiring =
        PmWiring { sci: log.line(9), clock, timer: Box::new(timer.clone()), requests: requests.clone() };
    let config = PmConfig { sleep_type_s5: 5, timer_width };
    Bench { pm: PowerManagement::new("pm", config, wiring), time, timer, log, requests }
}

#[test]
fn turns_off() {
    let mut b = bench(TimerWidth::Bits32);
    assert_eq!(b.pm.get(0, CONTROL, 2), 1, "always in ACPI mode");
    b.pm.put(0, CONTROL, 2, 5 << 10).unwrap();
    b.pm.put(0, CONTROL, 2, 1 << 13 | 3 << 10).unwrap();
    assert_eq!(b.requests.0.lock().0, 0);
    b.pm.put(0, CONTROL, 2, 1 << 13 | 5 << 10).unwrap();
    assert_eq!(*b.requests.0.lock(), (1, 0));
    assert_eq!(b.pm.get(0, CONTROL, 2), 5 << 10 | 1);
    b.pm.outb(0, CONTROL + 1, 0x34);
    assert_eq!(b.requests.0.lock().0, 2, "by byte");
}

#[test]
fn power_button_and_general_events() {
    let mut b = bench(TimerWidth::Bits32);
    b.pm.press_power_button();
    assert!(!b.log.level(9));
    b.pm.put(0, ENABLE, 2, 0x0100).unwrap();
    assert!(b.log.level(9));
    b.pm.put(0, STATUS, 2, 0x0001).unwrap();
    assert_eq!((b.pm.get(0, STATUS, 2), b.log.level(9)), (0x0100, true));
    b.pm.put(0, STATUS, 2, 0x0100).unwrap();
    assert!(!b.log.level(9));
    b.pm.raise_gpe(17);
    b.pm.raise_gpe(64);
    b.pm.outb(0, GPE_ENABLE + 2, 2);
    assert_eq!((b.pm.get(0, GPE_STATUS, 8), b.log.level(9)), (1 << 17, true));
    b.pm.outb(0, GPE_STATUS + 2, 2);
    assert!(!b.log.level(9));
}

#[test]
fn the_timer_counts_and_carries() {
    let mut b = bench(TimerWidth::Bits24);
    b.time.advance(1_000_000_000);
    assert_eq!(b.pm.get(0, TIMER, 4), 3_579_545);
    assert_eq!(b.timer.deadline(), None);
    b.pm.put(0, ENABLE, 2, 1).unwrap();
    let carry = b.timer.deadline().unwrap();
    assert_eq!(carry, TIMER_RATE.when(1 << 23));
    b.time.advance(carry - 1_000_000_000);
    b.pm.poll();
    assert_eq!((b.log.level(9), b.pm.get(0, STATUS, 2), b.pm.get(0, TIMER, 4)), (true, 1, 1 << 23));
    b.pm.put(0, STATUS, 2, 1).unwrap();
    assert_eq!((b.log.level(9), b.timer.deadline()), (false, Some(TIMER_RATE.when(1 << 24))));
    b.time.advance(1 << 42);
    assert!(b.pm.get(0, TIMER, 4) < 1 << 24);
    assert!(bench(TimerWidth::Bits32).timer.deadline().is_none());
}

fn stir(pm: &mut PowerManagement) {
    pm.put(0, ENABLE, 2, 0x0121).unwrap();
    pm.put(0, CONTROL, 2, 0x1402).unwrap();
    pm.put(0, GPE_ENABLE, 8, 0x8000_0000_0000_0004).unwrap();
    pm.press_power_button();
    pm.raise_gpe(2);
}

#[test]
fn golden_bytes_of_version_1() {
    let mut b = bench(TimerWidth::Bits32);
    b.time.advance(3_600_000_000_000);
    stir(&mut b.pm);
    golden(
        &b.pm.save().unwrap(),
        "010002000000010102000200000021010300020000000214040001000000040500080000000400000000000080060001
         00000006",
    );
}

#[test]
fn restored_without_an_edge() {
    let mut b = bench(TimerWidth::Bits32);
    stir(&mut b.pm);
    let mut copy = bench(TimerWidth::Bits32);
    copy.pm.restore(&b.pm.save().unwrap()).unwrap();
    assert_eq!((copy.log.take_edges(9), copy.pm.wiring.sci.level()), (0, true));
    assert_eq!(copy.timer.deadline(), b.timer.deadline());
}

device::device_conformance!(conformance, || bench(TimerWidth::Bits32).pm, &[REGION_BYTES], stir);

proptest! {
    #[test]
    fn random_traffic_never_panics(
        steps in proptest::collection::vec((0u64..REGION_BYTES, 0usize..4, any::<u64>(), 0u64..1 << 50), 0..100),
    ) {
        let mut b = bench(TimerWidth::Bits24);
        for (at, width, value, ns) in steps {
            b.pm.put(0, at, 1 << width, value).unwrap();
            b.time.advance(ns);
            b.pm.poll();
            b.pm.get(0, at, 1 << width);
            prop_assert_eq!(b.log.level(9), b.pm.sci());
        }
    }
}
