//! The DSDT: host bridge with its windows and interrupt routing, link devices, ISA devices,
//! processors, power-off.
//!
//! Called by `acpi::build`. Interrupt routing: in APIC mode PIRQ n is GSI 16 + n; in PIC mode it
//! goes through link device LNKx, whose routing register lies in the ISA bridge's configuration
//! space. ACPI 6.3 sections 6.2 and 7; PCI Firmware Specification 3.2, 4.5 (`_OSC`).

use super::AcpiConfig;
use super::aml::{Aml, FieldUnit, Space};
use alloc::format;
use alloc::vec::Vec;
use machine_spec::layout::{
    ECAM, ECAM_BUSES, HPET, PCI_MMIO32, PCI_MMIO32_UPPER, Span, VGA_HOLE, irq, port, power, slot,
};
use pci::{PIRQ_OFF, PIRQ_ROUTES, PIRQS, pirq_of};

/// `33DB4D5B-1FF7-401C-9657-7441C03DD766`, PCI host bridge `_OSC`, in the byte order of ToUUID.
const PCI_OSC_UUID: [u8; 16] =
    [0x5B, 0x4D, 0xDB, 0x33, 0xF7, 0x1F, 0x1C, 0x40, 0x96, 0x57, 0x74, 0x41, 0xC0, 0x3D, 0xD7, 0x66];
/// What the guest may control: native hot-plug, PME, AER, capability structure. Not SHPC.
const OSC_GRANTED: u64 = 0x1D;
const LINK_NAMES: [&str; PIRQS] = ["LNKA", "LNKB", "LNKC", "LNKD", "LNKE", "LNKF", "LNKG", "LNKH"];
const ROUTE_NAMES: [&str; PIRQS] = ["PRQA", "PRQB", "PRQC", "PRQD", "PRQE", "PRQF", "PRQG", "PRQH"];

/// The definition block's body.
pub(super) fn build(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut aml = Aml::default();
    interrupt_mode(&mut aml);
    power_off(&mut aml);
    aml.scope("\\_SB", |sb| {
        // Before the bridge, whose routing table names them.
        link_resources(sb);
        for (index, name) in LINK_NAMES.iter().enumerate() {
            link_device(sb, name, index);
        }
        sb.device("PCI0", |bridge| {
            host_bridge(bridge, config);
            isa_bridge(bridge, config);
        });
        board_resources(sb);
        processors(sb, config);
    });
    aml.into_bytes()
}

/// `_PIC`: the guest says whether it uses the PICs (0) or the APICs (1).
fn interrupt_mode(aml: &mut Aml) {
    aml.name("\\PICF").int(0);
    aml.method("\\_PIC", 1, |m| {
        m.store().arg(0).path("PICF");
    });
}

fn power_off(aml: &mut Aml) {
    let kind = power::SLEEP_TYPE_S5.into();
    aml.name("\\_S5").package(4, |p| {
        p.int(kind).int(kind).int(0).int(0);
    });
}

fn host_bridge(bridge: &mut Aml, config: &AcpiConfig<'_>) {
    bridge.name("_HID").eisa_id(b"PNP0A08");
    bridge.name("_CID").eisa_id(b"PNP0A03");
    bridge.name("_UID").int(0);
    bridge.name("_SEG").int(0);
    bridge.name("_BBN").int(0);
    bridge_windows(bridge, config.layout.pci_mmio64());
    bridge_control(bridge);
    routing_table(bridge, "PRTP", |pirq, package| {
        package.path(LINK_NAMES[usize::from(pirq)]).int(0);
    });
    routing_table(bridge, "PRTA", |pirq, package| {
        package.int(0).int(u64::from(irq::PIRQ_GSI) + u64::from(pirq));
    });
    bridge.method("_PRT", 0, |m| {
        m.when(|p| p.path("PICF"), |m| m.ret().path("PRTA")).otherwise(|m| m.ret().path("PRTP"));
    });
}

/// What the bridge passes on: buses, I/O ports around its own, memory around ECAM and the APICs.
fn bridge_windows(bridge: &mut Aml, mmio64: Span) {
    let first32 = |span: Span| span.start.0 as u32;
    let last32 = |span: Span| (span.end() - 1) as u32;
    bridge.name("_CRS").resources(|r| {
        r.window16(Space::Bus, 0, ECAM_BUSES - 1);
        r.io(port::PCI_CONFIG, 8);
        r.window16(Space::Io, 0, port::PCI_CONFIG - 1);
        r.window16(Space::Io, port::PCI_CONFIG + 8, 0xFFFF);
        r.window32(Space::CacheableMemory, first32(VGA_HOLE), last32(VGA_HOLE));
        r.window32(Space::Memory, first32(PCI_MMIO32), last32(PCI_MMIO32));
        r.window32(Space::Memory, first32(PCI_MMIO32_UPPER), last32(PCI_MMIO32_UPPER));
        r.window64(Space::CacheableMemory, mmio64.start.0, mmio64.end() - 1)
    });
}

/// `_OSC`: hands PCI Express features to the guest.
fn bridge_control(bridge: &mut Aml) {
    const UNKNOWN_UUID: u64 = 4;
    const UNKNOWN_REVISION: u64 = 8;
    const MASKED: u64 = 0x10;
    bridge.serialized_method("_OSC", 4, |m| {
        m.create_dword_field().arg(3).int(0).path("CDW1");
        m.when(
            |p| p.equal().arg(0).buffer(&PCI_OSC_UUID),
            |m| {
                m.create_dword_field().arg(3).int(4).path("CDW2");
                m.create_dword_field().arg(3).int(8).path("CDW3");
                m.and().path("CDW3").int(OSC_GRANTED).local(0);
                m.when(
                    |p| p.not().equal().path("CDW3").local(0),
                    |m| m.or().path("CDW1").int(MASKED).path("CDW1"),
                );
                m.when(
                    |p| p.not().equal().arg(1).int(1),
                    |m| m.or().path("CDW1").int(UNKNOWN_REVISION).path("CDW1"),
                );
                m.store().local(0).path("CDW3")
            },
        );
        m.otherwise(|m| m.or().path("CDW1").int(UNKNOWN_UUID).path("CDW1"));
        m.ret().arg(3);
    });
}

/// A `_PRT` package: four pins of every device; `source` writes where the PIRQ goes.
fn routing_table(bridge: &mut Aml, name: &str, source: impl Fn(u8, &mut Aml)) {
    const DEVICES: u8 = 32;
    const PINS: u8 = 4;
    // Device 0 is the host bridge itself: no pins.
    bridge.name(name).package((DEVICES - 1) * PINS, |table| {
        for device in 1..DEVICES {
            for pin in 0..PINS {
                table.package(4, |entry| {
                    entry.int(u64::from(device) << 16 | 0xFFFF).int(pin.into());
                    source(pirq_of(device, pin + 1), entry);
                });
            }
        }
    });
}

/// The ISA bridge: routing registers, and the devices behind it.
fn isa_bridge(bridge: &mut Aml, config: &AcpiConfig<'_>) {
    let gap = u32::from(PIRQ_ROUTES[4] - PIRQ_ROUTES[3] - 1) * 8;
    let mut units: Vec<FieldUnit> = Vec::with_capacity(9);
    units.extend(ROUTE_NAMES[..4].iter().map(|name| FieldUnit::Named(name, 8)));
    units.push(FieldUnit::Skip(gap));
    units.extend(ROUTE_NAMES[4..].iter().map(|name| FieldUnit::Named(name, 8)));
    bridge.device("ISA", |isa| {
        isa.name("_ADR").int(u64::from(slot::LPC_DEVICE) << 16);
        let size = u64::from(PIRQ_ROUTES[PIRQS - 1] - PIRQ_ROUTES[0]) + 1;
        isa.pci_config_region("PIRQ", PIRQ_ROUTES[0].into(), size);
        isa.byte_fields("PIRQ", &units);
        isa.device("RTC", |rtc| {
            rtc.name("_HID").eisa_id(b"PNP0B00");
            rtc.name("_CRS").resources(|r| r.io(port::RTC, 2).isa_irq(irq::RTC));
        });
        if config.i8042_keyboard {
            isa.device("KBD", |keyboard| {
                keyboard.name("_HID").eisa_id(b"PNP0303");
                keyboard.name("_CRS").resources(|r| {
                    r.io(port::I8042_DATA, 1).io(port::I8042_COMMAND, 1).isa_irq(irq::KEYBOARD)
                });
            });
        }
        for index in config.uarts.iter().map(|uart| usize::from(*uart)).filter(|uart| *uart < 4) {
            isa.device(&format!("COM{}", index + 1), |com| {
                com.name("_HID").eisa_id(b"PNP0501");
                com.name("_UID").int(index as u64 + 1);
                com.name("_CRS").resources(|r| r.io(port::COM[index], 8).isa_irq(irq::COM[index]));
            });
        }
    });
}

/// One PIRQ as a device whose interrupt the guest chooses (6.2.13, `PNP0C0F`).
fn link_device(sb: &mut Aml, name: &str, index: usize) {
    let route = format!("\\_SB.PCI0.ISA.{}", ROUTE_NAMES[index]);
    sb.device(name, |link| {
        link.name("_HID").eisa_id(b"PNP0C0F");
        link.name("_UID").int(index as u64);
        link.name("_PRS").resources(|r| r.level_interrupt(&irq::PIRQ_ISA_CHOICES));
        link.method("_STA", 0, |m| {
            m.when(|p| p.and().path(&route).int(PIRQ_OFF.into()).null(), |m| m.ret().int(0x09));
            m.ret().int(0x0B);
        });
        link.method("_DIS", 0, |m| {
            m.or().path(&route).int(PIRQ_OFF.into()).path(&route);
        });
        link.method("_CRS", 0, |m| {
            m.ret().path("LCRS").path(&route);
        });
        link.serialized_method("_SRS", 1, |m| {
            // The number stands behind tag, length, flags and count.
            m.create_dword_field().arg(0).int(5).path("PRRI");
            m.store().path("PRRI").path(&route);
        });
    });
}

/// `LCRS`: a routing register's value as a resource template.
fn link_resources(sb: &mut Aml) {
    sb.serialized_method("LCRS", 1, |m| {
        m.name("PRR0").resources(|r| r.level_interrupt(&[0]));
        m.create_dword_field().path("PRR0").int(5).path("PRRI");
        m.when(|p| p.less().arg(0).int(PIRQ_OFF.into()), |m| m.store().arg(0).path("PRRI"));
        m.ret().path("PRR0");
    });
}

/// What the board itself occupies, so that nothing else is put there; and the HPET.
fn board_resources(sb: &mut Aml) {
    sb.device("MBRD", |board| {
        board.name("_HID").eisa_id(b"PNP0C02");
        board.name("_UID").int(0);
        board.name("_CRS").resources(|r| {
            r.memory32(ECAM.start.0 as u32, ECAM.size as u32);
            r.io(port::ELCR, 2);
            r.io(port::PM_BASE, port::PM_SIZE as u8)
        });
    });
    sb.device("HPET", |hpet| {
        hpet.name("_HID").eisa_id(b"PNP0103");
        hpet.name("_UID").int(0);
        hpet.name("_CRS").resources(|r| r.memory32(HPET.start.0 as u32, HPET.size as u32));
    });
}

/// A device for every processor of the MADT, by the same UID.
fn processors(sb: &mut Aml, config: &AcpiConfig<'_>) {
    for (uid, cpu) in config.cpus.iter().enumerate() {
        sb.device(&format!("C{uid:03X}"), |device| {
            device.name("_HID").string("ACPI0007");
            device.name("_UID").int(uid as u64);
            if !cpu.present {
                device.name("_STA").int(0);
            }
        });
    }
}
