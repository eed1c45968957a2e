//! Limits and duplicates of a spec.
//!
//! Called by `vmm` before a machine is built, and when a spec comes from a save file or a peer: it
//! is hostile input there. An error names the field as a user wrote it, and what would be right.

use crate::layout::{LayoutError, slot};
use crate::spec::{
    BootSpec, ClockSpec, CpuSpec, DeviceSpec, HostKey, MachineSpec, PciSlot, RamBacking, RamSpec,
};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// The most of everything.
pub mod limit {
    /// Processors.
    pub const CPUS: u32 = 1024;
    /// Bytes of a machine's name.
    pub const NAME: usize = 64;
    /// Bytes of a device's id.
    pub const ID: usize = 32;
    /// Bytes of a host key.
    pub const KEY: usize = 4096;
    /// Bytes of a CPU model's or feature's name.
    pub const CPU_NAME: usize = 64;
    /// Changes to a CPU model.
    pub const CPU_FEATURES: usize = 256;
    /// Bytes of the command line; the kernel may take less.
    pub const COMMAND_LINE: usize = 65_535;
    /// Devices.
    pub const DEVICES: usize = 256;
    /// Bytes of a disk's serial number (VIRTIO 1.2, 5.2.6).
    pub const SERIAL: usize = 20;
    /// Slowest and fastest time stamp counter.
    pub const TSC_KHZ: (u32, u32) = (1_000, 10_000_000);
    /// A guest runs at most so much slower than its host.
    pub const CLOCK_SLOWDOWN: u32 = 1000;
    /// Least and most physical address bits.
    pub const ADDRESS_BITS: (u8, u8) = (36, 52);
}

/// A field that cannot be as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct SpecError {
    /// Path of the field, such as `devices[2].mac`.
    pub field: String,
    /// What is wrong.
    #[source]
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Nothing there.
    #[error("must not be empty")]
    Empty,
    /// Too many bytes or elements.
    #[error("{len} long, at most {max} are possible")]
    TooLong {
        /// As given.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// Other characters than possible.
    #[error("`{value}` may have only {allowed}")]
    Characters {
        /// As given.
        value: String,
        /// What is possible.
        allowed: &'static str,
    },
    /// Outside its limits.
    #[error("{value} is not between {min} and {max}")]
    Range {
        /// As given.
        value: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// Not a multiple of the page size.
    #[error("{value} is not a multiple of {unit}")]
    NotMultiple {
        /// As given.
        value: u64,
        /// Of what it must be one.
        unit: u64,
    },
    /// The same as another.
    #[error("`{value}` is already used by {other}")]
    Duplicate {
        /// As given.
        value: String,
        /// Path of the other.
        other: String,
    },
    /// A multicast or zero address.
    #[error("{mac} does not name one station; use one such as 52:54:00:12:34:56")]
    NotAStation {
        /// As given.
        mac: String,
    },
    /// No device may be there.
    #[error("slot {bus:02x}:{device:02x}.{function} is not free for devices")]
    Slot {
        /// Bus.
        bus: u8,
        /// Device.
        device: u8,
        /// Function.
        function: u8,
    },
    /// Memory that cannot be laid out.
    #[error(transparent)]
    Layout(LayoutError),
}

type Checked = Result<(), SpecError>;

fn refuse(field: impl Into<String>, problem: Problem) -> Checked {
    Err(SpecError { field: field.into(), problem })
}

impl MachineSpec {
    /// Whether the machine can be built; the first field that cannot be.
    pub fn validate(&self) -> Checked {
        check_name("name", &self.name, limit::NAME)?;
        check_cpus(&self.cpus)?;
        if let Err(error) = self.layout() {
            return refuse("ram", Problem::Layout(error));
        }
        check_ram(&self.ram)?;
        check_boot(&self.boot)?;
        check_clock(&self.clock)?;
        check_devices(&self.devices)
    }
}

fn check_cpus(cpus: &CpuSpec) -> Checked {
    check_range("cpus.max", cpus.max, 1, limit::CPUS)?;
    check_range("cpus.count", cpus.count, 1, cpus.max)?;
    check_range("cpus.address_bits", cpus.address_bits, limit::ADDRESS_BITS.0, limit::ADDRESS_BITS.1)?;
    check_model("cpus.model", &cpus.model)?;
    check_length("cpus.features", cpus.features.len(), limit::CPU_FEATURES)?;
    for (index, feature) in cpus.features.iter().enumerate() {
        let field = format!("cpus.features[{index}]");
        check_name(&field, &feature.name, limit::CPU_NAME)?;
        if let Some(other) = cpus.features[..index].iter().position(|other| other.name == feature.name) {
            let other = format!("cpus.features[{other}]");
            return refuse(field, Problem::Duplicate { value: feature.name.clone(), other });
        }
    }
    Ok(())
}

/// A model's name, or `name@version`. Whether there is such a model is the engine's to know.
fn check_model(field: &str, model: &str) -> Checked {
    check_length(field, model.len(), limit::CPU_NAME)?;
    let (name, version) =
        model.split_once('@').map_or((model, None), |(name, version)| (name, Some(version)));
    check_name(field, name, limit::CPU_NAME)?;
    version.map_or(Ok(()), |version| check_name(field, version, limit::CPU_NAME))
}

fn check_ram(ram: &RamSpec) -> Checked {
    const PAGE_2M: u64 = 2 << 20;
    const PAGE_1G: u64 = 1 << 30;
    let RamBacking::Huge { page_bytes } = ram.backing else { return Ok(()) };
    if page_bytes != PAGE_2M && page_bytes != PAGE_1G {
        let (min, max) = (PAGE_2M, PAGE_1G);
        return refuse("ram.backing.page_bytes", Problem::Range { value: page_bytes, min, max });
    }
    if !ram.bytes.is_multiple_of(page_bytes) {
        return refuse("ram.bytes", Problem::NotMultiple { value: ram.bytes, unit: page_bytes });
    }
    Ok(())
}

fn check_boot(boot: &BootSpec) -> Checked {
    check_key("boot.kernel", &boot.kernel)?;
    if let Some(initrd) = &boot.initrd {
        check_key("boot.initrd", initrd)?;
    }
    check_length("boot.command_line", boot.command_line.len(), limit::COMMAND_LINE)?;
    if boot.command_line.contains('\0') {
        let value = boot.command_line.escape_default().to_string();
        return refuse(
            "boot.command_line",
            Problem::Characters { value, allowed: "characters other than zero" },
        );
    }
    Ok(())
}

fn check_clock(clock: &ClockSpec) -> Checked {
    check_range("clock.tsc_khz", clock.tsc_khz, limit::TSC_KHZ.0, limit::TSC_KHZ.1)?;
    let rate = clock.rate;
    check_range("clock.rate.numerator", rate.numerator, 1, u32::MAX)?;
    // Never faster than the host, which could not deliver it.
    let most = rate.numerator.saturating_mul(limit::CLOCK_SLOWDOWN);
    check_range("clock.rate.denominator", rate.denominator, rate.numerator, most)
}

fn check_devices(devices: &[DeviceSpec]) -> Checked {
    check_length("devices", devices.len(), limit::DEVICES)?;
    let mut ids = Taken::default();
    let mut ports = Taken::default();
    let mut slots = Taken::default();
    let mut macs = Taken::default();
    for (index, device) in devices.iter().enumerate() {
        let field = |name: &str| format!("devices[{index}].{name}");
        if let Some(id) = device.id() {
            check_name(&field("id"), id, limit::ID)?;
            ids.take(field("id"), id)?;
        }
        if let Some(Some(slot)) = device.slot() {
            check_slot(field("slot"), slot)?;
            slots.take(field("slot"), &format!("{:02x}:{:02x}.{}", slot.bus, slot.device, slot.function))?;
        }
        match device {
            DeviceSpec::Uart(spec) => {
                check_range(&field("port"), spec.port, 0, 3)?;
                ports.take(field("port"), &format!("COM{}", spec.port + 1))?;
                check_optional_key(&field("stream"), spec.stream.as_ref())?;
            }
            DeviceSpec::Blk(spec) => {
                check_key(&field("disk"), &spec.disk)?;
                check_serial(field("serial"), &spec.serial)?;
            }
            DeviceSpec::Net(spec) => {
                check_key(&field("backend"), &spec.backend)?;
                if !spec.mac.is_station() {
                    return refuse(field("mac"), Problem::NotAStation { mac: spec.mac.to_string() });
                }
                macs.take(field("mac"), &spec.mac.to_string())?;
            }
            DeviceSpec::Console(spec) => check_optional_key(&field("stream"), spec.stream.as_ref())?,
            DeviceSpec::Rng(_) => {}
        }
    }
    Ok(())
}

/// Values that may occur once.
#[derive(Default)]
struct Taken(Vec<(String, String)>);

impl Taken {
    fn take(&mut self, field: String, value: &str) -> Checked {
        if let Some((_, other)) = self.0.iter().find(|(taken, _)| taken == value) {
            return refuse(field, Problem::Duplicate { value: value.into(), other: other.clone() });
        }
        self.0.push((value.into(), field));
        Ok(())
    }
}

/// A name: letters, digits and a few marks, so that it can be a file's name and a command's argument.
fn check_name(field: &str, value: &str, max: usize) -> Checked {
    if value.is_empty() {
        return refuse(field, Problem::Empty);
    }
    check_length(field, value.len(), max)?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !value.chars().all(good) || value.starts_with(['-', '.']) {
        let allowed = "letters, digits, `_`, `-` and `.`, and begins with none of the last two";
        return refuse(field, Problem::Characters { value: value.escape_default().to_string(), allowed });
    }
    Ok(())
}

fn check_serial(field: String, serial: &str) -> Checked {
    check_length(&field, serial.len(), limit::SERIAL)?;
    if !serial.bytes().all(|b| (0x20..0x7F).contains(&b)) {
        let value = serial.escape_default().to_string();
        return refuse(field, Problem::Characters { value, allowed: "printable ASCII" });
    }
    Ok(())
}

fn check_key(field: &str, key: &HostKey) -> Checked {
    if key.0.is_empty() {
        return refuse(field, Problem::Empty);
    }
    check_length(field, key.0.len(), limit::KEY)
}

fn check_optional_key(field: &str, key: Option<&HostKey>) -> Checked {
    key.map_or(Ok(()), |key| check_key(field, key))
}

fn check_slot(field: String, at: PciSlot) -> Checked {
    let free = at.bus != 0 || (slot::FIRST_FREE..slot::LPC_DEVICE).contains(&at.device);
    if !free || at.device > 31 || at.function > 7 {
        let PciSlot { bus, device, function } = at;
        return refuse(field, Problem::Slot { bus, device, function });
    }
    Ok(())
}

fn check_length(field: &str, len: usize, max: usize) -> Checked {
    if len > max { refuse(field, Problem::TooLong { len, max }) } else { Ok(()) }
}

fn check_range<T: Into<u64> + Copy>(field: &str, value: T, min: T, max: T) -> Checked {
    let (value, min, max) = (value.into(), min.into(), max.into());
    if (min..=max).contains(&value) { Ok(()) } else { refuse(field, Problem::Range { value, min, max }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saved::tests::full_spec;

    /// The message after one change to a good spec.
    fn message(change: impl FnOnce(&mut MachineSpec)) -> String {
        let mut spec = full_spec();
        change(&mut spec);
        spec.validate().err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_full_spec_is_good() {
        assert_eq!(full_spec().validate(), Ok(()));
        for model in ["x86-64-v3@1", "max"] {
            assert_eq!(message(|s| s.cpus.model = model.into()), "");
        }
    }

    #[test]
    fn errors_name_the_field() {
        type Change = fn(&mut MachineSpec);
        let cases: [(&str, Change); 18] = [
            ("name: must not be empty", |s| s.name.clear()),
            ("name: `../x` may have only", |s| s.name = "../x".into()),
            ("cpus.count: 3 is not between 1 and 2", |s| (s.cpus.count, s.cpus.max) = (3, 2)),
            ("cpus.max: 9999 is not", |s| s.cpus.max = 9999),
            ("cpus.model: must not be empty", |s| s.cpus.model = "x86-64-v3@".into()),
            ("cpus.model: `1@2` may have only", |s| s.cpus.model = "x86-64-v3@1@2".into()),
            ("cpus.features[1]: `sha` is already used by cpus.features[0]", |s| {
                s.cpus.features.push(s.cpus.features[0].clone());
            }),
            ("ram: memory of 3 bytes", |s| s.ram.bytes = 3),
            ("ram.backing.page_bytes: 5", |s| s.ram.backing = RamBacking::Huge { page_bytes: 5 }),
            ("ram.bytes: 1075838976 is not a multiple", |s| {
                (s.ram.bytes, s.ram.backing) =
                    ((1 << 30) + (2 << 20), RamBacking::Huge { page_bytes: 1 << 30 });
            }),
            ("boot.kernel: must not be empty", |s| s.boot.kernel.0.clear()),
            ("clock.tsc_khz: 0 is not", |s| s.clock.tsc_khz = 0),
            ("clock.rate.denominator: 2 is not between 3", |s| s.clock.rate.numerator = 3),
            ("devices[2].id: `disk0` is already used by devices[1].id", |s| {
                set_id(&mut s.devices[2], "disk0")
            }),
            ("devices[1].slot: slot 00:1f.0 is not free", |s| {
                s.devices[1].set_slot(PciSlot { bus: 0, device: 31, function: 0 });
            }),
            ("devices[3].slot: `00:03.0` is already used by devices[1].slot", |s| {
                s.devices[1].set_slot(PciSlot { bus: 0, device: 3, function: 0 });
                s.devices[3].set_slot(PciSlot { bus: 0, device: 3, function: 0 });
            }),
            ("devices[2].mac: 01:00:00:00:00:00 does not name", |s| {
                let DeviceSpec::Net(net) = &mut s.devices[2] else { return };
                net.mac.0 = [1, 0, 0, 0, 0, 0];
            }),
            ("devices[5].port: `COM1` is already used by devices[0].port", |s| {
                s.devices.push(s.devices[0].clone());
            }),
        ];
        for (expected, change) in cases {
            let message = message(change);
            assert!(message.starts_with(expected), "{message} is not {expected}");
        }
    }

    fn set_id(device: &mut DeviceSpec, id: &str) {
        match device {
            DeviceSpec::Uart(_) => {}
            DeviceSpec::Blk(spec) => spec.id = id.into(),
            DeviceSpec::Net(spec) => spec.id = id.into(),
            DeviceSpec::Console(spec) => spec.id = id.into(),
            DeviceSpec::Rng(spec) => spec.id = id.into(),
        }
    }
}
