//! A machine without a host, and without a CPU if a test needs none: for tests and fuzzing of the board.
//!
//! [`engine::ScriptEngine`] is a hypervisor whose vCPUs play a list of accesses; [`host::TestHost`] is a ground on which
//! time moves only when told, with the devices' other ends in [`ends`]; [`kernel`] makes kernels of a few bytes.

pub mod ends;
pub mod engine;
pub mod host;
pub mod kernel;

use crate::{Machine, Parts, RequestQueue};
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use engine::ScriptEngine;
use host::TestHost;
use hypervisor::Hypervisor;
use machine_spec::{
    BlkSpec, BootSpec, ClockSpec, ConsoleSpec, CpuSpec, DeviceSpec, HostKey, Mac, MachineSpec, NetSpec,
    RamBacking, RamSpec, RngSpec, UartSpec, Uuid,
};

/// RAM of the machine that [`spec`] describes.
pub const RAM_BYTES: u64 = 16 << 20;

/// A small machine with one device of each kind.
pub fn spec() -> MachineSpec {
    let key = |text: &str| HostKey(text.to_string());
    let id = ToString::to_string;
    MachineSpec {
        name: id("test"),
        uuid: Uuid([7; 16]),
        cpus: CpuSpec { count: 2, max: 2, ..CpuSpec::default() },
        ram: RamSpec { bytes: RAM_BYTES, hotplug_bytes: 0, backing: RamBacking::Anonymous },
        boot: BootSpec { kernel: key("kernel"), initrd: None, command_line: id("console=ttyS0") },
        clock: ClockSpec::default(),
        devices: vec![
            DeviceSpec::Uart(UartSpec { port: 0, stream: Some(key("serial0")) }),
            DeviceSpec::Uart(UartSpec { port: 1, stream: None }),
            DeviceSpec::Blk(BlkSpec {
                id: id("disk0"),
                disk: key("disk0"),
                read_only: false,
                serial: id("serial"),
                discard: true,
                slot: None,
            }),
            DeviceSpec::Net(NetSpec {
                id: id("net0"),
                mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
                backend: key("net0"),
                slot: None,
            }),
            DeviceSpec::Console(ConsoleSpec { id: id("console0"), stream: None, slot: None }),
            DeviceSpec::Rng(RngSpec { id: id("rng0"), slot: None }),
        ],
    }
}

/// A machine with everything around it.
pub struct TestMachine<E = ScriptEngine> {
    /// The machine.
    pub machine: Machine,
    /// Its engine.
    pub engine: E,
    /// Its ground.
    pub host: TestHost,
    /// What was asked.
    pub requests: Arc<RequestQueue>,
}

impl TestMachine {
    /// Builds [`spec`] as changed by `change`, without booting it.
    pub fn build(change: impl FnOnce(&mut MachineSpec)) -> Result<Self, crate::BuildError> {
        Self::build_on(ScriptEngine::default(), TestHost::default(), change)
    }

    /// Builds [`spec`] and boots a kernel that does nothing; time runs.
    pub fn started() -> Self {
        Self::started_on(ScriptEngine::default())
    }
}

impl<E: Hypervisor> TestMachine<E> {
    /// As [`TestMachine::build`], with an engine and a ground of the test's choice.
    pub fn build_on(
        engine: E,
        host: TestHost,
        change: impl FnOnce(&mut MachineSpec),
    ) -> Result<Self, crate::BuildError> {
        let mut spec = spec();
        change(&mut spec);
        let requests = Arc::new(RequestQueue::new(|| {}));
        let parts = Parts { engine: &engine, host: &host, requests: requests.clone() };
        let machine = Machine::build(spec, &parts)?;
        host.set_ram(machine.ram().clone());
        Ok(Self { machine, engine, host, requests })
    }

    /// As [`TestMachine::started`], with an engine of the test's choice.
    pub fn started_on(engine: E) -> Self {
        let test =
            Self::build_on(engine, TestHost::default(), |_| {}).expect("the test machine's spec is sound");
        test.machine.boot(&test.host).expect("the test machine's kernel can be booted");
        test.host.start();
        test
    }

    /// The whole machine, saved.
    pub fn saved(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut w = crate::saved_vm::Writer::begin(&mut out).expect("memory takes everything");
        let ram = crate::saved_vm::RamSaver { compress: false };
        self.machine.save(&mut w, ram, &self.host, |_| {}).expect("every device can be saved");
        w.finish().expect("memory takes everything");
        out
    }

    /// Reads `width` bytes of a port.
    pub fn port_in(&self, port: u16, width: usize) -> u64 {
        let mut data = [0; 8];
        self.machine.io().pio_read(port, &mut data[..width]);
        device::read_le(&data[..width])
    }

    /// Writes `width` bytes to a port.
    pub fn port_out(&self, port: u16, width: usize, value: u64) {
        self.machine.io().pio_write(port, &value.to_le_bytes()[..width]);
    }

    /// Reads `width` bytes of memory-mapped I/O.
    pub fn read(&self, at: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.machine.io().mmio_read(guest_memory::Gpa(at), &mut data[..width]);
        device::read_le(&data[..width])
    }

    /// Writes `width` bytes of memory-mapped I/O.
    pub fn write(&self, at: u64, width: usize, value: u64) {
        self.machine.io().mmio_write(guest_memory::Gpa(at), &value.to_le_bytes()[..width]);
    }
}
