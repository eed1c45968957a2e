//! From the VM as people write it to the machine that is built: wire types end here.
//!
//! Called by: `launch`. Files, sockets and interfaces become [`HostKey`]s, which only [`crate::host`] can open.

use crate::wire::{SpecError, VmSpec, parse_rate};
use hypervisor::CpuModel;
use machine_spec::{
    BlkSpec, BootSpec, ClockRate, ClockSpec, ConsoleSpec, CpuFeature, CpuSpec, DeviceSpec, HostKey, Mac,
    MachineSpec, NetSpec, RamBacking, RamSpec, RngSpec, UartSpec, Uuid,
};

/// Key of the kernel.
pub const KERNEL: &str = "kernel";
/// Key of the initial RAM disk.
pub const INITRD: &str = "initrd";

/// Key of the `index`-th resource of a kind.
pub fn key(kind: &str, index: usize) -> HostKey {
    HostKey(format!("{kind}{index}"))
}

/// The index in a key of this kind.
pub fn index_of(kind: &str, key: &HostKey) -> Option<usize> {
    key.0.strip_prefix(kind)?.parse().ok()
}

/// What a VM without a name is called in the machine.
pub const UNNAMED: &str = "vm";

const NO_KERNEL: &str = "name the kernel to boot with --kernel, or under [boot] in the spec file";

impl TryFrom<&VmSpec> for MachineSpec {
    type Error = SpecError;

    fn try_from(vm: &VmSpec) -> Result<Self, SpecError> {
        let boot = vm.boot.as_ref().ok_or_else(|| SpecError::field("boot.kernel", "", NO_KERNEL))?;
        let name = vm.name.clone().unwrap_or_else(|| UNNAMED.into());
        let (numerator, denominator) = vm.clock_rate.as_deref().map_or(Ok((1, 1)), parse_rate)?;
        Ok(Self {
            uuid: uuid_of(&name),
            cpus: cpus(vm)?,
            ram: RamSpec { bytes: vm.memory.0, hotplug_bytes: 0, backing: RamBacking::Memfd },
            boot: BootSpec {
                kernel: HostKey(KERNEL.into()),
                initrd: boot.initrd.as_ref().map(|_| HostKey(INITRD.into())),
                command_line: boot.append.clone(),
            },
            clock: ClockSpec { rate: ClockRate { numerator, denominator }, ..ClockSpec::default() },
            devices: devices(vm, &name)?,
            name,
        })
    }
}

/// The machine of a resolved spec, if it could be built.
pub fn machine(vm: &VmSpec) -> Result<MachineSpec, SpecError> {
    let machine = MachineSpec::try_from(vm)?;
    machine.validate()?;
    Ok(machine)
}

/// The processors; the text of their model was understood.
pub(crate) fn cpus(vm: &VmSpec) -> Result<CpuSpec, SpecError> {
    let text = vm.cpu_model();
    CpuModel::parse(text).map_err(|error| SpecError::field("cpu_model", text, error.to_string()))?;
    let mut parts = text.split(',').map(str::trim);
    let model = parts.next().unwrap_or_default().into();
    let feature = |text: &str| match text.strip_prefix('-') {
        Some(name) => CpuFeature { name: name.into(), enabled: false },
        None => CpuFeature { name: text.strip_prefix('+').unwrap_or(text).into(), enabled: true },
    };
    Ok(CpuSpec {
        count: vm.cpus,
        max: vm.cpus,
        model,
        features: parts.map(feature).collect(),
        address_bits: vm.address_bits.unwrap_or(CpuSpec::default().address_bits),
    })
}

fn devices(vm: &VmSpec, name: &str) -> Result<Vec<DeviceSpec>, SpecError> {
    let mut devices = Vec::new();
    for (index, end) in vm.serial.iter().enumerate() {
        let stream = (end != "none").then(|| key("serial", index));
        devices.push(DeviceSpec::Uart(UartSpec { port: index as u8, stream }));
    }
    for (index, disk) in vm.disks.iter().enumerate() {
        devices.push(DeviceSpec::Blk(BlkSpec {
            id: format!("disk{index}"),
            disk: key("disk", index),
            read_only: disk.read_only,
            serial: format!("bedplate-disk{index}"),
            discard: !disk.ignore_discard && !disk.read_only,
            slot: None,
        }));
    }
    for (index, net) in vm.nets.iter().enumerate() {
        devices.push(DeviceSpec::Net(NetSpec {
            id: format!("net{index}"),
            mac: Mac(net.mac_address(name, index)?),
            backend: key("net", index),
            slot: None,
        }));
    }
    for (index, end) in vm.consoles.iter().enumerate() {
        let stream = (end != "none").then(|| key("console", index));
        devices.push(DeviceSpec::Console(ConsoleSpec { id: format!("console{index}"), stream, slot: None }));
    }
    if vm.rng {
        devices.push(DeviceSpec::Rng(RngSpec { id: "rng0".into(), slot: None }));
    }
    Ok(devices)
}

/// A UUID that stays the same for a name (RFC 9562, version 8).
fn uuid_of(name: &str) -> Uuid {
    let hash = name.bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    let mut uuid = hash.to_be_bytes();
    uuid[6] = uuid[6] & 0x0F | 0x80;
    uuid[8] = uuid[8] & 0x3F | 0x80;
    Uuid(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{BootSpec as WireBoot, ByteSize, DiskSpec, NetSpec as WireNet};

    #[test]
    fn a_vm_becomes_a_machine_that_can_be_built() {
        let vm = VmSpec {
            cpus: 2,
            cpu_model: Some("x86-64-v2,+sha,-aes".into()),
            memory: ByteSize(256 << 20),
            clock_rate: Some("1/8".into()),
            boot: Some(WireBoot { kernel: "/k".into(), initrd: Some("/i".into()), append: "quiet".into() }),
            disks: vec![DiskSpec::from_option("a.img,ro").unwrap(), DiskSpec::from_option("b.img").unwrap()],
            nets: vec![WireNet::from_option("user").unwrap()],
            consoles: vec!["none".into()],
            ..VmSpec::default()
        };
        let machine = MachineSpec::try_from(&vm).unwrap();
        machine.validate().unwrap();
        assert_eq!(machine.devices.len(), 6);
        assert_eq!(machine.cpus.features.len(), 2);
        assert!(!machine.cpus.features[1].enabled);
        assert_eq!(machine.clock.rate, ClockRate { numerator: 1, denominator: 8 });
        assert_eq!(index_of("disk", &key("disk", 7)), Some(7));
        assert_eq!(index_of("disk", &key("net", 7)), None);
    }

    #[test]
    fn a_vm_without_kernel_says_what_to_do() {
        let error = MachineSpec::try_from(&VmSpec::default()).unwrap_err().to_string();
        assert!(error.contains("--kernel"), "{error}");
    }
}
