//! A guest that touches everything: every port and register at every width, configuration space of every function.

use machine::testing::TestMachine;
use machine::{Request, RequestQueue};
use machine_spec::layout::{self, port};
use proptest::prelude::*;

/// Registers of the board, as first address and bytes.
fn places(test: &TestMachine) -> Vec<(u64, u64)> {
    let mut places = vec![
        (layout::IOAPIC.start.0, 0x100),
        (layout::HPET.start.0, layout::HPET.size),
        (layout::LAPIC.start.0, 0x1000),
        (layout::VGA_HOLE.start.0, 0x100),
        (layout::FLASH.start.0, 0x100),
    ];
    for device in 0..32u64 {
        let config = layout::ECAM.start.0 + (device << 15);
        places.push((config, 0x200));
        for bar in [0x10, 0x14] {
            let base = test.read(config + bar, 4) & !0xF;
            if base != 0 && base < 0xFFFF_FFF0 {
                places.push((base, 0x4000));
            }
        }
    }
    places
}

#[test]
fn every_port_and_register_at_every_width() {
    let test = TestMachine::started();
    for at in 0..=0xFFFFu16 {
        for width in [1, 2, 4] {
            test.port_in(at, width);
            for value in [0, u64::MAX, 0x5A5A_5A5A] {
                test.port_out(at, width, value);
            }
        }
    }
    test.host.advance(1_000_000);
    let test = TestMachine::started();
    for (base, bytes) in places(&test) {
        for at in base..base + bytes {
            // Odd widths are what a page boundary leaves of a wider access.
            for width in 1..=8 {
                test.read(at, width);
                for value in [0, u64::MAX, 0x5A5A_5A5A_5A5A_5A5A] {
                    test.write(at, width, value);
                }
            }
        }
        // Across its end, too.
        for at in base + bytes - 8..base + bytes + 8 {
            test.write(at, 8, u64::MAX);
            test.read(at, 8);
        }
        test.host.advance(1_000);
    }
    for at in [u64::MAX, u64::MAX - 7, 1 << 63, 1 << 46, layout::HIGH_RAM_START, layout::HIGH_RAM_START - 4] {
        test.write(at, 8, u64::MAX);
        assert_eq!(test.read(at, 8), u64::MAX);
    }
    still_works(&test);
}

/// Configuration space of every function, all of it, through ECAM and the ports; and of those that are not there.
#[test]
fn every_configuration_register_of_every_function() {
    let test = TestMachine::started();
    let present = |at: u64| test.read(at, 2) != 0xFFFF;
    let mut found = 0;
    for devfn in 0..256u64 {
        let function = layout::ECAM.start.0 + (devfn << 12);
        if !present(function) {
            absent(&test, devfn << 12);
            continue;
        }
        found += 1;
        for offset in 0..0x1000 {
            for width in 1..=8 {
                test.read(function + offset, width);
                for value in [0, u64::MAX, 0x5A5A_5A5A_5A5A_5A5A] {
                    test.write(function + offset, width, value);
                }
            }
        }
        for offset in 0..0x100 {
            test.port_out(port::PCI_CONFIG, 4, 1 << 31 | devfn << 8 | (offset & 0xFC));
            for width in [1, 2, 4] {
                let data = port::PCI_CONFIG + 4 + (offset & 3) as u16;
                test.port_in(data, width);
                test.port_out(data, width, 0xA5A5_A5A5);
            }
        }
        // Whatever its BARs say now: fixed chips and ECAM are still where they were.
        assert!(present(layout::ECAM.start.0) && test.read(layout::HPET.start.0, 4) & 0xFF00 != 0xFF00);
    }
    assert_eq!(found, 10, "host bridge, four devices, four root ports, LPC bridge");
    // Whatever bus numbers the ports were given, and where no bus is.
    for bus in 1..256u64 {
        for devfn in [0, 1, 8, 255] {
            absent(&test, bus << 20 | devfn << 12);
        }
    }
    still_works(&test);
}

/// A function where nothing may answer but the root ports' own buses, which are empty.
fn absent(test: &TestMachine, function: u64) {
    for offset in [0u64, 4, 0x10, 0x3C, 0xFF, 0x100, 0xFFC] {
        let at = layout::ECAM.start.0 + function + offset;
        test.write(at, 4, 0);
        assert_eq!(test.read(at, 4), 0xFFFF_FFFF, "{function:#x}");
    }
}

/// Whatever the guest did: the machine can be stopped, saved, and reset to a new one.
fn still_works(test: &TestMachine) {
    for _ in 0..1000 {
        if test.machine.quiesce().is_ready() {
            break;
        }
        test.host.settle();
    }
    assert!(test.machine.quiesce().is_ready(), "{:?} never come to rest", test.machine.busy_devices());
    test.saved();
    test.machine.reset(&test.host).unwrap();
    test.machine.resume();
    assert_eq!(test.read(layout::ECAM.start.0, 4), 0x29C0_8086);
}

#[derive(Clone, Debug)]
enum Act {
    PortIn(u16, usize),
    PortOut(u16, usize, u32),
    Read(usize, u64, usize),
    Write(usize, u64, usize, u64),
    Ram(u64, u64),
    Type(Vec<u8>),
    Wait(u64),
}

fn width() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1usize), Just(2), Just(4), Just(8)]
}

fn act() -> impl Strategy<Value = Act> {
    let port = prop_oneof![0u16..0x100, 0x3F0u16..0x400, 0x4D0u16..0x4D2, 0x600u16..0x680, 0xCF8u16..0xD00];
    let port_width = prop_oneof![Just(1usize), Just(2), Just(4)];
    prop_oneof![
        (port.clone(), port_width.clone()).prop_map(|(at, width)| Act::PortIn(at, width)),
        (port, port_width, any::<u32>()).prop_map(|(at, width, value)| Act::PortOut(at, width, value)),
        (any::<usize>(), any::<u64>(), width()).prop_map(|(place, at, width)| Act::Read(place, at, width)),
        (any::<usize>(), any::<u64>(), width(), prop_oneof![any::<u64>(), 0u64..0x100])
            .prop_map(|(place, at, width, value)| Act::Write(place, at, width, value)),
        (0u64..0x8000, any::<u64>()).prop_map(|(at, value)| Act::Ram(at, value)),
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(Act::Type),
        (0u64..10_000_000).prop_map(Act::Wait),
    ]
}

fn play(test: &TestMachine, places: &[(u64, u64)], act: &Act) {
    let address = |place: usize, at: u64| {
        let (base, bytes) = places[place % places.len()];
        base + at % bytes
    };
    match act {
        Act::PortIn(at, width) => _ = test.port_in(*at, *width),
        Act::PortOut(at, width, value) => test.port_out(*at, *width, (*value).into()),
        Act::Read(place, at, width) => _ = test.read(address(*place, *at), *width),
        Act::Write(place, at, width, value) => test.write(address(*place, *at), *width, *value),
        Act::Ram(at, value) => test.machine.ram().store(at * 8, *value),
        Act::Type(text) => _ = test.host.type_text(text),
        Act::Wait(ns) => test.host.advance(*ns),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 6))]
    #[test]
    fn no_order_of_accesses_breaks_the_board(acts in proptest::collection::vec(act(), 0..400)) {
        let test = TestMachine::started();
        let places = places(&test);
        for act in &acts {
            play(&test, &places, act);
        }
        still_works(&test);
    }
}

#[test]
fn a_guest_that_asks_for_resets_without_end_fills_no_queue() {
    let queue = RequestQueue::new(|| {});
    queue.ask(Request::Start).unwrap();
    for _ in 0..100_000 {
        queue.guest_asks(Request::Reset);
    }
    let mut count = 0;
    while queue.begin().is_some() {
        queue.finish(true);
        count += 1;
    }
    assert!(count <= 65);
}
