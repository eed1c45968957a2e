//! The whole board without a CPU: where things stand, who interrupts whom, how power and reset reach the queue.

use hypervisor::VcpuExit;
use machine::testing::engine::Step;
use machine::testing::{TestMachine, kernel};
use machine::{Next, Request, Verdict};
use machine_spec::layout::{self, irq, port, power};
use machine_spec::{DeviceSpec, HostKey, PciSlot, UartSpec};

/// A register of PCI configuration space, through ECAM.
fn config(device: u8, offset: u64) -> u64 {
    layout::ECAM.start.0 + (u64::from(device) << 15) + offset
}

#[test]
fn slots_are_handed_out_in_order_and_written_back() {
    let test = TestMachine::started();
    let slots: Vec<_> = test.machine.spec().devices.iter().filter_map(|d| d.slot().flatten()).collect();
    let expected: Vec<_> = (1..=4).map(|device| PciSlot { bus: 0, device, function: 0 }).collect();
    assert_eq!(slots, expected);
    // virtio-blk, -net, -console, -rng by their PCI ids; then the bridges.
    for (device, id) in [(1, 0x1042), (2, 0x1041), (3, 0x1043), (4, 0x1044)] {
        assert_eq!(test.read(config(device, 0), 4), id << 16 | 0x1AF4);
    }
    assert_eq!(test.read(config(0, 0), 4), 0x29C0_8086);
    assert_eq!(test.read(config(31, 0), 4), 0x2918_8086);
    assert_eq!(test.read(config(5, 0), 4), 0xFFFF_FFFF);
    // The same through the ports.
    test.port_out(port::PCI_CONFIG, 4, 0x8000_0800);
    assert_eq!(test.port_in(port::PCI_CONFIG + 4, 4), 0x1042_1AF4);
}

#[test]
fn a_wanted_slot_is_given_and_a_taken_one_refused() {
    let slot = |device| PciSlot { bus: 0, device, function: 0 };
    let test = TestMachine::build(|spec| spec.devices[2].set_slot(slot(9))).unwrap();
    assert_eq!(test.machine.spec().devices[2].slot(), Some(Some(slot(9))));
    assert_eq!(test.machine.spec().devices[3].slot(), Some(Some(slot(1))));
    let refused = TestMachine::build(|spec| spec.devices[2].set_slot(slot(24))).err().unwrap().to_string();
    assert_eq!(refused, "PCI slot 00:18.0 is not free for a device");
}

#[test]
fn what_the_host_lacks_is_named() {
    let spec = machine::testing::spec();
    for (key, words) in
        [("serial0", "serial port COM1"), ("disk0", "disk `disk0`"), ("net0", "network `net0`")]
    {
        let host = machine::testing::host::TestHost::default();
        host.lack(key);
        let engine = machine::testing::engine::ScriptEngine::default();
        let requests = std::sync::Arc::new(machine::RequestQueue::new(|| {}));
        let parts = machine::Parts { engine: &engine, host: &host, requests };
        let error = machine::Machine::build(spec.clone(), &parts).err().unwrap().to_string();
        assert!(error.starts_with(words) && error.ends_with("not there"), "{error}");
    }
    let test = TestMachine::build(|_| {}).unwrap();
    test.host.lack("kernel");
    let error = test.machine.boot(&test.host).unwrap_err().to_string();
    assert_eq!(error, "kernel: not there");
}

#[test]
fn the_serial_port_prints_and_interrupts_through_the_io_apic() {
    let test = TestMachine::started();
    let com1 = port::COM[0];
    test.port_out(com1, 1, b'!'.into());
    assert_eq!(test.host.serial_output(), b"!");

    // Pin 4, edge, vector 0x31 to APIC 1.
    let ioapic = layout::IOAPIC.start.0;
    for (register, value) in [(0x10 + 2 * 4, 0x31), (0x11 + 2 * 4, 1 << 24)] {
        test.write(ioapic, 4, register);
        test.write(ioapic + 0x10, 4, value);
    }
    test.port_out(com1 + 4, 1, 0x08);
    test.port_out(com1 + 1, 1, 0x01);
    assert_eq!(test.host.type_text(b"x"), 1);
    let messages = test.engine.take_messages();
    assert_eq!(messages.len(), 1);
    assert_eq!((messages[0].data & 0xFF, messages[0].address >> 12 & 0xFF), (0x31, 1));
    assert_eq!(test.port_in(com1, 1), b'x'.into());
}

#[test]
fn a_level_interrupt_comes_again_after_its_end() {
    let test = TestMachine::started();
    // The SCI: pin 9, level, vector 0x59.
    let ioapic = layout::IOAPIC.start.0;
    test.write(ioapic, 4, 0x10 + 2 * u64::from(irq::SCI));
    test.write(ioapic + 0x10, 4, 0x8059);
    test.port_out(port::PM1A_EVENT + 2, 2, 1 << 8);
    test.machine.press_power_button();
    assert_eq!(test.engine.take_messages().len(), 1);
    test.engine.script([Step::Eoi(0x58), Step::Eoi(0x59), Step::Exit(VcpuExit::Kicked)]);
    assert_eq!(test.machine.run_vcpu(0), Next::Run);
    assert_eq!(test.engine.take_messages().len(), 1, "still asserted: once more for its own vector");
    test.port_out(port::PM1A_EVENT, 2, 1 << 8);
    test.engine.script([Step::Eoi(0x59)]);
    assert_eq!(test.machine.run_vcpu(0), Next::Wait(None));
    assert!(test.engine.take_messages().is_empty());
}

#[test]
fn the_timer_interrupts_through_the_8259() {
    let test = TestMachine::started();
    let steps = [
        (port::PIC1, 0x11),
        (port::PIC1 + 1, 0x30),
        (port::PIC1 + 1, 4),
        (port::PIC1 + 1, 1),
        (port::PIC1 + 1, 0xFE),
        // Counter 0, mode 2, every 1000 ticks.
        (port::PIT + 3, 0x34),
        (port::PIT, 0xE8),
        (port::PIT, 0x03),
    ];
    test.engine.script(steps.map(|(at, value)| Step::Out(at, 1, value)));
    test.machine.run_vcpu(0);
    assert!(!test.engine.pic_level());
    test.host.advance(1_000_000);
    assert!(test.engine.pic_level());
    test.engine.script([Step::Acknowledge, Step::Out(port::PIC1, 1, 0x20)]);
    test.machine.run_vcpu(0);
    assert_eq!(test.engine.take_played().acknowledged, [Some(0x30)]);
    assert!(!test.engine.pic_level());
    test.host.advance(1_000_000);
    assert!(test.engine.pic_level());
}

/// What the guest asked, after the machine was started.
fn asked(test: &TestMachine) -> Option<Request> {
    test.requests.begin().map(|(_, request)| request)
}

fn running() -> TestMachine {
    let test = TestMachine::started();
    test.requests.ask(Request::Start).unwrap();
    assert_eq!(asked(&test), Some(Request::Start));
    test.requests.finish(true);
    test
}

#[test]
fn power_and_reset_reach_the_queue() {
    let sleep = u64::from(power::SLEEP_TYPE_S5) << 10 | 1 << 13;
    let resets: [(u16, u64); 3] = [(port::RESET, 6), (port::I8042_COMMAND, 0xFE), (0x92, 1)];
    let test = running();
    test.port_out(port::PM1A_CONTROL, 2, sleep);
    assert_eq!(asked(&test), Some(Request::Stop(Verdict::PoweredOff)));
    for (at, value) in resets {
        let test = running();
        test.port_out(at, 1, value);
        assert_eq!(asked(&test), Some(Request::Reset), "port {at:#x}");
    }
}

#[test]
fn a_triple_fault_and_a_broken_engine_end_the_machine() {
    let test = running();
    test.engine.script([Step::Exit(VcpuExit::TripleFault)]);
    assert_eq!(test.machine.run_vcpu(1), Next::Wait(None));
    let Some(Request::Stop(Verdict::TripleFault { vcpu: 1, detail })) = asked(&test) else {
        panic!("no verdict")
    };
    assert!(detail.contains("rip f000:fff0"), "{detail}");
    let test = running();
    test.engine.script([Step::Exit(VcpuExit::Fatal("out of ideas".into()))]);
    test.machine.run_vcpu(0);
    let Some(Request::Stop(Verdict::Failed { reason })) = asked(&test) else { panic!("no verdict") };
    assert!(reason.contains("out of ideas"));
    assert_eq!(test.machine.run_vcpu(99), Next::Wait(None));
}

#[test]
fn direct_boot_leaves_kernel_tables_and_registers() {
    let test = TestMachine::started();
    let ram = test.machine.ram();
    let mut code = [0; 4];
    ram.load_bytes(ram.offset(kernel::ENTRY.into(), 4).unwrap(), &mut code);
    assert_eq!(code, kernel::IDLE);
    let mut signature = [0; 8];
    ram.load_bytes(ram.offset(layout::RSDP_AREA.start.0, 8).unwrap(), &mut signature);
    assert_eq!(&signature, b"RSD PTR ");
    let mut entry_point = [0; 5];
    ram.load_bytes(ram.offset(layout::SMBIOS_AREA.start.0, 5).unwrap(), &mut entry_point);
    assert_eq!(&entry_point, b"_SM3_");
    assert!(test.machine.describe_vcpu(0).starts_with("rip 10:100000"), "{}", test.machine.describe_vcpu(0));
    assert!(test.machine.describe_vcpu(1).starts_with("rip f000:fff0"));
    // BARs were assigned and decode: virtio's common configuration answers.
    let bar = test.read(config(1, 0x10), 4) & !0xF;
    assert_ne!(bar, 0);
    assert_ne!(test.read(bar, 4), 0xFFFF_FFFF);
}

#[test]
fn direct_boot_routes_interrupts_for_the_8259() {
    let test = TestMachine::started();
    test.write(config(31, 0x60), 4, 0x8080_8080);
    test.machine.reset(&test.host).unwrap();
    // PIRQA to PIRQH at interrupts 10 and 11; these and the SCI level-triggered.
    assert_eq!(test.read(config(31, 0x60), 4), 0x0B0B_0A0A);
    assert_eq!(test.read(config(31, 0x68), 4), 0x0B0B_0A0A);
    assert_eq!((test.port_in(port::ELCR, 1), test.port_in(port::ELCR + 1, 1)), (0, 0x0E));
    // Interrupt Line of INTA of devices 1 (PIRQB) to 4, and of the root ports.
    let lines = [1, 2, 3, 4, 24, 25, 26, 27].map(|device| test.read(config(device, 0x3C), 2));
    assert_eq!(lines, [0x10A, 0x10B, 0x10B, 0x10A, 0x10A, 0x10A, 0x10B, 0x10B]);
    // A function without a pin has none.
    assert_eq!(test.read(config(31, 0x3C), 2), 0);
}

#[test]
fn the_spec_names_the_version_of_its_processor() {
    let model = |model: &str, feature: Option<(&str, bool)>| {
        let feature = feature.map(|(name, enabled)| machine_spec::CpuFeature { name: name.into(), enabled });
        let test = TestMachine::build(|spec| {
            spec.cpus.model = model.into();
            spec.cpus.features = feature.into_iter().collect();
        });
        test.unwrap().machine.spec().cpus.clone()
    };
    assert_eq!(model("x86-64-v3", None).model, "x86-64-v3@1");
    assert_eq!(model("x86-64-v3@1", None).model, "x86-64-v3@1");
    // With what a feature needs and what needs it, as the guest sees it.
    let without_avx = model("x86-64-v3", Some(("avx", false)));
    assert_eq!(without_avx.model, "x86-64-v3@1");
    for name in ["avx", "avx2", "fma"] {
        let found = without_avx.features.iter().find(|feature| feature.name == name);
        assert!(found.is_some_and(|feature| !feature.enabled), "{name} in {without_avx:?}");
    }
    let refused =
        TestMachine::build(|spec| spec.cpus.model = "x86-64-v3@9".into()).err().unwrap().to_string();
    assert!(refused.contains("has no version `9`"), "{refused}");
}

#[test]
fn two_serial_ports_of_one_number_are_refused() {
    let twin = DeviceSpec::Uart(UartSpec { port: 0, stream: Some(HostKey("serial1".into())) });
    let error = TestMachine::build(|spec| spec.devices.push(twin)).err().unwrap().to_string();
    assert!(error.contains("COM1"), "{error}");
}

#[test]
fn a_dropped_machine_gives_the_hosts_ends_back() {
    let test = TestMachine::started();
    let host = test.host.clone();
    assert!(host.ends().holders() > 1);
    drop(test);
    assert_eq!(host.ends().holders(), 1, "a device outlived its machine");
}
