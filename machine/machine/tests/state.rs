//! Save, restore and reset of the whole machine.

use machine::KIND_SPEC;
use machine::saved_vm::{Reader, Record};
use machine::testing::TestMachine;
use machine_spec::MachineSpec;
use machine_spec::layout::{self, port};

/// How long a stirred machine has run.
const STIRRED_NS: u64 = 3_000_000;

/// A machine that has done something with every part.
fn stirred() -> TestMachine {
    let test = TestMachine::started();
    let com1 = port::COM[0];
    for (at, value) in [
        (com1 + 1, 0x03),
        (com1 + 4, 0x0B),
        (port::PIT + 3, 0x34),
        (port::PIT, 0x10),
        (port::PIT, 0x20),
        (port::PIC1 + 1, 0xAA),
        (port::RTC, 0x0B),
        (port::RTC + 1, 0x42),
        (port::I8042_COMMAND, 0x20),
    ] {
        test.port_out(at, 1, value);
    }
    test.host.type_text(b"typed");
    test.write(layout::IOAPIC.start.0, 4, 0x18);
    test.write(layout::IOAPIC.start.0 + 0x10, 4, 0x41);
    test.write(layout::HPET.start.0 + 0x10, 8, 1);
    test.port_out(port::PM1A_EVENT + 2, 2, 0x100);
    // The disk's command register, and a feature selector behind its BAR.
    let blk = layout::ECAM.start.0 + (1 << 15);
    test.write(blk + 4, 2, 6);
    let bar = test.read(blk + 0x10, 4) & !0xF;
    test.write(bar, 4, 1);
    let ram = test.machine.ram();
    ram.store_bytes(0x20_0000, b"what the guest computed");
    test.host.advance(STIRRED_NS);
    test
}

fn restored(saved: &[u8]) -> TestMachine {
    let test = TestMachine::build(|_| {}).unwrap();
    test.host.sleep(STIRRED_NS);
    let mut source = saved;
    let mut reader = Reader::begin(&mut source).unwrap();
    let spec = reader.next_record().unwrap().unwrap();
    assert_eq!(spec.kind, KIND_SPEC);
    assert_eq!(spec.state::<MachineSpec>().unwrap(), *test.machine.spec());
    test.machine.restore(&mut reader).unwrap();
    test
}

fn records(saved: &[u8]) -> Vec<Record> {
    let mut source = saved;
    let mut reader = Reader::begin(&mut source).unwrap();
    let mut records = Vec::new();
    while let Some(record) = reader.next_record().unwrap() {
        records.push(record);
    }
    records
}

#[test]
fn save_restore_save_is_the_same() {
    let test = stirred();
    while test.machine.quiesce().is_pending() {
        test.host.settle();
    }
    let saved = test.saved();
    let copy = restored(&saved);
    for (before, after) in records(&saved).iter().zip(records(&copy.saved())) {
        assert!(*before == after, "{}", before.body.escape_ascii());
    }
    let mut text = [0; 23];
    copy.machine.ram().load_bytes(0x20_0000, &mut text);
    assert_eq!(&text, b"what the guest computed");
    // And it goes on: what was typed is still to be read.
    copy.machine.resume();
    copy.host.start();
    assert_eq!(copy.port_in(port::COM[0], 1), b't'.into());
}

#[test]
fn a_reset_machine_is_like_a_new_one() {
    let test = stirred();
    test.machine.reset(&test.host).unwrap();
    let fresh = TestMachine::started();
    fresh.host.advance(STIRRED_NS);
    for (reset, fresh) in records(&test.saved()).iter().zip(records(&fresh.saved())) {
        let text = String::from_utf8_lossy(&reset.body).into_owned();
        // The PIT and the RTC count from the moment of the reset; the fresh ones from power-on.
        if !text.contains("rtc") {
            assert!(*reset == fresh, "{} {text:?} {:?}", reset.kind.escape_ascii(), fresh.body);
        }
    }
}

#[test]
fn a_saved_machine_of_another_shape_is_refused() {
    let saved = TestMachine::started().saved();
    let refuse = |change: fn(&mut MachineSpec)| {
        let test = TestMachine::build(change).unwrap();
        let mut source = &saved[..];
        let mut reader = Reader::begin(&mut source).unwrap();
        reader.next_record().unwrap();
        test.machine.restore(&mut reader).unwrap_err().to_string()
    };
    assert!(refuse(|spec| spec.ram.bytes *= 2).contains("RAM"));
    assert!(refuse(|spec| (spec.cpus.count, spec.cpus.max) = (1, 1)).contains("2 vCPUs, this machine 1"));
    assert!(refuse(|spec| _ = spec.devices.pop()).contains("no device `rng0`"));
    assert!(refuse(|spec| spec.devices.push(another_rng())).contains("lacks device `rng1`"));
}

fn another_rng() -> machine_spec::DeviceSpec {
    machine_spec::DeviceSpec::Rng(machine_spec::RngSpec { id: "rng1".into(), slot: None })
}

#[test]
fn cut_and_flipped_saves_are_refused_and_never_panic() {
    let saved = stirred().saved();
    // RAM is at the end; its own tests flip every bit.
    let interesting = saved.len().min(24 << 10);
    let attempt = |bytes: &[u8]| {
        let mut source = bytes;
        let Ok(mut reader) = Reader::begin(&mut source) else { return false };
        let Ok(Some(_)) = reader.next_record() else { return false };
        let test = TestMachine::build(|_| {}).unwrap();
        test.machine.restore(&mut reader).is_ok()
    };
    assert!(attempt(&saved));
    let mut bytes = saved.clone();
    for at in (0..interesting).step_by(509) {
        assert!(!attempt(&saved[..at]), "cut at {at}");
        bytes[at] ^= 0x10;
        assert!(!attempt(&bytes), "flipped at {at}");
        bytes[at] ^= 0x10;
    }
}
