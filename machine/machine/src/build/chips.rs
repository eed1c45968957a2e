//! The board's fixed chips: timers, clock, power, reset.
//!
//! Called by: [`super::q35`], once for each machine.

use super::q35::{Board, GuestRequests, memory};
use super::site::{Range, Site};
use super::{BuildError, Parts};
use alloc::sync::Arc;
use chipset::pm::TimerWidth;
use chipset::rtc_cmos::memory_size_bytes;
use chipset::{
    DebugPort, Hpet, HpetWiring, I8042, LegacyReplacement, MissedTicks, Pit8254, PitWiring, PlatformRequests,
    PmConfig, PmWiring, Port92, PowerManagement, ResetControl, RtcCmos, RtcWiring,
};
use machine_spec::layout::{HIGH_RAM_START, HPET, RamLayout, irq, port, power as acpi_power};
use sync::Mutex;

/// Fast A20 and reset of the PS/2.
const PORT_92: u16 = 0x92;
/// Where firmware says how far it came.
const DEBUG_PORT: u16 = 0x80;

/// PIRQs whose pins the HPET's timers may be routed to.
const HPET_PIRQS: core::ops::Range<u8> = 4..8;

/// Chips that the machine itself talks to.
pub struct Chips {
    /// Hears of acknowledged timer interrupts.
    pub pit: Arc<Mutex<Pit8254>>,
    /// Has the power button.
    pub power: Arc<Mutex<PowerManagement>>,
    /// Stands among PCI's configuration ports.
    pub reset: Arc<Mutex<ResetControl>>,
}

/// Builds all of them.
pub fn build(
    board: &mut Board,
    layout: &RamLayout,
    missed: MissedTicks,
    parts: &Parts<'_>,
) -> Result<Chips, BuildError> {
    let requests: Arc<dyn PlatformRequests> = Arc::new(GuestRequests(parts.requests.clone()));
    let replaced = LegacyReplacement::new();

    let mut site = Site::new(board, parts.host);
    let wiring = PitWiring {
        irq: site.isa_irq(irq::TIMER),
        clock: site.clock(),
        timer: site.timer(),
        replaced: replaced.clone(),
    };
    let pit = Pit8254::new("pit", missed, wiring);
    let pit = site.place(pit, &[Range::Ports(port::PIT, 4), Range::Ports(port::PORT_B, 1)])?;
    site.commit();

    let mut site = Site::new(board, parts.host);
    let wiring = RtcWiring {
        irq: site.isa_irq(irq::RTC),
        clock: site.clock(),
        timer: site.timer(),
        replaced: replaced.clone(),
    };
    let high = layout.ram_bytes().saturating_sub(layout.low_end());
    let preset = memory_size_bytes(layout.low_end().min(HIGH_RAM_START), high);
    site.place(RtcCmos::new("rtc", missed, wiring, &preset), &[Range::Ports(port::RTC, 2)])?;
    site.commit();

    let mut site = Site::new(board, parts.host);
    let wiring = HpetWiring {
        lines: HPET_PIRQS.map(|pirq| (irq::PIRQ_GSI as u8 + pirq, site.pirq(pirq))).collect(),
        legacy: [site.isa_irq(irq::TIMER), site.isa_irq(irq::RTC)],
        messages: Some(site.messages()),
        clock: site.clock(),
        timer: site.timer(),
        replaced,
    };
    site.place(Hpet::new("hpet", wiring), &[memory(HPET)])?;
    site.commit();

    let mut site = Site::new(board, parts.host);
    let (sci, clock, timer) = (site.isa_irq(irq::SCI), site.clock(), site.timer());
    let wiring = PmWiring { sci, clock, timer, requests: requests.clone() };
    let config = PmConfig { sleep_type_s5: acpi_power::SLEEP_TYPE_S5, timer_width: TimerWidth::Bits32 };
    let power = PowerManagement::new("pm", config, wiring);
    let power = site.place(power, &[Range::Ports(port::PM_BASE, port::PM_SIZE)])?;
    site.commit();

    let mut site = Site::new(board, parts.host);
    let i8042 = I8042::new("i8042", site.isa_irq(irq::KEYBOARD), requests.clone());
    site.place(i8042, &[Range::Ports(port::I8042_DATA, 1), Range::Ports(port::I8042_COMMAND, 1)])?;
    site.commit();

    let mut site = Site::new(board, parts.host);
    site.place(Port92::new("port92", requests.clone()), &[Range::Ports(PORT_92, 1)])?;
    site.commit();

    let mut site = Site::new(board, parts.host);
    site.place(DebugPort::new("debug-port"), &[Range::Ports(DEBUG_PORT, 1)])?;
    site.commit();

    // Reached through PCI's configuration ports, which it lies among.
    let mut site = Site::new(board, parts.host);
    let reset = site.place(ResetControl::new("reset-control", requests), &[])?;
    site.commit();
    Ok(Chips { pit, power, reset })
}
